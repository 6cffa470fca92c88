"""Charts: values, positions and labels."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from userspace_proxy.compare.charts import Bar, BarChart, LineChart, SizeLine
from userspace_proxy.compare.derived import short
from userspace_proxy.compare.judge import Figure
from userspace_proxy.compare.page import draw
from userspace_proxy.compare.results import ModeRun

MODE = ModeRun("nftables", "nftables", "kernel", ours=True)


@pytest.mark.parametrize("points", [{10: -3.0, 1_000: -1.5}, {10: 0.0, 1_000: 0.0}], ids=["negative", "zero"])
def test_lines_without_a_positive_value_are_drawn_at_zero(points: dict[int, float]) -> None:
    chart = ElementTree.fromstring(draw(LineChart("a figure", "", [SizeLine(MODE, points)])))  # noqa: S314 - ours

    dots = list(chart.iter("circle"))
    assert {dot.attrib["cy"] for dot in dots} == {"198.0"}
    assert [title.text for dot in dots for title in dot] == [
        f"nftables, {size:,} Services: {short(value)}" for size, value in points.items()
    ]


@pytest.mark.parametrize("is_log", [True, False])
def test_a_logarithmic_axis_says_so(*, is_log: bool) -> None:
    lines = LineChart("a figure", "", [SizeLine(MODE, {10: 1.0, 1_000: 100.0})], is_log=is_log)
    chart = ElementTree.fromstring(draw(lines))  # noqa: S314 - ours

    axes = [text.text for text in chart.iter("text") if text.attrib["class"] == "axis"]

    assert "number of Services (logarithmic)" in axes
    assert ("logarithmic" in axes) == is_log


def test_a_bar_has_its_value_at_its_end() -> None:
    bars = BarChart("a figure", "", [Bar(MODE, Figure(50.0, 10.0, 100.0))])
    chart = ElementTree.fromstring(draw(bars))  # noqa: S314 - ours

    bar = next(rect for rect in chart.iter("rect") if rect.attrib["class"] == "fill")
    value = next(text for text in chart.iter("text") if text.attrib["class"] == "value")

    assert float(value.attrib["x"]) - float(bar.attrib["x"]) - float(bar.attrib["width"]) == pytest.approx(6, abs=0.2)
