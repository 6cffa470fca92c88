"""All figures as text tables, for the terminal, a pipe and the end of the report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from userspace_proxy.compare.claims import CLAIMS, RULINGS, choices
from userspace_proxy.compare.derived import EVENT_NAMES, noise_text, outage, percent, short, sizes_of, timelines_of
from userspace_proxy.compare.disasters import DISASTERS, SLOW_S, Disaster
from userspace_proxy.compare.judge import Figure, figure, noise
from userspace_proxy.compare.results import ModeRun, Results
from userspace_proxy.compare.scaling import SIZES

_NONE = "-"
_PIPE_WIDTH = 170
_STYLES = {"holds": "green", "fails": "red", "partly": "yellow"}
_RARE = 0.05  # calls a unit; fewer are housekeeping
# The figures of the charts, each once.
_LOADS = tuple({(p.case, p.figure): p for claim in CLAIMS for p in claim.bars if p.figure}.values())
_SIZES = tuple(panel for claim in CLAIMS for panel in claim.lines)
_UNITS = {"calls-request": "request", "calls-connection": "connection", "calls-mb": "megabyte"}


class Cell(NamedTuple):
    """A value, and the spread of its rounds."""

    value: str
    spread: str = ""


def cells(*values: str) -> list[Cell]:
    """Return *values* as cells without a spread."""
    return [Cell(value) for value in values]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table. Its first ``words`` columns, and columns without a figure, hold text."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    words: int = 1


def sheets(results: Results) -> Iterator[Sheet]:
    """Yield the tables for which *results* have figures."""
    for make in (_loads, calls_sheet, _services, _outages):
        sheet = make(results)
        if sheet.rows:
            yield sheet


def _loads(results: Results) -> Sheet:
    rows = []
    for panel in _LOADS:
        found = [figure(results, panel.case, mode.name, panel.figure) for mode in results.shown()]
        if any(found):
            of_modes = [_cell(each, panel.factor) for each in found]
            rows.append([Cell(panel.label), *of_modes, Cell(noise_text(noise(results, panel.case, panel.figure)))])
    return Sheet("Loads", ["", *(mode.title for mode in results.shown()), "noise"], rows)


def _cell(found: Figure | None, factor: float) -> Cell:
    if found is None:
        return Cell(_NONE)
    return Cell(short(found.median * factor), f"{short(found.low * factor)} to {short(found.high * factor)}")


def calls_sheet(results: Results) -> Sheet:
    """Return the system calls of each mode, for each unit of work."""
    titles = {mode.name: mode.title for mode in results.modes}
    rows = []
    for case, unit in _UNITS.items():
        for sample in (sample for sample in results.samples if sample.case == case):
            which = ", ".join(f"{name} {short(count)}" for name, count in sample.figures.items() if count >= _RARE)
            rows.append(cells(titles[sample.mode], unit, short(sum(sample.figures.values())), which))
    return Sheet("System calls", ["", "per", "calls", "which"], rows, words=2)


def _services(results: Results) -> Sheet:
    rows = []
    for mode in results.ran():
        for panel in _SIZES:
            if by_size := sizes_of(results, mode.name, panel.figure):
                of_sizes = (short(by_size[size]) if size in by_size else _NONE for size in SIZES)
                rows.append(cells(mode.title, panel.label, *of_sizes))
    return Sheet("By the number of Services", ["", "", *(f"{size:,}" for size in SIZES)], rows, words=2)


def _outages(results: Results) -> Sheet:
    modes, rows = results.shown(), []
    for event, what in EVENT_NAMES.items():
        shares = [_shares(results, event, mode.name) for mode in modes]
        if set(shares) != {(_NONE, _NONE)}:
            rows.append(cells(f"a Pod {what}: failed", *(failed for failed, _ in shares)))
            rows.append(cells(f"a Pod {what}: slow", *(slow for _, slow in shares)))
    return Sheet("Requests while one Pod of three fails", ["", *(mode.title for mode in modes)], rows)


def _shares(results: Results, event: str, mode: str) -> tuple[str, str]:
    """Return the shares of failed and of slow requests, or dashes."""
    timelines = timelines_of(results, event, mode)
    failed, slow = outage(timelines)
    return (percent(failed), percent(slow)) if timelines else (_NONE, _NONE)


def disaster_sheets(results: Results) -> Iterator[tuple[Disaster, Sheet]]:
    """Yield the disasters that happened, each with its table."""
    slow = f"slower than {SLOW_S:g} s"
    head = ("", "failed", "stated", "lost on the way", "stated", slow, "time to recover", "open lost", "verdict")
    for disaster in DISASTERS:
        rows = [
            _disaster_row(disaster, mode, sample.figures)
            for mode in results.shown()
            for sample in results.samples
            if (sample.case, sample.mode) == (disaster.case, mode.name)
        ]
        if rows:
            yield disaster, Sheet(disaster.title, head, rows)


def _disaster_row(disaster: Disaster, mode: ModeRun, figures: Mapping[str, float]) -> list[Cell]:
    failed, received = disaster.at_most(mode)
    whole = {name: f"{value:.0f}" for name, value in figures.items()}
    return cells(
        mode.title,
        f"{whole['failed']} of {whole['requests']}",
        f"at most {failed}",
        whole["received"],
        f"at most {received}",
        whole["slow"],
        f"{figures['recover_s']:.1f} s",
        f"{whole['lost']} of {whole['opened']}",
        "; ".join(disaster.surprises(mode, figures)) or "as stated",
    )


# ---- printing


def stdout(pipe_width: int = _PIPE_WIDTH) -> Console:
    """Return the console for stdout: coloured on a terminal, plain and *pipe_width* columns wide in a pipe."""
    return Console(highlight=False, width=None if Console().is_terminal else pipe_width)


def print_sheet(console: Console, sheet: Sheet) -> None:
    """Print *sheet*, with the spread of a value below it."""
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.min_width = len(sheet.title)
    for index, head in enumerate(sheet.head):
        is_words = index < sheet.words or head == "which"
        table.add_column(head, justify="left" if is_words else "right", overflow="fold")
    for row in sheet.rows:
        table.add_row(*("\n".join(filter(None, cell)) for cell in row))
    console.print(table)
    console.print()


def print_all(results: Results) -> None:
    """Print tables, verdicts, missing parts and advice to stdout."""
    console = stdout()
    for sheet in sheets(results):
        print_sheet(console, sheet)
    for disaster, sheet in disaster_sheets(results):
        print_sheet(console, sheet)
        _print_lines(console, "  ", (disaster.what, disaster.why))
    for claim in CLAIMS:
        verdict = claim.judge(results)
        style = _STYLES.get(verdict.ruling, "dim")
        console.print(f"[bold]{claim.title}[/bold]: [{style}]{RULINGS[verdict.ruling]}[/{style}]", soft_wrap=True)
        _print_lines(console, "  ", verdict.words)
    console.print()
    missing = [f"{mode.title}: {mode.reason}" for mode in results.modes if mode.reason]
    _print_lines(console, "not measured: ", missing)
    _print_lines(console, "note: ", results.notes)
    console.print("So choose ...", style="bold")
    _print_lines(console, "  ", choices(results))


def _print_lines(console: Console, prefix: str, lines: Sequence[str]) -> None:
    for line in lines:
        console.print(f"{prefix}{line}", soft_wrap=True, markup=False)
