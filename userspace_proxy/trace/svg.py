"""Draws a trace as one SVG file, light and dark; as wide as a phone, or with lanes side by side. Pure.

The file loads no other resource, so it looks the same in a page, in a slide and in ten years.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from xml.sax.saxutils import escape

from userspace_proxy.trace.lanes import Lane, Line, Station, lanes
from userspace_proxy.trace.values import PacketTrace

WIDTH = 460
_EDGE, _PAD, _GAP, _INDENT = 12, 12, 20, 12
_SIZES = {"title": 16, "lane": 14, "ends": 12, "station": 13, "aside": 11, "mono": 11, "outcome": 13}
_MONO = {"ends", "mono"}
# Maximum average width of a character relative to the font size, for all usual fonts.
_MONO_EM, _TEXT_EM, _BOLD_EM = 0.605, 0.58, 0.66
_BOLD_CAPITALS_EM = 0.75
_BOLD = {"title", "lane", "station", "outcome"}
# Keep an iptables option and its value on one line.
_OPTION = re.compile(r"(?<=\s)(!|--?[\w-]+) (?=[^-\s])")
_GLUE = "\u00a0"
_STYLE = Path(__file__).with_name("drawing.css")


@dataclass(slots=True)
class _Sheet:
    """The elements drawn so far, and the vertical position of the next one."""

    parts: list[str] = field(default_factory=list)
    y: float = _EDGE

    def text(self, words: str, x: float, size: str, kind: str, room: float, hang: int = 0) -> None:
        """Append *words*, wrapped to the width *room*."""
        height = _SIZES[size]
        columns = max(12, int(room / (height * _em(size))))
        for line in _wrapped(words, columns, hang):
            self.y += height + 3
            own = "mono " if size in _MONO else ""
            self.parts.append(
                f'<text class="{own}{kind}" x="{x:g}" y="{self.y - 3:g}" font-size="{height}" xml:space="preserve">'
                f"{escape(line)}</text>"
            )

    def box(self, kind: str, top: float, left: float = _EDGE, right: float = WIDTH - _EDGE) -> str:
        """Return a box from *top* to the current position; insert it before its content."""
        return (
            f'<rect class="{kind}" x="{left:g}" y="{top:g}" width="{right - left:g}" height="{self.y - top:g}" rx="6"/>'
        )

    def arrow(self) -> None:
        """Append an arrow to the next element."""
        x, top = _EDGE + 16, self.y
        self.y += _GAP
        self.parts.append(f'<path class="arrow" d="M{x} {top:g}V{self.y - 5:g}"/>')
        self.parts.append(f'<path class="head" d="M{x - 4} {self.y - 7:g}l4 7l4 -7z"/>')


def _em(size: str) -> float:
    return _MONO_EM if size in _MONO else _BOLD_EM if size in _BOLD else _TEXT_EM


def _wrapped(words: str, columns: int, hang: int) -> list[str]:
    glued = _OPTION.sub(rf"\1{_GLUE}", f" {words}").strip()
    lines = textwrap.wrap(glued, columns, subsequent_indent=" " * hang, break_on_hyphens=False)
    return [line.replace(_GLUE, " ") for line in lines]


def drawing(trace: PacketTrace, title: str = "", *, wide: bool = False) -> str:
    """Return *trace* as SVG with *title* above it; *wide* draws the lanes side by side."""
    heading = title or f"A packet's way to {trace.portal}"
    shown = lanes(trace, folded=True)
    # Failed dials share a column with the successful one below them.
    columns = [list(group) for _, group in groupby(shown, lambda lane: lane.title)] if wide else [list(shown)]
    width = max(1, len(columns)) * WIDTH
    sheet = _Sheet()
    sheet.text(heading, _EDGE, "title", "heading", width - 2 * _EDGE)
    top = bottom = sheet.y
    for number, column in enumerate(columns):
        sheet.y = top
        sheet.parts.append(f'<g transform="translate({number * WIDTH} 0)">')
        for lane in column:
            _draw_lane(sheet, lane)
        sheet.parts.append("</g>")
        bottom = max(bottom, sheet.y)
    sheet.y = bottom
    _draw_outcome(sheet, trace, width - 2 * _EDGE)
    height = sheet.y + _EDGE
    return "".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:g}" width="{width}" '
            f'height="{height:g}" role="img" aria-labelledby="t d">\n',
            f'<title id="t">{escape(heading)}</title>\n<desc id="d">{escape(_described(trace))}</desc>\n',
            f"<style>{_STYLE.read_text()}</style>\n",
            f'<rect class="paper" width="{width}" height="{height:g}" rx="10"/>\n',
            "\n".join(sheet.parts),
            "\n</svg>\n",
        )
    )


def _draw_lane(sheet: _Sheet, lane: Lane) -> None:
    sheet.y += 14
    sheet.text(lane.title, _EDGE, "lane", "lane", WIDTH - 2 * _EDGE)
    sheet.text(lane.aside, _EDGE, "ends", "dim", WIDTH - 2 * _EDGE)
    sheet.y += 6
    for number, station in enumerate(lane.stations):
        if number:
            sheet.arrow()
        _draw_station(sheet, station)


def _draw_station(sheet: _Sheet, station: Station) -> None:
    top, at = sheet.y, len(sheet.parts)
    room = WIDTH - 2 * _EDGE - 2 * _PAD
    sheet.y += 5
    sheet.text(station.title, _EDGE + _PAD, "station", f"title-{station.kind}", room)
    used = len(station.title) * _SIZES["station"] * _BOLD_CAPITALS_EM + len(station.aside) * _SIZES["aside"] * _TEXT_EM
    if used + 10 < room:
        sheet.parts.append(
            f'<text class="dim" x="{WIDTH - _EDGE - _PAD}" y="{sheet.y - 3:g}" font-size="{_SIZES["aside"]}" '
            f'text-anchor="end">{escape(station.aside)}</text>'
        )
    else:
        sheet.text(station.aside, _EDGE + _PAD, "aside", "dim", room)
    for line in station.lines:
        _draw_line(sheet, line)
    sheet.y += 6
    sheet.parts.insert(at, sheet.box(f"station {station.kind}", top))


def _draw_line(sheet: _Sheet, line: Line) -> None:
    left = _EDGE + _PAD + _INDENT * min(line.depth, 6)
    room = WIDTH - _EDGE - _PAD - left
    if line.kind in ("decides", "change"):
        top, at = sheet.y + 4, len(sheet.parts)
        sheet.y = top + 2
        sheet.text(line.text, left + 6, "mono", line.kind, room - 12, hang=2)
        sheet.y += 4
        sheet.parts.insert(at, sheet.box(f"under-{line.kind}", top, left, WIDTH - _EDGE - _PAD))
        return
    sheet.y += 4 if line.kind == "chain" else 1
    words = f"= {line.text}" if line.kind == "element" else line.text
    sheet.text(words, left + (6 if line.kind == "element" else 0), "mono", line.kind, room, hang=2)


def _draw_outcome(sheet: _Sheet, trace: PacketTrace, room: float) -> None:
    sheet.y += 16
    if trace.flow is not None:
        sheet.text("What conntrack remembers", _EDGE, "lane", "lane", room)
        sheet.text(f"there  {trace.flow.original}", _EDGE, "ends", "dim", room, hang=7)
        sheet.text(f"back   {trace.flow.reply}", _EDGE, "ends", "dim", room, hang=7)
        sheet.y += 8
    sheet.text(trace.outcome, _EDGE, "outcome", "outcome", room)
    for note in trace.notes:
        sheet.text(note, _EDGE, "aside", "dim", room)


def _described(trace: PacketTrace) -> str:
    return ". ".join((trace.outcome, *_words(trace))).replace("..", ".")


def _words(trace: PacketTrace) -> Iterator[str]:
    for lane in lanes(trace, folded=True):
        yield f"{lane.title}, {lane.aside}: {', '.join(station.title for station in lane.stations)}"
