"""The cases: each runs one load over one plane and returns what it did and what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.loads import UDP, UDP_ONCE, Bulk, Datagrams, Idle
from benchmarks.planes import HAPROXY, NGINX, Plane
from userspace_proxy.compare.loads import Done, Wrk, run_for
from userspace_proxy.compare.meters import machine_cpu_s, process_cpu_s, pss_kib
from userspace_proxy.compare.sites import Site

_IDLE_CONNECTIONS = 5_000
_WARM_UP_CONNECTIONS = 200
_BULK_WARM_UP_S = 0.1
_BESIDE_CONNECTIONS = 8


@dataclass(frozen=True, slots=True)
class Run:
    """One load over one plane. Rates are per second, in the case's unit; costs are processor seconds per unit."""

    rate: float
    proxy_cpu_s: float = 0.0
    machine_cpu_s: float = 0.0
    p99_ms: float = 0.0
    failed: int = 0
    beside: float = 0.0  # bytes a second that flowed at the same time


@dataclass(frozen=True, slots=True)
class Case:
    """``unit``: what a rate counts, one of so many as ``unit_size`` says. ``reference``: whose figure is 1."""

    name: str
    title: str
    unit: str
    run: Callable[[Site, float], Run]
    unit_size: float = 1.0
    udp: bool = False
    reference: str = HAPROXY

    def can_run(self, plane: Plane) -> bool:
        return plane.udp or not self.udp


def _measured(site: Site, unit_size: float, load: Callable[[], Done]) -> Run:
    proxy_before, machine_before = process_cpu_s(site.pids), machine_cpu_s()
    done = load()
    proxy_s, machine_s = process_cpu_s(site.pids) - proxy_before, machine_cpu_s() - machine_before
    units = done.units / unit_size or 1e-9
    return Run(units / done.seconds, proxy_s / units, machine_s / units, done.p99_ms, done.failed)


def _requests(connections: int, *, close: bool = False) -> Callable[[Site, float], Run]:
    return lambda site, seconds: _measured(site, 1, lambda: run_for(seconds, Wrk(site, connections, close=close)))


def _bulk(flows: int) -> Callable[[Site, float], Run]:
    def run(site: Site, seconds: float) -> Run:
        with Bulk(site, flows) as bulk:
            bulk.read(_BULK_WARM_UP_S)
            return _measured(site, 1e9, lambda: bulk.read(seconds))

    return run


def _small_beside_bulk(site: Site, seconds: float) -> Run:
    with Bulk(site, 2) as bulk:
        bulk.read(_BULK_WARM_UP_S)
        flowed = 0.0

        def load() -> Done:
            nonlocal flowed
            wrk = Wrk(site, _BESIDE_CONNECTIONS)
            read = bulk.read(seconds)
            flowed = read.units / read.seconds
            return wrk.stop(meanwhile=lambda: bulk.read(0.01))

        run = _measured(site, 1, load)
    return Run(run.rate, 0.0, 0.0, run.p99_ms, run.failed, beside=flowed)


def _datagrams(port: int, *, once: bool) -> Callable[[Site, float], Run]:
    def run(site: Site, seconds: float) -> Run:
        with Datagrams(site, port, 32, once=once) as datagrams:
            return _measured(site, 1, lambda: datagrams.exchange(seconds))

    return run


CASES: tuple[Case, ...] = (
    Case("keepalive-64", "keep-alive, 64 connections", "requests", _requests(64)),
    Case("keepalive-1", "keep-alive, 1 connection", "requests", _requests(1)),
    Case("new-connection", "new connection per request", "connections", _requests(64, close=True)),
    Case("bulk-1", "bulk, 1 flow", "GB", _bulk(1), unit_size=1e9),
    Case("bulk-8", "bulk, 8 flows", "GB", _bulk(8), unit_size=1e9),
    Case("small-beside-bulk", "small requests beside 2 bulk flows", "requests", _small_beside_bulk),
    Case("udp-32", "UDP, 32 flows", "datagrams", _datagrams(UDP, once=False), udp=True, reference=NGINX),
    Case(
        "udp-new", "UDP, a new flow per datagram", "flows", _datagrams(UDP_ONCE, once=True), udp=True, reference=NGINX
    ),
)


def idle_memory_kib(site: Site) -> float:
    """Return the user memory of one idle connection that has had one answer, in KiB."""
    with Idle(site, _WARM_UP_CONNECTIONS):
        pass
    time.sleep(0.1)
    before = pss_kib(site.pids)
    with Idle(site, _IDLE_CONNECTIONS):
        return (pss_kib(site.pids) - before) / _IDLE_CONNECTIONS
