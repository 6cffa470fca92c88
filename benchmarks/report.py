"""Results as tables: for the terminal, and as Markdown between two marks of docs/explanation/performance.md."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.cases import CASES, Case, Run
from benchmarks.planes import HAPROXY, HAPROXY_TUNED, NGINX, PLANES
from benchmarks.results import Figure, Results

_BEGIN, _END = "<!-- figures: written by `make bench` -->", "<!-- /figures -->"
_NONE = "-"
_LINE_MAX = 120  # characters
_FEWEST_CALLS = 0.05  # a unit; rarer ones are housekeeping

_Text = Callable[[Case, float], str]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table: ratios in the columns of planes, the reference's own figure in the second column."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True, slots=True)
class Goal:
    """A ratio to reach: ``least`` or ``most`` of it."""

    title: str
    case: str
    figure: Figure
    reference: str
    least: float | None = None
    most: float | None = None


def _rate(run: Run) -> float:
    return run.rate


def _proxy_cpu(run: Run) -> float:
    return run.proxy_cpu_s


def _machine_cpu(run: Run) -> float:
    return run.machine_cpu_s


def _p99(run: Run) -> float:
    return run.p99_ms


GOALS = (
    Goal("keep-alive, 64 connections: requests", "keepalive-64", _rate, HAPROXY, least=0.95),
    Goal("keep-alive, 64 connections: CPU per request", "keepalive-64", _proxy_cpu, HAPROXY, most=1.06),
    Goal("keep-alive, 64 connections: p99", "keepalive-64", _p99, HAPROXY, most=1.1),
    Goal("new connections", "new-connection", _rate, HAPROXY, least=0.95),
    Goal("CPU per new connection", "new-connection", _proxy_cpu, HAPROXY, most=1.08),
    Goal("bulk, 1 flow", "bulk-1", _rate, HAPROXY, least=2.0),
    Goal("bulk, 1 flow, HAProxy tuned", "bulk-1", _rate, HAPROXY_TUNED, least=1.0),
    Goal("bulk, 8 flows", "bulk-8", _rate, HAPROXY, least=2.8),
    Goal("bulk, 8 flows, HAProxy tuned", "bulk-8", _rate, HAPROXY_TUNED, least=1.4),
    Goal("small requests beside 2 bulk flows", "small-beside-bulk", _rate, HAPROXY, least=8.0),
    Goal("UDP, 32 flows, nginx stream", "udp-32", _rate, NGINX, least=1.2),
    Goal("UDP, a new flow per datagram, nginx stream", "udp-new", _rate, NGINX, least=1.1),
)
MOST_IDLE_KIB = 1.3
MOST_LOADING_BY_HOG = 1.2


def sheets(results: Results) -> Iterator[Sheet]:
    planes = [plane for plane in PLANES if any(plane.name in runs for runs in results.runs.values())]
    names = [plane.name for plane in planes]
    proxies = [plane.name for plane in planes if plane.proxy]
    cases = [case for case in CASES if case.name in results.runs]
    with_latency = [case for case in cases if case.name in ("keepalive-64", "keepalive-1", "new-connection")]
    if cases:
        yield _ratios(results, "Rate (more is better)", cases, names, _rate, _rate_text)
        yield _ratios(results, "CPU of the proxy (less is better)", cases, proxies, _proxy_cpu, _cost_text)
        yield _ratios(results, "CPU of the whole machine (less is better)", cases, names, _machine_cpu, _cost_text)
    if with_latency:
        yield _ratios(results, "p99 latency (less is better)", with_latency, names, _p99, lambda _, ms: f"{ms:.2f} ms")
    if results.idle_kib:
        rows = [[plane, f"{kib:.2f}"] for plane, kib in results.idle_kib.items()]
        yield Sheet("User memory of one idle connection", ["plane", "KiB"], rows)
    if results.system_calls:
        rows = [
            [plane, what, f"{sum(calls.values()):.2f}", _calls_text(calls)]
            for what, planes_calls in results.system_calls.items()
            for plane, calls in planes_calls.items()
        ]
        yield Sheet("System calls", ["plane", "per", "calls", "of these"], rows)
    if results.disturbed:
        yield _disturbed(results)
    goals = list(_goal_rows(results))
    if goals:
        yield Sheet("Goals", ["ratio", "goal", *(plane.name for plane in PLANES if plane.ours)], goals)


def _ratios(
    results: Results, title: str, cases: Sequence[Case], planes: Sequence[str], figure: Figure, text: _Text
) -> Sheet:
    rows = []
    for case in cases:
        own = results.median(case.name, case.reference, figure)
        row = [case.title, _NONE if own is None else text(case, own)]
        for plane in planes:
            ratio = results.ratio(case.name, plane, case.reference, figure)
            row.append(_NONE if ratio is None or not own else f"{ratio:.2f}")
        if own:
            rows.append(row)
    return Sheet(title, ["case", "1.00 =", *planes], rows)


def _rate_text(case: Case, rate: float) -> str:
    return f"{rate:.2f} {case.unit}/s" if case.unit_size > 1 else f"{rate:,.0f} {case.unit}/s"


def _cost_text(case: Case, seconds: float) -> str:
    return f"{seconds:.3f} s/{case.unit}" if case.unit_size > 1 else f"{seconds * 1e6:.1f} us"


def _calls_text(calls: dict[str, float]) -> str:
    return ", ".join(f"{name} {count:.2f}" for name, count in calls.items() if count >= _FEWEST_CALLS)


def _disturbed(results: Results) -> Sheet:
    rows = []
    for plane in results.disturbed:
        quiet, hog, loading, loaded_s, rate = (
            results.disturbed_median(plane, figure) or 0.0
            for figure in ("quiet_p99_ms", "hog_p99_ms", "loading_p99_ms", "loaded_s", "rate")
        )
        times = [f"{rate:,.0f}", f"{quiet:.2f} ms", f"{hog:.2f} ms", f"{loading:.2f} ms", f"{loaded_s:.1f} s"]
        rows.append([plane, *times, f"{loading / hog:.2f}" if hog else _NONE])
    head = ["plane", "requests/s", "quiet", "beside a hog", "while loading", "loading took", "loading / hog"]
    return Sheet("p99 at 30 % load while 10,000 Services are loaded", head, rows)


def _goal_rows(results: Results) -> Iterator[list[str]]:
    ours = [plane.name for plane in PLANES if plane.ours]
    for goal in GOALS:
        found = [results.ratios(goal.case, plane, goal.reference, goal.figure) for plane in ours]
        if any(found):
            yield [goal.title, *_verdicts(found, goal.least, goal.most)]
    if results.idle_kib:
        found = [[results.idle_kib[plane]] if plane in results.idle_kib else [] for plane in ours]
        yield ["user memory of an idle connection, KiB", *_verdicts(found, None, MOST_IDLE_KIB)]
    for what, of_planes in results.system_calls.items():
        most = sum(of_planes.get(HAPROXY, {}).values())
        if most:
            found = [[sum(of_planes[plane].values())] if plane in of_planes else [] for plane in ours]
            yield [f"system calls per {what}, HAProxy's", *_verdicts(found, None, round(most, 2))]
    if results.disturbed:
        found = [
            [each["loading_p99_ms"] / each["hog_p99_ms"] for each in results.disturbed.get(plane, ())] for plane in ours
        ]
        yield ["p99 at 30 % load: loading, by the hog's", *_verdicts(found, None, MOST_LOADING_BY_HOG)]


def _verdicts(found: Sequence[Sequence[float]], least: float | None, most: float | None) -> Iterator[str]:
    """Say the goal, and for each engine its median, the lowest and highest round, and whether the goal is reached."""
    yield f"at least {least:g}" if least is not None else f"at most {most:g}"
    for rounds in found:
        if not rounds:
            yield _NONE
            continue
        value = statistics.median(rounds)
        spread = f" ({min(rounds):.2f} to {max(rounds):.2f})" if len(rounds) > 1 else ""
        reached = value >= least if least is not None else value <= (most or 0.0)
        yield f"{value:.2f}{spread} {'yes' if reached else 'no'}"


def print_tables(results: Results) -> None:
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left", title_style="bold", min_width=len(sheet.title))
        for index, head in enumerate(sheet.head):
            table.add_column(head, justify="right" if index else "left", overflow="fold")
        for row in sheet.rows:
            table.add_row(*row)
        console.print(table)
    failed = {
        f"{case}, {plane}": sum(run.failed for run in rounds.values())
        for case, runs in results.runs.items()
        for plane, rounds in runs.items()
    }
    for where, count in failed.items():
        if count:
            console.print(f"failed or lost: {count} at {where}")


def markdown(results: Results) -> str:
    """Return every table as Markdown, after a line about the machine."""
    about = "; ".join(f"{name.replace('_', ' ')}: {value}" for name, value in results.machine.items())
    parts = [f"{about}. {results.rounds} rounds of {results.seconds:g} s."]
    for sheet in sheets(results):
        parts.append(f"### {sheet.title}\n\n{_table(sheet)}")
    return "\n\n".join(parts)


def _table(sheet: Sheet) -> str:
    """Return *sheet* as a table, or as a list if a row of it would be too long for a line."""
    lines = [_line(sheet.head), _line(["---"] * len(sheet.head)), *map(_line, sheet.rows)]
    if max(map(len, lines)) <= _LINE_MAX:
        return "\n".join(lines)
    items = (
        f"- {row[0]}: {', '.join(f'{head} {cell}' for head, cell in zip(sheet.head[1:], row[1:], strict=True))}"
        for row in sheet.rows
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
