"""How long to wait before the API is asked again. Pure, chance injected."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

_DOUBLINGS_MAX = 16


class FollowError(Exception):
    """A list or a watch has failed.

    ``longest_s`` bounds the wait: it tells one sort of failure from another. ``retry_after_s`` is what the server
    asked for. ``at_once``: the first of its class in a row needs no wait, because what is asked next is something else.
    """

    def __init__(self, reason: str, longest_s: float, *, retry_after_s: float = 0.0, at_once: bool = False) -> None:
        super().__init__(reason)
        self.longest_s = longest_s
        self.retry_after_s = retry_after_s
        self.at_once = at_once


@dataclass(slots=True)
class Backoff:
    """Doubles from ``first_s``, with jitter, so that a thousand nodes do not come back in step."""

    first_s: float
    chance: random.Random
    _failures: int = 0
    _longest_s: float = 0.0
    _spared: set[type[FollowError]] = field(default_factory=set)  # what needed no wait in this row

    def delay_s(self, failure: FollowError) -> float:
        """Return how long to wait after *failure*; one of another sort begins a new row."""
        if failure.at_once and type(failure) not in self._spared:
            self._spared.add(type(failure))
            return 0.0
        if failure.longest_s != self._longest_s:
            self._longest_s, self._failures, self._spared = failure.longest_s, 0, {type(failure)}
        self._failures += 1
        whole_s = min(self.first_s * (1 << min(self._failures - 1, _DOUBLINGS_MAX)), failure.longest_s)
        return failure.retry_after_s + whole_s * self.chance.uniform(0.5, 1.0)

    def reset(self) -> None:
        """All went well."""
        self._failures = 0
        self._spared.clear()
