"""Charts as SVG text: bars with spread, lines over the number of Services, and failures over time.

Every colour is a class or a variable of the page's style sheet (light and dark). Every chart is as wide as a phone, so
that its text stays readable there. Hovering over a mark shows its figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

from userspace_proxy.compare.judge import Figure

WIDTH = 380
_LABEL, _VALUE, _ROW, _BAR = 126, 62, 24, 14
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 84, 12, 32
_HEIGHT = 230
_LANE, _LANE_GAP = 26, 6
_HALF = 0.5

Text = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Bar:
    """One mode's figure."""

    mode: str
    title: str
    figure: Figure


def short(value: float) -> str:
    """Return *value* with at most three significant digits: 12,300, 1.25, 0.031."""
    if not value:
        return "0"
    size = abs(value)
    if size >= 100:
        digits = max(0, int(math.log10(size)) - 2)
        return f"{round(value / 10**digits) * 10**digits:,}"
    text = f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{float(f'{value:.2g}'):.5f}"
    return text.rstrip("0").rstrip(".")


def bars(rows: Sequence[Bar], text: Text, label: str) -> str:
    """Return horizontal bars, one in each row; a thin line shows the spread of the rounds."""
    room = WIDTH - _LABEL - _VALUE
    most = max((row.figure.high for row in rows), default=0.0) or 1.0
    height = len(rows) * _ROW + 4
    parts = [_open(height, label)]
    for index, row in enumerate(rows):
        y = index * _ROW + 4
        middle, figure = y + _BAR / 2, row.figure
        length, low, high = (max(0.0, value) / most * room for value in (figure.median, figure.low, figure.high))
        said = f"{row.title}: {text(figure.median)} (rounds {text(figure.low)} to {text(figure.high)})"
        parts += [
            f'<g class="m-{row.mode}"><title>{escape(said)}</title>',
            f'<rect class="hover" x="0" y="{y - 4}" width="{WIDTH}" height="{_ROW}"/>',
            f'<text class="name" x="{_LABEL - 8}" y="{middle + 4}" text-anchor="end">{escape(row.title)}</text>',
            f'<rect class="fill" x="{_LABEL}" y="{y}" width="{max(length, 1.5):.1f}" height="{_BAR}" rx="3"/>',
        ]
        if high - low > 1:
            parts.append(
                f'<path class="spread" d="M{_LABEL + low:.1f} {middle}H{_LABEL + high:.1f}'
                f'M{_LABEL + low:.1f} {middle - 3}v6M{_LABEL + high:.1f} {middle - 3}v6"/>'
            )
        at = _LABEL + max(length, high) + 6
        parts.append(f'<text class="value" x="{at:.1f}" y="{middle + 4}">{escape(text(figure.median))}</text></g>')
    parts.append("</svg>")
    return "".join(parts)


@dataclass(frozen=True, slots=True)
class SizeLine:
    """One mode's figures by number of Services."""

    mode: str
    title: str
    points: Mapping[int, float]


def lines(rows: Sequence[SizeLine], text: Text, label: str, *, is_log: bool) -> str:
    """Return lines over the number of Services (logarithmic), labelled at their ends."""
    sizes = sorted({size for row in rows for size in row.points})
    values = [value for row in rows for value in row.points.values() if value > 0 or not is_log]
    if len(sizes) < 1 or not values:
        return ""
    marks = _log_marks(min(values), max(values)) if is_log else _marks(max(values))
    bottom, top = (marks[0], marks[-1]) if is_log else (0.0, marks[-1])
    across, down = WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(size: int) -> float:
        first, last = math.log(sizes[0]), math.log(sizes[-1])
        return _LEFT + (across * (math.log(size) - first) / (last - first) if last > first else across / 2)

    def y(value: float) -> float:
        share = math.log(max(value, bottom) / bottom) / math.log(top / bottom) if is_log else max(0.0, value) / top
        return _TOP + down * (1 - share)

    parts = [_open(_HEIGHT, label)]
    for mark in marks:
        parts.append(f'<path class="grid" d="M{_LEFT} {y(mark):.1f}H{_LEFT + across}"/>')
        parts.append(f'<text class="axis" x="{_LEFT - 6}" y="{y(mark) + 4:.1f}" text-anchor="end">{text(mark)}</text>')
    for size in sizes:
        parts.append(
            f'<text class="axis" x="{x(size):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{_size(size)}</text>'
        )
    parts.append(
        f'<text class="axis" x="{_LEFT + across / 2}" y="{_HEIGHT - 2}" text-anchor="middle">number of Services</text>'
    )
    ends = _apart([(y(list(row.points.values())[-1]), row) for row in rows])
    for at, row in ends:
        points = [(x(size), y(value), size, value) for size, value in sorted(row.points.items())]
        path = "L".join(f"{px:.1f} {py:.1f}" for px, py, _, _ in points)
        parts.append(f'<g class="m-{row.mode}"><path class="line" d="M{path}"/>')
        for px, py, size, value in points:
            said = escape(f"{row.title}, {size:,} Services: {text(value)}")
            parts.append(f'<circle class="dot" cx="{px:.1f}" cy="{py:.1f}" r="3.5"><title>{said}</title></circle>')
        px, py = points[-1][:2]
        parts.append(f'<path class="lead" d="M{px + 5:.1f} {py:.1f}L{px + 10:.1f} {at:.1f}"/>')
        parts.append(f'<text class="name" x="{px + 12:.1f}" y="{at + 4:.1f}">{escape(row.title)}</text></g>')
    parts.append("</svg>")
    return "".join(parts)


