"""All figures as text tables, for the terminal, a pipe and the end of the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from userspace_proxy.compare import cases
from userspace_proxy.compare.charts import short
from userspace_proxy.compare.claims import CLAIMS, RULINGS
from userspace_proxy.compare.derived import EVENT_NAMES, noise_text, outage, percent, sizes_of, timelines_of
from userspace_proxy.compare.judge import figure, noise
from userspace_proxy.compare.modes import DIRECT_AGAIN
from userspace_proxy.compare.results import Results
from userspace_proxy.compare.scaling import SIZES

_NONE = "-"
_PIPE_WIDTH = 170
# Case, figure, factor to the displayed unit, label.
_ROWS = (
    (cases.KEEPALIVE_1, "p50_ms", 1, "request p50, ms"),
    (cases.KEEPALIVE_1, "p99_ms", 1, "request p99, ms"),
    (cases.KEEPALIVE_1, "p999_ms", 1, "request p99.9, ms"),
    (cases.NEW_1, "p50_ms", 1, "new connection p50, ms"),
    (cases.NEW_1, "p99_ms", 1, "new connection p99, ms"),
    (cases.NEW_1, "p999_ms", 1, "new connection p99.9, ms"),
    (cases.KEEPALIVE_64, "rate", 1, "requests/s"),
    (cases.NEW_64, "rate", 1, "new connections/s"),
    (cases.BULK_1, "rate", 1, "GB/s, 1 flow"),
    (cases.BULK_8, "rate", 1, "GB/s, 8 flows"),
    (cases.KEEPALIVE_64, "proxy_cpu_s", 1e6, "proxy CPU a request, µs"),
    (cases.KEEPALIVE_64, "machine_cpu_s", 1e6, "machine CPU a request, µs"),
    (cases.NEW_64, "proxy_cpu_s", 1e6, "proxy CPU a connection, µs"),
    (cases.NEW_64, "machine_cpu_s", 1e6, "machine CPU a connection, µs"),
    (cases.BULK_1, "proxy_cpu_s", 1, "proxy CPU a GB, s"),
    (cases.BULK_1, "machine_cpu_s", 1, "machine CPU a GB, s"),
    (cases.KEEPALIVE_1, "switches", 1, "context switches a request, 1 connection"),
    (cases.KEEPALIVE_64, "switches", 1, "context switches a request, 64 connections"),
)
_SIZE_ROWS = (
    ("rules", "rules"),
    ("load_s", "time to load, s"),
    ("change_ms", "time to change one, ms"),
    ("new_connection_ms", "new connection, ms"),
    ("added_us", "beyond the direct way, µs"),
)


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


def sheets(results: Results) -> Iterator[Sheet]:
    """Yield the tables for which *results* have figures."""
    modes = [mode for mode in results.ran() if mode.name != DIRECT_AGAIN]
    rows = []
    for case, name, factor, what in _ROWS:
        found = [figure(results, case, mode.name, name) for mode in modes]
        if any(found):
            cells = [
                f"{short(f.median * factor)} ({short(f.low * factor)} to {short(f.high * factor)})" if f else _NONE
                for f in found
            ]
            rows.append([what, *cells, noise_text(noise(results, case, name))])
    if rows:
        yield Sheet("Loads", ["", *(mode.title for mode in modes), "noise"], rows)
    yield from _calls(results)
    yield from _services(results)
    rows = []
    for event, what in EVENT_NAMES.items():
        seen = [timelines_of(results, event, mode.name) for mode in modes]
        if any(seen):
            told = [outage(timelines) if timelines else None for timelines in seen]
            rows.append([f"a Pod {what}: failed", *(percent(each[0]) if each else _NONE for each in told)])
            rows.append([f"a Pod {what}: slow", *(percent(each[1]) if each else _NONE for each in told)])
    if rows:
        yield Sheet("Requests while one Pod of three fails", ["", *(mode.title for mode in modes)], rows)


def _calls(results: Results) -> Iterator[Sheet]:
    rows = []
    for sample in results.samples:
        kind, _, unit = sample.case.partition("-")
        if kind == "calls":
            which = ", ".join(f"{name} {short(count)}" for name, count in sample.figures.items() if count >= 0.05)
            title = next(mode.title for mode in results.modes if mode.name == sample.mode)
            rows.append([title, unit.replace("mb", "megabyte"), short(sum(sample.figures.values())), which])
    if rows:
        yield Sheet("System calls", ["", "per", "calls", "which"], sorted(rows, key=lambda row: row[1], reverse=True))


def _services(results: Results) -> Iterator[Sheet]:
    rows = []
    for mode in results.ran():
        for name, what in _SIZE_ROWS:
            by_size = sizes_of(results, mode.name, name)
            if by_size:
                rows.append([mode.title, what, *(short(by_size[size]) if size in by_size else _NONE for size in SIZES)])
    if rows:
        yield Sheet("By the number of Services", ["", "", *(f"{size:,}" for size in SIZES)], rows)


def print_all(results: Results) -> None:
    """Print tables, verdicts and missing parts to stdout: coloured on a terminal, plain in a pipe."""
    console = Console(highlight=False, width=None if Console().is_terminal else _PIPE_WIDTH)
    for sheet in sheets(results):
        table = Table(title=sheet.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, head in enumerate(sheet.head):
            is_words = index == 0 or head in ("", "per", "which")
            table.add_column(head, justify="left" if is_words else "right", overflow="fold")
        for row in sheet.rows:
            table.add_row(*(cell.replace(" (", "\n").rstrip(")") if sheet.title == "Loads" else cell for cell in row))
        console.print(table)
        console.print()
    for claim in CLAIMS:
        verdict = claim.judge(results)
        style = {"holds": "green", "fails": "red", "partly": "yellow"}.get(verdict.ruling, "dim")
        console.print(f"[bold]{claim.title}[/bold]: [{style}]{RULINGS[verdict.ruling]}[/{style}]", soft_wrap=True)
        for sentence in verdict.words:
            console.print(f"  {sentence}", soft_wrap=True, markup=False)
    console.print()
    for mode in results.modes:
        if mode.reason is not None:
            console.print(f"not measured: {mode.title}: {mode.reason}", soft_wrap=True, markup=False)
    for note in results.notes:
        console.print(f"note: {note}", soft_wrap=True, markup=False)
