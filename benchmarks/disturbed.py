"""Latency at a fixed rate while something else is busy: our control process with 10,000 Services, or a plain hog.

The hog is a loop that uses one processor. If a busy control process adds more latency than the hog, it does work in the
path of packets.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.loads import latencies_at
from benchmarks.planes import start_engine
from benchmarks.scale import manifest, service_ip
from userspace_proxy.compare.modes import manifests_of
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.errors import StartError
from userspace_proxy.lab import last_line

PROBE_POD_IP = "10.244.0.2"  # the endpoint of the 10,000 Services
_SERVICES = 10_000
_CONNECTIONS = 64
_SETTLE_S = 0.3
_QUIET_S = 1.5


def quiet_p99_ms(node: ModeNode, rate: float, seconds: float) -> float:
    return _p99(latencies_at(node, rate, _CONNECTIONS, _elapsed(seconds)))


def hog_p99_ms(node: ModeNode, rate: float, seconds: float) -> float:
    hog = node.host.start(sys.executable, "-c", "while True: pass")
    try:
        return quiet_p99_ms(node, rate, seconds)
    finally:
        hog.kill()
        hog.wait(5)


def loading_p99_ms(node: ModeNode, rate: float) -> tuple[float, float]:
    """Return the p99 while our proxy loads 10,000 Services, and the seconds which that takes."""
    manifests, prefix = manifests_of(node), node.service_range.removesuffix(".0.0/16")
    (manifests / "many.new").write_text(manifest(_SERVICES, probe_pod=0, prefix=prefix))
    answers = str(Path(__file__).parent / "answers.py")
    (manifests / "many.new").replace(manifests / "many.yaml")
    started_at = time.monotonic()
    probe = node.host.start(sys.executable, answers, service_ip(_SERVICES - 1, prefix), "80")
    took = latencies_at(node, rate, _CONNECTIONS, _ended(probe))
    loaded_s = time.monotonic() - started_at
    (manifests / "many.yaml").unlink()
    if probe.poll() != 0:
        raise StartError(f"10,000 Services were not loaded: {last_line(node.folder / 'log')}")
    return _p99(took), loaded_s


def disturbed(node: ModeNode, arguments: tuple[str, ...], rate: float) -> dict[str, float]:
    """Measure on *node*, which runs nothing yet, with a separate proxy of ours."""
    node.host.ip("route", "add", f"{PROBE_POD_IP}/32", "via", node.pod_ip)
    _start(node, arguments)
    loading_ms, loaded_s = loading_p99_ms(node, rate)
    node.stop()
    _start(node, arguments)
    quiet_ms = quiet_p99_ms(node, rate, min(loaded_s, _QUIET_S))
    hog_ms = hog_p99_ms(node, rate, loaded_s)
    return {
        "rate": rate,
        "loaded_s": loaded_s,
        "quiet_p99_ms": quiet_ms,
        "hog_p99_ms": hog_ms,
        "loading_p99_ms": loading_ms,
    }


def _start(node: ModeNode, arguments: tuple[str, ...]) -> None:
    start_engine(node, arguments)
    node.wait_until_it_serves()
    time.sleep(_SETTLE_S)


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def _elapsed(seconds: float) -> Callable[[], bool]:
    end_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_at


def _ended(process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: process.poll() is not None
