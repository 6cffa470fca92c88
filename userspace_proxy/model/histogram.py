"""How often something took how long. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts durations below each of some bounds."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = tuple(bounds_s)
        self._counts = [0] * (len(self._bounds_s) + 1)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self.total_s += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return (bound, how many took no longer), as Prometheus has them; the last bound is none."""
        names = [*(f"{bound:g}" for bound in self._bounds_s), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))
