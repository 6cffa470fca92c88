"""Runs a comparison: builds the hosts, starts every mode, measures for the stated time, and returns the results.

Single measurements come first. Repeated loads fill the remaining time, with the modes in a different order each round.
A machine that slows down therefore slows all modes.
"""

import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from userspace_proxy import __version__
from userspace_proxy.compare import cases
from userspace_proxy.compare.cases import Case
from userspace_proxy.compare.disasters import DISASTER_PODS, DISASTERS, POD_FAILURES, Disaster, happen
from userspace_proxy.compare.meters import machine
from userspace_proxy.compare.modes import IPTABLES, MODES, USERSPACE_COPY, ComparedMode
from userspace_proxy.compare.nodes import PODS, CompareLab
from userspace_proxy.compare.outputs import output
from userspace_proxy.compare.page import page
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, Results, to_json
from userspace_proxy.compare.scaling import SIZES, scale
from userspace_proxy.compare.session import Session, compare_lab, reason_of
from userspace_proxy.compare.tables import print_all
from userspace_proxy.errors import StartError
from userspace_proxy.lab import enter_namespaces

LATENCY, RATES, THROUGHPUT = "latency", "rates", "throughput"
SYSTEM_CALLS, SERVICES, FAILURES, ALL_DISASTERS = "system-calls", "services", "failures", "disasters"
LOADS = {
    LATENCY: (cases.KEEPALIVE_1, cases.NEW_1),
    RATES: (cases.KEEPALIVE_64, cases.NEW_64),
    THROUGHPUT: (cases.BULK_1, cases.BULK_8),
}
CASE_NAMES = (*LOADS, SYSTEM_CALLS, SERVICES, FAILURES, ALL_DISASTERS, *(each.name for each in DISASTERS))
MODE_NAMES = tuple(mode.name for mode in MODES)
QUICK_S, DEFAULT_S = 120.0, 600.0
TOOLS = {
    "nft": "nftables",
    "ip": "iproute2",
    "nginx": "nginx-light",
    "wrk": "wrk",
    "iperf3": "iperf3",
    "conntrack": "conntrack",
    "sysctl": "procps",
}
_RUN_OVERHEAD_S = 0.3  # around each load: to clear conntrack, and to start and end wrk
_LEAST_LOAD_S, _MOST_LOAD_S = 0.1, 2.0
_SERVICES_SHARE = 0.35  # the maximum share of the total time


@dataclass(frozen=True, slots=True)
class Depth:
    """How thorough a comparison is: the maximum ``rounds`` of each load, and the ``events`` of each kind.

    ``calls_s``: how long system calls are counted; ``dial_s``: how long new connections are made. ``engines``: run
    every load with both engines. Otherwise the copying engine runs large transfers only, where the engines differ.
    """

    rounds: int
    events: int
    calls_s: float
    dial_s: float
    sizes: Sequence[int]
    engines: bool


_QUICK = Depth(rounds=3, events=1, calls_s=0.2, dial_s=0.3, sizes=(10, 1_000, 5_000), engines=False)
_FULL = Depth(rounds=7, events=3, calls_s=1.0, dial_s=1.0, sizes=SIZES, engines=True)


@dataclass(frozen=True, slots=True)
class ComparisonRequest:
    """The options of a comparison; empty *modes* or *cases* select all."""

    duration_s: float = DEFAULT_S
    modes: Sequence[str] = ()
    cases: Sequence[str] = ()
    seed: int = 1

    def wants(self, case: str) -> bool:
        return not self.cases or case in self.cases

    @property
    def disasters(self) -> list[Disaster]:
        """The disasters to play: those named in *cases*; without cases all, except in a quick comparison."""
        is_all = ALL_DISASTERS in self.cases or (not self.cases and self.depth is _FULL)
        return [each for each in DISASTERS if is_all or each.name in self.cases]

    @property
    def depth(self) -> Depth:
        return _QUICK if self.duration_s <= QUICK_S else _FULL


def enter(arguments: Sequence[str]) -> None:
    """Continue this process in new namespaces. Raises StartError if namespaces are forbidden or a tool is missing."""
    enter_namespaces(arguments, TOOLS)


def run(request: ComparisonRequest, json_file: Path | None, html_file: Path | None) -> None:
    """Compare the modes, write the requested files and print the tables. Raises StartError on failure."""
    with ExitStack() as stack:
        # Open the files first: /run is replaced later, and a missing folder should not be found after ten minutes.
        writers = []
        for path, content in ((json_file, to_json), (html_file, page)):
            if path is not None:
                try:
                    writers.append((stack.enter_context(output(path)), content))
                except OSError as error:
                    raise StartError(f"{path}: {error.strerror}") from None
        results = measure(request)
        for write, content in writers:
            write(content(results))
    print_all(results)
    for path in filter(None, (json_file, html_file)):
        Console(stderr=True, soft_wrap=True).print(f"written: {path}", highlight=False, markup=False)


