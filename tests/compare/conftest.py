"""Fixtures: a bare node of a mode, and shell scripts in the place of tools."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.lab import Lab

PutTool = Callable[[str, str], None]


@pytest.fixture
def node(tmp_path: Path) -> Iterator[ModeNode]:
    """A node that is linked to nothing; its processes end with the test."""
    with Lab() as lab:
        yield ModeNode("bare", lab.add("node"), lab.add("client"), 1, tmp_path, front_ip="127.0.0.1")


@pytest.fixture
def put_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PutTool:
    """Put a shell script on PATH in the place of a tool: ``put_tool(name, script)``."""

    def put(name: str, script: str) -> None:
        tool = tmp_path / name
        tool.write_text(f"#!/bin/sh\n{script}\n")
        tool.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put
