"""Counters for the rule loads of a kernel mode: loads add to them, a scrape reads them."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram


@dataclass(slots=True)
class Loads:
    """Rule loads of one IP family, or of both if one load covers both.

    ``whole``, ``changes``: durations of full loads, and of loads that write only what changed. ``refused``: loads that
    the kernel refused; ``refused_changes``: those that wrote only what changed. ``rules``: desired rules by table, for
    tables that grow with the number of Services. ``written``: rules written by the last load, by table.
    """

    whole: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    changes: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    refused: int = 0
    refused_changes: int = 0
    rules: Mapping[str, int] = field(default_factory=Counter)
    written: Mapping[str, int] = field(default_factory=Counter)

    @contextmanager
    def of(self, *, everything: bool) -> Iterator[None]:
        """Time the load in the block, full if *everything*. An exception counts as a refused load."""
        try:
            with (self.whole if everything else self.changes).timed():
                yield
        except Exception:
            self.refused += 1
            self.refused_changes += not everything
            raise
