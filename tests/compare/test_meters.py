"""The CPU time of processes includes that of their tools."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

from userspace_proxy.compare.meters import process_cpu_s

_TICKS_S = 0.02  # of user and of system time, as /proc rounds them


def test_the_cpu_time_of_an_ended_tool_counts_for_its_caller() -> None:
    cpu_before, children_before = process_cpu_s([os.getpid()]), children_s()

    subprocess.run([sys.executable, "-c", "sum(range(20_000_000))"], check=True)

    tool_s = children_s() - children_before
    assert tool_s > 0.04
    assert process_cpu_s([os.getpid()]) - cpu_before >= tool_s - _TICKS_S


def children_s() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