def _apart(ends: list[tuple[float, SizeLine]]) -> list[tuple[float, SizeLine]]:
    """Move overlapping labels apart."""
    placed: list[tuple[float, SizeLine]] = []
    for at, row in sorted(ends, key=lambda end: end[0]):
        placed.append((max(at, placed[-1][0] + 14) if placed else at, row))
    over = placed[-1][0] - (_HEIGHT - _BOTTOM) if placed else 0
    return [(at - max(0.0, over), row) for at, row in placed]


def _marks(most: float) -> list[float]:
    most = most if most > 0 else 1  # draw negative values as zero
    step = 10 ** math.floor(math.log10(most))
    step = next(s for s in (step / 5, step / 2, step, step * 2, step * 5) if most / s <= 5)
    return [index * step for index in range(math.ceil(most / step) + 1)]


def _log_marks(least: float, most: float) -> list[float]:
    first, last = math.floor(math.log10(least)), math.ceil(math.log10(most))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]


def _size(size: int) -> str:
    return f"{size // 1000}k" if size >= 1000 else str(size)


@dataclass(frozen=True, slots=True)
class FailureLane:
    """One mode's clients over time: the shares (0 to 1) of slow and of failed requests, by bucket."""

    mode: str
    title: str
    slow: Sequence[float]
    failed: Sequence[float]


def lane_is_half(rows: Sequence[FailureLane]) -> bool:
    """Return whether a lane's full height means half of the requests; true if no larger share was slow or failed."""
    return all(a + b <= _HALF for row in rows for a, b in zip(row.slow, row.failed, strict=True))


def lanes(rows: Sequence[FailureLane], bucket_s: float, event_s: float, told_s: float, label: str) -> str:
    """Return one lane for each mode; a mark's height is its share of the requests in that bucket."""
    top, foot = 22, 30
    height = top + len(rows) * (_LANE + _LANE_GAP) + foot
    room = WIDTH - _LABEL - 8
    buckets = max((len(row.failed) for row in rows), default=1)
    tall = _LANE / (_HALF if lane_is_half(rows) else 1.0)
    wide = room / buckets

    def x(second: float) -> float:
        return _LABEL + second / bucket_s * wide

    bottom = height - foot
    parts = [_open(height, label)]
    for index, row in enumerate(rows):
        base = top + index * (_LANE + _LANE_GAP) + _LANE
        failed, slow = sum(row.failed) / buckets, sum(row.slow) / buckets
        said = f"{row.title}: {failed:.1%} failed, {slow:.1%} slow over all this time"
        parts += [
            f"<g><title>{escape(said)}</title>",
            f'<rect class="lane" x="{_LABEL}" y="{base - _LANE}" width="{room}" height="{_LANE}" rx="3"/>',
            f'<text class="name" x="{_LABEL - 8}" y="{base - _LANE / 2 + 4}" text-anchor="end">{escape(row.title)}'
            "</text>",
        ]
        for number, (slow, failed) in enumerate(zip(row.slow, row.failed, strict=True)):
            left = _LABEL + number * wide
            for share, below, kind in ((failed, 0.0, "failed"), (slow, failed, "slow")):
                if share:
                    parts.append(
                        f'<rect class="{kind}" x="{left:.1f}" y="{base - (below + share) * tall:.1f}" '
                        f'width="{wide + 0.3:.1f}" height="{share * tall:.1f}"/>'
                    )
        parts.append("</g>")
    moments = [(event_s, "it happens")] if told_s == event_s else [(event_s, "it happens"), (told_s, "modes are told")]
    for second, name in moments:
        parts.append(f'<path class="moment" d="M{x(second):.1f} {top - 4}V{bottom}"/>')
        parts.append(f'<text class="axis" x="{x(second):.1f}" y="{top - 9}" text-anchor="middle">{name}</text>')
    for second in range(math.ceil(buckets * bucket_s)):
        parts.append(f'<text class="axis" x="{x(second):.1f}" y="{bottom + 12}" text-anchor="middle">{second} s</text>')
    parts.append("</svg>")
    return "".join(parts)


def _open(height: float, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label, {chr(34): "&quot;"})}">'
