"""The tree and the drawing are complete, fit their width, and equal their golden files."""

from __future__ import annotations

import io
import itertools
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.modes.redirect_cases import assert_golden
from tests.trace.recordings import MODES, recording, trace
from tests.trace.test_ipvs import LISTING
from userspace_proxy.trace.analysis import analyse, with_outcome
from userspace_proxy.trace.elements import Elements
from userspace_proxy.trace.legs import TABLE, legs
from userspace_proxy.trace.nftrace import Message
from userspace_proxy.trace.paths import packet_paths
from userspace_proxy.trace.rulebook import Rulebook
from userspace_proxy.trace.svg import WIDTH, drawing
from userspace_proxy.trace.text import show
from userspace_proxy.trace.values import Ends, PacketTrace

SVG = "{http://www.w3.org/2000/svg}"
_MONO_EM, _BOLD_EM = 0.6, 0.62


def drawn(mode: str, *, wide: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(drawing(trace(mode), wide=wide))  # noqa: S314 - our own


def words(svg: ElementTree.Element) -> str:
    return " ".join("".join(text.itertext()).strip() for text in svg.iter(f"{SVG}text"))


def plain(told: PacketTrace, width: int = 10_000) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(told, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("wide", [False, True], ids=["column", "side by side"])
@pytest.mark.parametrize("mode", MODES)
def test_a_drawing_has_every_stage_with_its_lines(mode: str, *, wide: bool) -> None:
    shown = words(drawn(mode, wide=wide))

    for path in packet_paths(trace(mode), folded=True):
        for stage in path.stages:
            assert stage.title in shown
            for line in stage.lines:
                assert line.text in re.sub(r"\s+", " ", shown)


@pytest.mark.parametrize("mode", MODES)
def test_no_text_of_a_drawing_is_wider_than_its_box(mode: str) -> None:
    for text in drawn(mode).iter(f"{SVG}text"):
        said, size, x = "".join(text.itertext()), float(text.attrib["font-size"]), float(text.attrib["x"])
        wide = len(said) * size * (_MONO_EM if "mono" in text.attrib["class"] else _BOLD_EM)
        if text.attrib.get("text-anchor") == "end":
            x -= wide
        assert x >= 0, said
        assert x + wide <= WIDTH, said


@pytest.mark.parametrize("mode", MODES)
def test_no_part_of_a_drawing_overlaps_another_or_the_edge(mode: str) -> None:
    svg = drawn(mode)
    height = float(svg.attrib["height"])
    lines = [float(text.attrib["y"]) for text in svg.iter(f"{SVG}text") if "text-anchor" not in text.attrib]
    boxes = [rect for rect in svg.iter(f"{SVG}rect") if rect.attrib["class"].startswith("stage")]

    assert lines == sorted(lines)
    assert all(after - before >= 11 for before, after in itertools.pairwise(lines))
    assert max(float(box.attrib["y"]) + float(box.attrib["height"]) for box in boxes) < height
    assert max(lines) < height


def test_a_drawing_has_a_description_and_loads_nothing() -> None:
    text = drawing(trace("iptables"))
    svg = ElementTree.fromstring(text)  # noqa: S314

    title, described = svg.find(f"{SVG}title"), svg.find(f"{SVG}desc")
    assert title is not None
    assert described is not None
    assert title.text == "A packet's way to 10.96.0.11:80"
    assert "PREROUTING, FORWARD, POSTROUTING, the backend" in (described.text or "")
    assert svg.attrib["aria-labelledby"] == "t d"
    assert "prefers-color-scheme: dark" in text
    assert not re.search(r"url\(|@import|href|http(?!://www\.w3\.org/2000/svg)", text)


def test_a_drawing_equals_its_golden_file() -> None:
    assert_golden("trace-userspace.svg", drawing(trace("userspace"), "Mode userspace"))


def test_a_tree_equals_its_golden_file() -> None:
    assert_golden("trace-iptables.txt", plain(trace("iptables")))


@pytest.mark.parametrize("mode", MODES)
def test_in_a_pipe_a_tree_is_plain_and_every_rule_is_on_one_line(mode: str) -> None:
    told = trace(mode)
    shown = plain(told)

    assert "\x1b" not in shown
    rules = [step.rule for leg in told.legs for hook in leg.hooks for visit in hook.visits for step in visit.steps]
    assert rules
    assert all(rule in shown for rule in rules)
    assert max(len(line) for line in plain(told, width=60).splitlines()) <= 60


def test_text_in_a_drawing_is_escaped() -> None:
    told = trace("nftables")
    nasty = replace(told, notes=('<script>alert("&")</script>',), outcome="a < b & c")

    svg = ElementTree.fromstring(drawing(nasty))  # noqa: S314

    assert '<script>alert("&")</script>' in words(svg)
    assert not list(svg.iter(f"{SVG}script"))


def test_ipvs_is_shown_between_input_and_output() -> None:
    path, *_ = packet_paths(through_ipvs(), folded=True)
    ipvs = next(stage for stage in path.stages if stage.kind == "ipvs")

    titles = ["the client", "PREROUTING", "INPUT", "IPVS", "OUTPUT", "POSTROUTING", "the backend"]
    assert [stage.title for stage in path.stages] == titles
    assert ipvs.aside == "TCP 10.96.0.11:80, scheduler rr"
    assert [line.text for line in ipvs.lines] == [
        "10.244.0.3:8080, weight 1",
        "10.244.0.2:8080, weight 0",
        "10.96.0.11:80 became 10.244.0.3:8080",
    ]
    assert "IPVS" in plain(through_ipvs())
    assert "IPVS" in words(ElementTree.fromstring(drawing(through_ipvs())))  # noqa: S314


def test_changes_by_ipvs_are_attributed_to_ipvs() -> None:
    changes = [line.text for path in packet_paths(through_ipvs(), folded=True) for stage in path.stages
               for line in stage.lines if line.kind == "change"]  # fmt: skip

    assert changes == ["10.96.0.11:80 became 10.244.0.3:8080", "IPVS: sender 10.244.0.3:8080 became 10.96.0.11:80"]
    assert through_ipvs().outcome == "10.96.0.11:80 became 10.244.0.3:8080; the answer was SYN+ACK"


def test_ipvs_is_shown_after_output_for_local_packets() -> None:
    asked, sent = Ends("192.168.50.2", 4711, "10.96.0.11", 80), Ends("192.168.50.2", 4711, "10.244.0.3", 8080)
    seen = [("client_out", asked), ("dial_out", sent), ("after_output", sent), ("after_postrouting", sent)]

    (path,) = packet_paths(of_messages(seen), folded=True)

    assert [stage.title for stage in path.stages] == [
        "the client",
        "OUTPUT",
        "IPVS",
        "POSTROUTING",
        "the backend",
    ]
    assert not path.stages[1].lines


def through_ipvs() -> PacketTrace:
    """Return the trace of a kernel with IPVS, which takes packets at INPUT and sends them from OUTPUT."""
    asked, sent = Ends("192.168.50.2", 4711, "10.96.0.11", 80), Ends("192.168.50.2", 4711, "10.244.0.3", 8080)
    back, shown = Ends("10.244.0.3", 8080, "192.168.50.2", 4711), Ends("10.96.0.11", 80, "192.168.50.2", 4711)
    there = [("client_in", asked), ("after_prerouting", asked), ("at_input", asked)]
    on = [("client_out", sent), ("after_output", sent), ("after_postrouting", sent)]
    answer = [("answer_in", back), ("after_prerouting", back), ("after_forward", shown), ("after_postrouting", shown)]
    return of_messages([*there, *on, *answer])


def of_messages(seen: list[tuple[str, Ends]]) -> PacketTrace:
    told, asked = [], seen[0]
    for chain, ends in seen:
        is_first = (chain, ends) == asked or chain == "answer_in"
        told += said_at(chain, ends, handle=1 if is_first else 0)
    way = legs(told, Rulebook("", {}), {2: "eth0"}, Elements("tcp", {}))
    bare = replace(recording("nftables"), datagrams=[], ip_vs=LISTING)
    return with_outcome(replace(analyse(bare), legs=way))


def said_at(chain: str, ends: Ends, handle: int) -> list[Message]:
    what = "SYN" if ends.source == "192.168.50.2" else "SYN+ACK"
    kind = "rule" if handle else "end"
    first = Message(7, "inet", TABLE, chain, kind, handle, "continue", "", 2, 0, ends, what)
    return [first, replace(first, kind="policy", handle=0, verdict="accept", ends=None, what="")]
