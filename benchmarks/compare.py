"""Compares userspace_proxy with alternatives: rates, processor time, memory, latency.

Run it with `make bench` or `make bench-quick`. Every round runs each case over every plane, the planes in another order
each time. A plane's figure is compared with the reference's of the same round; the tables show the median of the
rounds. Everything runs in private namespaces.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import report
from benchmarks.cases import CASES, idle_memory_kib
from benchmarks.chart import chart
from benchmarks.disturbed import PROBE_POD_IP, disturbed
from benchmarks.loads import BULK_FILE_BYTES, UDP, UDP_ONCE
from benchmarks.planes import ENGINES, PLANES
from benchmarks.report import DISTURBED, IDLE_MEMORY
from userspace_proxy import __version__
from userspace_proxy.compare.cases import Case
from userspace_proxy.compare.meters import machine
from userspace_proxy.compare.modes import HAPROXY, ComparedMode
from userspace_proxy.compare.nodes import BULK, SMALL, CompareLab
from userspace_proxy.compare.results import Results, Sample, to_json
from userspace_proxy.compare.session import Session, compare_lab
from userspace_proxy.lab import enter_namespaces

_RESULTS = Path(__file__).parent / "results"
# wrk does not count the 16 connections that are open at the end; of a short load they are several percent.
_COUNT_S = 2.0
_LOAD_SHARE = 0.3
_DEFAULT_RATE = 5_000.0

SYSTEM_CALLS = "system-calls"
KNOWN_CASES = [*(case.name for case in CASES), IDLE_MEMORY, SYSTEM_CALLS, DISTURBED]


def measure(arguments: argparse.Namespace, lab: CompareLab) -> Results:
    """Start every plane, and measure what *arguments* select."""
    about = machine() | ({"congestion control": arguments.congestion} if arguments.congestion else {})
    taken_at = datetime.now(UTC).isoformat(timespec="seconds")
    session = Session(lab, Results(__version__, taken_at, about, 0.0, 0, arguments.seconds, []), say)
    wanted = arguments.cases or KNOWN_CASES
    start_servers(lab)
    for plane in PLANES:
        if not arguments.planes or plane.name in arguments.planes:
            session.start(plane)
    if IDLE_MEMORY in wanted:  # first: memory that a proxy keeps from an earlier load would hide this
        measure_idle(session)
    runs: dict[Case, list[ComparedMode]] = {
        case: [plane for plane in session.running if case.can_run(plane)] for case in CASES if case.name in wanted
    }
    order = random.Random(arguments.seed)
    for number in range(1, arguments.rounds + 1):
        session.run_round(number, runs, order, arguments.seconds)
    if SYSTEM_CALLS in wanted:
        session.count_system_calls(_COUNT_S, bulk=False)
    if DISTURBED in wanted:
        measure_disturbed(arguments, session)
    return session.results


def start_servers(lab: CompareLab) -> None:
    """Give the pod its servers, and the address that the endpoints of the 10,000 Services have."""
    (lab.folder / "bulk").write_bytes(bytes(range(256)) * (BULK_FILE_BYTES // 256))
    lab.start_nginx("small", SMALL)
    lab.start_nginx("large", BULK)
    for port in (UDP, UDP_ONCE):
        echo = str(Path(__file__).parent / "echo.py")
        lab.pod.start(sys.executable, echo, str(port), log=lab.folder / "echo.log")
    lab.pod.ip("address", "add", f"{PROBE_POD_IP}/32", "dev", "lo")


def measure_idle(session: Session) -> None:
    """Measure the memory of idle connections in each proxy."""
    for plane, node in session.running.items():
        if plane.kind == "proxy":
            say(f"memory: {plane.title}")
            session.add(IDLE_MEMORY, plane, 1, {"kib": idle_memory_kib(node)})


def measure_disturbed(arguments: argparse.Namespace, session: Session) -> None:
    """Measure the latency of each engine while 10,000 Services are loaded, at a share of HAProxy's rate."""
    rates = session.results.figures("keepalive-64", HAPROXY, "rate").values()
    rate = _LOAD_SHARE * statistics.median(rates) if rates else _DEFAULT_RATE
    for number in range(1, arguments.disturbed_rounds + 1):
        for engine, engine_arguments in ENGINES[: arguments.disturbed_engines]:
            say(f"latency while 10,000 Services are loaded: {engine}, round {number} of {arguments.disturbed_rounds}")
            node = session.lab.add(f"disturbed {engine} {number}")
            figures = disturbed(node, engine_arguments, rate)
            session.results.samples.append(Sample(DISTURBED, f"ours-{engine}", number, figures))


def say(what: str) -> None:
    """Show the current measurement on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="duration of one load")
    parser.add_argument("--disturbed-rounds", type=int, default=3)
    parser.add_argument("--disturbed-engines", type=int, default=len(ENGINES), help="the number of engines to disturb")
    parser.add_argument(
        "--cases", nargs="*", choices=KNOWN_CASES, default=[], metavar="CASE", help=", ".join(KNOWN_CASES)
    )
    plane_names = [plane.name for plane in PLANES]
    parser.add_argument(
        "--planes", nargs="*", choices=plane_names, default=[], metavar="PLANE", help=", ".join(plane_names)
    )
    parser.add_argument("--congestion", default="", help="TCP congestion control on every host; default: the machine's")
    parser.add_argument("--seed", type=int, default=1, help="seed for the order of the planes")
    parser.add_argument("--name", default="bench", help="name of the files in benchmarks/results/")
    parser.add_argument("--docs", type=Path, help="a page to write the tables into; the chart is written beside it")
    arguments = parser.parse_args()
    enter_namespaces(sys.argv[1:], {}, module="benchmarks.compare")
    started_at = time.monotonic()
    with compare_lab(arguments.congestion) as lab:
        results = measure(arguments, lab)
    say("")
    report.print_tables(results)
    _RESULTS.mkdir(exist_ok=True)
    (_RESULTS / f"{arguments.name}.json").write_bytes(to_json(results))
    (_RESULTS / f"{arguments.name}.svg").write_text(chart(results))
    if arguments.docs:
        report.write_into(arguments.docs, results)
        arguments.docs.with_suffix(".svg").write_text(chart(results))
    print(f"{time.monotonic() - started_at:.0f} s; benchmarks/results/{arguments.name}.json and .svg")


if __name__ == "__main__":
    main()
