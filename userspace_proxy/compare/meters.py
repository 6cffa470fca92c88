"""Measures cost: CPU time and context switches of processes, and CPU time of the machine."""

import contextlib
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path

_CPUCLOCK_SCHED = 2  # linux/posix-timers.h
_IDLE, _IOWAIT, _STEAL = 3, 4, 7  # columns of /proc/stat
_CUTIME, _CSTIME = 13, 14  # fields of /proc/PID/stat after the name, which may contain spaces
_TICKS_A_SECOND = os.sysconf("SC_CLK_TCK")


def children(pid: int) -> list[int]:
    """Return all descendants of *pid*."""
    direct = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            direct += [int(word) for word in (task / "children").read_text().split()]
    return direct + [grandchild for child in direct for grandchild in children(child)]


def process_cpu_s(pids: Sequence[int]) -> float:
    """Return the CPU time (user and system) of *pids* so far: of all threads, and of the tools they ran.

    /proc/PID/stat counts utime + stime in steps of 10 ms, which is too coarse for short runs. Only the time of ended
    child processes (tools that loaded rules) comes from there.
    """
    total = 0.0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(int(fields[index]) for index in (_CUTIME, _CSTIME)) / _TICKS_A_SECOND
    return total


def machine_cpu_s() -> float:
    """Return the busy time of all CPUs so far, including the kernel's own work (softirqs)."""
    columns = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (
        sum(ticks for column, ticks in enumerate(columns) if column not in (_IDLE, _IOWAIT, _STEAL)) / _TICKS_A_SECOND
    )


def context_switches(pids: Sequence[int]) -> int:
    """Return the number of context switches, voluntary and involuntary, of these processes' threads so far."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):  # the process or a thread has ended
            for task in Path(f"/proc/{pid}/task").iterdir():
                for line in (task / "status").read_text().splitlines():
                    if "ctxt_switches:" in line:
                        total += int(line.split()[1])
    return total


def machine() -> dict[str, str]:
    """Return the properties of this machine that affect the figures."""
    model = "unknown"
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processors": f"{os.cpu_count()} x {model}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "congestion control": Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip(),
        "load before": f"{os.getloadavg()[0]:.1f}",
    }
