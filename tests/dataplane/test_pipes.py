"""Pipes are lent empty, never dirty, and never more than there may be."""

from __future__ import annotations

import os

import pytest

from userspace_proxy.dataplane import pipes
from userspace_proxy.dataplane.pipes import PipePool


def test_a_pipe_that_was_given_back_empty_is_lent_again() -> None:
    pool = PipePool()
    first = pool.lend()
    assert first is not None
    pool.take_back(first)

    assert pool.lend() is first
    assert pool.descriptors == 2


def test_a_pipe_that_still_holds_bytes_is_never_lent_again() -> None:
    pool = PipePool()
    dirty = pool.lend()
    assert dirty is not None
    dirty.held_bytes = os.write(dirty.write_end, b"somebody's")

    pool.take_back(dirty)

    assert pool.descriptors == 0
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(dirty.read_end)


def test_when_all_are_out_none_is_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipes, "PIPES_MAX", 2)
    pool = PipePool()
    lent = [pool.lend(), pool.lend()]

    assert pool.lend() is None

    for pipe in lent:
        assert pipe is not None
        pool.take_back(pipe)
    assert pool.lend() is not None


def test_idle_pipes_are_closed_when_descriptors_are_short() -> None:
    pool = PipePool()
    idle, used = pool.lend(), pool.lend()
    assert idle is not None
    assert used is not None
    pool.take_back(idle)

    pool.shed()

    assert pool.descriptors == 2
    os.fstat(used.read_end)
    pool.take_back(used)
    pool.shed()
    assert pool.descriptors == 0
