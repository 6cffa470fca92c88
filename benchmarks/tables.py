"""10,000 Services of two endpoints each in the tables of every kernel mode: the whole load, one change, removal.

Run it with `make bench-tables`. It measures only the tables: from the desired state of each Service until the kernel
has it. It runs in private namespaces. A mode that this kernel lacks is skipped with a message.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from userspace_proxy.config.settings import Settings
from userspace_proxy.errors import SyncError
from userspace_proxy.lab import Host, Lab, enter_namespaces, prepare
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import Node
from userspace_proxy.modes import MODES
from userspace_proxy.modes.kernel_mode import KernelMode
from userspace_proxy.modes.kernel_rules import KernelRules, NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.plans import plan

_HERE = Node("here", addresses=("192.0.2.1",))
_PODS = PodDetector(cidrs=("10.244.0.0/16",))
_CHANGES = 21


def translation(number: int, *endpoints: Endpoint) -> Translation:
    name = ServicePortName(NamespacedName("default", f"svc-{number}"), "http", L4Protocol.TCP)
    service_port = ServicePort(name, 80, (f"10.{96 + number // 62_500}.{number // 250 % 250}.{number % 250 + 1}",))
    made = plan(service_port, endpoints, _HERE, detects_pods=True, in_kernel=True)
    return Translation(service_port, made.routes, made.reaches)


def endpoint(number: int, index: int) -> Endpoint:
    return Endpoint(f"10.{244 + index}.{number // 250 % 250}.{number % 250 + 1}", 8080)


def _make_tables_of(name: str) -> Callable[[Settings], KernelRules]:
    mode = MODES[name]
    assert isinstance(mode, KernelMode)
    return mode.make_rules


async def measure(make: Callable[[Settings], KernelRules], services: int) -> dict[str, Any]:
    """Return the seconds of a whole load and of removal, and the milliseconds of a change."""
    tables, facts = make(Settings()), NodeFacts(_HERE, _PODS)
    wanted = [translation(n, endpoint(n, 0), endpoint(n, 1)) for n in range(services)]
    by_name: Mapping[ServicePortName, Translation] = {made.service_port.name: made for made in wanted}
    await tables.prepare()
    try:
        began = time.perf_counter()
        await tables.load(RuleUpdate(by_name, set(by_name), facts))
        load_s = time.perf_counter() - began
        changes_ms = []
        for turn in range(_CHANGES):
            number = turn * (services // _CHANGES)
            changed = translation(number, endpoint(number, 0), *([endpoint(number, 2)] if turn % 2 else []))
            by_name = {**by_name, changed.service_port.name: changed}
            began = time.perf_counter()
            await tables.load(RuleUpdate(by_name, {changed.service_port.name}, facts))
            changes_ms.append((time.perf_counter() - began) * 1000)
    finally:
        began = time.perf_counter()
        await tables.remove()
        removal_s = time.perf_counter() - began
        tables.unwatch()
    change = {"change_ms": statistics.median(changes_ms), "slowest_change_ms": max(changes_ms)}
    return {"load_s": load_s, **change, "removal_s": removal_s}


def measure_on(host: Host, mode: str, services: int) -> dict[str, Any]:
    """Measure *mode* on *host*; the new event loop starts its threads there."""
    with host.inside(), asyncio.Runner() as runner:
        return runner.run(measure(_make_tables_of(mode), services))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--modes", default=",".join(mode.name for mode in MODES.values() if mode.kernel_serves))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    enter_namespaces(sys.argv[1:], {}, module="benchmarks.tables")
    prepare()
    results: dict[str, list[dict[str, Any]]] = {}
    with Lab() as lab:
        for turn, mode in itertools.product(range(arguments.rounds), arguments.modes.split(",")):
            try:
                found = measure_on(lab.add(f"{mode}{turn}"), mode, arguments.services)
            except SyncError as error:
                print(f"{mode}: {error}", file=sys.stderr)
            else:
                results.setdefault(mode, []).append(found)
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    for mode, rounds in results.items():
        print(f"{mode}, {arguments.services:,} Services, median (and all) of {len(rounds)} rounds:")
        for figure in rounds[0]:
            values = [each[figure] for each in rounds]
            print(f"  {figure:18} {statistics.median(values):9.3f}   ({', '.join(f'{v:.3f}' for v in values)})")


if __name__ == "__main__":
    main()
