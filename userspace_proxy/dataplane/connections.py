"""The set of open connections: its limits, its timeouts and the drain.

Idle, half-closed and dead-peer timeouts need no timer for each connection. A sweep visits a part of the set every
second, so that it visits each connection several times within the shortest timeout. A connection is silent if its byte
counters have not moved since the last visit.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import resource
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from userspace_proxy.dataplane.peers import PeerAnswer, last_answer
from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.dataplane.slices import in_slices
from userspace_proxy.dataplane.sockets import keep_alive
from userspace_proxy.interfaces import Splice

if TYPE_CHECKING:
    from userspace_proxy.dataplane.tcp import TcpConnection

# Descriptors reserved for the event loop, rules, admin and file watching.
RESERVED_DESCRIPTORS = 128
# A service port may hold this multiple of the free connections (dynamic thresholds, Choudhury and Hahne 1998). Alone,
# it gets 8 of 9 descriptors. Some always stay free, however many service ports reach their share.
_SHARE = 8
# Also kept free of listeners, so that existing listeners can accept.
_FOR_CONNECTIONS = 16
_SWEEPS_A_LIMIT = 12
_RESUME_S = 0.1
_COMPLAIN_EVERY_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """Timeouts of the data plane (seconds, 0 for never), and the limits for its clients."""

    idle_timeout_s: float = 86_400.0
    half_closed_timeout_s: float = 3_600.0
    dead_peer_timeout_s: float = 300.0
    connections_per_client: int = 0  # open at once, over all listeners; 0 for any number
    congestion_control: str = ""  # of TCP connections on both sides; "" for the host's
    udp_flows_per_service: int = 32_768
    udp_timeout_s: float = 30.0
    udp_stream_timeout_s: float = 120.0
    udp_port_rest_s: float = 30.0  # after the last datagram of a flow, before another one has its local port


@dataclass(slots=True)
class _Silence:
    """The results of the sweep's visits to one connection. Lists have one item per side: client, backend."""

    since: float
    moved_bytes: int = -1
    # Bytes and half-close state at which both peers had acknowledged all; no check is needed until they change.
    answered_at: tuple[int, bool] | None = None
    unanswered_since: list[float | None] = field(default_factory=lambda: [None, None])


