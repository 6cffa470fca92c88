"""Results as tables: for the terminal, and as Markdown between two marks of docs/explanation/performance.md."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cases import CASES, CLIENT, PROXY, SERVERS, BenchCase
from benchmarks.planes import HAPROXY_LIKE, HAPROXY_TUNED_LIKE, NGINX_LIKE, PLANES
from userspace_proxy.compare.derived import calls_of, percent
from userspace_proxy.compare.judge import figure, ratios
from userspace_proxy.compare.results import Results
from userspace_proxy.compare.tables import Cell, Sheet, calls_sheet, cells, print_sheet, stdout

_BEGIN, _END = "<!-- figures: written by `make bench` -->", "<!-- /figures -->"
_NONE = "-"
_PIPE_WIDTH = 160
_LINE_MAX = 120  # characters
RATE, PROXY_CPU, MACHINE_CPU, P99 = "rate", "proxy_cpu_s", "machine_cpu_s", "p99_ms"
IDLE_MEMORY, DISTURBED = "idle-memory", "disturbed"

_Text = Callable[[BenchCase, float], str]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio to reach: ``least`` or ``most`` of it."""

    title: str
    case: str
    figure: str
    reference: str
    least: float | None = None
    most: float | None = None


# References: the peers behind the same redirect, as capture is part of a Service proxy's job.
GOALS = (
    Goal("keep-alive, 64 connections: requests", "keepalive-64", RATE, HAPROXY_LIKE, least=1.05),
    Goal("keep-alive, 64 connections: CPU per request", "keepalive-64", PROXY_CPU, HAPROXY_LIKE, most=1.0),
    Goal("keep-alive, 64 connections: p99", "keepalive-64", P99, HAPROXY_LIKE, most=0.9),
    Goal("new connections", "new-connection", RATE, HAPROXY_LIKE, least=1.15),
    Goal("CPU per new connection", "new-connection", PROXY_CPU, HAPROXY_LIKE, most=0.95),
    Goal("bulk, 1 flow, HAProxy tuned", "bulk-1", RATE, HAPROXY_TUNED_LIKE, least=1.0),
    Goal("bulk, 8 flows, HAProxy tuned", "bulk-8", RATE, HAPROXY_TUNED_LIKE, least=1.0),
    Goal("small requests beside 2 bulk flows", "small-beside-bulk", RATE, HAPROXY_LIKE, least=8.0),
    Goal("UDP, 32 flows, nginx stream", "udp-32", RATE, NGINX_LIKE, least=1.2),
    Goal("CPU per new UDP flow at 900 a second, nginx stream", "udp-900", PROXY_CPU, NGINX_LIKE, most=0.9),
)
MOST_IDLE_KIB = 1.3
MOST_CALLS_MORE_PER_CONNECTION = 1.0  # SO_OOBINLINE, which HAProxy does not set
MOST_LOADING_BY_HOG = 1.1


def sheets(results: Results) -> Iterator[Sheet]:
    """Yield the tables for which *results* have figures."""
    names = {run.name for run in results.ran()}
    planes = [plane.name for plane in PLANES if plane.name in names]
    proxies = [plane.name for plane in PLANES if plane.name in names and plane.kind == "proxy"]
    for sheet in (
        _ratios(results, "Rate (more is better)", planes, RATE, _rate_text),
        _ratios(results, "CPU of the proxy (less is better)", proxies, PROXY_CPU, _cost_text),
        _ratios(results, "CPU of the whole machine (less is better)", planes, MACHINE_CPU, _cost_text),
        _ratios(results, "p99 latency (less is better)", planes, P99, lambda _, ms: f"{ms:.2f} ms"),
        _shares(results),
        _idle(results, proxies),
        calls_sheet(results),
        _disturbed(results),
        Sheet("Goals", ["ratio", "goal", *_titles(_ours())], list(_goal_rows(results))),
    ):
        if sheet.rows:
            yield sheet


def _titles(planes: Sequence[str]) -> list[str]:
    return [plane.title for plane in PLANES if plane.name in planes]


def _ours() -> list[str]:
    return [plane.name for plane in PLANES if plane.ours]


