"""Measures what clients see when one pod of three dies, falls silent, or leaves, for all modes at the same time.

Clients arrive at a fixed rate, whether answers come or not. Each uses a new connection, to every mode in turn. One
event in one pod therefore affects all modes alike.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import cycle

from userspace_proxy.compare.loads import REQUEST_AND_CLOSE
from userspace_proxy.compare.modes import ComparedMode
from userspace_proxy.compare.nodes import PEERS, TRIO_PODS, CompareLab, ModeNode
from userspace_proxy.compare.results import Timeline
from userspace_proxy.compare.session import MODE_ERRORS, reason_of
from userspace_proxy.errors import StartError
from userspace_proxy.lab import ask

RATE = 60.0  # new clients each second, for each mode
BUCKET_S = 0.1
SLOW_S = 0.1
PATIENCE_S = 1.0  # a client gives up after this time
_EVENT_S = 1.0
_VICTIM = 1
_RECOVERED_WITHIN_S = 20.0
_OTHERS = [index for index in range(TRIO_PODS) if index != _VICTIM]


@dataclass(frozen=True, slots=True)
class Event:
    """One kind of failure.

    ``told_after_s``: the time that a cluster needs to notice it (a readiness probe) and to notify every mode.
    """

    name: str
    title: str
    told_after_s: float
    happen: Callable[[CompareLab], None]
    undo: Callable[[CompareLab], None]

    @property
    def what(self) -> str:
        """A short description of the event."""
        return self.title.partition(":")[0]

    @property
    def length_s(self) -> float:
        return _EVENT_S + self.told_after_s + 1.5


def _kill(lab: CompareLab) -> None:
    lab.trio_servers[_VICTIM].send_signal(signal.SIGKILL)


def _leave(lab: CompareLab) -> None:
    lab.trio_servers[_VICTIM].send_signal(signal.SIGQUIT)  # nginx: accepts no new connections and finishes open ones


def _restart(lab: CompareLab) -> None:
    lab.trio_servers[_VICTIM].wait(5)
    lab.restart_trio(_VICTIM)


def _fall_silent(lab: CompareLab) -> None:
    lab.trio[_VICTIM].run("nft", "-f", str(PEERS / "silence.rules"))


def _speak(lab: CompareLab) -> None:
    lab.trio[_VICTIM].run("nft", "delete", "table", "inet", "silence")


EVENTS: tuple[Event, ...] = (
    Event("dies", "a pod's process is killed: its port refuses", 2.0, _kill, _restart),
    Event("silent", "a pod is black-holed: packets to it vanish", 2.0, _fall_silent, _speak),
    Event("leaves", "a pod is deleted: told and stopped at the same moment", 0.0, _leave, _restart),
)


@dataclass
class Tally:
    """One mode's answers, by the bucket in which the request began. An answer after ``slow_s`` is slow."""

    addresses: Iterator[tuple[str, int]]
    length_s: float
    slow_s: float = SLOW_S
    patience_s: float = PATIENCE_S
    cut: int = 0  # of the failed ones, those that had been connected

    def __post_init__(self) -> None:
        self.good, self.slow, self.failed = ([0] * (int(self.length_s / BUCKET_S) + 1) for _ in range(3))


async def send_requests(tallies: Sequence[Tally], started_at: float, length_s: float) -> None:
    """Start clients at a fixed rate for *length_s*, each to the next mode; end when all of them have ended."""
    gap_s = 1 / (RATE * len(tallies))
    async with asyncio.TaskGroup() as clients:
        for number in range(int(length_s / gap_s)):
            due_s = number * gap_s
            await asyncio.sleep(started_at + due_s - time.monotonic())
            clients.create_task(
                _send_request(tallies[number % len(tallies)], started_at + due_s, int(due_s / BUCKET_S))
            )


async def _send_request(tally: Tally, due_at: float, bucket: int) -> None:
    answer, is_connected = b"", False
    with contextlib.suppress(OSError):
        async with asyncio.timeout(tally.patience_s):
            reader, writer = await asyncio.open_connection(*next(tally.addresses))
            is_connected = True
            try:
                writer.write(REQUEST_AND_CLOSE)
                answer = await reader.read(4096)
            finally:
                writer.transport.abort()
    is_slow = time.monotonic() - due_at > tally.slow_s
    is_good = answer.startswith(b"HTTP/1.1 200")
    ((tally.slow if is_slow else tally.good) if is_good else tally.failed)[bucket] += 1
    tally.cut += is_connected and not is_good


def watch(
    lab: CompareLab, running: Mapping[ComparedMode, ModeNode], event: Event, number: int, note: Callable[[str], None]
) -> list[Timeline]:
    """Trigger *event* while clients send requests, then undo it; return what each mode's clients saw.

    A mode that cannot be notified is reported to *note* and has no result.
    """
    tallies = {
        mode: Tally(cycle(mode.trio_addresses(node, range(TRIO_PODS))), event.length_s)
        for mode, node in running.items()
    }

    untold: dict[ComparedMode, str] = {}

    def tell(alive: Iterable[int]) -> None:
        for mode, node in running.items():
            try:
                mode.tell(node, alive)
            except MODE_ERRORS as error:
                untold[mode] = reason_of(error)

    def happen() -> None:
        time.sleep(max(0.0, started_at + _EVENT_S - time.monotonic()))
        event.happen(lab)
        time.sleep(event.told_after_s)
        tell(_OTHERS)

    try:
        with ThreadPoolExecutor(1, "event") as beside:
            started_at = time.monotonic() + 0.05
            happened = beside.submit(happen)
            with lab.client.inside():
                asyncio.run(send_requests(list(tallies.values()), started_at, event.length_s))
    finally:
        event.undo(lab)
        tell(range(TRIO_PODS))
    happened.result()
    for mode, reason in untold.items():
        note(f"{mode.title}, round {number}: could not be told that {event.what}: {reason}")
    told_s = _EVENT_S + event.told_after_s
    return [
        Timeline(event.name, mode.name, number, BUCKET_S, _EVENT_S, told_s, tally.good, tally.slow, tally.failed)
        for mode, tally in tallies.items()
        if mode not in untold
    ]


def wait_until_all_answer(
    mode: ComparedMode, node: ModeNode, addresses: Sequence[tuple[str, int]], pods: int = TRIO_PODS
) -> None:
    """Wait until all *pods* answer at *addresses*, through *mode*: an ejected pod could not fail.

    Raises:
        StartError: not all pods answer in time, so the event would show nothing.
    """
    give_up_at = time.monotonic() + _RECOVERED_WITHIN_S
    seen: set[str] = set()
    for ip, port in cycle(addresses):
        try:
            seen.add(ask(node.client, ip, port, timeout_s=0.5))
        except OSError:
            time.sleep(0.02)
        if len(seen) == pods:
            return
        if time.monotonic() > give_up_at:
            raise StartError(f"{mode.title}: of {pods} pods only {', '.join(sorted(seen)) or 'none'} answered")
