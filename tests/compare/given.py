"""Results of one load, made by hand; tools that say what a test wants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from userspace_proxy.compare.modes import DIRECT, DIRECT_AGAIN, IPTABLES, IPVS, NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import Kind, ModeRun, Results, Sample

KINDS: dict[str, Kind] = {
    DIRECT: "none",
    DIRECT_AGAIN: "none",
    NFTABLES: "kernel",
    IPTABLES: "kernel",
    IPVS: "kernel",
    USERSPACE: "proxy",
    USERSPACE_COPY: "proxy",
}


def results_of(case: str, figure: str, rounds: dict[str, list[float]]) -> Results:
    """Return results with one figure of one case: for each mode its value in each round."""
    modes = [ModeRun(name, name, KINDS[name], ours=KINDS[name] != "none") for name in rounds]
    results = Results("1.0", "2026-01-01T00:00:00+00:00", {}, 60.0, 3, 1.0, modes)
    add_rounds(results, case, figure, rounds)
    return results


def add_rounds(results: Results, case: str, figure: str, rounds: dict[str, list[float]]) -> None:
    """Add one more figure, for modes that took part."""
    results.samples += [
        Sample(case, mode, number, {figure: value})
        for mode, values in rounds.items()
        for number, value in enumerate(values, 1)
    ]


def put_tool(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, script: str) -> None:
    """Have a *script* of the shell on PATH in the place of a tool."""
    tool = folder / name
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