def _ratios(results: Results, title: str, planes: Sequence[str], name: str, text: _Text) -> Sheet:
    """Return ratios to the reference of each case. The second column has the reference's own figure."""
    rows = []
    for case in CASES:
        own = figure(results, case.name, case.reference, name)
        if own is not None and own.median:
            found = [ratios(results, case.name, plane, case.reference, name) for plane in planes]
            of_planes = (f"{statistics.median(rounds):.2f}" if rounds else _NONE for rounds in found)
            rows.append(cells(case.title, text(case, own.median), *of_planes))
    return Sheet(title, ["case", "1.00 =", *_titles(planes)], rows)


def _rate_text(case: BenchCase, rate: float) -> str:
    return f"{rate:.2f} {case.unit}/s" if case.unit_size > 1 else f"{rate:,.0f} {case.unit}/s"


def _cost_text(case: BenchCase, seconds: float) -> str:
    return f"{seconds:.3f} s/{case.unit}" if case.unit_size > 1 else f"{seconds * 1e6:.1f} us"


def _shares(results: Results) -> Sheet:
    """Return each party's share of the machine's CPU time. The rest is the kernel's work on packets in softirqs."""
    rows = []
    for case in CASES:
        for plane in PLANES:
            if plane.ours or plane.name == case.reference:
                found = [figure(results, case.name, plane.name, f"{who}_share") for who in (PROXY, CLIENT, SERVERS)]
                shares = [each.median for each in found if each]
                if len(shares) == len(found):
                    rows.append(cells(case.title, plane.title, *map(percent, [*shares, 1 - sum(shares)])))
    return Sheet("Shares of the CPU time", ["case", "plane", "proxy", "client", "servers", "rest"], rows, words=2)


def _idle(results: Results, planes: Sequence[str]) -> Sheet:
    found = {
        title: figure(results, IDLE_MEMORY, plane, "kib") for plane, title in zip(planes, _titles(planes), strict=True)
    }
    rows = [cells(title, f"{kib.median:.2f}") for title, kib in found.items() if kib]
    return Sheet("User memory of one idle connection", ["plane", "KiB"], rows)


def _disturbed(results: Results) -> Sheet:
    rows = []
    for plane, title in zip(_ours(), _titles(_ours()), strict=True):
        names = ("rate", "quiet_p99_ms", "hog_p99_ms", "loading_p99_ms", "loaded_s")
        rate, quiet, hog, loading, loaded_s = (figure(results, DISTURBED, plane, name) for name in names)
        if rate and quiet and hog and loading and loaded_s:
            latencies = (f"{each.median:.2f} ms" for each in (quiet, hog, loading))
            by_hog = f"{loading.median / hog.median:.2f}"
            rows.append(cells(title, f"{rate.median:,.0f}", *latencies, f"{loaded_s.median:.1f} s", by_hog))
    head = ["plane", "requests/s", "quiet", "beside a hog", "while loading", "loading took", "loading / hog"]
    return Sheet("p99 at 30 % load while 10,000 Services are loaded", head, rows)


def _goal_rows(results: Results) -> Iterator[list[Cell]]:
    for goal in GOALS:
        found = [ratios(results, goal.case, plane, goal.reference, goal.figure) for plane in _ours()]
        yield from _goal_row(goal.title, found, goal.least, goal.most)
    idle = [list(results.figures(IDLE_MEMORY, plane, "kib").values()) for plane in _ours()]
    yield from _goal_row("user memory of an idle connection, KiB", idle, None, MOST_IDLE_KIB)
    for what, more in (("request", 0.0), ("connection", MOST_CALLS_MORE_PER_CONNECTION)):
        peer = calls_of(results, f"calls-{what}", HAPROXY_LIKE)
        own = [calls_of(results, f"calls-{what}", plane) for plane in _ours()]
        if peer is not None:
            found = [[each.median] if each else [] for each in own]
            yield from _goal_row(f"system calls per {what}, HAProxy's", found, None, round(peer.median + more, 2))
    by_hog = [
        [
            loading / hog
            for loading, hog in zip(
                *(results.figures(DISTURBED, plane, name).values() for name in ("loading_p99_ms", "hog_p99_ms")),
                strict=True,
            )
        ]
        for plane in _ours()
    ]
    yield from _goal_row("p99 at 30 % load: loading, by the hog's", by_hog, None, MOST_LOADING_BY_HOG)


