"""Decides when to sync: collects changes for a moment, and retries a failed sync with exponential back-off. Pure."""

from collections.abc import Callable

# The changes of one moment are synced together. Files are gathered by their source, and wait for longer.
GATHER_S = 0.002
_RETRY_S = 0.25
# Bounds the exponent: a night of failures would otherwise overflow a float.
_DOUBLINGS_MAX = 32


class Pacer:
    """Computes the delay before the next sync. *min_period_s*: the minimum time after a sync that loaded rules."""

    def __init__(self, now: Callable[[], float], min_period_s: float, max_retry_s: float) -> None:
        self._now = now
        self._min_period_s = min_period_s
        self._max_retry_s = max_retry_s
        self._ended_at = float("-inf")
        self._failures = 0

    def note_end(self, *, succeeded: bool, has_loaded: bool = True) -> None:
        """Record the end of a sync, and whether it loaded rules."""
        if has_loaded or not succeeded:
            self._ended_at = self._now()
        self._failures = 0 if succeeded else self._failures + 1

    def delay_s(self) -> float:
        """Return the seconds until the next sync: to collect changes, the minimum period or the retry back-off."""
        pause_s = self._min_period_s
        if self._failures:
            doublings = min(self._failures - 1, _DOUBLINGS_MAX)
            pause_s = max(pause_s, min(_RETRY_S * 2**doublings, self._max_retry_s))
        return max(GATHER_S, self._ended_at + pause_s - self._now())
