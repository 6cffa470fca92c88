"""Keeping our rules as they were loaded, whoever changes or removes them: the same for every mode."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import LoadedRules

# A notice is the first of several; and whoever changes rules all the time is not answered all the time.
_SETTLE_S = 0.05
REPAIR_PAUSE_S = 0.3
_LOOK_EVERY_S = 30.0

log = logging.getLogger(__name__)


async def keep_rules(rules: LoadedRules, repair: Callable[[], Awaitable[None]]) -> None:
    """Call *repair* whenever somebody else may have changed *rules*. Runs until cancelled."""
    changed = asyncio.Event()
    await rules.watch(changed.set)
    try:
        while True:
            try:
                async with asyncio.timeout(_LOOK_EVERY_S):
                    await changed.wait()
                await asyncio.sleep(_SETTLE_S)
            except TimeoutError:
                pass
            changed.clear()
            try:
                await repair()
            except SyncError as error:
                log.error("rules were changed by somebody else and cannot be loaded again: %s", error)  # noqa: TRY400
                changed.set()
                await asyncio.sleep(1)
    finally:
        rules.unwatch()


async def repaired(rules: LoadedRules) -> bool:
    """Load *rules* again unless they are as they were loaded; return whether that was necessary.

    Raises:
        SyncError: they are not, and the kernel refused.
    """
    if await rules.is_intact():
        return False
    log.warning("our rules were removed or changed by somebody else; loading them again")
    await rules.reload()
    return True
