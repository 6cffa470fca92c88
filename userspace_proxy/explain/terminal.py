"""Explained rules in colours, two modes side by side where there is room."""

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.highlighter import RegexHighlighter
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from userspace_proxy.explain.lines import Explained, Line
from userspace_proxy.explain.plain import opens_block
from userspace_proxy.explain.words import words_in

SIDE_BY_SIDE_COLUMNS = 160
_TAB = 2
_HANG = 4  # how much further what is behind the first row of a line stands
_GAP = 4

_THEME = Theme(
    {
        "rules.keyword": "blue",
        "rules.chain": "yellow",
        "rules.address": "cyan",
        "rules.port": "bright_cyan",
        "rules.name": "magenta",
        "rules.verdict": "bold green",
        "rules.refusal": "bold red",
        "rules.reason": "dim",
    }
)


class _Rules(RegexHighlighter):
    """Colours for both rule languages; later patterns override earlier ones."""

    base_style = "rules."
    highlights = [
        r"(?P<keyword>^\s*(?:table|delete|map|set|chain|type|typeof|elements)\b|^(?:\*\w+|COMMIT|:|-[AIDa]\b|#.*))",
        r"(?P<address>\b\d{1,3}(?:\.\d{1,3}){3}(?:/\d+)?|\[?\b[\da-f]{1,4}(?::[\da-f]{0,4}){2,}[\da-f](?:/\d+)?\]?)",
        r"(?:--dports? |--to-ports |(?:tcp|udp) \. |\d\.\d+:|\]:|redirect to :)(?P<port>\d[\d,]*)\b",
        r"(?:: |[\d.]+ \. |: [\da-f:.]+ \. )(?P<port>\d+)(?=,$| \}$|$)",
        r"(?P<chain>\bKUBE-[A-Z0-9-]+|\bUSERSPACE-PROXY[A-Z-]*|@\w+)",
        r"(?:\b(?:jump|goto|chain|map|set|table inet) |-[AI] )(?P<chain>[A-Za-z]\w+(?![\w-]))",
        r"(?P<verdict>\b(?:accept|dnat|redirect|masquerade|jump|goto)\b)",
        r"(?P<verdict>-j (?:ACCEPT|DNAT|REDIRECT|MASQUERADE|RETURN|MARK)\b)",
        r"(?P<refusal>\b(?:drop|reject)\b(?!-)|-j (?:DROP|REJECT)\b)",
        r"(?P<name>\"[^\"]*\")",
    ]


_colour = _Rules()


def print_to(found: Sequence[Explained], *, explains: bool, console: Console | None = None) -> None:
    """Print *found* to *console*, by default the terminal."""
    console = console or Console(highlight=False, theme=_THEME)
    if explains:
        console.print(_legend(found), "", sep="\n")
    width = console.width
    if width < SIDE_BY_SIDE_COLUMNS or len(found) == 1:
        for mode in found:
            console.print(_shown(mode, console, width, explains=explains), "", sep="\n")
        return
    half = (width - _GAP) // 2
    for at in range(0, len(found), 2):
        grid = Table.grid(padding=(0, _GAP, 0, 0), pad_edge=False)
        grid.add_column(width=half)
        grid.add_column(width=half)
        grid.add_row(*(_shown(mode, console, half, explains=explains) for mode in found[at : at + 2]))
        console.print(grid, "", sep="\n")


def _legend(found: Sequence[Explained]) -> Table:
    """Return the words that explanations use."""
    table = Table.grid(padding=(0, 2, 0, 0))
    for word, meaning in words_in(line for mode in found for line in mode.lines).items():
        table.add_row(Text(word, "bold"), Text(meaning, "rules.reason"))
    return table


def _shown(mode: Explained, console: Console, width: int, *, explains: bool) -> RenderableType:
    rows: list[RenderableType] = [Rule(Text(str(mode.rendered), "bold"), align="left", style="dim")]
    for line in mode.lines:
        if opens_block(line):
            rows.append(Text(""))
        rows += _rows(line, console, width, explains=explains)
    return Group(*rows)


def _rows(line: Line, console: Console, width: int, *, explains: bool) -> Iterator[Text]:
    """Yield *line* with its explanation: behind it if there is room, otherwise below it."""
    text = line.text.lstrip("\t")
    indent = _TAB * (len(line.text) - len(text))
    reason = line.explanation if explains else ""
    coloured = _colour(text)
    if reason and indent + len(text) + len(reason) + 2 <= width and line.text.startswith("\t"):
        yield Text(" " * indent).append(coloured).append("  ").append(reason, "rules.reason")
        return
    yield from _wrapped(coloured, console, width, indent)
    if reason:
        yield from _wrapped(Text(reason, "rules.reason"), console, width, indent + _HANG, hang=0)


def _wrapped(text: Text, console: Console, width: int, indent: int, hang: int = _HANG) -> Iterator[Text]:
    for number, row in enumerate(text.wrap(console, width - indent - hang)):
        row.rstrip()
        yield Text(" " * (indent + (hang if number else 0))).append(row)
