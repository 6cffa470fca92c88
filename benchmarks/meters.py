"""What a run cost: processor time of processes and of the whole machine, memory of processes."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

_CPUCLOCK_SCHED = 2  # linux/posix-timers.h
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # columns of /proc/stat
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def process_cpu_s(pids: Sequence[int]) -> float:
    """Return what these processes have used so far, user and system, every thread of theirs.

    The same as utime + stime in /proc/PID/stat, which counts in steps of 10 ms: too coarse for short runs.
    """
    return sum(time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED) for pid in pids)


def machine_cpu_s() -> float:
    """Return what all processors have been busy with so far, the kernel's own work (softirqs) included."""
    columns = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (
        sum(ticks for column, ticks in enumerate(columns) if column not in (_IDLE, _IOWAIT, _STEAL)) / _TICKS_A_SECOND
    )


def pss_kib(pids: Sequence[int]) -> int:
    """Return the user memory of these processes: private pages, and their share of shared ones."""
    total = 0
    for pid in pids:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that *share* (0 to 1) of *values* do not exceed; 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
