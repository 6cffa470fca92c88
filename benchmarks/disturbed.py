"""Latency at a fixed rate while something else is busy: our control process with 10,000 Services, or a plain hog.

The hog is a loop that uses one processor. Whatever a busy control process adds to the latency beyond what
the hog adds is its own doing: work in the packets' way instead of beside it.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.loads import latencies_at
from benchmarks.planes import start_userspace_proxy
from benchmarks.scale import manifest, service_ip
from userspace_proxy.compare.meters import percentile
from userspace_proxy.compare.sites import Site

PROBE_POD_IP = "10.244.0.2"  # the endpoint of the 10,000 Services
_SERVICES = 10_000
_CONNECTIONS = 64
_SETTLE_S = 0.3
_QUIET_S = 1.5
_STOP_TIMEOUT_S = 30.0


def quiet_p99_ms(site: Site, rate: float, seconds: float) -> float:
    return percentile(latencies_at(site, rate, _CONNECTIONS, _elapsed(seconds)), 0.99)


def hog_p99_ms(site: Site, rate: float, seconds: float) -> float:
    hog = site.node.start(sys.executable, "-c", "while True: pass")
    try:
        return quiet_p99_ms(site, rate, seconds)
    finally:
        hog.kill()
        hog.wait(5)


def loading_p99_ms(site: Site, rate: float, manifests: Path) -> tuple[float, float]:
    """Return the p99 while our proxy takes up 10,000 Services, and how long that took."""
    (manifests / "many.new").write_text(manifest(_SERVICES, probe_pod=0))
    last = str(Path(__file__).parent / "answers.py")
    (manifests / "many.new").replace(manifests / "many.yaml")
    started_at = time.monotonic()
    probe = site.node.start(sys.executable, last, service_ip(_SERVICES - 1), "80")
    took = latencies_at(site, rate, _CONNECTIONS, _ended(probe))
    loaded_s = time.monotonic() - started_at
    if probe.poll() != 0:
        raise RuntimeError(f"10,000 Services were not loaded: {site.log()}")
    return percentile(took, 0.99), loaded_s


def disturbed(site: Site, arguments: tuple[str, ...], rate: float) -> dict[str, float]:
    """Measure on *site*, where nothing runs yet, with a proxy of ours for this alone."""
    site.node.ip("route", "add", f"{PROBE_POD_IP}/32", "via", site.pod_ip)
    manifests = start_userspace_proxy(site, arguments)
    site.wait_until_it_serves()
    time.sleep(_SETTLE_S)
    loading_ms, loaded_s = loading_p99_ms(site, rate, manifests)
    (manifests / "many.yaml").unlink()
    site.stop(_STOP_TIMEOUT_S)
    start_userspace_proxy(site, arguments)
    site.wait_until_it_serves()
    time.sleep(_SETTLE_S)
    quiet_ms = quiet_p99_ms(site, rate, min(loaded_s, _QUIET_S))
    hog_ms = hog_p99_ms(site, rate, loaded_s)
    return {
        "rate": rate,
        "loaded_s": loaded_s,
        "quiet_p99_ms": quiet_ms,
        "hog_p99_ms": hog_ms,
        "loading_p99_ms": loading_ms,
    }


def _elapsed(seconds: float) -> Callable[[], bool]:
    end_at = time.monotonic() + seconds
    return lambda: time.monotonic() >= end_at


def _ended(process: subprocess.Popen[bytes]) -> Callable[[], bool]:
    return lambda: process.poll() is not None