@dataclass(eq=False)
class Connections:
    """Every open TCP connection of the data plane."""

    _poller: Poller
    _loop: asyncio.AbstractEventLoop
    _limits: Limits
    _now: Callable[[], float]
    _descriptors_used: Callable[[], int]
    _shed: Callable[[], None] = lambda: None
    _open: dict[TcpConnection, _Silence | None] = field(default_factory=dict)  # None: not visited yet
    _open_by_client: Counter[bytes] = field(default_factory=Counter)  # empty if clients have no limit
    races: int = 0  # second dials of a connection that is already being dialled
    _round: list[TcpConnection] = field(default_factory=list)
    _part: int = 1
    _empty: asyncio.Event = field(default_factory=asyncio.Event)
    _complained_at: float = float("-inf")
    times_paused: int = 0
    shortages: int = 0

    def __post_init__(self) -> None:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        self._most = limit - min(RESERVED_DESCRIPTORS, limit // 4)

    def __len__(self) -> int:
        return len(self._open)

    def __iter__(self) -> Iterator[TcpConnection]:
        """Yield every connection, oldest first."""
        return iter(self._open)

    def add(self, connection: TcpConnection) -> bool:
        """Add *connection*. Return False if its client has reached its limit."""
        if self._limits.connections_per_client:
            client = _client_key(connection.client[0])
            if self._open_by_client[client] >= self._limits.connections_per_client:
                return False
            self._open_by_client[client] += 1
        self._open[connection] = None
        return True

    def remove(self, connection: TcpConnection) -> None:
        """Remove *connection*, which `add` accepted."""
        del self._open[connection]
        if self._limits.connections_per_client:
            client = _client_key(connection.client[0])
            self._open_by_client[client] -= 1
            if not self._open_by_client[client]:
                del self._open_by_client[client]
        if not self._open:
            self._empty.set()

    def note_new_backend(self, connection: TcpConnection) -> None:
        """Visit *connection* as a new one from now on: its backend's socket is another one."""
        self._open[connection] = None

    # ---- room

    def share(self, connections_open: int) -> int:
        """Return how many more connections a service port with *connections_open* may have; <= 0 for none.

        If no descriptor is left for any connection, accepting is paused until there is one.
        """
        room = self._descriptors_left() // 2
        if room <= 0:
            self.note_shortage(OSError(errno.EMFILE, "all descriptors are in use"))
        return min(room, _SHARE * room - connections_open)

    def note_crowd(self, name: str) -> None:
        """Note that the service port *name* has used up its share of descriptors; its new clients wait."""
        self.times_paused += 1
        self.note_shortage(OSError(0, f"{name} has used up its share of descriptors"))

    def fits(self, descriptors: int) -> bool:
        """Return whether *descriptors* more leave enough for everything else."""
        return descriptors <= self._descriptors_left()

    def _descriptors_left(self) -> int:
        return self._most - self._descriptors_used() - 2 * len(self._open) - self.races

    def note_shortage(self, error: OSError) -> None:
        """Note that this host is short of a resource. If it is descriptors or memory, pause accepting for a moment."""
        self.shortages += 1
        if self._now() - self._complained_at > _COMPLAIN_EVERY_S:
            self._complained_at = self._now()
            remedy = "raise the limit (ulimit -n, LimitNOFILE=)"
            if error.errno == errno.EADDRNOTAVAIL:
                remedy = "widen net.ipv4.ip_local_port_range, add endpoints"
            log.warning("%s, with %d connections open; %s or lower the load", error.strerror, len(self._open), remedy)
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM) and self._poller.accepting:
            self.times_paused += 1
            self._shed()
            self._poller.pause_accepting()
            self._loop.call_later(_RESUME_S, self._poller.resume_accepting)

    # ---- sweep

    @property
    def sweep_period_s(self) -> float:
        """The period for `sweep`: it visits each connection twelve times within the shortest timeout."""
        return min(1.0, self._shortest_limit_s / _SWEEPS_A_LIMIT)

    @property
    def _shortest_limit_s(self) -> float:
        limits = self._limits
        given = (limits.idle_timeout_s, limits.half_closed_timeout_s, limits.dead_peer_timeout_s)
        return min((limit for limit in given if limit), default=60.0)

    async def sweep(self) -> None:
        """Visit the next part of the connections, and cut those that have been silent for too long."""
        if not self._round:
            self._round = list(self._open)
            parts = max(1, round(self._shortest_limit_s / _SWEEPS_A_LIMIT / self.sweep_period_s))
            self._part = -(-len(self._round) // parts)
        part, self._round = self._round[: self._part], self._round[self._part :]
        now = self._now()
        async for connection in in_slices(part, self._now):
            self._look_at(connection, now)

    def _look_at(self, connection: TcpConnection, now: float) -> None:
        splice = connection.splice
        if connection not in self._open or splice is None:
            return
        silence = self._open[connection]
        if silence is None:
            silence = self._open[connection] = _Silence(now)
            # The client's socket inherits keepalive from the listener. Most connections end before their first visit
            # and save these system calls.
            keep_alive(splice.sockets[1], self._limits.dead_peer_timeout_s)
        reason = self._too_long(splice, silence, now)
        if reason:
            connection.cut(reason)

    def _too_long(self, splice: Splice, silence: _Silence, now: float) -> str:
        limits = self._limits
        moved = splice.bytes_to_backend + splice.bytes_to_client
        if moved != silence.moved_bytes:
            silence.moved_bytes = moved
            silence.since = now
        silent_s = now - silence.since
        if limits.idle_timeout_s and silent_s >= limits.idle_timeout_s:
            return "idle"
        if splice.half_closed and limits.half_closed_timeout_s and silent_s >= limits.half_closed_timeout_s:
            return "half-closed for too long"
        if not limits.dead_peer_timeout_s or silence.answered_at == (moved, splice.half_closed):
            return ""
        return self._dead_peer(splice, silence, now)

    def _dead_peer(self, splice: Splice, silence: _Silence, now: float) -> str:
        # Two sweep periods less than the limit, so that it is never exceeded.
        limit_s = self._limits.dead_peer_timeout_s * (1 - 2 / _SWEEPS_A_LIMIT)
        owes_nothing = True
        for side, sock in enumerate(splice.sockets):
            since = silence.unanswered_since[side]
            waiting_s = 0.0 if since is None else now - since
            answer = last_answer(sock, waiting_s)
            owes_nothing = owes_nothing and answer is PeerAnswer.NOTHING_ASKED
            if answer is not PeerAnswer.NONE:
                silence.unanswered_since[side] = None
            elif since is None:
                silence.unanswered_since[side] = now
            elif waiting_s >= limit_s:
                return f"{('client', 'backend')[side]} is dead"
        if owes_nothing:
            silence.answered_at = (silence.moved_bytes, splice.half_closed)
        return ""

    async def count_bytes(self) -> None:
        """Update the byte counters of all connections."""
        async for connection in in_slices(list(self._open), self._now):
            connection.count_bytes()

    # ---- drain

    async def drain(self, timeout_s: float) -> None:
        """Wait until all connections have ended, for at most *timeout_s*; then cut the rest."""
        if self._open:
            self._empty.clear()
            log.info("draining %d connections for up to %.3g s", len(self._open), timeout_s)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._empty.wait()
        self.cut_all()

    def cut_all(self) -> None:
        for connection in list(self._open):
            connection.cut("cut: the proxy stops")


def _client_key(client_ip: str) -> bytes:
    """Return the key of one client: an IPv4 address, or the /64 of an IPv6 address, which a client chooses freely."""
    if ":" in client_ip:
        return socket.inet_pton(socket.AF_INET6, client_ip.partition("%")[0])[:8]
    return socket.inet_aton(client_ip)


def require_room(descriptor: int) -> None:
    """Raise OSError if too few descriptors are left after a listener got *descriptor*.

    The kernel always assigns the lowest free number, so the number tells how many are in use.
    """
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if descriptor >= limit - min(RESERVED_DESCRIPTORS, limit // 4) - _FOR_CONNECTIONS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def raise_descriptor_limit() -> None:
    """Raise the soft limit of descriptors to the hard limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
