"""What loading the rules of a kernel mode has come to: plain numbers that loads add to and a scrape reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram


@dataclass(slots=True)
class Loads:
    """Of one IP family, or of both where one load is for both.

    ``whole``, ``changes``: how long it took to load everything, and only what differed. ``refused``: loads that the
    kernel refused, ``refused_changes`` of them of what differed. ``rules``: how many are wanted, by table, where their
    number grows with the Services; ``written``: how many the last load has written.
    """

    whole: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    changes: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    refused: int = 0
    refused_changes: int = 0
    rules: Mapping[str, int] = field(default_factory=Counter)
    written: Mapping[str, int] = field(default_factory=Counter)

    @contextmanager
    def of(self, *, everything: bool) -> Iterator[None]:
        """Time the load within; what it raises is a refusal."""
        try:
            with (self.whole if everything else self.changes).timed():
                yield
        except Exception:
            self.refused += 1
            self.refused_changes += not everything
            raise
