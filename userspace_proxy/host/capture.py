"""Chooses how packets to portals are captured on this host: by REDIRECT, or with private addresses on ``lo``."""

import logging

from userspace_proxy.errors import SyncError
from userspace_proxy.host import network
from userspace_proxy.model.redirects import Capture

log = logging.getLogger(__name__)


async def choose_capture(asked: str) -> Capture:
    """Return the capture method for *asked*: "auto", "redirect" or "address".

    The private addresses that the method needs are added to ``lo``.
    """
    if await network.lacks_addresses():
        # The kernel has no source for a local client's packets to a cluster IP, unless we give it one.
        await network.add_local_addresses()
    if asked == "redirect":
        return Capture.REDIRECT
    if asked == "auto" and not await has_unnumbered_interfaces():
        return Capture.REDIRECT
    await network.add_local_addresses()
    return Capture.ADDRESS


async def has_unnumbered_interfaces() -> bool:
    """Return whether an interface has no IPv4 address, so that REDIRECT cannot work there; log which one."""
    try:
        found = await network.find_unnumbered_interfaces()
    except SyncError as error:
        log.warning("interfaces cannot be looked at, traffic is captured by REDIRECT: %s", error)
        return False
    if found:
        log.info(
            "%s has no IPv4 address, so REDIRECT cannot work there; capturing with a private address on lo instead",
            ", ".join(found[:3]),
        )
    return bool(found)
