"""Switch to another kind of capture when an interface comes up at which REDIRECT cannot work."""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from userspace_proxy.errors import SyncError
from userspace_proxy.host import network
from userspace_proxy.host.capture import has_unnumbered_interfaces
from userspace_proxy.model.redirects import Capture
from userspace_proxy.netfilter.notices import NetworkNotices

_SETTLE_S = 0.2

log = logging.getLogger(__name__)


class Capturing(Protocol):
    """A proxier with a way of capture that can be changed."""

    @property
    def capture(self) -> Capture: ...

    async def set_capture(self, capture: Capture) -> None: ...


async def watch_interfaces(proxier: Capturing) -> None:
    """Switch *proxier* to a private address as soon as an interface without an IPv4 address comes up; then return."""
    changed = asyncio.Event()
    notices = NetworkNotices(changed.set)
    try:
        while proxier.capture is Capture.REDIRECT:
            await changed.wait()
            await asyncio.sleep(_SETTLE_S)
            changed.clear()
            if await has_unnumbered_interfaces():
                await network.add_local_addresses()
                try:
                    await proxier.set_capture(Capture.ADDRESS)
                except SyncError as error:
                    log.error("capture could not be changed: %s", error)  # noqa: TRY400
                    await asyncio.sleep(_SETTLE_S)
    finally:
        notices.close()
