"""The tool that counts system calls always ends, as it slows the processes that it traces."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.compare.conftest import PutTool
from userspace_proxy.compare import syscalls
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.errors import StartError

POLITE, DEAF = "trap 'exit 0' INT", "trap '' INT"


def put_strace(folder: Path, put_tool: PutTool, at_interrupt: str) -> None:
    """Install an strace that counts nothing and runs until it is stopped."""
    put_tool("strace", f"{at_interrupt}\n: > {folder}/counts\nwhile :; do sleep 0.02; done")


def wait_until_it_counts(folder: Path) -> None:
    give_up_at = time.monotonic() + 20
    while not (folder / "counts").exists():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_a_load_that_fails_ends_the_counting(node: ModeNode, tmp_path: Path, put_tool: PutTool) -> None:
    put_strace(tmp_path, put_tool, POLITE)

    def load() -> float:
        wait_until_it_counts(tmp_path)
        raise StartError("iperf3 said: the server is busy")

    with pytest.raises(StartError, match="the server is busy"):
        syscalls._counted(node, load)

    assert [process.poll() for process in node.host.processes] == [0]


def test_a_counter_that_does_not_end_is_killed_and_named(
    node: ModeNode, tmp_path: Path, put_tool: PutTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_strace(tmp_path, put_tool, DEAF)
    monkeypatch.setattr(syscalls, "_TIMEOUT_S", 0.3)

    def load() -> float:
        wait_until_it_counts(tmp_path)
        return 1.0

    with pytest.raises(StartError, match="strace does not end"):
        syscalls._counted(node, load)

    assert all(process.poll() is not None for process in node.host.processes)
