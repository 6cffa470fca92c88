"""The lines of a stream do not depend on how it is cut into chunks."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userspace_proxy.sources.stream import LineSplitter


@given(st.binary().map(lambda stream: stream + b"\n"), st.lists(st.integers(0, 60)))
def test_lines_do_not_depend_on_the_chunks_of_a_stream(stream: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(stream)]
    splitter = LineSplitter(1_000)

    lines = [line for a, b in itertools.pairwise(edges) for line in splitter.lines(stream[a:b])]

    assert lines == [line for line in stream.split(b"\n") if line]


def test_a_line_without_an_end_is_not_a_line_yet() -> None:
    assert LineSplitter(10).lines(b"half") == []


def test_a_line_that_is_too_long_is_refused_before_it_has_ended() -> None:
    splitter = LineSplitter(10)
    splitter.lines(b"123\n1234567890")

    with pytest.raises(ValueError, match="longer than 10 bytes"):
        splitter.lines(b"1")