def measure(request: ComparisonRequest) -> Results:
    """Compare the modes; removes everything before it returns or raises. Raises StartError if a part does not start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        pods = DISASTER_PODS if request.disasters else PODS
        with compare_lab(pods=pods) as lab, _progress(request.duration_s) as say:
            return ComparisonRun(request, lab, say).run()
    except subprocess.SubprocessError as error:
        raise StartError(reason_of(error)) from None
    except KeyboardInterrupt:
        raise StartError("stopped") from None


@contextmanager
def _progress(duration_s: float) -> Iterator[Callable[[str], None]]:
    """Show the current measurement on a terminal; updates only between measurements, so that it costs them nothing."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, transient=True, auto_refresh=False, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("building hosts", total=duration_s)
        started_at = time.monotonic()

        def say(what: str) -> None:
            elapsed_s = min(time.monotonic() - started_at, duration_s)
            progress.update(bar, description=f"{what:<48.48}", completed=elapsed_s, refresh=True)

        yield say


class ComparisonRun:
    """One run of `compare`: starts the modes and measures what *request* asks for, within its duration."""

    def __init__(self, request: ComparisonRequest, lab: CompareLab, say: Callable[[str], None]) -> None:
        self._request = request
        self._end_at = time.monotonic() + request.duration_s
        taken_at = datetime.now(UTC).isoformat(timespec="seconds")
        results = Results(__version__, taken_at, machine(), request.duration_s, 0, 0.0, [])
        self.session = Session(lab, results, say)

    def run(self) -> Results:
        self.session.lab.start_backends()
        self.session.lab.start_endpoints()
        self.start_modes()
        if self._request.wants(SYSTEM_CALLS):
            self.session.count_system_calls(self._request.depth.calls_s)
        if self._request.wants(FAILURES):
            self.let_pods_fail()
        for disaster in self._request.disasters:
            self._let_happen(disaster, disaster.title)
        if self._request.wants(SERVICES):
            self._add_services()
        self._run_rounds()
        return self.session.results

    def start_modes(self) -> None:
        """Start the selected modes. Direct connections, the reference, are always started, and twice."""
        for mode in MODES:
            if self._request.modes and mode.name not in (DIRECT, DIRECT_AGAIN, *self._request.modes):
                continue
            reason = self.session.start(mode)
            if mode.name == DIRECT and reason:
                raise StartError(f"direct connections did not start: {reason}")

    def let_pods_fail(self) -> None:
        """Let each failure happen, as often as the depth says."""
        for number in range(1, self._request.depth.events + 1):
            for failure in POD_FAILURES:
                self._let_happen(failure, f"{failure.title}, round {number}", number)

    def _let_happen(self, disaster: Disaster, what: str, number: int = 1) -> None:
        self.session.say(what)
        with self.session.noting(what):
            happen(self.session, disaster, number)

    def _add_services(self) -> None:
        session, depth = self.session, self._request.depth
        modes = [mode for mode in session.running if mode.ours and mode.name != USERSPACE_COPY]
        # iptables comes last: it needs the most time and gets what the others leave.
        modes.sort(key=lambda mode: mode.name == IPTABLES)
        direct = next(node for mode, node in session.running.items() if mode.name == DIRECT)
        end_at = time.monotonic() + _SERVICES_SHARE * self._request.duration_s
        for index, mode in enumerate(modes):
            share_s = (end_at - time.monotonic()) / (len(modes) - index)
            session.say(f"10 to 10,000 Services: {mode.title}")
            node = session.lab.add(f"{mode.name} with many Services")
            done = [0]
            with session.noting(lambda mode=mode, done=done: f"{mode.title}: after {done[-1]:,} Services"):  # type: ignore[misc]
                for size, figures in scale(mode, node, direct, depth.sizes, depth.dial_s, share_s):
                    done.append(size)
                    session.add(f"services-{size}", mode, 1, figures)
                    session.say(f"{size:,} Services: {mode.title}")
            node.kill()  # the mode has its own node, so this disturbs nothing later

    def _run_rounds(self) -> None:
        names = [name for group, members in LOADS.items() if self._request.wants(group) for name in members]
        runs = {case: self._modes_of(case) for case in cases.CASES if case.name in names}
        if not runs:
            return
        left_s = self._end_at - time.monotonic()
        rounds, load_s = _plan(left_s, sum(map(len, runs.values())), self._request.depth.rounds)
        self.session.results.load_s = load_s
        order = random.Random(self._request.seed)  # noqa: S311 - no secret
        longest_s = 0.0
        for number in range(1, rounds + 1):
            started_at = time.monotonic()
            if started_at + longest_s > self._end_at and number > 1:
                break
            self.session.run_round(number, runs, order, load_s)
            longest_s = max(longest_s, time.monotonic() - started_at)

    def _modes_of(self, case: Case) -> list[ComparedMode]:
        is_bulk = case.name in LOADS[THROUGHPUT]
        all_engines = is_bulk or self._request.depth.engines
        return [mode for mode in self.session.running if mode.name != USERSPACE_COPY or all_engines]


def _plan(left_s: float, runs: int, wanted_rounds: int) -> tuple[int, float]:
    """Return (rounds, seconds of a load) that fit into *left_s* with *runs* loads in a round.

    More rounds take precedence over longer loads.
    """
    least_s = runs * (_LEAST_LOAD_S + _RUN_OVERHEAD_S)
    rounds = max(1, min(wanted_rounds, int(left_s / least_s)))
    load_s = left_s / (rounds * runs) - _RUN_OVERHEAD_S
    return rounds, round(min(_MOST_LOAD_S, max(_LEAST_LOAD_S, load_s)), 2)
