"""The report: one valid file with every claim, and the modes that were not measured."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import msgspec
import pytest

from tests.compare.made_results import whole_run
from userspace_proxy.compare.claims import CLAIMS, RULINGS
from userspace_proxy.compare.derived import short
from userspace_proxy.compare.page import page
from userspace_proxy.compare.results import Results, from_json, to_json
from userspace_proxy.compare.tables import sheets

_VOID = {"meta", "br", "link", "img"}


@pytest.fixture(scope="module")
def results() -> Results:
    return whole_run()


@pytest.fixture(scope="module")
def report(results: Results) -> str:
    return page(results).decode()


class Outline(HTMLParser):
    """Raises where tags do not match; collects links and texts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_tags_match_and_nothing_is_loaded_from_elsewhere(report: str) -> None:
    outline = Outline()
    outline.feed(report)

    assert outline.open == []
    assert outline.loaded == []
    assert not re.search(r"<script|<link|url\(|@import|https?://", report)


def test_each_chart_is_a_drawing_with_a_name(report: str) -> None:
    charts = re.findall(r"<svg.*?</svg>", report, re.DOTALL)

    assert len(charts) > 20
    for chart in charts:
        assert ElementTree.fromstring(chart).attrib["aria-label"]  # noqa: S314 - ours
        assert "nan" not in chart


def test_each_claim_has_a_verdict(report: str) -> None:
    for claim in CLAIMS:
        section = report.partition(f'id="{claim.name}"')[2].partition("</section>")[0]
        assert claim.title in section
        assert any(f">{words}</span>" in section for words in RULINGS.values())


def test_a_mode_that_did_not_take_part_is_named_with_the_reason(report: str, results: Results) -> None:
    missing = [mode for mode in results.modes if mode.reason]

    assert missing
    for mode in missing:
        assert f"not measured: {mode.reason}" in report


def test_unknown_noise_is_a_dash(results: Results) -> None:
    noise = {row[0].value: row[-1].value for row in next(sheets(results)).rows}

    assert noise["CPU of the proxy a request, µs"] == "-"
    assert noise["Context switches a request, 1 connection"] == "-"
    assert float(noise["Requests a second"]) > 1


def test_each_tile_names_its_subject(report: str) -> None:
    tiles = re.findall(r'<div class="tile"><h3>(.*?)</h3><b>(.*?)</b><span>(.*?)</span>', report)

    assert [subject for subject, _, _ in tiles] == [
        "Requests a second, kept connections",
        "Throughput of one large transfer",
        "Time for a new connection",
        "Failed requests when one Pod of three died",
    ]
    assert all("userspace" in words for _, _, words in tiles)


def test_it_closes_with_what_to_choose(report: str) -> None:
    last = report.rpartition("<section")[2]

    assert "So choose ..." in last
    assert "<li>userspace, where a failed request costs more than microseconds: when a Pod died, 0%" in last
    assert "<li>iptables only for few Services: with 5,000 of them" in last


def test_json_is_read_as_it_was_written(results: Results) -> None:
    assert from_json(to_json(results)) == results


def test_another_schema_is_refused(results: Results) -> None:
    with pytest.raises(msgspec.ValidationError, match="schema is 99"):
        from_json(to_json(results).replace(b'"schema": 1', b'"schema": 99'))


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.0312, "0.031"), (1.25, "1.25"), (2.0, "2"), (12.34, "12.3"), (123.4, "123"), (12_345, "12,300")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert short(value) == text
