"""System calls of a mode's processes, counted by strace (which slows them: nothing else is read meanwhile)."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from userspace_proxy.compare.loads import Bulk, Wrk
from userspace_proxy.compare.sites import Site
from userspace_proxy.errors import StartError

_ATTACH_S = 0.2
# Few, so that those which are only half done at the end do not show in the figures.
_CONNECTIONS = 16
_TIMEOUT_S = 10


def calls_per_request(site: Site, seconds: float, *, close: bool = False) -> dict[str, float]:
    """Return the calls per request of keep-alive connections, or of a connection per request, by name."""

    def load() -> float:
        wrk = Wrk(site, _CONNECTIONS, close=close)
        time.sleep(seconds)
        return wrk.stop().units

    return _counted(site, load)


def calls_per_mb(site: Site, seconds: float) -> dict[str, float]:
    """Return the calls per megabyte of one bulk flow, by name."""
    with Bulk(site, 1) as bulk:
        return _counted(site, lambda: bulk.read(seconds).units / 1e6)


def _counted(site: Site, load: Callable[[], float]) -> dict[str, float]:
    report = site.folder / "strace"
    report.unlink(missing_ok=True)
    pids = [argument for pid in site.pids for argument in ("-p", str(pid))]
    strace = site.node.start("strace", "-c", "-f", "-o", str(report), *pids, log=site.folder / "strace.log")
    time.sleep(_ATTACH_S)
    if strace.poll() is not None:
        raise StartError(f"strace may not look here: {_last_line(site.folder / 'strace.log')}")
    units = load()
    strace.send_signal(signal.SIGINT)
    strace.wait(_TIMEOUT_S)
    counts = _parse(report.read_text())
    if not units:
        raise StartError(f"{site.name} answered nothing while its system calls were counted")
    return {name: count / units for name, count in counts.most_common()}


def _last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["it said nothing"])[-1]


def _parse(report: str) -> Counter[str]:
    """Read the table of ``strace -c``: share, seconds, microseconds a call, calls, errors where there are any, name."""
    counts: Counter[str] = Counter()
    for line in report.splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            counts[words[-1]] += int(words[3])
    return counts
