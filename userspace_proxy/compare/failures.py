"""Measures what clients see when one pod of three dies, falls silent, or leaves, for all modes at the same time.

Clients arrive at a fixed rate, whether answers come or not. Each uses a new connection, to every mode in turn. One
event in one pod therefore affects all modes alike.
"""

from __future__ import annotations

import select
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import cycle

from userspace_proxy.compare.loads import REQUEST_AND_CLOSE
from userspace_proxy.compare.modes import Mode
from userspace_proxy.compare.results import Timeline
from userspace_proxy.compare.sites import MISHAPS, PEERS, TRIO_PODS, Site, Sites, reason_of
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
    happen: Callable[[Sites], None]
    undo: Callable[[Sites], None]

    @property
    def what(self) -> str:
        """A short description of the event."""
        return self.title.partition(":")[0]

    @property
    def length_s(self) -> float:
        return _EVENT_S + self.told_after_s + 1.5


def _kill(sites: Sites) -> None:
    sites.trio_servers[_VICTIM].send_signal(signal.SIGKILL)


def _leave(sites: Sites) -> None:
    sites.trio_servers[_VICTIM].send_signal(signal.SIGQUIT)  # nginx: accepts no new connections and finishes open ones


def _restart(sites: Sites) -> None:
    sites.trio_servers[_VICTIM].wait(5)
    sites.restart_trio(_VICTIM)


def _fall_silent(sites: Sites) -> None:
    sites.trio[_VICTIM].run("nft", "-f", str(PEERS / "silence.rules"))


def _speak(sites: Sites) -> None:
    sites.trio[_VICTIM].run("nft", "delete", "table", "inet", "silence")


EVENTS: tuple[Event, ...] = (
    Event("dies", "a pod's process is killed: its port refuses", 2.0, _kill, _restart),
    Event("silent", "a pod is black-holed: packets to it vanish", 2.0, _fall_silent, _speak),
    Event("leaves", "a pod is deleted: told and stopped at the same moment", 0.0, _leave, _restart),
)


@dataclass
class _Tally:
    """One mode's answers, by the bucket in which the request began."""

    addresses: Iterator[tuple[str, int]]
    good: list[int]
    slow: list[int]
    failed: list[int]


@dataclass
class _Clients:
    """Runs the clients of all modes in one loop; sockets belong to the calling thread's network namespace."""

    tallies: list[_Tally]
    length_s: float
    _poll: select.epoll = field(default_factory=select.epoll)
    _open: dict[int, tuple[socket.socket, _Tally, float, bool]] = field(default_factory=dict)

    def run(self, started_at: float) -> None:
        turns = cycle(self.tallies)
        gap_s = 1 / (RATE * len(self.tallies))
        due_at, last_at = started_at, started_at + self.length_s
        while due_at < last_at or self._open:
            now = time.monotonic()
            while due_at <= now and due_at < last_at:
                self._begin(next(turns), due_at)
                due_at += gap_s
            wait_s = max(0.0, min(due_at, now + 0.05) - time.monotonic()) if due_at < last_at else 0.05
            for fd, events in self._poll.poll(wait_s):
                self._go_on(fd, events, started_at)
            self._give_up(started_at)
        self._poll.close()

    def _begin(self, tally: _Tally, due_at: float) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._open[sock.fileno()] = (sock, tally, due_at, False)
        sock.connect_ex(next(tally.addresses))  # poll() reports immediate errors, too
        self._poll.register(sock.fileno(), select.EPOLLOUT)

    def _go_on(self, fd: int, events: int, started_at: float) -> None:
        sock, tally, due_at, asked = self._open[fd]
        try:
            if not asked:
                sock.send(REQUEST_AND_CLOSE)
                self._open[fd] = (sock, tally, due_at, True)
                self._poll.modify(fd, select.EPOLLIN)
                return
            is_answered = sock.recv(4096).startswith(b"HTTP/1.1 200")
        except OSError:
            is_answered = False
        self._end(fd, started_at, is_answered=is_answered)

    def _give_up(self, started_at: float) -> None:
        before = time.monotonic() - PATIENCE_S
        for fd in [fd for fd, (_, _, due_at, _) in self._open.items() if due_at < before]:
            self._end(fd, started_at, is_answered=False)

    def _end(self, fd: int, started_at: float, *, is_answered: bool) -> None:
        sock, tally, due_at, _ = self._open.pop(fd)
        self._poll.unregister(fd)
        sock.close()
        took_s = time.monotonic() - due_at
        counts = tally.failed if not is_answered else tally.slow if took_s > SLOW_S else tally.good
        counts[int((due_at - started_at) / BUCKET_S)] += 1


def watch(
    sites: Sites, running: Mapping[Mode, Site], event: Event, number: int, note: Callable[[str], None]
) -> list[Timeline]:
    """Trigger *event* while clients send requests, then undo it; return what each mode's clients saw.

    A mode that cannot be notified is reported to *note* and has no result.
    """
    buckets = int(event.length_s / BUCKET_S) + 1
    tallies = {
        mode: _Tally(cycle(mode.trio_addresses(site, range(TRIO_PODS))), *([0] * buckets for _ in range(3)))
        for mode, site in running.items()
    }

    untold: dict[Mode, str] = {}

    def tell(alive: Iterable[int]) -> None:
        for mode, site in running.items():
            try:
                mode.tell(site, alive)
            except MISHAPS as error:
                untold[mode] = reason_of(error)

    def happen() -> None:
        time.sleep(max(0.0, started_at + _EVENT_S - time.monotonic()))
        event.happen(sites)
        time.sleep(event.told_after_s)
        tell(_OTHERS)

    try:
        with ThreadPoolExecutor(1, "event") as beside:
            started_at = time.monotonic() + 0.05
            happened = beside.submit(happen)
            with sites.client.inside():
                _Clients(list(tallies.values()), event.length_s).run(started_at)
    finally:
        event.undo(sites)
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


def wait_until_all_answer(mode: Mode, site: Site) -> None:
    """Wait until all three pods answer through *mode*: an ejected pod could not fail.

    Raises:
        StartError: they do not answer, so the event would show nothing.
    """
    give_up_at = time.monotonic() + _RECOVERED_WITHIN_S
    seen: set[str] = set()
    for ip, port in cycle(mode.trio_addresses(site, range(TRIO_PODS))):
        try:
            seen.add(ask(site.client, ip, port, timeout_s=0.5))
        except OSError:
            time.sleep(0.02)
        if len(seen) == TRIO_PODS:
            return
        if time.monotonic() > give_up_at:
            raise StartError(f"{mode.title}: of the three pods only {', '.join(sorted(seen)) or 'none'} answered")
