"""Draws a trace as one SVG file, light and dark; as wide as a phone, or with packets side by side. Pure.

Positions are computed here; `drawing.svg` has the markup. The file loads no other resource, so it looks the same in a
page, in a slide and in ten years.
"""

import re
import textwrap
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2

from userspace_proxy.trace.paths import PacketPath, Stage, StageLine, packet_paths
from userspace_proxy.trace.values import PacketTrace

WIDTH = 460
_EDGE, _PAD, _GAP, _INDENT = 12, 12, 20, 12
_SIZES = {"title": 16, "lane": 14, "ends": 12, "stage": 13, "aside": 11, "mono": 11, "outcome": 13}
_MONO = {"ends", "mono"}
_BOLD = {"title", "lane", "stage", "outcome"}
# Maximum average width of a character relative to the font size, for all usual fonts.
_MONO_EM, _TEXT_EM, _BOLD_EM = 0.605, 0.58, 0.66
_BOLD_CAPITALS_EM = 0.75
# Keep an iptables option and its value on one line.
_OPTION = re.compile(r"(?<=\s)(!|--?[\w-]+) (?=[^-\s])")
_GLUE = "\u00a0"
_FOLDER = Path(__file__).parent


_templates = jinja2.Environment(
    loader=jinja2.FileSystemLoader(_FOLDER), autoescape=True, trim_blocks=True, lstrip_blocks=True
)
_templates.filters["number"] = "{:g}".format
_draw: Any = _templates.get_template("drawing.svg").module


@dataclass(slots=True)
class _Sheet:
    """The parts drawn so far, and the vertical position of the next one."""

    y: float
    parts: list[str] = field(default_factory=list)

    def text(self, words: str, x: float, size: str, kind: str, room: float, hang: int = 0) -> None:
        """Append *words*, wrapped to the width *room*."""
        height = _SIZES[size]
        columns = max(12, int(room / (height * _em(size))))
        for line in _wrapped(words, columns, hang):
            self.y += height + 3
            self.parts.append(_draw.text(x, self.y - 3, height, f"mono {kind}" if size in _MONO else kind, line))

    def arrow(self) -> None:
        """Append an arrow to the next part."""
        self.parts.append(_draw.arrow(self.y, self.y + _GAP))
        self.y += _GAP


def _em(size: str) -> float:
    return _MONO_EM if size in _MONO else _BOLD_EM if size in _BOLD else _TEXT_EM


def _wrapped(words: str, columns: int, hang: int) -> list[str]:
    glued = _OPTION.sub(rf"\1{_GLUE}", f" {words}").strip()
    lines = textwrap.wrap(glued, columns, subsequent_indent=" " * hang, break_on_hyphens=False)
    return [line.replace(_GLUE, " ") for line in lines]


def drawing(trace: PacketTrace, title: str = "", *, wide: bool = False) -> str:
    """Return *trace* as SVG with *title* above it; *wide* draws the packets side by side."""
    heading = title or f"A packet's way to {trace.portal}"
    shown = packet_paths(trace, folded=True)
    # Failed dials share a column with the successful one below them.
    columns = [list(group) for _, group in groupby(shown, lambda path: path.title)] if wide else [list(shown)]
    width = max(1, len(columns)) * WIDTH
    top = _Sheet(_EDGE)
    top.text(heading, _EDGE, "title", "heading", width - 2 * _EDGE)
    sheets = [_Sheet(top.y) for _ in columns]
    for sheet, column in zip(sheets, columns, strict=True):
        for path in column:
            _draw_path(sheet, path)
    bottom = _Sheet(max(sheet.y for sheet in (top, *sheets)))
    _draw_outcome(bottom, trace, width - 2 * _EDGE)
    titles = (f"{path.title}, {path.aside}: {', '.join(stage.title for stage in path.stages)}" for path in shown)
    page = _draw.page(
        heading,
        ". ".join((trace.outcome, *titles)).replace("..", "."),
        (_FOLDER / "drawing.css").read_text(),
        width,
        bottom.y + _EDGE,
        WIDTH,
        top.parts,
        [sheet.parts for sheet in sheets],
        bottom.parts,
    )
    return str(page)


def _draw_path(sheet: _Sheet, path: PacketPath) -> None:
    sheet.y += 14
    sheet.text(path.title, _EDGE, "lane", "lane", WIDTH - 2 * _EDGE)
    sheet.text(path.aside, _EDGE, "ends", "dim", WIDTH - 2 * _EDGE)
    sheet.y += 6
    for number, stage in enumerate(path.stages):
        if number:
            sheet.arrow()
        _draw_stage(sheet, stage)


def _draw_stage(sheet: _Sheet, stage: Stage) -> None:
    top, at = sheet.y, len(sheet.parts)
    room = WIDTH - 2 * _EDGE - 2 * _PAD
    sheet.y += 5
    sheet.text(stage.title, _EDGE + _PAD, "stage", f"title-{stage.kind}", room)
    used = len(stage.title) * _SIZES["stage"] * _BOLD_CAPITALS_EM + len(stage.aside) * _SIZES["aside"] * _TEXT_EM
    if used + 10 < room:
        end = WIDTH - _EDGE - _PAD
        sheet.parts.append(_draw.text(end, sheet.y - 3, _SIZES["aside"], "dim", stage.aside, is_at_end=True))
    else:
        sheet.text(stage.aside, _EDGE + _PAD, "aside", "dim", room)
    for line in stage.lines:
        _draw_line(sheet, line)
    sheet.y += 6
    sheet.parts.insert(at, _draw.box(f"stage {stage.kind}", _EDGE, top, WIDTH - _EDGE, sheet.y))


def _draw_line(sheet: _Sheet, line: StageLine) -> None:
    left = _EDGE + _PAD + _INDENT * min(line.depth, 6)
    right = WIDTH - _EDGE - _PAD
    if line.kind in ("decides", "change"):
        top, at = sheet.y + 4, len(sheet.parts)
        sheet.y = top + 2
        sheet.text(line.text, left + 6, "mono", line.kind, right - left - 12, hang=2)
        sheet.y += 4
        sheet.parts.insert(at, _draw.box(f"under-{line.kind}", left, top, right, sheet.y))
        return
    sheet.y += 4 if line.kind == "chain" else 1
    words = f"= {line.text}" if line.kind == "element" else line.text
    sheet.text(words, left + (6 if line.kind == "element" else 0), "mono", line.kind, right - left, hang=2)


def _draw_outcome(sheet: _Sheet, trace: PacketTrace, room: float) -> None:
    sheet.y += 16
    if trace.flow is not None:
        sheet.text("The entry in conntrack", _EDGE, "lane", "lane", room)
        sheet.text(f"there  {trace.flow.original}", _EDGE, "ends", "dim", room, hang=7)
        sheet.text(f"back   {trace.flow.reply}", _EDGE, "ends", "dim", room, hang=7)
        sheet.y += 8
    sheet.text(trace.outcome, _EDGE, "outcome", "outcome", room)
    for note in trace.notes:
        sheet.text(note, _EDGE, "aside", "dim", room)
