"""What `compare` and the benchmarks have in common: modes on their nodes, measured in rounds, with notes on failures.

An error of one mode (MODE_ERRORS) becomes a note in the results. The other modes are measured.
"""

import random
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from userspace_proxy.compare.cases import Case, run_case
from userspace_proxy.compare.modes import ComparedMode
from userspace_proxy.compare.nodes import PODS, CompareLab, ModeNode
from userspace_proxy.compare.results import ModeRun, Results, Sample
from userspace_proxy.compare.syscalls import calls_per_mb, calls_per_request, has_counter
from userspace_proxy.errors import StartError
from userspace_proxy.lab import Lab, prepare

MODE_ERRORS = (StartError, OSError, subprocess.SubprocessError)


def reason_of(error: Exception) -> str:
    """Return the reason for *error*; for a failed tool, the tool's own message."""
    if not isinstance(error, subprocess.CalledProcessError):
        return str(error)
    message = (error.stderr or error.stdout or "").strip() or f"exit code {error.returncode}"
    return f"{' '.join(map(str, error.cmd))}: {message}"


@contextmanager
def compare_lab(congestion: str = "", pods: int = PODS) -> Iterator[CompareLab]:
    """Build the hosts, inside of namespaces; remove everything at the end. *congestion*: TCP's on every host.

    *pods*: the number of pods that may fail.
    """
    prepare()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with tempfile.TemporaryDirectory(dir="/run") as folder, Lab() as lab:
        yield CompareLab(lab, Path(folder), congestion, pods)


@dataclass
class Session:
    """The running modes with their nodes, and the results so far. ``say`` shows the current measurement."""

    lab: CompareLab
    results: Results
    say: Callable[[str], None]
    running: dict[ComparedMode, ModeNode] = field(default_factory=dict)

    def note(self, what: str) -> None:
        if what not in self.results.notes:
            self.results.notes.append(what)

    @contextmanager
    def noting(self, what: Callable[[], str] | str) -> Iterator[None]:
        """Record an error of a mode, raised in the block, as a note in the results that begins with *what*."""
        try:
            yield
        except MODE_ERRORS as error:
            self.note(f"{what if isinstance(what, str) else what()}: {reason_of(error)}")

    def add(self, case: str, mode: ComparedMode, number: int, figures: dict[str, float]) -> None:
        self.results.samples.append(Sample(case, mode.name, number, figures))

    def start(self, mode: ComparedMode) -> str | None:
        """Start *mode* on its own node; return the reason if it did not start, else None."""
        self.say(f"starting {mode.title}")
        reason = mode.missing() or self._start(mode)
        self.results.modes.append(ModeRun(mode.name, mode.title, mode.kind, mode.ours, reason))
        return reason

    def _start(self, mode: ComparedMode) -> str | None:
        node = self.lab.add(mode.name)
        try:
            mode.start(node)
            node.wait_until_it_serves()
        except MODE_ERRORS as error:
            node.kill()
            return reason_of(error)
        self.running[mode] = node
        return None

    def count_system_calls(self, seconds: float, *, bulk: bool = True) -> None:
        """Count the system calls of each mode that has a process, for *seconds* a load; with *bulk* of bytes, too."""
        if not has_counter():
            self.note("system calls were not counted: strace is not installed (package strace)")
            return
        for mode, node in self.running.items():
            if not node.processes:
                continue
            self.say(f"system calls: {mode.title}")
            with self.noting(f"system calls of {mode.title} were not counted"):
                self.add("calls-request", mode, 1, calls_per_request(node, seconds))
                self.add("calls-connection", mode, 1, calls_per_request(node, seconds, close=True))
                if bulk:
                    self.add("calls-mb", mode, 1, calls_per_mb(node, seconds))

    def run_round(
        self, number: int, runs: Mapping[Case, Sequence[ComparedMode]], order: random.Random, load_s: float
    ) -> None:
        """Run each case over its modes, in random *order*, for *load_s* each."""
        for case, modes in runs.items():
            self.say(f"round {number}: {case.title}")
            for mode in order.sample(modes, len(modes)):
                with self.noting(f"{mode.title}, {case.title}, round {number}"):
                    self.add(case.name, mode, number, run_case(case, self.running[mode], load_s))
        self.results.rounds = number
