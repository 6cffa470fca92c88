"""Choose local ports for UDP flows: the port that has rested longest, and none too early. Pure, but reads the range.

The kernel finds a reply's socket by addresses and ports alone. A late reply to an ended flow therefore reaches the
flow that has the same local port towards the same endpoint by then. So local ports are chosen here instead of by the
kernel, and rest after the last datagram of their flow. Sockets with SO_REUSEPORT that are connected to different
endpoints may share a local port, so each endpoint has the whole range.
"""

from __future__ import annotations

import heapq
import itertools
import random
from array import array
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

_SYSCTLS = Path("/proc/sys/net/ipv4")
_DEFAULT_RANGE = "32768 60999"
# The last 1/32 of the ports is reserved for clients with few flows. It also leaves some to other programs.
_RESERVED_PART = 32


def local_ports(share: tuple[int, int] = (0, 1)) -> array[int]:
    """Return the local ports to choose from: the kernel's ephemeral range, without reserved ports.

    *share*: (worker, workers); no two workers have a port in common.
    """
    first, last = map(int, (_sysctl("ip_local_port_range") or _DEFAULT_RANGE).split())
    reserved = parse_ports(_sysctl("ip_local_reserved_ports"))
    worker, workers = share
    ports = range(first + (worker - first) % workers, last + 1, workers)
    return array("H", [port for port in ports if port not in reserved] if reserved else ports)


def parse_ports(text: str) -> set[int]:
    """Return the ports in *text*, in the format of ``ip_local_reserved_ports``: ``8080,9000-9100``."""
    ports: set[int] = set()
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        ports.update(range(int(first), int(last or first) + 1))
    return ports


def _sysctl(name: str) -> str:
    try:
        return (_SYSCTLS / name).read_text()
    except OSError:
        return ""


class LocalPorts:
    """The local ports from one source address towards one endpoint.

    *ports*: in ascending order. *start*: index in *ports* of the first to use. *taken*: ports that another process has
    used lately, free at *free_at*. *never*: a port that is never used. *look*: returns both as they are now. It
    is called once, before the first port of *taken* is reached: behind the last of these, the other process may have
    continued for a while.
    """

    __slots__ = ("_at", "_free", "_fresh", "_look", "_ports", "_reserve", "_resting", "_skipped", "used")

    def __init__(
        self,
        ports: Sequence[int],
        start: int,
        taken: Collection[int] = (),
        free_at: float = 0.0,
        never: int = 0,
        look: Callable[[], tuple[Collection[int], float]] | None = None,
    ) -> None:
        self._ports = ports
        self._at = start
        self._look = look if taken else None
        self._resting: list[tuple[float, int]] = []  # a heap, by free time
        at = bisect_left(ports, never)
        self._skipped = {never}.intersection(ports[at : at + 1])
        if taken:  # else in constant time: there may be many source addresses
            self._resting = [(free_at, p) for p in ports if p in taken and p != never]
            self._skipped |= set(taken).intersection(ports)
        self._fresh = len(ports) - len(self._skipped)  # number of ports not used yet
        self._free: deque[int] = deque()  # rested ports, longest first
        self._reserve = len(ports) // _RESERVED_PART
        self.used = 0

    @property
    def at(self) -> int:
        """The index of the next port that was never used."""
        return self._at

    def take(self, now: float, *, has_few: bool) -> int | None:
        """Return the port that has rested longest, or None if there is none for this client.

        *has_few*: the client has few flows, so it may take a reserved port.
        """
        resting, free = self._resting, self._free
        while resting and resting[0][0] <= now:
            free.append(heapq.heappop(resting)[1])
        if not has_few and self._fresh + len(free) <= self._reserve:
            return None
        while self._fresh:
            port = self._ports[self._at]
            if port in self._skipped and self._look is not None:
                self._skip(*self._look())
                self._look = None
                continue
            self._at = (self._at + 1) % len(self._ports)
            if port not in self._skipped:
                self._fresh -= 1
                break
        else:
            if not free:
                return None
            port = free.popleft()
        self.used += 1
        return port

    def _skip(self, taken: Collection[int], free_at: float) -> None:
        """Let the ports that another process has *taken* rest until *free_at*, before they are used here."""
        ahead = (self._ports[(self._at + step) % len(self._ports)] for step in range(len(self._ports)))
        for port in itertools.islice((p for p in ahead if p not in self._skipped), self._fresh):
            if port in taken:
                heapq.heappush(self._resting, (free_at, port))
                self._skipped.add(port)
                self._fresh -= 1

    def rest(self, port: int, until: float) -> None:
        """Give back *port*, which `take` returned. It is free again at *until*."""
        self.used -= 1
        heapq.heappush(self._resting, (until, port))

    def is_idle(self, now: float) -> bool:
        """Return whether all ports are free, so that this object can be discarded."""
        return not self.used and all(until <= now for until, _ in self._resting)


def first_index(ports: Sequence[int], taken: Collection[int]) -> int:
    """Return the index to start at: in the middle of the largest gap between *taken* ports.

    The process that used these may continue behind each of them.
    """
    used = [index for index, port in enumerate(ports) if port in taken] if taken else []
    if not used:
        return random.randrange(len(ports)) if ports else 0  # noqa: S311 - no secret
    gaps = [(after - before, before) for before, after in zip(used, [*used[1:], used[0] + len(ports)], strict=True)]
    width, before = max(gaps)
    return (before + (width + 1) // 2) % len(ports)
