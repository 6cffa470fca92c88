"""The report: one self-contained HTML file, made from results alone. `templates/` has its text and its drawings."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup

from userspace_proxy.compare.charts import Bar, BarChart, Chart, FailureLane, LaneChart, LineChart, SizeLine
from userspace_proxy.compare.claims import CLAIMS, RULINGS, Claim, Panel, choices
from userspace_proxy.compare.derived import (
    BULK_POINT,
    EVENT_NAMES,
    RATE_POINT,
    Point,
    calls_of,
    lookup_growth,
    noise_text,
    outages,
    percent,
    points,
    sizes_of,
    timelines_of,
)
from userspace_proxy.compare.disasters import POD_FAILURES
from userspace_proxy.compare.judge import Figure, figure
from userspace_proxy.compare.results import ModeRun, Results, Timeline
from userspace_proxy.compare.scaling import SIZES
from userspace_proxy.compare.tables import Sheet, cells, disaster_sheets, sheets

_TEMPLATES = Path(__file__).parent / "templates"
_KINDS = {"none": "nothing: clients dial the Pod", "kernel": "the kernel, by rules", "proxy": "a process"}


class _Tile(NamedTuple):
    """One figure: its subject, its value, and what it compares."""

    subject: str
    value: str
    words: str


def templates() -> jinja2.Environment:
    """Return the templates of the report and of its charts."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def draw(chart: Chart) -> str:
    """Return *chart* as SVG."""
    macro = getattr(templates().get_template("charts.html").module, chart.shape)
    return str(macro(chart)).strip()


def page(results: Results) -> bytes:
    """Return the report of *results* as one HTML document."""
    verdicts = [(claim, claim.judge(results)) for claim in CLAIMS]
    report = templates().get_template("report.html")
    text = report.render(
        style=Markup((_TEMPLATES / "report.css").read_text()),  # noqa: S704 - a file of this package
        results=results,
        shown=results.shown(),
        tiles=list(_tiles(results)),
        scores=list(_scores(results)),
        claims=[
            (claim, verdict, list(_panels(results, claim)) if verdict.ruling != "unmeasured" else [])
            for claim, verdict in verdicts
        ],
        rulings=RULINGS,
        disasters=[
            (disaster, sheet, [*_lanes(results, disaster.case, "New clients", "Each tenth of a second")])
            for disaster, sheet in disaster_sheets(results)
        ],
        modes=_modes(results),
        sheets=list(sheets(results)),
        sizes=", ".join(f"{size:,}" for size in SIZES),
        choices=choices(results),
    )
    return text.encode()


# ---- summary


def _tiles(results: Results) -> Iterator[_Tile]:
    by_what = {point.what: point for point in points(results)}
    for what, subject in (
        (RATE_POINT, "Requests a second, kept connections"),
        (BULK_POINT, "Throughput of one large transfer"),
    ):
        if what in by_what:
            kernel, compared = by_what[what].kernel, by_what[what].comparison
            words = f"{kernel} does {compared.ratio.median:.2f} times what userspace does"
            yield _Tile(subject, f"{compared.ratio.median:.1f} times", words + _undecided(compared.decided))
    yield from _growth_tile(results)
    for event, title, lost, kept in outages(results):
        if event == "dies":
            words = f"{title} lost {percent(lost)}, userspace {percent(kept)}"
            yield _Tile("Failed requests when one Pod of three died", f"{percent(lost)} or {percent(kept)}", words)


def _growth_tile(results: Results) -> Iterator[_Tile]:
    growths = (lookup_growth(results, mode) for mode in results.shown())
    measured = sorted((each for each in growths if each.by_size), key=lambda each: -each.more_us)
    if measured:
        worst, *others = measured
        beside = "".join(f"; {each.title} {round(each.more_us):+d} µs" for each in others)
        words = f"{worst.title} with {max(worst.by_size):,} Services, compared with {min(worst.by_size):,}{beside}"
        yield _Tile("Time for a new connection", f"{round(worst.more_us):+d} µs", words + _undecided(worst.is_visible))


def _undecided(decided: object) -> str:
    return "" if decided else "; undecided"


