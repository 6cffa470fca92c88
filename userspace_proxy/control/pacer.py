"""Decides when to sync: collects changes for a moment, and retries a failed sync with exponential back-off. Pure."""

from collections.abc import Callable

# The changes of one moment are synced together. Files are gathered by their source, and wait for longer.
GATHER_S = 0.002
_RETRY_S = 0.25
# A sync that loads no rules is followed by a pause of this many times its duration. While changes come without a pause,
# such syncs then take a fifth of the time, or more if the minimum period ends the pause.
_PAUSE_RATIO = 4
# Bounds the exponent: a night of failures would otherwise overflow a float.
_DOUBLINGS_MAX = 32


class Pacer:
    """Computes the delay before the next sync. *min_period_s*: the minimum time after a sync that loaded rules.

    It is also the longest pause after one that did not.
    """

    def __init__(self, now: Callable[[], float], min_period_s: float, max_retry_s: float) -> None:
        self._now = now
        self._min_period_s = min_period_s
        self._max_retry_s = max_retry_s
        self._next_at = float("-inf")
        self._failures = 0

    def note_end(self, *, succeeded: bool, has_loaded: bool = True, took_s: float = 0.0) -> None:
        """Record the end of a sync, whether it loaded rules, and how long it took."""
        now = self._now()
        self._failures = 0 if succeeded else self._failures + 1
        if self._failures:
            doublings = min(self._failures - 1, _DOUBLINGS_MAX)
            self._next_at = now + max(self._min_period_s, min(_RETRY_S * 2**doublings, self._max_retry_s))
        elif has_loaded:
            self._next_at = now + self._min_period_s
        else:
            self._next_at = max(self._next_at, now + min(_PAUSE_RATIO * took_s, self._min_period_s))

    def delay_s(self) -> float:
        """Return the seconds until the next sync: to collect changes, the minimum period or the retry back-off."""
        return max(GATHER_S, self._next_at - self._now())
