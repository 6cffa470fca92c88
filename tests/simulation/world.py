"""The hosts around the proxy in a history: clients, endpoints, and what each has seen."""

from __future__ import annotations

import errno
import functools
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.simulation.datagrams import reply_addresses
from tests.simulation.ends import Backend, Client, Plan
from tests.simulation.kernel import Address, Datagram, Listener, Network, Stream
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.memory import EJECT_MAX_S, EJECT_S
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName

if TYPE_CHECKING:
    from tests.simulation.history import History

PORTAL = ("10.96.0.1", 80)
UDP_PORTAL_IP = "10.96.0.1"
TCP = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
UDP = ServicePortName(NamespacedName("shop", "dns"), "dns", L4Protocol.UDP)
PORT = 8_080
LIMITS = Limits(
    idle_timeout_s=12.0,
    half_closed_timeout_s=9.0,
    dead_peer_timeout_s=6.0,
    udp_timeout_s=3.0,
    udp_stream_timeout_s=5.0,
    udp_port_rest_s=6.0,
)
_CONNTRACK_S = 30.0


class ViolationError(AssertionError):
    """An invariant does not hold."""


def check(holds: object, what: str, *details: object) -> None:
    if not holds:
        raise ViolationError(" ".join([what, *map(repr, details)]))


@dataclass
class Site:
    """An endpoint's host. ``is_steady``: it answers from the beginning to the end."""

    address: Address
    is_steady: bool
    state: str = "answer"
    delay_s: float = 0.0
    answer: str = "answer"  # to probes
    accepted: int = 0
    answered_at: float = 0.0
    # The ejection that its failures justify, as long as a steady endpoint is there.
    failures: int = 0
    failed_at: float = 0.0
    ejected_until: float = 0.0
    arrivals_since_due: int = 0  # new connections since its ejection has ended, without a dial to it


@dataclass
class UdpClient:
    address: Address
    number: int
    sent: int = 0
    replies: set[tuple[int, int]] = field(default_factory=set)


