"""Counts system calls of a mode's processes with strace.

strace slows the processes, so nothing else is measured meanwhile.
"""

import shutil
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable

from userspace_proxy.compare.loads import Wrk, bulk_for, or_again, run_for, served
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.errors import StartError
from userspace_proxy.lab import last_line

_ATTACH_S = 0.1
# Few connections, so that unfinished requests at the end do not distort the figures.
_CONNECTIONS = 16
_TIMEOUT_S = 10


def calls_per_request(node: ModeNode, seconds: float, *, close: bool = False) -> dict[str, float]:
    """Return system calls per request, by name. With *close*, each request has a connection of its own."""

    return _counted(node, lambda: served(run_for(seconds, Wrk(node, _CONNECTIONS, close=close))).units)


def calls_per_mb(node: ModeNode, seconds: float) -> dict[str, float]:
    """Return the system calls per megabyte of one bulk flow, by name."""
    return or_again(lambda s: _counted(node, lambda: bulk_for(s, node, 1).units / 1e6), seconds)


def has_counter() -> bool:
    """Return whether system calls can be counted here."""
    return shutil.which("strace") is not None


def _counted(node: ModeNode, load: Callable[[], float]) -> dict[str, float]:
    report, log = node.folder / "calls", node.folder / "calls.log"
    for file in (report, log):
        file.unlink(missing_ok=True)
    counting = node.host.start(
        "strace", "-c", "-f", "-o", str(report), *(f"--attach={pid}" for pid in node.pids), log=log
    )
    try:
        time.sleep(_ATTACH_S)
        if counting.poll() is not None:
            raise StartError(f"strace cannot attach here: {last_line(log) or 'no message'}")
        units = load()
    finally:
        has_reported = _end(counting)  # always: otherwise it would slow all later loads
    if not has_reported:
        raise StartError("strace does not end")
    return {name: count / units for name, count in _parse(report.read_text()).most_common()}


def _end(counting: subprocess.Popen[bytes]) -> bool:
    """Stop the tool; return whether it ended by itself and wrote its report."""
    counting.send_signal(signal.SIGINT)
    try:
        counting.wait(_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        counting.kill()
        counting.wait(_TIMEOUT_S)
        return False
    return True


def _parse(report: str) -> Counter[str]:
    """Parse the table of ``strace -c``: share, seconds, microseconds for each call, calls, errors (optional), name."""
    counts: Counter[str] = Counter()
    for line in report.splitlines():
        words = line.split()
        if len(words) >= 5 and words[3].isdigit() and words[-1] != "total":
            counts[words[-1]] += int(words[3])
    return counts
