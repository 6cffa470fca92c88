"""Load our rules again when another program has changed or removed them: the same for every mode."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import LoadedRules

# The notices of one transaction come in a burst: wait for its end. New connections fail until the rules are loaded.
# The pause after a repair limits what another program can cost.
_SETTLE_S = 0.02
REPAIR_PAUSE_S = 0.3
# The longest pause between checks. After a refused repair, each pause is twice the one before, up to this one.
_CHECK_EVERY_S = 30.0
_RETRY_S = 1.0

log = logging.getLogger(__name__)


class RuleRepairer:
    """Keeps *rules* as they were loaded.

    ``error``: why a repair failed, "" if it did not; ``failing_since``: the wall-clock second of the first failure.
    """

    def __init__(self, rules: LoadedRules, retry_s: float = _RETRY_S) -> None:
        """*retry_s*: the pause after the first refused repair."""
        self._rules = rules
        self._retry_s = retry_s
        self.error = ""
        self.failing_since: float | None = None
        self._is_loaded = asyncio.Event()

    def check_now(self) -> None:
        """End the pause after a refused repair, because rules have been loaded since."""
        self._is_loaded.set()

    async def run(self, repair: Callable[[], Awaitable[None]]) -> None:
        """Call *repair* whenever another program may have changed the rules. Runs until cancelled."""
        changed = asyncio.Event()
        await self._rules.watch(changed.set)
        pause_s = self._retry_s
        try:
            while True:
                if await _is_set_within(_CHECK_EVERY_S, changed):
                    await asyncio.sleep(_SETTLE_S)
                changed.clear()
                self._is_loaded.clear()
                try:
                    await repair()
                except Exception as error:  # noqa: BLE001 - as in a sync, the rules in force stay
                    self._note_failure(error)
                    changed.set()
                    await _is_set_within(pause_s, self._is_loaded)
                    pause_s = min(2 * pause_s, _CHECK_EVERY_S)
                else:
                    self._note_success()
                    pause_s = self._retry_s
        finally:
            self._rules.unwatch()

    async def repair(self) -> bool:
        """Load the rules again if they are not as they were loaded; return whether that was necessary.

        Raises:
            SyncError: the kernel refused the rules.
        """
        if await self._rules.is_intact():
            return False
        if not self.error:
            log.warning("our rules were removed or changed by another program; loading them again")
        await self._rules.reload()
        return True

    def _note_failure(self, failure: Exception) -> None:
        error = str(failure) if isinstance(failure, SyncError) else repr(failure)
        if error != self.error:
            bug = None if isinstance(failure, SyncError) else failure
            log.error("our rules were changed, and cannot be loaded again: %s", error, exc_info=bug)
        self.error = error
        self.failing_since = self.failing_since or time.time()

    def _note_success(self) -> None:
        if self.error:
            log.info("our rules are as they were loaded again")
        self.error, self.failing_since = "", None


async def _is_set_within(timeout_s: float, event: asyncio.Event) -> bool:
    """Wait until *event* is set, for at most *timeout_s*; return whether it is."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(timeout_s):
            await event.wait()
            return True
    return False
