"""The chart of docs/explanation/performance.md: `chart.svg`, filled in."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import jinja2

from benchmarks.cases import CASES
from benchmarks.planes import PLANES
from userspace_proxy.compare.judge import ratios
from userspace_proxy.compare.results import Results


def chart(results: Results) -> str:
    """Return the rates as an SVG document: each bar is a ratio, with a line at the reference (1.00)."""
    titles = {plane.name: plane.title for plane in PLANES}
    panels = []
    for case in CASES:
        found = {plane: ratios(results, case.name, plane.name, case.reference, "rate") for plane in PLANES}
        bars: list[dict[str, Any]] = [
            {"plane": plane, "ratio": statistics.median(rounds) if rounds else None} for plane, rounds in found.items()
        ]
        if any(found.values()):
            panels.append({"title": f"{case.title} ({titles[case.reference]} = 1)", "bars": bars})
    text = Path(__file__).with_suffix(".svg").read_text()
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    return template.render(panels=panels) + "\n"
