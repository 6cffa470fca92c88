"""System calls of a proxy per request and per connection, counted by strace (which slows it: nothing else is read)."""

from __future__ import annotations

import signal
import time
from collections import Counter

from benchmarks.loads import Wrk
from benchmarks.sites import Site

_ATTACH_S = 0.2
_COUNT_S = 0.5
# Few, so that those which are only half done at the end do not show in the figures.
_CONNECTIONS = 16
_TIMEOUT_S = 10


def system_calls(site: Site, *, close: bool) -> dict[str, float]:
    """Return the calls per request of keep-alive connections, or of a connection per request, by name."""
    report = site.folder / "strace"
    pids = [argument for pid in site.pids for argument in ("-p", str(pid))]
    strace = site.node.start("strace", "-c", "-f", "-o", str(report), *pids, log=site.folder / "strace.log")
    time.sleep(_ATTACH_S)
    wrk = Wrk(site, _CONNECTIONS, close=close)
    time.sleep(_COUNT_S)
    done = wrk.stop()
    strace.send_signal(signal.SIGINT)
    strace.wait(_TIMEOUT_S)
    counts = _parse(report.read_text())
    units = counts["accept4"] if close else done.units
    if not units:
        raise RuntimeError(f"{site.name} answered nothing while its system calls were counted")
    return {name: count / units for name, count in counts.most_common()}


def _parse(report: str) -> Counter[str]:
    """Read the table of ``strace -c``: share, seconds, microseconds a call, calls, errors where there are any, name."""
    counts: Counter[str] = Counter()
    for line in report.splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            counts[words[-1]] += int(words[3])
    return counts