def _goal_row(
    title: str, found: Sequence[Sequence[float]], least: float | None, most: float | None
) -> Iterator[list[Cell]]:
    """Yield the goal and whether each engine reaches it, or nothing if none was measured."""
    if any(found):
        goal = f"at least {least:g}" if least is not None else f"at most {most:g}"
        yield [*cells(title, goal), *(_goal_cell(rounds, least, most) for rounds in found)]


def _goal_cell(rounds: Sequence[float], least: float | None, most: float | None) -> Cell:
    if not rounds:
        return Cell(_NONE)
    value, goal = statistics.median(rounds), least if least is not None else (most or 0.0)
    is_reached = value >= goal if least is not None else value <= goal
    low, high = _interval(rounds)
    verdict = "undecided" if low <= goal <= high and low < high else "yes" if is_reached else "no"
    return Cell(f"{value:.2f} {verdict}", f"{low:.2f} to {high:.2f}" if len(rounds) > 1 else "")


def _interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the interval that contains the true median with a chance of 95 % (of five values or fewer: less).

    Its ends are values by rank: a value is below the median as often as a coin shows heads.
    """
    ordered, count = sorted(values), len(values)
    left_out = -1
    while 2 * sum(math.comb(count, heads) for heads in range(left_out + 2)) <= 0.05 * 2**count:
        left_out += 1
    return ordered[max(left_out, 0)], ordered[-1 - max(left_out, 0)]


def print_tables(results: Results) -> None:
    console = stdout(_PIPE_WIDTH)
    for sheet in sheets(results):
        print_sheet(console, sheet)
    titles = {run.name: run.title for run in results.modes}
    for case in CASES:
        for name, title in titles.items():
            if count := sum(results.figures(case.name, name, "failed").values()):
                console.print(f"failed or lost: {count:.0f} at {case.name}, {title}")
    for run in results.modes:
        if run.reason:
            console.print(f"{run.title} did not start: {run.reason}", markup=False)
    for note in results.notes:
        console.print(f"note: {note}", markup=False)


def markdown(results: Results) -> str:
    """Return every table as Markdown, after a line about the machine."""
    about = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in results.machine.items())
    parts = [textwrap.fill(f"{about}. {results.rounds} rounds of {results.load_s:g} s.", _LINE_MAX)]
    for sheet in sheets(results):
        parts.append(f"### {sheet.title}\n\n{_table(sheet)}")
    return "\n\n".join(parts)


def _table(sheet: Sheet) -> str:
    """Return *sheet* as a table, as two of half the columns, or as a list: the first whose rows fit into a line."""
    rows = [[f"{cell.value} ({cell.spread})" if cell.spread else cell.value for cell in row] for row in sheet.rows]
    lines = [_line(sheet.head), _line(["---"] * len(sheet.head)), *map(_line, rows)]
    if max(map(len, lines)) <= _LINE_MAX:
        return "\n".join(lines)
    middle = (len(sheet.head) + 3) // 2
    halves = [
        [_line([*row[:2], *row[part]]) for row in (sheet.head, ["---"] * len(sheet.head), *rows)]
        for part in (slice(2, middle), slice(middle, None))
    ]
    if middle > 2 and max(map(len, halves[0] + halves[1])) <= _LINE_MAX:
        return "\n\n".join("\n".join(half) for half in halves)
    items = (
        f"- {row[0]}: {', '.join(f'{head} {cell}' for head, cell in zip(sheet.head[1:], row[1:], strict=True))}"
        for row in rows
    )
    return "\n".join(textwrap.fill(item, _LINE_MAX, subsequent_indent="  ") for item in items)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write_into(page: Path, results: Results) -> None:
    """Put the tables between the two marks of *page*."""
    before, begin, rest = page.read_text().partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"{page}: the marks {_BEGIN} and {_END} are missing")
    page.write_text(f"{before}{_BEGIN}\n\n{markdown(results)}\n\n{_END}{after}")
