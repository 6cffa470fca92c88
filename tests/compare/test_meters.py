"""The CPU time of processes includes that of their tools; percentiles."""

from __future__ import annotations

import os
import resource
import subprocess
import sys

import pytest

from userspace_proxy.compare.meters import percentile, process_cpu_s

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


@pytest.mark.parametrize(
    ("count", "share", "rank"),
    [(100, 0.99, 99), (100, 0.5, 50), (100, 0.07, 7), (101, 0.99, 100), (1000, 0.999, 999), (1, 0.99, 1), (3, 0, 1)],
)
def test_a_percentile_is_the_least_value_that_the_share_does_not_exceed(count: int, share: float, rank: int) -> None:
    assert percentile(range(count, 0, -1), share) == rank


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 0.5) == 0
