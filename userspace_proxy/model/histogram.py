"""A histogram of durations. Pure."""

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

# kube-proxy's bounds for the duration of a sync, so that its dashboards fit.
SYNC_BOUNDS_S = [0.001 * 2**n for n in range(15)]


class Histogram:
    """Counts durations by upper bound."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self._bounds_s = tuple(bounds_s)
        self._counts = [0] * (len(self._bounds_s) + 1)
        self.total_s = 0.0

    @property
    def count(self) -> int:
        return sum(self._counts)

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(self._bounds_s, seconds)] += 1
        self.total_s += seconds

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Observe the duration of the block, unless it raises."""
        began = time.monotonic()
        yield
        self.observe(time.monotonic() - began)

    def buckets(self) -> list[tuple[str, float]]:
        """Return (upper bound, number of durations up to it), as Prometheus expects; the last bound is ``+Inf``."""
        names = [*(f"{bound:g}" for bound in self._bounds_s), "+Inf"]
        return list(zip(names, accumulate(self._counts), strict=True))