class World(Network):
    """The hosts around the proxy."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.kernel = history.kernel
        self.sites: dict[Address, Site] = {}
        self.clients: list[Client] = []
        self.backends: dict[int, Backend] = {}
        self.udp_clients: dict[Address, UdpClient] = {}
        self.forwarded: set[tuple[int, int]] = set()
        self.udp_used: dict[Address, dict[int, float]] = {}  # by endpoint and local port: when it was used last
        self.short_until = 0.0
        self.lacks: set[int] = set()

    # ---- TCP

    def check_room(self, kind: int) -> None:
        if self.kernel.now < self.short_until and errno.EMFILE in self.lacks:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def connect(self, sock: Stream, address: Address) -> int:
        if sock.is_probe:
            self.history.note("probe", address)
            return self.history.probing.connect(sock, address)
        kernel, site = self.kernel, self.sites[address]
        self.history.note("dial", address)
        self.history.check_barred(TCP, address)
        if kernel.now < self.short_until and errno.EADDRNOTAVAIL in self.lacks and kernel.random.random() < 0.5:
            return errno.EADDRNOTAVAIL
        self.history.check_ejection(site)
        round_trip_s = 2 * kernel.latency_s
        if site.state == "unreachable":
            self.history.note_failure(site)
            return errno.EHOSTUNREACH
        if site.state == "refuse":
            kernel.call_later(round_trip_s, lambda: self._refuse(sock, site))
        elif site.state == "vanish":
            kernel.call_later(127.0, lambda: sock.fail(errno.ETIMEDOUT))
        else:
            delay_s = site.delay_s if site.state == "slow" else 0.0
            kernel.call_later(round_trip_s + delay_s, lambda: self._establish(sock, site))
        return errno.EINPROGRESS

    def _refuse(self, sock: Stream, site: Site) -> None:
        if not sock.closed:
            self.history.note_failure(site)
            sock.fail(errno.ECONNREFUSED)

    def _establish(self, sock: Stream, site: Site) -> None:
        if sock.closed or sock.dead:
            return
        site.failures, site.ejected_until, site.answered_at = 0, 0.0, self.kernel.now
        far = Stream(self.kernel, local=False)
        self.history.draw_rooms(far, sock)
        far.connected = True
        far.join(sock)
        number = 1_000 + len(self.backends)
        backend = Backend(
            self.kernel, far, number, self.history.draw_backend_plan(site), site.address, self.history.on_backend
        )
        self.backends[number] = backend
        sock.on_ack = backend.begin
        sock.establish()

    def arrive(self, listener: Listener, ip: str, plan: Plan) -> None:
        """Let a client connect to the proxy port of *listener*."""
        kernel = self.kernel
        far, near = Stream(kernel, local=False), Stream(kernel, local=False)
        self.history.draw_rooms(far, near)
        if plan.reads_slowly:  # so that much of a reply is still on its way when something happens
            far.receive_room, near.send_room = 600, 2_000
        far.join(near)
        far.connected = near.connected = True
        near.original = PORTAL
        client = Client(kernel, far, 1 + len(self.clients), plan, (ip, 20_000 + len(self.clients)))
        self.clients.append(client)
        self.history.check_trials()
        client.begin()
        kernel.call_later(plan.begins_s, client.allow_sending)
        listener.arrive(near, client.address)

    # ---- UDP

    def send(self, sock: Datagram, data: bytes) -> None:
        kernel, address = self.kernel, sock.address
        assert address is not None
        if sock.is_probe:
            self.history.note("probe", address)
            self.history.probing.ask(sock, data)
            return
        self.history.check_barred(UDP, address)
        site, port = self.sites[address], sock.port
        number, sequence = int.from_bytes(data[:4], "big"), int.from_bytes(data[4:8], "big")
        if (number, sequence) in self.forwarded:
            self.history.broken.append(f"a datagram was forwarded twice: {number}, {sequence}")
        self.forwarded.add((number, sequence))
        self.history.note("datagram", address, port, number, sequence)
        self.udp_used.setdefault(address, {})[port] = kernel.now
        if site.state in ("refuse", "unreachable"):
            kernel.call_later(2 * kernel.latency_s, lambda: sock.fail(errno.ECONNREFUSED))
        elif site.state != "vanish":
            for copy in range(kernel.random.choice((1, 1, 2))):
                late_s = kernel.random.choice((0.0, 0.0, 0.3, 2.0, 4.5)) + 2 * kernel.latency_s
                answer = data[:8] + bytes((copy,)) + data[8:]
                is_due = late_s < LIMITS.udp_timeout_s and self.history.kind == "calm"
                step = functools.partial(self._answer, port, address, answer, is_due=is_due)
                kernel.call_later(late_s, step)

    def udp_ports(self) -> dict[Address, set[int]]:
        since = self.kernel.now - _CONNTRACK_S
        return {address: {p for p, at in used.items() if at > since} for address, used in self.udp_used.items()}

    def _answer(self, port: int, address: Address, answer: bytes, *, is_due: bool) -> None:
        found = [
            sock
            for sock in self.kernel.descriptors.values()
            if isinstance(sock, Datagram) and (sock.port, sock.address) == (port, address)
        ]
        for sock in found:
            sock.arrive(answer)
        if is_due and not found:
            self.history.broken.append(f"no socket is left for a reply: {address}, {port}, {self.kernel.now}")

    def reply(self, listener: Datagram, record: bytes, data: bytes) -> bool:
        address, source = reply_addresses(record)
        client = self.udp_clients[address]
        check(source == UDP_PORTAL_IP, "a reply leaves from another address than the client asked", source)
        check(int.from_bytes(data[:4], "big") == client.number, "a reply reaches another client", client.number)
        key = int.from_bytes(data[4:8], "big"), data[8]
        check(key not in client.replies, "a reply came twice", client.number, key)
        client.replies.add(key)
        return True


def ejected_s(failures: int) -> float:
    """Return how long an endpoint is ejected after this number of failures in a row."""
    return min(EJECT_S * 2.0 ** (failures - 1), EJECT_MAX_S)
