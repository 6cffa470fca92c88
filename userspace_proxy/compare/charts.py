"""The charts of the report: what each shows, and where its marks are. `templates/charts.html` draws them as SVG.

Every colour is a class or a variable of the style sheet (light and dark). Every chart is as wide as a phone, so that
its text stays readable there. Hovering over a mark shows its figures.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from userspace_proxy.compare.derived import short
from userspace_proxy.compare.judge import Figure
from userspace_proxy.compare.results import ModeRun

WIDTH, HEIGHT = 380, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 84, 16, 32  # the margins of a line chart
_LABEL_GAP = 14
_HALF = 0.5

Text = Callable[[float], str]


class Bar(NamedTuple):
    """One bar of a chart: a mode and its figure."""

    mode: ModeRun
    figure: Figure


@dataclass(frozen=True, slots=True)
class BarChart:
    """Horizontal bars, one in each row; a thin line below shows the spread of the rounds."""

    title: str
    note: str
    rows: Sequence[Bar]
    text: Text = short
    shape: str = "bars"


class SizeLine(NamedTuple):
    """One line of a chart: a mode, and its figure for each number of Services."""

    mode: ModeRun
    points: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class LineChart:
    """Lines over the number of Services (a logarithmic axis), labelled at their ends."""

    title: str
    note: str
    rows: Sequence[SizeLine]
    text: Text = short
    is_log: bool = False
    shape: str = "lines"

    @property
    def sizes(self) -> list[int]:
        return sorted({size for row in self.rows for size in row.points})

    @property
    def marks(self) -> list[float]:
        """The values at which the vertical axis has a label."""
        values = [value for row in self.rows for value in row.points.values() if value > 0 or not self.is_log]
        if not values:
            return []
        return _log_marks(min(values), max(values)) if self.is_log else _marks(max(values))

    def x(self, size: int) -> float:
        first, last, room = math.log(self.sizes[0]), math.log(self.sizes[-1]), WIDTH - LEFT - RIGHT
        return LEFT + (room * (math.log(size) - first) / (last - first) if last > first else room / 2)

    def y(self, value: float) -> float:
        low, high = self.marks[0], self.marks[-1]
        share = math.log(max(value, low) / low) / math.log(high / low) if self.is_log else max(0.0, value) / high
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    def labels(self) -> Iterator[tuple[float, SizeLine]]:
        """Yield each line with the vertical position of its label; labels do not overlap."""
        ends = sorted(((self.y(row.points[max(row.points)]), row) for row in self.rows), key=lambda end: end[0])
        placed: list[float] = []
        for at, _ in ends:
            placed.append(max(at, placed[-1] + _LABEL_GAP) if placed else at)
        over = max(0.0, placed[-1] - (HEIGHT - BOTTOM)) if placed else 0.0
        return ((at - over, row) for at, (_, row) in zip(placed, ends, strict=True))


def _marks(most: float) -> list[float]:
    most = most if most > 0 else 1  # negative values are drawn as zero
    step = 10 ** math.floor(math.log10(most))
    step = next(s for s in (step / 5, step / 2, step, step * 2, step * 5) if most / s <= 5)
    return [index * step for index in range(math.ceil(most / step) + 1)]


def _log_marks(least: float, most: float) -> list[float]:
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


class FailureLane(NamedTuple):
    """One mode's clients over time: the shares (0 to 1) of slow and of failed requests, by bucket."""

    mode: ModeRun
    slow: Sequence[float]
    failed: Sequence[float]


@dataclass(frozen=True, slots=True)
class LaneChart:
    """One lane for each mode; a mark's height is its share of the requests in that bucket of time."""

    title: str
    note: str
    rows: Sequence[FailureLane]
    bucket_s: float
    event_s: float
    told_s: float
    shape: str = "lanes"

    @property
    def top(self) -> float:
        """The share of requests that fills a lane: half of them, if no larger share was slow or failed."""
        shares = (a + b for row in self.rows for a, b in zip(row.slow, row.failed, strict=True))
        return _HALF if all(share <= _HALF for share in shares) else 1.0


Chart = BarChart | LineChart | LaneChart
