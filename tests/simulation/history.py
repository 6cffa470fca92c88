"""One history: a data plane, its clients and endpoints, and what goes wrong, all drawn from one seed.

`play` plays it and checks the invariants:

1. No byte is lost, doubled, reordered or misdelivered, and no request reaches two endpoints.
2. No attempt fails, and none takes long, while an endpoint answers that always does.
3. A connection that meets no fault ends in order. One that ends otherwise has a reason.
4. Endpoints without faults get their share, and a pinned client keeps its endpoint.
5. An ejected endpoint is left alone until its ejection ends, if another one answers.
6. Everything ends, and no descriptor, port, task, counter or waiting connection is left.
7. In some histories endpoints are probed; `probing.py` says what follows from that.

In some histories a second data plane takes over in the middle, as a new worker does. All of this holds for both
together: clients notice nothing, pins and ejections stay, and no local port is used by both.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import astuple, dataclass, field, replace
from typing import Any

from tests.simulation.datagrams import record_of, reply_addresses
from tests.simulation.ends import Backend, Client, Plan
from tests.simulation.install import use
from tests.simulation.kernel import Address, Datagram, Kernel, Listener, Network, Stream
from tests.simulation.loop import SimulatedLoop
from tests.simulation.probing import ANSWERS, Probing, desired_state, new_filter
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.context import Shared
from userspace_proxy.dataplane.dial import RACE_S
from userspace_proxy.dataplane.lifetimes import IDLE_S, JITTER, PERIOD_S
from userspace_proxy.dataplane.memory import EJECT_MAX_S, EJECT_S
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.model.access_record import UNANSWERED, AccessRecord
from userspace_proxy.model.counters import Counters
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.service import Balance, ConnectionPolicy, ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.probes.filter import HealthFilter

PORTAL = ("10.96.0.1", 80)
UDP_PORTAL_IP = "10.96.0.1"
TCP = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
UDP = ServicePortName(NamespacedName("shop", "dns"), "dns", L4Protocol.UDP)
_PORT = 8_080
KINDS = ("calm", "slow", "faults", "faults", "faults", "removals", "policy", "shortage")
FAULTS = frozenset({"refuse", "vanish", "stall", "reset", "half-close", "pieces", "shortage"})
_STATES = ("answer", "refuse", "vanish", "slow", "unreachable", "reset")
# Ejections follow from dials alone, at times that can be told from outside.
_CERTAIN_STATES = ("answer", "refuse", "unreachable")
_CONNECTIONS = 20, 24
_ARRIVALS_S = 6.0
# Histories in which endpoints are probed: their part, how many endpoints they have, and how much longer they last.
_PROBING_PART = 0.15
_PROBED_MAX = 5
_PROBED_S = 4.0
# Until a sync begins after a verdict.
_SYNCS_AFTER_S = 0.0, 0.05
_ENDS_WITHIN_S = 90.0
# How long the predecessor serves still, while its successor is ready.
_BOTH_SERVE_S = 0.002, 1.0
_CONNTRACK_S = 30.0
# Shorter than a client may wait for a descriptor, for all shortages of a history together.
_SHORT_MAX_S = 9.0
# Within which a client gets an endpoint, or a refusal, once there is one to dial, in histories with a policy.
_DIALLING_MAX_S = 1.0
# A packet that has arrived has been noticed by then.
_NOTICED_S = 0.001
_LIMITS = Limits(
    idle_timeout_s=12.0,
    half_closed_timeout_s=9.0,
    dead_peer_timeout_s=6.0,
    udp_timeout_s=3.0,
    udp_stream_timeout_s=5.0,
    udp_port_rest_s=6.0,
)
# Endings that the proxy decides on, each with the fates that justify it.
_JUSTIFIED = {
    "idle": {"stall", "vanish"},
    "half-closed for too long": {"stall", "vanish"},
    "client is dead": {"vanish"},
    "backend is dead": {"vanish"},
}


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
        site.failures, site.ejected_until = 0, 0.0
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
                kernel.call_later(late_s, lambda answer=answer: self._answer(port, address, answer))  # type: ignore[misc]

    def udp_ports(self) -> dict[Address, set[int]]:
        since = self.kernel.now - _CONNTRACK_S
        return {address: {p for p, at in used.items() if at > since} for address, used in self.udp_used.items()}

    def _answer(self, port: int, address: Address, answer: bytes) -> None:
        for sock in list(self.kernel.descriptors.values()):
            if isinstance(sock, Datagram) and (sock.port, sock.address) == (port, address):
                sock.arrive(answer)

    def reply(self, listener: Datagram, record: bytes, data: bytes) -> bool:
        address, source = reply_addresses(record)
        client = self.udp_clients[address]
        check(source == UDP_PORTAL_IP, "a reply leaves from another address than the client asked", source)
        check(int.from_bytes(data[:4], "big") == client.number, "a reply reaches another client", client.number)
        key = int.from_bytes(data[4:8], "big"), data[8]
        check(key not in client.replies, "a reply came twice", client.number, key)
        client.replies.add(key)
        return True


class History:
    """Draws and plays one history."""

    def __init__(self, seed: int) -> None:
        self.kernel = kernel = Kernel(seed)
        self.random = draw = kernel.random
        self.kind = draw.choice(KINDS)
        self.faults: Counter[str] = Counter()
        self.broken: list[str] = []  # what the data plane must not see as an exception
        self.happened: list[tuple[object, ...]] = []
        self.dials = 0
        self.began_at = self.arrived_at = 0.0
        self.dials_justified = 0.0
        self.records: dict[Address, AccessRecord] = {}
        self.udp_records = 0
        self.udp_bytes = 0, 0
        kernel.latency_s = draw.choice((0.0002, 0.002, 0.02))
        kernel.cuts_pieces = draw.random() < 0.5
        self.balance = Balance.ROUND_ROBIN if draw.random() < 0.6 else draw.choice(list(Balance))
        self.engine = draw.choice(("auto", "copy"))
        kernel.network = self.world = World(self)
        if self.kind == "shortage" and draw.random() < 0.5:
            kernel.descriptors_max = draw.choice((64, 80))
        is_calm = self.kind == "calm"
        self.states = _STATES if draw.random() < 0.6 else _CERTAIN_STATES
        has_steady = is_calm or (self.kind != "slow" and draw.random() < 0.8)
        count = draw.choice((2, 3, 4, 5, 12))
        self.probes = self.kind != "slow" and count <= _PROBED_MAX and draw.random() < _PROBING_PART
        self.probing = Probing(
            kernel,
            (TCP, UDP) if self.probes else (),
            answer_of=lambda ip: self.world.sites[ip, _PORT].answer,
            in_force=self._in_force,
            note=self._count,
            broken=self.broken,
            may_skip=self.kind == "shortage",
        )
        for index in range(count):
            site = Site((f"10.0.1.{index + 1}", _PORT), is_calm or (has_steady and not index))
            if not site.is_steady:
                self._set_state(site)
            self.world.sites[site.address] = site
        self.usable: list[Address] = list(self.world.sites)
        self.predecessors: list[tuple[LocalPlane, dict[ServicePortName, Shared]]] = []
        self.hands_over = self.kind in ("calm", "slow", "faults") and draw.random() < 0.3
        self.affinity_s = 1_000 if draw.random() < (0.5 if self.hands_over else 0.2) else None
        self._tasks: list[asyncio.Future[None]] = []
        self._syncing = asyncio.Lock()
        self._is_sync_due = False
        self._desired = ProxyState()
        self._ports: dict[ServicePortName, ServicePort] = {}
        self.policy = ConnectionPolicy()
        if self.kind in ("policy", "removals"):
            self.policy = ConnectionPolicy(
                drain_s=draw.choice((None, 0.0, 1.0)),
                max_age_s=draw.choice((0.0, 2.0)),
                force_s=draw.choice((None, 1.0)),
                wait_s=draw.choice((0.0, 2.0)),
            )

    # ---- what is drawn

    def note(self, *what: object) -> None:
        """Add *what* to all that has happened in this history."""
        self.happened.append((self.kernel.now, *what))

    def _set_state(self, site: Site) -> None:
        site.state = "slow" if self.kind == "slow" else self.random.choice(self.states)
        site.delay_s = self.random.uniform(0.05, 1.5)
        if self.probes:
            is_open = site.state in ("answer", "slow") or self.probing.has_own_port
            site.answer = self.random.choice(("answer", *ANSWERS)) if is_open else site.state
            self.probing.note_answer(site.address[0], site.answer)

    def _count(self, what: str) -> None:
        self.faults[what] += 1

    def draw_rooms(self, first: Stream, second: Stream) -> None:
        for sock in (first, second):
            if self.random.random() < 0.3:
                self.faults["pieces"] += 1
                sock.send_room = self.random.randint(300, 2_000)
                sock.receive_room = self.random.randint(300, 2_000)

    def _draw_plan(self, sizes: tuple[int, ...]) -> Plan:
        draw = self.random
        plan = Plan(int(draw.choice(sizes) * draw.uniform(0.5, 1.0)))
        if draw.random() < 0.3:
            plan.pieces = max(1, plan.size // draw.randint(2, 6)), draw.choice((0.001, 0.05, 0.4, 1.6))
        plan.reads_slowly = draw.random() < 0.2
        return plan

    def _draw_fate(self, plan: Plan, least_bytes: int, most_bytes: int, part: float) -> None:
        draw = self.random
        if self.kind != "calm" and draw.random() < part:
            plan.fate = draw.choice(("reset", "reset", "vanish", "stall"))
            plan.fate_after = draw.randint(least_bytes, max(least_bytes, most_bytes))
            plan.fate_s = draw.choice((0.0, 0.001, 0.05, 0.3))

    def _draw_client_plan(self) -> Plan:
        draw = self.random
        plan = self._draw_plan((40, 400, 1_500, 3_000, 9_000))
        plan.begins_s = draw.choice((0.0, 0.0, 0.0, 0.01, 0.5))
        plan.half_closes = draw.random() < 0.4
        self._draw_fate(plan, 0, 400, 0.15)
        return plan

    def draw_backend_plan(self, site: Site) -> Plan:
        draw = self.random
        plan = self._draw_plan((40, 400, 1_500, 3_000, 9_000))
        plan.speaks_first = draw.random() < 0.3
        if site.state == "reset":
            plan.fate, plan.fate_s = "reset", draw.choice((0.0, 0.03, 0.15))
            plan.speaks_first = draw.random() < 0.1
        else:
            self._draw_fate(plan, 9, 400, 0.2)
            if plan.fate == "reset" and draw.random() < 0.7:
                plan.pieces = max(1, plan.size // 2), 2.0  # in the middle of its reply
        return plan

    def on_backend(self, backend: Backend) -> None:
        self.note("accept", backend.address)
        self.world.sites[backend.address].accepted += 1

    # ---- ejection, as far as a steady endpoint makes it certain

    @property
    def _has_steady(self) -> bool:
        return any(self.world.sites[address].is_steady for address in self.usable)

    @property
    def _ejects(self) -> bool:
        """Whether the ejections of this history follow from refused dials alone.

        The successor does not learn the results of dials that were under way at a hand-over.
        """
        is_alone = (
            not self.predecessors and not self.probes
        )  # an unhealthy endpoint leaves, and its ejection is forgotten
        return is_alone and self.kind == "faults" and self._has_steady and self.states is _CERTAIN_STATES

    def note_failure(self, site: Site) -> None:
        self.faults["refuse"] += 1
        now = self.kernel.now
        if now >= site.ejected_until:
            site.failures += 1
            site.failed_at = now
            site.ejected_until = now + min(EJECT_S * 2 ** (site.failures - 1), EJECT_MAX_S)

    def check_ejection(self, site: Site) -> None:
        if site.state == "vanish":
            self.faults["vanish"] += 1
        self.dials += 1
        site.arrivals_since_due = 0
        if self._ejects:
            now = self.kernel.now
            if site.failed_at + _NOTICED_S < now < site.ejected_until - _NOTICED_S:
                self.broken.append(f"an ejected endpoint was dialled: {site}, {now}")

    def check_trials(self) -> None:
        """A new connection comes: one of the endpoints whose ejection has ended gets it, or has got one before."""
        is_apart = self.kernel.now > self.arrived_at + _NOTICED_S  # those of a burst are accepted together
        self.arrived_at = self.kernel.now
        if self._ejects and self.affinity_s is None and is_apart:
            for site in self.world.sites.values():
                if site.failures and self.kernel.now > site.ejected_until + _NOTICED_S:
                    site.arrivals_since_due += 1
                    if site.arrivals_since_due > len(self.world.sites) + 1:
                        self.broken.append(f"an endpoint is not tried again: {site}, {self.kernel.now}")

    # ---- playing

    def play(self) -> Counter[str]:
        """Play the history and check it. Return how often each kind of fault occurred."""
        use(self.kernel)
        loop = SimulatedLoop(self.kernel)
        loop.set_exception_handler(lambda _, what: self.broken.append(repr(what)))
        try:
            with errors_logged(self.broken):
                loop.run_until_complete(self._play())
            check(not self.broken, "broken", *self.broken)
            self._check_connections()
            self._check_shares()
        finally:
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0))
            loop.close()
        check(not self.kernel.descriptors, "descriptors are left", self.kernel.descriptors)
        return self.faults

    async def _play(self) -> None:
        kernel = self.kernel
        self.plane = self._new_plane()
        listener, proxy_port = Listener(kernel), Datagram(kernel)
        self.filter = self._new_filter()
        of_tcp = ServicePort(TCP, PORTAL[1], (PORTAL[0],), connections=self.policy, probe=self.probing.specs.get(TCP))
        self._serve(of_tcp, 10_001, listener)
        self._serve(ServicePort(UDP, 53, (UDP_PORTAL_IP,), probe=self.probing.specs.get(UDP)), 10_002, proxy_port)
        await self._use(self.usable)
        self._schedule(listener, proxy_port)
        began_at = self.began_at = kernel.now
        await asyncio.sleep(_ARRIVALS_S + 3 + (_PROBED_S if self.probes else 0))
        while kernel.now < began_at + _ENDS_WITHIN_S and not self._is_over():
            await asyncio.sleep(1)
        check(not self.broken, "", *self.broken)
        left = [str(c) for plane in self._planes for c in plane._context.connections]
        check(self._is_over(), "connections or flows have not ended", left)
        await asyncio.gather(*self._tasks)
        await self._check_counters()
        self._end_probes()
        await asyncio.sleep(0.5)  # the last packets arrive
        self.filter.close()
        await self.plane.close(0)
        check(asyncio.all_tasks() == {asyncio.current_task()}, "tasks are left", asyncio.all_tasks())

    def _new_filter(self) -> HealthFilter:
        return new_filter(self._sync_soon, self.broken)

    def _end_probes(self) -> None:
        """Let both service ports go."""
        self.filter.apply(ProxyState())
        self.probing.want(())
        check(not self.filter._targets, "targets of probes are left", self.filter._targets)
        check(not self.filter._prober._open, "probes are left", self.filter._prober._open)

    def _new_plane(self) -> LocalPlane:
        return LocalPlane(_LIMITS, self._record, lambda: self.kernel.now, self.engine)

    @property
    def _planes(self) -> list[LocalPlane]:
        return [*(plane for plane, _ in self.predecessors), self.plane]

    async def _hand_over(self) -> None:
        """Let a new data plane take over the listeners, in the order of `handover.py`."""
        before, after, since = self.plane, self._new_plane(), self.kernel.now
        self.filter.close()
        self.probing.suspend()
        for listener, backends in before.held():
            sock: Any = listener.sock
            memory = before.memory_of(listener.name.service_port)
            after.serve(listener.spec, type(sock)(self.kernel, sock), backends, memory, waits=True)
            check(after.memory_of(listener.name.service_port) == memory, "pins or ejections are lost", memory)
        self.faults["hand-over"] += 1
        self.note("hand-over")
        self.predecessors.append((before, dict(before._shared)))
        self.plane = after
        await asyncio.sleep(self.random.choice(_BOTH_SERVE_S))
        await before.stop_accepting()
        await after.begin(await before.pinned_since(since))
        self.filter = self._new_filter()
        await self._sync(anew=True)
        await before.close(_ENDS_WITHIN_S, successors=1)

    def _serve(self, service_port: ServicePort, port: int, sock: Listener | Datagram) -> None:
        self._ports[service_port.name] = service_port
        spec = ListenerSpec(replace(service_port, balance=self.balance, affinity_timeout_s=self.affinity_s), port)
        self.plane.serve(spec, sock)  # type: ignore[arg-type]

    async def _use(self, addresses: list[Address]) -> None:
        self.usable = addresses
        self._desired = desired_state(self._ports, addresses)
        await self._sync()

    async def _sync(self, *, anew: bool = False) -> None:
        """Give the data plane the endpoints that are not unhealthy, as the controller does."""
        async with self._syncing:
            self._is_sync_due = False
            wanted = self.filter.apply(self._desired).endpoints
            self.probing.want(self.usable, anew=anew)
            await self.plane.update({ListenerName(name): Backends(its, its) for name, its in wanted.items()})

    def _sync_soon(self) -> None:
        """A verdict has changed."""
        for name in self._ports:
            self.probing.check_verdicts(name, self.filter.health(name))
        if not self._is_sync_due:
            self._is_sync_due = True
            later_s = self.random.uniform(*_SYNCS_AFTER_S)
            self.kernel.call_later(later_s, lambda: self._tasks.append(asyncio.ensure_future(self._sync())))

    def _in_force(self, name: ServicePortName) -> set[Address]:
        """Return the endpoints that the data plane has for *name*."""
        given = next(backends for listener, backends in self.plane.held() if listener.name.service_port == name)
        return set() if given is None else {endpoint.address for endpoint in given.usable}

    def check_barred(self, name: ServicePortName, address: Address) -> None:
        if self.probes and self.probing.is_barred(name, address):
            self.broken.append(f"an unhealthy endpoint gets traffic of {name}: {address}, {self.kernel.now}")

    def _schedule(self, listener: Listener, proxy_port: Datagram) -> None:
        draw, kernel, world = self.random, self.kernel, self.world
        for _ in range(draw.randint(*_CONNECTIONS)):
            ip, plan = f"10.98.0.{draw.randint(1, 9)}", self._draw_client_plan()
            if draw.random() < 0.05 and self.kind != "calm":
                kernel.call_later(draw.uniform(0, _ARRIVALS_S), lambda: self._fail_accept(listener))
            when_s = draw.choice((draw.uniform(0, _ARRIVALS_S), float(draw.randint(0, 3))))
            kernel.call_later(when_s, lambda ip=ip, plan=plan: world.arrive(listener, ip, plan))  # type: ignore[misc]
        for number in range(1, draw.randint(8, 14)):
            client = UdpClient((f"10.98.0.{draw.randint(1, 9)}", 30_000 + number), number)
            world.udp_clients[client.address] = client
            for _ in range(draw.randint(1, 5)):
                when_s = draw.uniform(0, _ARRIVALS_S)
                kernel.call_later(when_s, lambda client=client: self._send(proxy_port, client))  # type: ignore[misc]
        for site in world.sites.values():
            if not site.is_steady:
                for _ in range(draw.randint(0, 3)):
                    kernel.call_later(draw.uniform(0, 8), lambda site=site: self._set_state(site))  # type: ignore[misc]
        if self.kind in ("removals", "policy"):
            for _ in range(draw.randint(1, 4)):
                kernel.call_later(draw.uniform(0, _ARRIVALS_S), self._change_endpoints)
        if self.hands_over:
            kernel.call_later(draw.uniform(0.1, _ARRIVALS_S), lambda: self._tasks.append(self._begin_handover()))
        if self.kind == "shortage":
            for _ in range(draw.randint(1, 3)):
                kernel.call_later(draw.uniform(0, _ARRIVALS_S), self._begin_shortage)

    def _begin_handover(self) -> asyncio.Future[None]:
        return asyncio.ensure_future(self._hand_over())

    def _fail_accept(self, listener: Listener) -> None:
        listener.errors.append(errno.ECONNABORTED)
        listener.wake(1)

    def _begin_shortage(self) -> None:
        self.faults["shortage"] += 1
        until = self.kernel.now + self.random.choice((0.05, 0.5, 1.5, 6.0))
        self.world.short_until = min(until, self.began_at + _SHORT_MAX_S)
        self.world.lacks = self.random.choice(({errno.EMFILE}, {errno.EADDRNOTAVAIL}))

    def _change_endpoints(self) -> None:
        draw = self.random
        steady = [address for address, site in self.world.sites.items() if site.is_steady]
        others = [address for address in self.world.sites if address not in steady]
        wanted = steady + [address for address in others if draw.random() < 0.5]
        if self.kind == "policy" and draw.random() < 0.4:
            wanted = []
        self._changes = asyncio.ensure_future(self._use(wanted))
        if self.policy.drain_s is not None:
            gone = set(self.usable) - set(wanted)
            self.kernel.call_later(self.policy.drain_s + 0.5, lambda: self._check_drained(gone))
        if not wanted:
            self.kernel.call_later(draw.uniform(0.2, 6.0), self._restore_endpoints)

    def _check_drained(self, gone: set[Address]) -> None:
        """The connections to endpoints that have left, and have not returned, are closed or not idle."""
        at_once = not self.policy.drain_s
        for connection in self.plane._context.connections if at_once else ():
            if (address := connection.details().endpoint) in gone and address not in self.usable:
                self.broken.append(f"a connection to a removed endpoint is open: {address}")

    def _restore_endpoints(self) -> None:
        self._changes = asyncio.ensure_future(self._use(list(self.world.sites)))

    def _send(self, proxy_port: Datagram, client: UdpClient) -> None:
        content = client.number.to_bytes(4, "big") + client.sent.to_bytes(4, "big") + bytes(self.random.randint(0, 99))
        client.sent += 1
        proxy_port.ask(record_of(client.address, UDP_PORTAL_IP), content)

    def _record(self, record: AccessRecord) -> None:
        self.note(record)
        if record.protocol is L4Protocol.UDP:
            self.udp_records += 1
            self.udp_bytes = self.udp_bytes[0] + record.bytes_to_backend, self.udp_bytes[1] + record.bytes_to_client
            return
        check(record.client not in self.records, "a connection ended twice", record)
        self.records[record.client] = record

    def _is_over(self) -> bool:
        if not all(task.done() for task in self._tasks):
            return False
        flows = self.plane._shared[UDP].counters.flows
        return not len(self.plane._context.connections) and not flows

    # ---- invariants

    async def _check_counters(self) -> None:
        stats = await self.plane.stats(endpoints_max=100)
        tcp, udp = (self._counters_of(name, stats.services[name]) for name in (TCP, UDP))
        for counters in (tcp, udp):
            check(min(astuple(counters)) >= 0, "a counter is negative", counters)
            check(counters.open == counters.flows == counters.waiting == 0, "counters have not returned", counters)
        for of_endpoints in stats.endpoints.values():
            for address, of_one in of_endpoints.items():
                check(min(astuple(of_one)) >= 0, "an endpoint's counter is negative", address, of_one)
                check(of_one.open == of_one.dialling == 0, "an endpoint's counters have not returned", address, of_one)
        for plane in self._planes:
            connections = plane._context.connections
            check(not len(connections), "connections are left", len(connections))
            check(connections._races == 0, "races are left", connections._races)
            check(not any(map(len, (d._until for d in plane._context.deadlines))), "deadlines are left")
            check(len(plane._datagrams) == 0, "UDP flows are left")
            for destination in plane._datagrams._destinations.values():
                used = sum(ports.used for ports in destination.ports.values())
                check(used == 0 and not destination.clients, "UDP ports are left", used)
        sent = sum(client.sent for client in self.world.udp_clients.values())
        forwarded = len(self.world.forwarded)
        check(forwarded + udp.datagrams_dropped == sent, "datagrams are lost", forwarded, udp.datagrams_dropped, sent)
        if self._has_steady and self.kind in ("calm", "faults"):
            check(not udp.datagrams_dropped or udp.port_exhaustions, "datagrams were dropped", udp)
        check(udp.flows_total == self.udp_records, "flows without a record", udp.flows_total, self.udp_records)
        bytes_moved = udp.bytes_to_backends, udp.bytes_to_clients
        check(bytes_moved == self.udp_bytes, "bytes of flows are miscounted", bytes_moved, self.udp_bytes)
        check(tcp.accepted == len(self.records), "connections without a record", tcp.accepted, len(self.records))
        to_backends = sum(r.bytes_to_backend for r in self.records.values())
        check(tcp.bytes_to_backends == to_backends, "bytes are miscounted", tcp.bytes_to_backends, to_backends)
        self.tcp, self.of_endpoints = tcp, stats.endpoints

    def _counters_of(self, name: ServicePortName, last: Counters) -> Counters:
        """Return the counters of both data planes together."""
        every = [shared[name].count() for _, shared in self.predecessors] + [last]
        return Counters(*map(sum, zip(*map(astuple, every), strict=True)))

    def _check_connections(self) -> None:
        replied_by: dict[int, list[Backend]] = {}
        for backend in self.world.backends.values():
            self.faults[backend.plan.fate] += backend.met_fate
            if (number := backend.client) is not None:
                replied_by.setdefault(number, []).append(backend)
        for client in self.world.clients:
            self.faults[client.plan.fate] += client.met_fate
            self.faults["half-close"] += client.plan.half_closes
            asked = replied_by.get(client.number, [])
            check(len(asked) <= 1, "a request reached two endpoints", client.number)
            its = asked[0] if asked else None
            if its is None and client.received:
                its = self._unasked_backend(client)
                check(its is not None, "a reply reaches another client", client.number)
            self._check_connection(client, its)
        check(self.dials <= self.dials_justified, "too many dials", self.dials, self.dials_justified)

    def _unasked_backend(self, client: Client) -> Backend | None:
        """Return the backend whose first bytes *client* has. A few bytes may be the first ones of several."""
        record = self.records.get(client.address)
        address = None if record is None or record.endpoint is None else record.endpoint.address
        unasked = (b for b in self.world.backends.values() if b.client is None and b.data.startswith(client.received))
        return max(unasked, key=lambda b: (b.address == address, b.sent == len(client.received)), default=None)

    def _check_connection(self, client: Client, backend: Backend | None) -> None:
        record = self.records.get(client.address)
        how = "" if record is None else record.how
        where = (client.number, client.plan, how, client.how, None if backend is None else backend.plan)
        is_idle = False
        if backend is None:
            check(not client.received, "bytes from nowhere", where)
        else:
            check(client.data.startswith(backend.received), "an endpoint got other bytes than were sent", where)
            check(backend.data.startswith(client.received), "a client got other bytes than were sent", where)
            # A policy may close a connection that pauses for longer than IDLE_S, although it will go on.
            is_idle = how.startswith("closed by") and max(client.plan.pieces[1], backend.plan.pieces[1]) >= IDLE_S
            if client.how == "eof" and not backend.met_fate and not is_idle:
                check(len(client.received) == backend.sent, "the reply is cut short", where)
            if backend.how == "eof" and not client.met_fate and not is_idle:
                check(len(backend.received) == client.sent, "the request is cut short", where)
            if backend.plan.fate == "reset" and backend.met_fate and not client.met_fate and not backend.is_shut:
                check(client.how in ("reset", ""), "a reset arrives as an end", where)
                if how in ("reset by backend", UNANSWERED) and not backend.unacknowledged_at_fate:
                    check(len(client.received) + client.unread == backend.sent, "bytes before a reset are lost", where)
        if record is None:
            check(self.kind == "shortage", "a client was not accepted", where)
            return
        fates = {end.plan.fate for end in (client, backend) if end is not None and end.met_fate}
        if (justified := _JUSTIFIED.get(how)) is not None:
            check(fates & justified or record.endpoint is None, "a healthy connection was cut", where)
        check(how != "a bug" and not how.startswith("out of memory"), "a bug ended a connection", where)
        if "vanish" not in fates and client.plan.fate not in fates:
            check(client.how, "a client was left alone", where)
        if not fates and backend is not None:
            expected = "eof" if how == "closed" or how.startswith("closed by") else "reset"
            is_over = client.how == "eof" and backend.is_shut  # for the client; the reset came later
            check(client.how == expected or is_over, "a connection ends otherwise than told", where)
            if expected == "eof" and not is_idle:
                check(record.bytes_to_backend == len(backend.received), "bytes to the backend", where)
                check(record.bytes_to_client == len(client.received), "bytes to the client", where)
            if self.policy == ConnectionPolicy():
                check(how == "closed", "a healthy connection was broken", where)
        self._check_attempt(client, backend, record, where)

    def _check_attempt(self, client: Client, backend: Backend | None, record: AccessRecord, where: object) -> None:
        began_at = client.began_at + record.duration_s if backend is None else backend.began_at
        took_s = max(0.0, began_at - client.began_at)
        self.dials_justified += len(self.world.sites) + 2 + took_s / RACE_S
        # Without the first bytes of the request, it is not known when the endpoint was reached.
        is_known = record.endpoint is None or backend is not None
        has_waited = "after a wait" in record.why and self.states is _CERTAIN_STATES and is_known
        if has_waited or record.how == "no endpoint came in time":
            check(took_s <= self.policy.wait_s + _DIALLING_MAX_S, "a client waited for too long", took_s, where)
        check(record.how != "out of descriptors", "an attempt failed in a short shortage", where)
        if self.policy.max_age_s and self.policy.force_s is not None:
            most_s = self.policy.max_age_s * (1 + JITTER) + self.policy.force_s + 2 * PERIOD_S
            # The age counts from the accept, as in the access log. An attempt is not ended by it: a client that waited
            # for an endpoint, or whose dials failed (seed 969), may be too old when it is connected at last. The next
            # look then ends it.
            most_s = max(most_s, took_s + 2 * PERIOD_S)
            check(record.duration_s <= most_s or record.endpoint is None, "a connection is too old", where)
        if self.kind == "slow":
            check(not record.how.startswith("no endpoint"), "an attempt failed over slow endpoints", where)
        if self.kind not in ("calm", "faults", "removals") or not self._has_steady:
            return
        check(not record.how.startswith("no endpoint"), "an attempt failed while an endpoint answered", where)
        if backend is not None and backend.began_at:
            sites = self.world.sites
            most_s = 0.2 + 4 * self.kernel.latency_s * len(sites) + (len(sites) - 1) * (RACE_S + 0.3)
            check(took_s <= most_s, "an attempt took long while an endpoint answered", took_s, where)

    def _check_shares(self) -> None:
        if self.kind != "calm":
            return
        if self.affinity_s is not None or self.balance is Balance.SOURCE_HASH:
            for ip, addresses in self._endpoints_by_client().items():
                check(len(addresses) == 1, "a pinned client changed its endpoint", ip, addresses)
        elif self.balance is Balance.ROUND_ROBIN:
            for of_endpoints in self.of_endpoints.values():
                opened = [one.opened for one in of_endpoints.values()]
                check(max(opened) - min(opened) <= 1, "shares are not fair", opened)

    def _endpoints_by_client(self) -> dict[str, set[Address]]:
        """Return the endpoints that each client was led to."""
        found: dict[str, set[Address]] = {}
        for record in self.records.values():
            if record.endpoint is not None:
                found.setdefault(record.client[0], set()).add(record.endpoint.address)
        return found


class _Errors(logging.Handler):
    def __init__(self, found: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._found = found

    def emit(self, record: logging.LogRecord) -> None:
        self._found.append(self.format(record))


@contextlib.contextmanager
def errors_logged(found: list[str]) -> Iterator[None]:
    """Add the errors that the data plane logs to *found*; nothing less is formatted."""
    logger, handler = logging.getLogger("userspace_proxy"), _Errors(found)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.ERROR)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]
