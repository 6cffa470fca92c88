"""Measures the memory of processes."""

from collections.abc import Sequence
from pathlib import Path


def pss_kib(pids: Sequence[int]) -> int:
    """Return the user memory of these processes: private pages, and their share of shared ones."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total
