"""The control side of a history: it probes, sends endpoints to the data plane, and hands over to a successor.

The data plane is in the same process, or in a worker that is reached by messages alone. In the middle of a history
another control process may take over with a worker of its own, or another worker may replace one whose channel breaks.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.simulation.probing import desired_state, new_filter
from tests.simulation.processes import Name, socketpair
from tests.simulation.world import LIMITS, TCP, UDP, check, ejected_s
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.context import Shared
from userspace_proxy.dataplane.handover import Conversation, Released, TakeOver, expect, hand_over
from userspace_proxy.dataplane.memory import Pin
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.process import answers_to
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import SyncError
from userspace_proxy.model.counters import PlaneStats
from userspace_proxy.model.details import DetailsRequest, ServicePortDetails
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import ListenerName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.probes.filter import HealthFilter
from userspace_proxy.runtime.instance_lock import InstanceLock, _collect

if TYPE_CHECKING:
    from tests.simulation.history import History

ENDS_WITHIN_S = 90.0
# Until a new worker serves.
REPLACED_WITHIN_S = 0.5
# Logged when that happens.
REPLACES = "%s process %d %s; another one takes its listeners"
# Until a sync begins after a verdict.
_SYNCS_AFTER_S = 0.0, 0.05
# What a worker has learnt in the last second may be lost with it.
_LEARNT_S = 1.2
# How long the predecessor serves still, while its successor is ready.
_BOTH_SERVE_S = 0.002, 1.0
# Between a predecessor's last answer and its end.
_YIELDS_S = 0.0, 0.5


class ControlSide:
    """The control processes of *history*, one after the other, and their data planes.

    ``plane``: the data plane that serves. ``predecessors``: those before, with the state of their service ports.
    ``replaced``: processes of workers that were replaced. ``usable``: the endpoints that the API names.
    """

    def __init__(self, history: History) -> None:
        self.history, self.kernel = history, history.kernel
        self.kernel.new_plane = self._new_plane
        self.plane: LocalPlane
        self.predecessors: list[tuple[LocalPlane, dict[ServicePortName, Shared]]] = []
        self.replaced: list[Any] = []
        self.usable: list[Address] = []
        self._control: LocalPlane | RemotePlane
        self._filter: HealthFilter
        self._specs: list[ListenerSpec] = []
        self._ports: dict[ServicePortName, ServicePort] = {}
        self._desired = ProxyState()
        self._syncing = asyncio.Lock()
        self._is_sync_due = False
        self._tasks: list[asyncio.Future[None]] = []
        # What the predecessor of a hand-over has learnt at its beginning, and at its end.
        self._ejected: list[tuple[Address, int, float]] = []
        self._pinned: list[tuple[str, Pin]] = []

    @property
    def planes(self) -> list[LocalPlane]:
        return [*(plane for plane, _ in self.predecessors), self.plane]

    async def begin(self, specs: Sequence[ListenerSpec]) -> None:
        """Serve *specs*."""
        self._specs = list(specs)
        self._ports = {spec.service_port.name: spec.service_port for spec in specs}
        self._filter = self._new_filter()
        self._control = self._start()
        check(not await self._control.open(specs), "a listener is refused")
        check([held.spec for held in self.plane.listeners.values()] == list(specs), "listeners differ from those sent")

    def _start(self) -> LocalPlane | RemotePlane:
        """Return a data plane: in this process, or in a worker."""
        engine = self.history.engine
        if not self.history.has_worker:
            return self._new_plane(LIMITS, None, engine)
        control = RemotePlane(WorkerSettings(limits=LIMITS, splice=engine, drain_timeout_s=ENDS_WITHIN_S))
        control.start()
        return control

    def _new_plane(self, limits: Limits, _record: object, splice: str, **_: object) -> LocalPlane:
        self.plane = LocalPlane(limits, self.history.record, lambda: self.kernel.now, splice)
        return self.plane

    def is_over(self) -> bool:
        """Return whether no change is under way, and no replaced worker runs."""
        return all(task.done() for task in self._tasks) and None not in [p.poll() for p in self.replaced]

    async def join(self) -> None:
        """Raise what a change has raised."""
        await asyncio.gather(*self._tasks)

    def end_probes(self) -> None:
        """Let both service ports go, as far as probes are concerned."""
        self._filter.apply(ProxyState())
        self.history.probing.want(())
        check(not self._filter._targets, "targets of probes are left", self._filter._targets)
        check(not self._filter._prober._open, "probes are left", self._filter._prober._open)

    async def close(self) -> None:
        self._filter.close()
        if self.kernel.random.random() < 0.5:
            await self._control.retire([ListenerName(TCP), ListenerName(UDP)])
            check(not self.plane.listeners, "listeners are left")
        await self._control.close(0)

    async def stats(self) -> PlaneStats:
        stats = await self._control.stats(endpoints_max=100)
        stats = replace(stats, worker_restarts=stats.worker_restarts - len(self.replaced))
        check(stats == await self.plane.stats(endpoints_max=100), "statistics differ from those of the worker", stats)
        request = DetailsRequest((TCP, UDP), client_ip="10.98.0.1")
        details = [_without_clock(of_one) for of_one in (await self._control.details(request)).service_ports]
        its = [_without_clock(of_one) for of_one in (await self.plane.details(request)).service_ports]
        check(details == its, "details differ from those of the worker", details, its)
        return stats

    # ---- listeners

    def begin_new_portals(self) -> None:
        """Let the service ports get more portals."""
        self._begin_task(self._configure())

    async def _configure(self) -> None:
        async with self._syncing:
            self._specs = [
                replace(spec, service_port=replace(spec.service_port, external_ips=("192.0.2.1",), node_port=30_080))
                for spec in self._specs
            ]
            check(not await self._control.open(self._specs), "a listener is refused")
            is_sent = self.replaced or [held.spec for held in self.plane.listeners.values()] == self._specs
            check(is_sent, "listeners differ from those sent")

    # ---- endpoints

    def _new_filter(self) -> HealthFilter:
        return new_filter(self._sync_soon, self.history.broken)

    def use_later(self, addresses: list[Address]) -> None:
        """From now on the API names the endpoints at *addresses*."""
        self._begin_task(self.use(addresses))

    async def use(self, addresses: list[Address]) -> None:
        self.usable = addresses
        self._desired = desired_state(self._ports, addresses)
        await self._sync()

    async def _sync(self, *, anew: bool = False) -> None:
        """Give the data plane the endpoints that are not unhealthy, as the controller does."""
        async with self._syncing:
            self._is_sync_due = False
            wanted = self._filter.apply(self._desired).endpoints
            self.history.probing.want(self.usable, anew=anew)
            backends = {ListenerName(name): Backends(its, its) for name, its in wanted.items()}
            try:
                await self._control.update(backends)
            except SyncError:  # another worker gets them
                check(self.replaced, "endpoints were not sent")
                return
            check(
                backends == {name: held.backends for name, held in self.plane.listeners.items()},
                "endpoints differ from those sent",
            )

    def _sync_soon(self) -> None:
        """A verdict has changed."""
        for name in self._ports:
            self.history.probing.check_verdicts(name, self._filter.health(name))
        if not self._is_sync_due:
            self._is_sync_due = True
            later_s = self.kernel.random.uniform(*_SYNCS_AFTER_S)
            self.kernel.call_later(later_s, lambda: self._begin_task(self._sync()))

    def _begin_task(self, work: Any) -> None:
        self._tasks.append(asyncio.ensure_future(work))

    def in_force(self, name: ServicePortName) -> set[Address]:
        """Return the endpoints that the data plane has for *name*."""
        given = next(held.backends for listener, held in self.plane.listeners.items() if listener.service_port == name)
        return set() if given is None else {endpoint.address for endpoint in given.usable}

    # ---- hand-over

    def begin_handover(self) -> None:
        self._begin_task(self._hand_over())

    async def _hand_over(self) -> None:
        """Let another control process, with a worker of its own, take over, in the order of runtime/lifecycle.py."""
        async with self._syncing:
            before, served = self._control, self.plane
            assert isinstance(before, RemotePlane)
            self._filter.close()
            self.history.probing.suspend()
            ours, theirs = (Conversation(sock) for sock in socketpair())  # type: ignore[arg-type]
            ending = asyncio.ensure_future(self._yield(before, theirs))
            turn, member, name = (Name(self.kernel) for _ in range(3))
            lock: Any = InstanceLock(turn, member, name, conversations=[ours])  # type: ignore[arg-type]
            name.close()
            lock.name = await _collect(ours, 1, lock)
            self._note("hand-over")
            await self._take_over(served, lock)
            lock.close()
        await self._sync(anew=True)
        await ending

    async def _take_over(self, served: LocalPlane, lock: Any) -> None:
        """Serve in place of the data plane *served*."""
        after = self._start()
        assert isinstance(after, RemotePlane)
        check(
            [held.spec for held in served.listeners.values()] == await after.adopt(lock.listeners), "listeners are lost"
        )
        self._check_ejections(self._ejected)
        await answers_to(after.keep_on(lock.name))
        await asyncio.sleep(self.kernel.random.choice(_BOTH_SERVE_S))
        learnt = await lock.taken()
        tcp, udp = (self.plane._shared[of_port].counters for of_port in (TCP, UDP))
        waits = not udp.flows_total and (self.history.affinity_s is None or not tcp.accepted)
        check(waits, "a successor does not wait for its predecessor", tcp.accepted, udp.flows_total)
        await after.begin(learnt)
        await after.stats()  # answered after `Begin`
        self._check_pins(self._pinned)
        self._control, self._filter = after, self._new_filter()

    async def _yield(self, plane: RemotePlane, conversation: Conversation) -> None:
        """Hand over and end, as the predecessor."""
        served, since, name = self.plane, self.kernel.now, Name(self.kernel)
        expect(await conversation.receive(), TakeOver)
        await plane.stats()
        self._ejected = _begun_before(since, served.memory_of(TCP).ejected)
        self.predecessors.append((served, dict(served._shared)))
        await hand_over(conversation, plane.inheritance(), name)  # type: ignore[arg-type]
        learnt = await plane.make_way(1, since)
        self._pinned = served.memory_of(TCP).pins
        tcp, udp = (served._shared[of_port].counters for of_port in (TCP, UDP))
        before = tcp.accepted, udp.flows_total
        conversation.send(Released(learnt))
        await conversation.sent()
        await asyncio.sleep(self.kernel.random.choice(_YIELDS_S))
        check(before == (tcp.accepted, udp.flows_total), "a predecessor has not yielded", before)
        await plane.close(ENDS_WITHIN_S, successors=1)
        await conversation.ended()
        conversation.close()
        name.close()

    # ---- another worker

    def begin_replacement(self) -> None:
        if self.kernel.random.random() < 0.5:  # a request is not answered any more
            self._begin_task(self._sync())
        asyncio.get_running_loop().call_soon(self._break_off)

    def _break_off(self) -> None:
        """Let the channel to the worker break. Another worker takes its listeners, and it drains its connections."""
        control: Any = self._control
        (process,) = control._workers
        memory, long_since = self.plane.memory_of(TCP), self.kernel.now - _LEARNT_S
        pinned_s = self.history.affinity_s or 0
        pins = [(ip, pin) for ip, pin in memory.pins if pin.expires_at < long_since + pinned_s]
        # An endpoint that leaves meanwhile is forgotten.
        ejected = _begun_before(long_since, memory.ejected) if self.history.kind not in ("removals", "policy") else []
        self._note("replaced-worker")
        self.predecessors.append((self.plane, dict(self.plane._shared)))
        self.replaced.append(process._process)
        process._channel.break_off("the history breaks it")

        def look() -> None:
            self._check_ejections(ejected)
            self._check_pins(pins)

        self.kernel.call_later(REPLACED_WITHIN_S, look)

    def _note(self, what: str) -> None:
        self.history.count(what)
        self.history.note(what)

    def _check_ejections(self, known: list[tuple[Address, int, float]]) -> None:
        """The pickers know the ejections that those before had, except those that ended meanwhile."""
        now, sites = self.kernel.now, self.history.world.sites
        ejected = {address for address, _, _ in self.plane.memory_of(TCP).ejected}
        for address, _, until in known:
            check(address in ejected or until < now or not sites[address].failures, "an ejection is lost", address)

    def _check_pins(self, known: list[tuple[str, Pin]]) -> None:
        after = dict(self.plane.memory_of(TCP).pins)
        for client_ip, pin in known:
            check(client_ip in after, "a pin is lost", client_ip)
            is_same = after[client_ip].address == pin.address and after[client_ip].expires_at >= pin.expires_at
            check(is_same or self.history.kind != "calm", "a pin has changed", client_ip, pin, after[client_ip])


def _begun_before(at: float, ejected: list[tuple[Address, int, float]]) -> list[tuple[Address, int, float]]:
    return [each for each in ejected if each[2] - ejected_s(each[1]) < at]


def _without_clock(details: ServicePortDetails) -> ServicePortDetails:
    """Return *details* without the ends of ejections, which are computed by the wall clock."""
    endpoints = (each._replace(ejected_until=bool(each.ejected_until)) for each in details.endpoints)
    return replace(details, endpoints=tuple(endpoints))
