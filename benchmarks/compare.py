"""userspace_proxy beside what else could stand in its place: rates, processor time, memory, latency.

Run it with `make bench` or `make bench-quick`. Every round runs each case over every plane, the planes in
another order each time; a plane's figure is compared with the reference's of the same round, and the
median of the rounds is what is printed. Everything happens in namespaces of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES, Case, Run, idle_memory_kib
from benchmarks.chart import chart
from benchmarks.disturbed import PROBE_POD_IP, disturbed
from benchmarks.loads import BULK_FILE_BYTES, UDP, UDP_ONCE
from benchmarks.planes import ENGINES, HAPROXY, PLANES, Plane
from benchmarks.results import Results
from userspace_proxy.compare import meters
from userspace_proxy.compare.sites import BULK, SMALL, Site, Sites
from userspace_proxy.compare.syscalls import calls_per_request
from userspace_proxy.lab import Lab, command_in_namespaces, prepare

_INSIDE = "USERSPACE_PROXY_BENCH_IN_NAMESPACES"
_RESULTS = Path(__file__).parent / "results"
_SETTLE_S = 0.02
_COUNT_S = 0.5
_LOAD_SHARE = 0.3
_DEFAULT_RATE = 5_000.0

IDLE_MEMORY, SYSTEM_CALLS, DISTURBED = "idle-memory", "system-calls", "disturbed"
KNOWN_CASES = [*(case.name for case in CASES), IDLE_MEMORY, SYSTEM_CALLS, DISTURBED]


def measure(arguments: argparse.Namespace, lab: Lab, folder: Path) -> Results:
    """Build the hosts, start every plane, and run what *arguments* ask for."""
    planes = [plane for plane in PLANES if not arguments.planes or plane.name in arguments.planes]
    wanted = arguments.cases or KNOWN_CASES
    sites = Sites(lab, folder, arguments.congestion)
    start_servers(sites, folder)
    running = {plane: sites.add(plane.name) for plane in planes}
    for plane, site in running.items():
        plane.start(site)
    for site in running.values():
        site.wait_until_it_serves()
    machine = meters.machine() | ({"congestion control": arguments.congestion} if arguments.congestion else {})
    results = Results(machine, arguments.rounds, arguments.seconds)
    proxies = {plane.name: site for plane, site in running.items() if plane.proxy}
    if IDLE_MEMORY in wanted:  # first: memory that a proxy keeps from an earlier load would hide what connections need
        for name, site in proxies.items():
            say(f"memory: {name}")
            results.idle_kib[name] = idle_memory_kib(site)
    measure_rounds(arguments, [case for case in CASES if case.name in wanted], running, results)
    if SYSTEM_CALLS in wanted:
        for name, site in proxies.items():
            say(f"system calls: {name}")
            for what, close in (("request", False), ("connection", True)):
                results.system_calls.setdefault(what, {})[name] = calls_per_request(site, _COUNT_S, close=close)
    if DISTURBED in wanted:
        measure_disturbed(arguments, sites, results)
    return results


def start_servers(sites: Sites, folder: Path) -> None:
    """Give the pod its servers, and the address that the endpoints of the 10,000 Services have."""
    (folder / "bulk").write_bytes(bytes(range(256)) * (BULK_FILE_BYTES // 256))
    sites.start_nginx("small", SMALL)
    sites.start_nginx("large", BULK)
    for port in (UDP, UDP_ONCE):
        sites.pod.start(sys.executable, str(Path(__file__).parent / "echo.py"), str(port), log=folder / "echo.log")
    sites.pod.ip("address", "add", f"{PROBE_POD_IP}/32", "dev", "lo")


def measure_rounds(
    arguments: argparse.Namespace, cases: Sequence[Case], running: Mapping[Plane, Site], results: Results
) -> None:
    order = random.Random(arguments.seed)
    for number in range(1, arguments.rounds + 1):
        for case in cases:
            say(f"round {number} of {arguments.rounds}: {case.title}")
            for plane in order.sample(list(running), len(running)):
                if case.can_run(plane):
                    results.add(case.name, plane.name, number, run_once(case, running[plane], arguments.seconds))


def measure_disturbed(arguments: argparse.Namespace, sites: Sites, results: Results) -> None:
    rates = results.runs.get("keepalive-64", {}).get(HAPROXY)
    rate = _LOAD_SHARE * statistics.median(run.rate for run in rates.values()) if rates else _DEFAULT_RATE
    for number in range(1, arguments.disturbed_rounds + 1):
        for engine, engine_arguments in ENGINES[: arguments.disturbed_engines]:
            say(f"latency while 10,000 Services are loaded: {engine}, round {number} of {arguments.disturbed_rounds}")
            site = sites.add(f"disturbed {engine} {number}")
            results.disturbed.setdefault(f"ours, {engine}", []).append(disturbed(site, engine_arguments, rate))


def run_once(case: Case, site: Site, seconds: float) -> Run:
    site.forget_connections()
    gc.collect()
    time.sleep(_SETTLE_S)
    return case.run(site, seconds)


def say(what: str) -> None:
    """Show what is measured now, where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="how long one load lasts")
    parser.add_argument("--disturbed-rounds", type=int, default=3)
    parser.add_argument("--disturbed-engines", type=int, default=len(ENGINES), help="of the first so many engines")
    parser.add_argument(
        "--cases", nargs="*", choices=KNOWN_CASES, default=[], metavar="CASE", help=", ".join(KNOWN_CASES)
    )
    known_planes = [plane.name for plane in PLANES]
    parser.add_argument(
        "--planes", nargs="*", choices=known_planes, default=[], metavar="PLANE", help=", ".join(known_planes)
    )
    parser.add_argument("--congestion", default="", help="TCP congestion control on every host; default: the machine's")
    parser.add_argument("--seed", type=int, default=1, help="of the order of the planes")
    parser.add_argument("--name", default="bench", help="of the files in benchmarks/results/")
    parser.add_argument("--docs", type=Path, help="a page to put the tables in, and beside it the chart")
    arguments = parser.parse_args()
    if not os.environ.get(_INSIDE):
        command = command_in_namespaces([sys.executable, "-m", "benchmarks.compare", *sys.argv[1:]])
        os.execvpe(command[0], command, {**os.environ, _INSIDE: "1"})  # noqa: S606 - a list, no shell
    started_at = time.monotonic()
    prepare()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(dir="/run") as folder, Lab() as lab:
        results = measure(arguments, lab, Path(folder))
    say("")
    report.print_tables(results)
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / f"{arguments.name}.json").write_text(json.dumps(asdict(results), indent=1))
    (_RESULTS / f"{arguments.name}.svg").write_text(chart(results))
    if arguments.docs:
        report.write_into(arguments.docs, results)
        arguments.docs.with_suffix(".svg").write_text(chart(results))
    print(f"{time.monotonic() - started_at:.0f} s; benchmarks/results/{arguments.name}.json and .svg")


if __name__ == "__main__":
    main()
