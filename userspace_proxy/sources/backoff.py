"""Retry delays for the API server. Pure; randomness is injected."""

import random
from dataclasses import dataclass, field

_DOUBLINGS_MAX = 16


class FollowError(Exception):
    """A list or a watch has failed.

    ``longest_s`` is the maximum delay; failures with different maxima are separate series. ``retry_after_s`` is the
    delay that the server requested. ``at_once``: the first failure of its class in a series is retried without delay,
    because the next request differs.
    """

    def __init__(self, reason: str, longest_s: float, *, retry_after_s: float = 0.0, at_once: bool = False) -> None:
        super().__init__(reason)
        self.longest_s = longest_s
        self.retry_after_s = retry_after_s
        self.at_once = at_once


@dataclass(slots=True)
class Backoff:
    """Exponential back-off from ``first_s``, with jitter, so that many nodes do not retry at the same time."""

    first_s: float
    chance: random.Random
    _failures: int = 0
    _longest_s: float = 0.0
    _spared: set[type[FollowError]] = field(default_factory=set)  # classes already retried without delay in this series

    def delay_s(self, failure: FollowError) -> float:
        """Return the delay in seconds after *failure*; a failure with another maximum begins a new series."""
        if failure.at_once and type(failure) not in self._spared:
            self._spared.add(type(failure))
            return 0.0
        if failure.longest_s != self._longest_s:
            self._longest_s, self._failures, self._spared = failure.longest_s, 0, {type(failure)}
        self._failures += 1
        whole_s = min(self.first_s * (1 << min(self._failures - 1, _DOUBLINGS_MAX)), failure.longest_s)
        return failure.retry_after_s + whole_s * self.chance.uniform(0.5, 1.0)

    def reset(self) -> None:
        """Begin a new series after a success."""
        self._failures = 0
        self._spared.clear()
