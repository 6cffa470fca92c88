"""The chart of docs/explanation/performance.md as SVG: a panel for each case, a bar for each plane."""

from __future__ import annotations

from xml.sax.saxutils import escape

from benchmarks.cases import CASES
from benchmarks.planes import PLANES
from benchmarks.results import Results

_PANEL_WIDTH, _HEAD_HEIGHT, _BAR_HEIGHT, _BAR_GAP = 400, 22, 15, 3
_LABEL_WIDTH, _VALUE_WIDTH, _MARGIN = 100, 48, 18
_COLUMNS = 2
_KERNEL, _PEER, _OURS, _INK = "#9aa5b1", "#6b8fc4", "#d9822b", "#222222"


def chart(results: Results) -> str:
    """Return the rates as an SVG document: each bar a ratio, a line where the reference (1.00) stands."""
    cases = [case for case in CASES if case.name in results.runs]
    panel_height = _HEAD_HEIGHT + len(PLANES) * (_BAR_HEIGHT + _BAR_GAP) + _MARGIN
    rows = -(-len(cases) // _COLUMNS)
    width, height = _COLUMNS * (_PANEL_WIDTH + _MARGIN) + _MARGIN, rows * panel_height + 2 * _MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="system-ui, sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for index, case in enumerate(cases):
        ratios = {
            plane.name: results.ratio(case.name, plane.name, case.reference, lambda run: run.rate) for plane in PLANES
        }
        left = _MARGIN + index % _COLUMNS * (_PANEL_WIDTH + _MARGIN)
        top = _MARGIN + index // _COLUMNS * panel_height
        parts.append(f'<g transform="translate({left},{top})">')
        parts += _panel(f"{case.title} ({case.reference} = 1)", ratios)
        parts.append("</g>")
    parts.append("</svg>\n")
    return "\n".join(parts)


def _panel(title: str, ratios: dict[str, float | None]) -> list[str]:
    scale = (_PANEL_WIDTH - _LABEL_WIDTH - _VALUE_WIDTH) / max(1.0, *(ratio or 0.0 for ratio in ratios.values()))
    bottom = _HEAD_HEIGHT + len(ratios) * (_BAR_HEIGHT + _BAR_GAP)
    one_at = _LABEL_WIDTH + scale
    parts = [
        f'<text y="12" font-weight="bold" font-size="12" fill="{_INK}">{escape(title)}</text>',
        f'<path d="M{one_at:.1f} {_HEAD_HEIGHT - 2}V{bottom}" stroke="{_INK}" stroke-dasharray="3 3"/>',
    ]
    for index, plane in enumerate(PLANES):
        ratio = ratios[plane.name]
        y = _HEAD_HEIGHT + index * (_BAR_HEIGHT + _BAR_GAP)
        colour = _OURS if plane.ours else _PEER if plane.proxy else _KERNEL
        length = (ratio or 0.0) * scale
        value = "-" if ratio is None else f"{ratio:.2f}"
        parts += [
            f'<text x="{_LABEL_WIDTH - 6}" y="{y + 11}" text-anchor="end" fill="{_INK}">{escape(plane.name)}</text>',
            f'<rect x="{_LABEL_WIDTH}" y="{y}" width="{length:.1f}" height="{_BAR_HEIGHT}" rx="2" fill="{colour}"/>',
            # A white rim, where the line at 1.00 runs through the value.
            f'<text x="{_LABEL_WIDTH + length + 5:.1f}" y="{y + 11}" fill="{_INK}" stroke="#ffffff" stroke-width="3" '
            f'paint-order="stroke">{value}</text>',
        ]
    return parts
