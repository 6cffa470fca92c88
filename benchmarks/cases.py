"""The cases: the loads of `userspace-proxy compare` with small answers, and more of bytes, datagrams and memory."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.loads import UDP, UDP_ONCE, Bulk, Datagrams, Idle
from benchmarks.memory import pss_kib
from benchmarks.planes import HAPROXY_LIKE, NGINX_LIKE
from userspace_proxy.compare.cases import Case, measured, requests
from userspace_proxy.compare.loads import LoadResult, Wrk
from userspace_proxy.compare.meters import machine_cpu_s, process_cpu_s
from userspace_proxy.compare.modes import ComparedMode
from userspace_proxy.compare.nodes import ModeNode
from userspace_proxy.lab import ip

Figures = dict[str, float]
PROXY, CLIENT, SERVERS = "proxy", "client", "pod"
_IDLE_CONNECTIONS = 5_000
_WARM_UP_CONNECTIONS = 200
_BULK_WARM_UP_S = 0.1
_BESIDE_CONNECTIONS = 8
_NEW_FLOWS_A_SECOND = 900.0  # what 28,000 local ports allow towards one endpoint, as each rests for 30 s


@dataclass(frozen=True, slots=True)
class BenchCase(Case):
    """``unit_size``: the number of counted things in a unit. ``reference``: the plane whose figure is 1."""

    unit_size: float = 1.0
    udp: bool = False
    reference: str = HAPROXY_LIKE

    def measure(self, node: ModeNode, seconds: float) -> Figures:
        """Run the load; add to its figures the shares of the machine's CPU time that each party used."""
        servers = [int(pid) for pid in ip("netns", "pids", SERVERS).split()]
        meters: dict[str, Callable[[], float]] = {
            PROXY: lambda: process_cpu_s(node.pids),
            CLIENT: _own_cpu_s,
            SERVERS: lambda: process_cpu_s(servers),
        }
        before, machine_before = {name: read() for name, read in meters.items()}, machine_cpu_s()
        figures = self.run(node, seconds)
        machine = machine_cpu_s() - machine_before
        return figures | {f"{name}_share": (read() - before[name]) / machine for name, read in meters.items()}

    def can_run(self, plane: ComparedMode) -> bool:
        return plane.udp or not self.udp


def _own_cpu_s() -> float:
    """Return the CPU time of this process, which is the client or the parent of its tools."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _bulk(flows: int) -> Callable[[ModeNode, float], Figures]:
    def run(node: ModeNode, seconds: float) -> Figures:
        with Bulk(node, flows) as bulk:
            bulk.read(_BULK_WARM_UP_S)
            return measured(node, 1e9, lambda: bulk.read(seconds))[1]

    return run


def _small_beside_bulk(node: ModeNode, seconds: float) -> Figures:
    with Bulk(node, 2) as bulk:
        bulk.read(_BULK_WARM_UP_S)

        def load() -> LoadResult:
            wrk = Wrk(node, _BESIDE_CONNECTIONS)
            bulk.read(seconds)
            return wrk.stop(meanwhile=lambda: bulk.read(0.01))

        done, figures = measured(node, 1, load)
    # The CPU time is that of both loads, so it says nothing about one request.
    return {"rate": figures["rate"], "p99_ms": done.p99_ms, "failed": done.failed}


def _datagrams(port: int, *, once: bool) -> Callable[[ModeNode, float], Figures]:
    def run(node: ModeNode, seconds: float) -> Figures:
        with Datagrams(node, port, 32, once=once) as datagrams:
            figures = measured(node, 1, lambda: datagrams.exchange(seconds))[1]
            return {**figures, "failed": datagrams.lost}

    return run


def _new_flows(node: ModeNode, seconds: float) -> Figures:
    with Datagrams(node, UDP_ONCE, 0, once=True) as datagrams:
        return measured(node, 1, lambda: datagrams.open_flows(seconds, _NEW_FLOWS_A_SECOND))[1]


CASES: tuple[BenchCase, ...] = (
    BenchCase("keepalive-64", "keep-alive, 64 connections", "requests", requests(64)),
    BenchCase("keepalive-1", "keep-alive, 1 connection", "requests", requests(1)),
    BenchCase("new-connection", "new connection per request", "connections", requests(64, close=True)),
    BenchCase("bulk-1", "bulk, 1 flow", "GB", _bulk(1), unit_size=1e9),
    BenchCase("bulk-8", "bulk, 8 flows", "GB", _bulk(8), unit_size=1e9),
    BenchCase("small-beside-bulk", "small requests beside 2 bulk flows", "requests", _small_beside_bulk),
    BenchCase("udp-32", "UDP, 32 flows", "datagrams", _datagrams(UDP, once=False), udp=True, reference=NGINX_LIKE),
    BenchCase("udp-new", "UDP, a new flow per datagram", "flows", _datagrams(UDP_ONCE, once=True), udp=True,
              reference=NGINX_LIKE),
    BenchCase("udp-900", "UDP, 900 new flows a second", "flows", _new_flows, udp=True, reference=NGINX_LIKE),
)  # fmt: skip


def idle_memory_kib(node: ModeNode) -> float:
    """Return the user memory of one idle connection that has had one answer, in KiB."""
    with Idle(node, _WARM_UP_CONNECTIONS):
        pass
    time.sleep(0.1)
    before = pss_kib(node.pids)
    with Idle(node, _IDLE_CONNECTIONS):
        return (pss_kib(node.pids) - before) / _IDLE_CONNECTIONS