def _scores(results: Results) -> Iterator[tuple[str, list[_Tile]]]:
    """Yield three lists: kernel modes better, userspace better, and undecided."""
    found = list(points(results))
    kernel = [_score(p) for p in found if p.comparison.decided and p.comparison.ratio.median > 1]
    ours = [_score(p, is_ours=True) for p in found if p.comparison.decided and p.comparison.ratio.median < 1]
    undecided = [_score(p) for p in found if not p.comparison.decided]
    named = "The kernel" if any(mode.kind == "kernel" for mode in results.ran()) else "Direct connections"
    failures = [
        _Tile(
            f"Failed requests when a Pod {EVENT_NAMES[event]}",
            f"{percent(lost)} / {percent(kept)}",
            f"{title} / userspace",
        )
        for event, title, lost, kept in outages(results)
        if lost > kept + 0.01
    ]
    yield f"{named} wins" if named == "The kernel" else f"{named} win", kernel
    yield "Userspace wins", failures + ours
    if undecided:
        yield "Undecided here", undecided


def _score(point: Point, *, is_ours: bool = False) -> _Tile:
    spread, noise = point.comparison.ratio, point.comparison.noise
    words = f"{point.kernel}; rounds {spread.low:.2f} to {spread.high:.2f}; the same mode twice: {noise_text(noise)}"
    ratio = 1 / spread.median if is_ours else spread.median
    return _Tile(point.what[0].upper() + point.what[1:], f"{ratio:.2f} times", words)


# ---- charts


def _panels(results: Results, claim: Claim) -> Iterator[Chart]:
    for panel in claim.bars:
        found = [(mode, _figure(results, panel, mode)) for mode in results.shown() if mode.kind in panel.kinds]
        if rows := [Bar(mode, each) for mode, each in found if each is not None]:
            yield BarChart(panel.title, panel.note, rows, panel.text)
    for panel in claim.lines:
        by_size = {mode: sizes_of(results, mode.name, panel.figure) for mode in results.shown()}
        lines = LineChart(
            panel.title, panel.note, [SizeLine(*row) for row in by_size.items() if row[1]], panel.text, panel.is_log
        )
        if lines.marks:
            yield lines
    if claim.name == "failures":
        yield from _failure_panels(results)


def _figure(results: Results, panel: Panel, mode: ModeRun) -> Figure | None:
    if panel.figure:
        return figure(results, panel.case, mode.name, panel.figure)
    return calls_of(results, panel.case, mode.name)


def _failure_panels(results: Results) -> Iterator[LaneChart]:
    for failure in POD_FAILURES:
        yield from _lanes(results, failure.case, failure.title, failure.what)


def _lanes(results: Results, event: str, title: str, effect: str) -> Iterator[LaneChart]:
    """Yield the chart of the clients during *event*, if it happened."""
    seen = {mode: timelines_of(results, event, mode.name) for mode in results.shown()}
    rows = [FailureLane(mode, *_shares_over_time(timelines)) for mode, timelines in seen.items() if timelines]
    if rows:
        first = next(timelines[0] for timelines in seen.values() if timelines)
        lanes = LaneChart(title, "", rows, first.bucket_s, first.event_s, first.told_s)
        height = "all requests" if lanes.top == 1 else "half of the requests"
        yield replace(lanes, note=f"{effect}. Red: failed, yellow: slow; a full lane is {height}")


def _shares_over_time(seen: Sequence[Timeline]) -> tuple[list[float], list[float]]:
    """Return, for each bucket, the shares of slow and of failed requests over all rounds."""
    slow, failed = [], []
    for bucket in range(min(len(timeline.good) for timeline in seen)):
        counts = [sum(getattr(timeline, kind)[bucket] for timeline in seen) for kind in ("good", "slow", "failed")]
        total = sum(counts) or 1
        slow.append(counts[1] / total)
        failed.append(counts[2] / total)
    return slow, failed


def _modes(results: Results) -> Sheet:
    rows = [
        cells(mode.title, _KINDS[mode.kind], f"not measured: {mode.reason}" if mode.reason else "took part")
        for mode in results.modes
    ]
    return Sheet("", ("mode", "bytes carried by", "here"), rows)
