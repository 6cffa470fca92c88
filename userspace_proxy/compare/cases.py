"""The loads that are repeated in rounds: each runs over one mode and returns its rate and its cost."""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass

from userspace_proxy.compare.loads import LoadResult, Wrk, bulk_for, or_again, run_for, served
from userspace_proxy.compare.meters import context_switches, machine_cpu_s, process_cpu_s
from userspace_proxy.compare.nodes import ModeNode

_SETTLE_S = 0.02


@dataclass(frozen=True, slots=True)
class Case:
    """One load that is repeated in rounds. ``unit``: the unit that its figures count."""

    name: str
    title: str
    unit: str
    run: Callable[[ModeNode, float], dict[str, float]]

    def measure(self, node: ModeNode, seconds: float) -> dict[str, float]:
        return self.run(node, seconds)


def measured(node: ModeNode, unit_size: float, load: Callable[[], LoadResult]) -> tuple[LoadResult, dict[str, float]]:
    """Run *load*; return what was done, and the rate and the cost of one unit, by the names used in results.

    Raises StartError if nothing, or too little, succeeded.
    """
    pids = node.pids
    proxy_before, machine_before, switches_before = process_cpu_s(pids), machine_cpu_s(), context_switches(pids)
    done = served(load())
    proxy_s, machine_s = process_cpu_s(pids) - proxy_before, machine_cpu_s() - machine_before
    switches = context_switches(pids) - switches_before
    units = done.units / unit_size
    return done, {
        "rate": units / done.seconds,
        "proxy_cpu_s": proxy_s / units,
        "machine_cpu_s": machine_s / units,
        "switches": switches / units,
    }


def requests(connections: int, *, close: bool = False) -> Callable[[ModeNode, float], dict[str, float]]:
    def run(node: ModeNode, seconds: float) -> dict[str, float]:
        done, costs = measured(node, 1, lambda: run_for(seconds, Wrk(node, connections, close=close)))
        latencies = {"p50_ms": done.p50_ms, "p99_ms": done.p99_ms, "p999_ms": done.p999_ms}
        return {**costs, **latencies, "failed": done.failed}

    return run


def bulk(flows: int) -> Callable[[ModeNode, float], dict[str, float]]:
    def run(node: ModeNode, seconds: float) -> dict[str, float]:
        return or_again(lambda s: measured(node, 1e9, lambda: bulk_for(s, node, flows))[1], seconds)

    return run


def run_case(case: Case, node: ModeNode, seconds: float) -> dict[str, float]:
    """Run *case* over *node* from a clean state; return its figures."""
    node.forget_connections()
    gc.collect()
    time.sleep(_SETTLE_S)
    return case.measure(node, seconds)


KEEPALIVE_1, NEW_1, KEEPALIVE_64, NEW_64 = "keepalive-1", "new-1", "keepalive-64", "new-64"
BULK_1, BULK_8 = "bulk-1", "bulk-8"

CASES: tuple[Case, ...] = (
    Case(KEEPALIVE_1, "keep-alive, 1 connection", "requests", requests(1)),
    Case(NEW_1, "new connection per request, 1 client", "connections", requests(1, close=True)),
    Case(KEEPALIVE_64, "keep-alive, 64 connections", "requests", requests(64)),
    Case(NEW_64, "new connection per request, 64 clients", "connections", requests(64, close=True)),
    Case(BULK_1, "bulk, 1 flow", "GB", bulk(1)),
    Case(BULK_8, "bulk, 8 flows", "GB", bulk(8)),
)
