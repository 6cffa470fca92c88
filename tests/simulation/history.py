"""One history: a data plane, its clients and endpoints, and what goes wrong, all drawn from one seed.

`play` plays it and checks the invariants:

1. No byte is lost, doubled, reordered or misdelivered, and no request reaches two endpoints.
2. No attempt fails, and none takes long, while an endpoint answers that always does.
3. A connection that meets no fault ends in order. One that ends otherwise has a reason.
4. Endpoints without faults get their share, and a pinned client keeps its endpoint.
5. An ejected endpoint is left alone until its ejection ends, if another one answers.
6. Everything ends, and no descriptor, port, task, counter or waiting connection is left.
7. In some histories endpoints are probed; `probing.py` says what follows from that.

In some histories a second data plane takes over in the middle, as a new worker does (`control.py`). All of this holds
for both together: clients notice nothing, pins and ejections stay, and no local port is used by both.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import fields, replace
from operator import attrgetter

from tests.simulation.control import ENDS_WITHIN_S, REPLACED_WITHIN_S, REPLACES, ControlSide
from tests.simulation.datagrams import record_of
from tests.simulation.ends import Backend, Client, Plan
from tests.simulation.install import use
from tests.simulation.kernel import Address, Datagram, Kernel, Listener, Stream
from tests.simulation.loop import SimulatedLoop
from tests.simulation.probing import ANSWERS, Probing
from tests.simulation.world import PORT, PORTAL, TCP, UDP, UDP_PORTAL_IP, Site, UdpClient, World, check, ejected_s
from userspace_proxy.dataplane.dial import RACE_S
from userspace_proxy.dataplane.lifetimes import IDLE_S, JITTER, PERIOD_S
from userspace_proxy.model.access_record import UNANSWERED, AccessRecord
from userspace_proxy.model.counters import Counters, EndpointCounters
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.service import Balance, ConnectionPolicy, ServicePort

KINDS = ("calm", "slow", "faults", "faults", "faults", "removals", "policy", "shortage")
FAULTS = frozenset({"refuse", "vanish", "stall", "reset", "half-close", "pieces", "shortage"})
_STATES = ("answer", "refuse", "vanish", "slow", "unreachable", "reset")
# Ejections follow from dials alone, at times that can be told from outside.
_CERTAIN_STATES = ("answer", "refuse", "unreachable")
_CONNECTIONS = 20, 24
_ARRIVALS_S = 6.0
# Histories in which endpoints are probed: their part, how many endpoints they have, and how much longer they last.
_PROBING_PART = 0.08
_PROBED_MAX = 5
_PROBED_S = 2.0
# The part of the histories whose data plane is in a worker process, and the part of these whose worker is replaced.
_WORKER_PART = 0.1
_REPLACED_PART = 0.3
# Shorter than a client may wait for a descriptor, for all shortages of a history together.
_SHORT_MAX_S = 9.0
# Within which a client gets an endpoint, or a refusal, once there is one to dial, in histories with a policy.
_DIALLING_MAX_S = 1.0
# A packet that has arrived has been noticed by then.
_NOTICED_S = 0.001
# Endings that the proxy decides on, each with the fates that justify it.
_JUSTIFIED = {
    "idle": {"stall", "vanish"},
    "half-closed for too long": {"stall", "vanish"},
    "client is dead": {"vanish"},
    "backend is dead": {"vanish"},
}


# `astuple` copies every value deeply.
_VALUES = attrgetter(*(each.name for each in fields(Counters)))
_VALUES_OF_ENDPOINT = attrgetter(*(each.name for each in fields(EndpointCounters)))


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
        kernel.channel_bytes = draw.choice((400, 4_000, 1 << 17))
        kernel.channel_latency_s = draw.choice((0.0, 0.0005, 0.005))
        kernel.count = self.count
        self.control = ControlSide(self)
        kernel.network = self.world = World(self)
        if self.kind == "shortage" and draw.random() < 0.5:
            kernel.descriptors_max = draw.choice((64, 80))
        is_calm = self.kind == "calm"
        self.states = _STATES if draw.random() < 0.6 else _CERTAIN_STATES
        has_steady = is_calm or (self.kind != "slow" and draw.random() < 0.8)
        self.hands_over = self.kind in ("calm", "slow", "faults") and draw.random() < 0.17
        self.has_worker = self.hands_over or draw.random() < _WORKER_PART
        may_replace = self.has_worker and not self.hands_over and self.kind != "shortage"  # it would find no room
        self.replaces = may_replace and draw.random() < _REPLACED_PART
        count = draw.choice((2, 3, 4, 5, 12))
        may_probe = self.kind != "slow" and not self.replaces and count <= _PROBED_MAX
        self.probes = may_probe and draw.random() < _PROBING_PART
        self.probing = Probing(
            kernel,
            (TCP, UDP) if self.probes else (),
            answer_of=lambda ip: self.world.sites[ip, PORT].answer,
            in_force=self.control.in_force,
            count=self.count,
            broken=self.broken,
            may_skip=self.kind == "shortage",
        )
        for index in range(count):
            site = Site((f"10.0.1.{index + 1}", PORT), is_calm or (has_steady and not index))
            if not site.is_steady:
                self._set_state(site)
            self.world.sites[site.address] = site
        self.affinity_s = 1_000 if draw.random() < (0.5 if self.hands_over else 0.2) else None
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

    def count(self, what: str) -> None:
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
        return any(self.world.sites[address].is_steady for address in self.control.usable)

    @property
    def _ejects(self) -> bool:
        """Whether the ejections of this history follow from refused dials alone.

        The successor does not learn the results of dials that were under way at a hand-over.
        """
        # An unhealthy endpoint leaves, and its ejection is forgotten.
        is_alone = not self.control.predecessors and not self.probes
        return is_alone and self.kind == "faults" and self._has_steady and self.states is _CERTAIN_STATES

    def note_failure(self, site: Site) -> None:
        self.faults["refuse"] += 1
        now = self.kernel.now
        if now < site.answered_at + _NOTICED_S:
            return  # the data plane may learn of both in any order
        if now >= site.ejected_until:
            site.failures += 1
            site.failed_at = now
            site.ejected_until = now + ejected_s(site.failures)

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
        of_tcp = ServicePort(TCP, PORTAL[1], (PORTAL[0],), connections=self.policy, probe=self.probing.specs.get(TCP))
        of_udp = ServicePort(UDP, 53, (UDP_PORTAL_IP,), probe=self.probing.specs.get(UDP))
        await self.control.begin([self._spec(of_tcp, 10_001), self._spec(of_udp, 10_002)])
        listener, proxy_port = kernel.proxy_ports[L4Protocol.TCP], kernel.proxy_ports[L4Protocol.UDP]
        await self.control.use(list(self.world.sites))
        self._schedule(listener, proxy_port)
        began_at = self.began_at = kernel.now
        await asyncio.sleep(_ARRIVALS_S + 3 + (_PROBED_S if self.probes else 0))
        while kernel.now < began_at + ENDS_WITHIN_S and not self._is_over():
            await asyncio.sleep(1)
        check(not self.broken, "", *self.broken)
        left = [str(c) for plane in self.control.planes for c in plane._context.connections]
        check(self._is_over(), "connections or flows have not ended", left)
        await self.control.join()
        await self._check_counters()
        self.control.end_probes()
        await asyncio.sleep(0.5)  # the last packets arrive
        await self.control.close()
        await asyncio.sleep(0.01)  # cancelled tasks end
        check(asyncio.all_tasks() == {asyncio.current_task()}, "tasks are left", asyncio.all_tasks())

    def _spec(self, service_port: ServicePort, port: int) -> ListenerSpec:
        return ListenerSpec(replace(service_port, balance=self.balance, affinity_timeout_s=self.affinity_s), port)

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
            kernel.call_later(draw.uniform(0.1, _ARRIVALS_S), self.control.begin_handover)
        if self.has_worker and draw.random() < 0.5:
            kernel.call_later(draw.uniform(0, _ARRIVALS_S), self.control.begin_new_portals)
        if self.replaces:
            kernel.call_later(draw.uniform(0.5, _ARRIVALS_S), self.control.begin_replacement)
        if self.kind == "shortage":
            for _ in range(draw.randint(1, 3)):
                kernel.call_later(draw.uniform(0, _ARRIVALS_S), self._begin_shortage)

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
        gone = set(self.control.usable) - set(wanted)
        self.control.use_later(wanted)
        if self.policy.drain_s is not None:
            self.kernel.call_later(self.policy.drain_s + 0.5, lambda: self._check_drained(gone))
        if not wanted:
            self.kernel.call_later(draw.uniform(0.2, 6.0), self._restore_endpoints)

    def _check_drained(self, gone: set[Address]) -> None:
        """The connections to endpoints that have left, and have not returned, are closed or not idle."""
        at_once = not self.policy.drain_s
        for connection in self.control.plane._context.connections if at_once else ():
            if (address := connection.details().endpoint) in gone and address not in self.control.usable:
                self.broken.append(f"a connection to a removed endpoint is open: {address}")

    def _restore_endpoints(self) -> None:
        self.control.use_later(list(self.world.sites))

    def _send(self, proxy_port: Datagram, client: UdpClient) -> None:
        content = client.number.to_bytes(4, "big") + client.sent.to_bytes(4, "big") + bytes(self.random.randint(0, 99))
        client.sent += 1
        proxy_port.ask(record_of(client.address, UDP_PORTAL_IP), content)

    def record(self, record: AccessRecord) -> None:
        self.note(record)
        if record.protocol is L4Protocol.UDP:
            self.udp_records += 1
            self.udp_bytes = self.udp_bytes[0] + record.bytes_to_backend, self.udp_bytes[1] + record.bytes_to_client
            return
        check(record.client not in self.records, "a connection ended twice", record)
        self.records[record.client] = record

    def _is_over(self) -> bool:
        if not self.control.is_over():
            return False
        flows = self.control.plane._shared[UDP].counters.flows
        return not len(self.control.plane._context.connections) and not flows

    # ---- invariants

    async def _check_counters(self) -> None:
        stats = await self.control.stats()
        tcp, udp = (self._counters_of(name, stats.services[name]) for name in (TCP, UDP))
        for counters in (tcp, udp):
            check(min(_VALUES(counters)) >= 0, "a counter is negative", counters)
            check(counters.open == counters.flows == counters.waiting == 0, "counters have not returned", counters)
        for of_endpoints in stats.endpoints.values():
            for address, of_one in of_endpoints.items():
                check(min(_VALUES_OF_ENDPOINT(of_one)) >= 0, "an endpoint's counter is negative", address, of_one)
                check(of_one.open == of_one.dialling == 0, "an endpoint's counters have not returned", address, of_one)
        for plane in self.control.planes:
            connections = plane._context.connections
            check(not len(connections), "connections are left", len(connections))
            check(connections.races == 0, "races are left", connections.races)
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
        """Return the counters of all data planes together."""
        every = [shared[name].count() for _, shared in self.control.predecessors] + [last]
        return Counters(*map(sum, zip(*map(_VALUES, every), strict=True)))

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
            begins_s = REPLACED_WITHIN_S if self.control.replaced else 0.2
            most_s = begins_s + 4 * self.kernel.latency_s * len(sites) + (len(sites) - 1) * (RACE_S + 0.3)
            check(took_s <= most_s, "an attempt took long while an endpoint answered", took_s, where)

    def _check_shares(self) -> None:
        if self.kind != "calm" or self.control.replaced:
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
        if record.msg != REPLACES:
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
