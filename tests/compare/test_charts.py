"""Charts are drawn of whatever was measured."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from userspace_proxy.compare.charts import SizeLine, lines, short


@pytest.mark.parametrize("points", [{10: -3.0, 1_000: -1.5}, {10: 0.0, 1_000: 0.0}], ids=["negative", "nothing"])
def test_lines_without_a_value_above_nothing_lie_on_the_ground(points: dict[int, float]) -> None:
    chart = ElementTree.fromstring(lines([SizeLine("nftables", "nftables", points)], short, "µs", is_log=False))  # noqa: S314 - ours

    dots = list(chart.iter("circle"))
    assert {dot.attrib["cy"] for dot in dots} == {"198.0"}
    assert [title.text for dot in dots for title in dot] == [
        f"nftables, {size:,} Services: {short(value)}" for size, value in points.items()
    ]
