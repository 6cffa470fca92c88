"""Results of one load, made by hand."""

from __future__ import annotations

from userspace_proxy.compare.modes import DIRECT, DIRECT_AGAIN, NFTABLES, USERSPACE
from userspace_proxy.compare.results import Kind, ModeRun, Results, Sample

KINDS: dict[str, Kind] = {DIRECT: "none", DIRECT_AGAIN: "none", NFTABLES: "kernel", USERSPACE: "proxy"}


def results_of(case: str, figure: str, rounds: dict[str, list[float]]) -> Results:
    """Return results with one figure of one case: for each mode its value in each round."""
    modes = [ModeRun(name, name, KINDS[name], ours=KINDS[name] != "none") for name in rounds]
    results = Results("1.0", "2026-01-01T00:00:00+00:00", {}, 60.0, 3, 1.0, modes)
    results.samples += [
        Sample(case, mode, number, {figure: value})
        for mode, values in rounds.items()
        for number, value in enumerate(values, 1)
    ]
    return results
