"""Keeping our rules as they were loaded, whoever changes or removes them: the same for every mode."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import LoadedRules

# A notice is the first of several; and whoever changes rules all the time is not answered all the time.
_SETTLE_S = 0.05
REPAIR_PAUSE_S = 0.3
# The longest pause after a repair that was refused, too; each is twice as long as the one before.
_LOOK_EVERY_S = 30.0
_RETRY_S = 1.0

log = logging.getLogger(__name__)


class Keeper:
    """Keeps *rules* as they were loaded.

    ``error``: why that cannot be done, "" where it can; ``failing_since``: since which wall-clock second.
    """

    def __init__(self, rules: LoadedRules, retry_s: float = _RETRY_S) -> None:
        """*retry_s*: the pause after the first repair that was refused."""
        self._rules = rules
        self._retry_s = retry_s
        self.error = ""
        self.failing_since: float | None = None
        self._is_loaded = asyncio.Event()

    def look_now(self) -> None:
        """Do not wait for the next try, if a repair was refused: rules have been loaded since."""
        self._is_loaded.set()

    async def keep(self, repair: Callable[[], Awaitable[None]]) -> None:
        """Call *repair* whenever somebody else may have changed the rules. Runs until cancelled."""
        changed = asyncio.Event()
        await self._rules.watch(changed.set)
        pause_s = self._retry_s
        try:
            while True:
                try:
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await changed.wait()
                    await asyncio.sleep(_SETTLE_S)
                except TimeoutError:
                    pass
                changed.clear()
                self._is_loaded.clear()
                try:
                    await repair()
                except Exception as error:  # noqa: BLE001 - whatever it is, what is in force stays, as in a sync
                    self._note_failure(error)
                    changed.set()
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause_s):
                            await self._is_loaded.wait()
                    pause_s = min(2 * pause_s, _LOOK_EVERY_S)
                else:
                    self._note_success()
                    pause_s = self._retry_s
        finally:
            self._rules.unwatch()

    async def repaired(self) -> bool:
        """Load the rules again unless they are as they were loaded; return whether that was necessary.

        Raises:
            SyncError: they are not, and the kernel refused.
        """
        if await self._rules.is_intact():
            return False
        if not self.error:
            log.warning("our rules were removed or changed by somebody else; loading them again")
        await self._rules.reload()
        return True

    def _note_failure(self, failure: Exception) -> None:
        error = str(failure) if isinstance(failure, SyncError) else repr(failure)
        if error != self.error:
            a_bug = None if isinstance(failure, SyncError) else failure
            log.error("our rules are not as they should be, and cannot be loaded again: %s", error, exc_info=a_bug)
        self.error = error
        self.failing_since = self.failing_since or time.time()

    def _note_success(self) -> None:
        if self.error:
            log.info("our rules are as they should be again")
        self.error, self.failing_since = "", None
