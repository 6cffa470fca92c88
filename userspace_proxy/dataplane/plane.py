"""The data plane in this process: listeners by name, and the objects that they share."""

import asyncio
import logging
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence, Set

from userspace_proxy.dataplane.connections import Connections, Limits, raise_descriptor_limit, require_room
from userspace_proxy.dataplane.conntrack_lookup import KernelTables
from userspace_proxy.dataplane.context import PlaneContext, Record, Shared
from userspace_proxy.dataplane.datagrams import DatagramPoller
from userspace_proxy.dataplane.details import collect_details
from userspace_proxy.dataplane.dial import deadlines
from userspace_proxy.dataplane.groups import open_group
from userspace_proxy.dataplane.handover import HandoverPlane
from userspace_proxy.dataplane.lifetimes import PolicyLoop
from userspace_proxy.dataplane.memory import Memories, Memory, PickerMemory
from userspace_proxy.dataplane.pipes import PipePool
from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.dataplane.slices import in_slices
from userspace_proxy.dataplane.sockets import closed_on_error, refusal, reserve_refusing_port
from userspace_proxy.dataplane.splice.copy import CopySplicer
from userspace_proxy.dataplane.splice.pipe import PipeSplicer
from userspace_proxy.dataplane.stats import add_up
from userspace_proxy.dataplane.tcp import TcpListener
from userspace_proxy.dataplane.udp import UdpListener
from userspace_proxy.interfaces import Splicer
from userspace_proxy.model.counters import PlaneStats, ServiceStats
from userspace_proxy.model.details import Details, DetailsRequest, merge
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName

_SERVICE_PORTS_A_STEP = 256
# How long a predecessor waits for replies to datagrams that it has forwarded.
_UDP_LINGER_S = 5.0
_LINGER_POLL_S = 0.1


# Splice engines, by their names in `--splice`.
SPLICERS: dict[str, Callable[[Poller, asyncio.AbstractEventLoop, PipePool], Splicer]] = {
    "auto": PipeSplicer,
    "copy": CopySplicer,
}

log = logging.getLogger(__name__)


class LocalPlane(HandoverPlane):
    """A DataPlane with its sockets in this process. Create it inside the running event loop."""

    # Always "": code that could report a hang would hang with it.
    failing = ""
    unserved: Mapping[ListenerName, str] = {}

    def __init__(
        self,
        limits: Limits,
        record: Record | None = None,
        now: Callable[[], float] = time.monotonic,
        splice: str = "auto",
        lines_dropped: Callable[[], int] = lambda: 0,
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Make it.

        *lines_dropped* returns how many records given to *record* were not written. *share*: (worker, workers); no two
        workers choose the same local ports for UDP flows.
        """
        raise_descriptor_limit()
        loop = asyncio.get_running_loop()
        self._poller = Poller(loop)
        self._tables = KernelTables()
        self._datagrams = DatagramPoller(loop, now, limits.udp_port_rest_s, self._tables.udp_flows, share)
        self._pipes = PipePool()
        self.listeners: dict[ListenerName, TcpListener | UdpListener] = {}
        self._udp: dict[ListenerName, UdpListener] = {}
        self._waiting: list[TcpListener | UdpListener] = []  # for `begin`
        self._shared: dict[ServicePortName, Shared] = {}
        self._reserved: tuple[socket.socket, ...] = ()
        self._context = PlaneContext(
            poller=self._poller,
            datagrams=self._datagrams,
            loop=loop,
            splicer=SPLICERS[splice](self._poller, loop, self._pipes),
            connections=Connections(self._poller, loop, limits, now, self._descriptors_used, self._pipes.shed),
            limits=limits,
            now=now,
            access_log=record,
            tables=self._tables,
            deadlines=deadlines(loop),
            policy_loop=PolicyLoop(now),
        )
        self._lines_dropped = lines_dropped
        self._sweeper = asyncio.create_task(self._sweep(), name="sweep")

    def _descriptors_used(self) -> int:
        return len(self.listeners) + len(self._datagrams) + self._pipes.descriptors

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        refused: dict[ListenerName, str] = {}
        async for spec in in_slices(specs, self._context.now):
            try:
                if not self.configure(spec):
                    (sock,) = open_group(spec.name.protocol, spec.proxy_port, 1, self._context.limits)
                    self.serve(spec, sock)
            except OSError as error:
                refused[spec.name] = refusal(spec.proxy_port, error)
        return refused

    def configure(self, spec: ListenerSpec) -> bool:
        """Give the listener of *spec* its new portals and affinity. Return False if there is no such listener."""
        listener = self.listeners.get(spec.name)
        if listener is not None:
            listener.configure(spec)
        return listener is not None

    def serve(
        self,
        spec: ListenerSpec,
        sock: socket.socket,
        backends: Backends | None = None,
        memory: PickerMemory | None = None,
        *,
        waits: bool = False,
    ) -> None:
        """Serve *spec* at *sock*, which this plane owns from now on. On failure, close it and raise OSError.

        *waits*: a predecessor serves still. Listeners that need to know what it does last are not read before `begin`.
        """
        name = spec.name
        shared = self._shared.get(name.service_port) or Shared(Memory(self._context.now))
        listener: TcpListener | UdpListener
        with closed_on_error(sock):
            require_room(sock.fileno())
            if name.protocol is L4Protocol.UDP:
                listener = self._udp[name] = UdpListener(spec, sock, self._context, shared)
            else:
                listener = TcpListener(spec, sock, self._context, shared)
            if waits and needs_last_state(spec):
                self._waiting.append(listener)
            else:
                listener.begin()
        self.listeners[name] = listener
        self._shared[name.service_port] = shared
        if backends is not None:
            self._give(name, backends)
        if memory is not None:
            shared.memory.remember(memory)

    @property
    def messages(self) -> int:
        """The number of small messages moved so far."""
        return self._poller.messages

    def take_news(self) -> Iterator[Memories]:
        """Yield what pickers have learnt since the last call, in parts that take a fraction of a millisecond each."""
        learnt = [(name, shared.memory) for name, shared in self._shared.items() if shared.memory.has_learnt]
        for start in range(0, len(learnt), _SERVICE_PORTS_A_STEP):
            part = learnt[start : start + _SERVICE_PORTS_A_STEP]
            yield [(name, news) for name, memory in part if (news := memory.take_news()) is not None]

    async def pinned_since(self, at: float) -> Memories:
        """Return the pins that were set or used at *at* or later, by service port."""
        of_ports = in_slices(list(self._shared.items()), self._context.now)
        found = [(name, shared.memory.pinned_since(at)) async for name, shared in of_ports]
        return [(name, memory) for name, memory in found if memory.pins]

    def memory_of(self, name: ServicePortName) -> PickerMemory:
        """Return all pins and ejections of a service port with listeners."""
        return self._shared[name].memory.all()

    async def reserve(self, port: int) -> str:
        """Hold *port* so that the kernel refuses its clients. Return the reason on failure, "" on success."""
        try:
            self._reserved += reserve_refusing_port(port)
        except OSError as error:
            return refusal(port, error)
        return ""

    async def update(self, backends: Mapping[ListenerName, Backends]) -> None:
        async for name, given in in_slices(backends.items(), self._context.now):
            self._give(name, given)
            if (udp := self._udp.get(name)) is not None:
                async for flow in in_slices(udp.flows(), self._context.now):
                    udp.end_if_gone(flow)

    def _give(self, name: ListenerName, backends: Backends) -> None:
        """Give the listener *name* its endpoints. No effect if it is closed already."""
        listener = self.listeners.get(name)
        if listener is not None:
            if backends.usable == backends.serving:
                backends = Backends(backends.usable, backends.usable)  # a worker decodes them twice
            listener.backends = backends
            listener.update(backends)

    async def retire(self, names: Sequence[ListenerName]) -> None:
        gone = frozenset(names)
        async for name in in_slices(names, self._context.now):
            listener = self.listeners.pop(name, None)
            if listener is not None:
                if (udp := self._udp.pop(name, None)) is not None:
                    udp.leave()
                    replacement = self._replacement_of(name, gone)
                    async for flow in in_slices(udp.flows(), self._context.now):
                        udp.let_go(flow, replacement)
                listener.close()
                if self._shared[name.service_port].memory.unregister(listener.picker):
                    del self._shared[name.service_port]

    def _replacement_of(self, name: ListenerName, retired: Set[ListenerName]) -> UdpListener | None:
        """Return the listener that takes over the UDP flows of *name* after a change of traffic policy, or None.

        It differs in scope only, so endpoints see the same source address; otherwise new flows begin.
        """
        others = (
            ListenerName(name.service_port, scope, name.transparent) for scope in Scope if scope is not name.scope
        )
        return next((self._udp[other] for other in others if other in self._udp and other not in retired), None)

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        count = sum(len(shared.memory.addresses()) for shared in self._shared.values())
        services = [service async for part in self.take_stats(endpoints=count <= endpoints_max) for service in part]
        return add_up(services, self.totals(), count if count > endpoints_max else 0)

    async def take_stats(self, *, endpoints: bool) -> AsyncIterator[list[ServiceStats]]:
        """Yield the counters of every service port, in parts that take a fraction of a millisecond each."""
        await self._context.connections.count_bytes()
        async for listener in in_slices(list(self._udp.values()), self._context.now):
            async for flow in in_slices(listener.flows(), self._context.now):
                listener.count_bytes(flow)
        part, steps = [], 0
        for name, shared in list(self._shared.items()):
            part.append(ServiceStats(name, shared.count(), shared.memory.counters() if endpoints else []))
            steps += 1 + len(part[-1].endpoints)
            if steps >= _SERVICE_PORTS_A_STEP:
                yield part
                part, steps = [], 0
        yield part

    async def details(self, request: DetailsRequest) -> Details:
        return merge(list(self.take_details(request)))

    def take_details(self, request: DetailsRequest) -> Iterator[Details]:
        """Yield the answer to *request*, in parts that take a fraction of a millisecond each."""
        return collect_details(request, self.listeners, self._context.connections)

    def totals(self) -> PlaneStats:
        """Return the counters of the data plane as a whole."""
        connections = self._context.connections
        return PlaneStats(
            services={},
            connections_open=len(connections),
            accept_paused=connections.times_paused,
            local_shortages=connections.shortages,
            access_lines_dropped=self._lines_dropped(),
        )

    def cut(self) -> None:
        self._context.connections.cut_all()

    async def begin(self, memory: Memories) -> None:
        """Start reading from all listeners that wait. *memory*: what the predecessor has learnt last."""
        for name, learnt in memory:
            if (shared := self._shared.get(name)) is not None:
                shared.memory.remember(learnt)
        waiting, self._waiting = self._waiting, []
        async for listener in in_slices(waiting, self._context.now):
            if listener.sock.fileno() >= 0:
                listener.begin()

    async def stop_accepting(self) -> None:
        """Stop accepting: another data plane accepts at the same sockets."""
        self._waiting = []
        async for listener in in_slices(list(self.listeners.values()), self._context.now):
            listener.leave()

    handover_obstacle = "it has no workers (--workers 0)"

    async def close(self, drain_timeout_s: float, *, successors: int = 0) -> None:
        """Drain and stop. With *successors*, another data plane already accepts at the same sockets."""
        try:
            if successors:
                await self.stop_accepting()
                await self._linger(min(drain_timeout_s, _UDP_LINGER_S))
            await self.retire(list(self.listeners))
            await self._context.connections.drain(drain_timeout_s)
        finally:
            self._context.connections.cut_all()
            self._context.policy_loop.stop()
            self._sweeper.cancel()
            for sock in self._reserved:
                sock.close()
            self._poller.stop()
            self._datagrams.stop()
            self._tables.close()
        self._pipes.shed()
        await asyncio.wait([self._sweeper])

    async def _linger(self, timeout_s: float) -> None:
        for _ in range(int(timeout_s / _LINGER_POLL_S)):
            if not any(listener.counters.flows for listener in self._udp.values()):
                break
            await asyncio.sleep(_LINGER_POLL_S)

    async def _sweep(self) -> None:
        period_s = self._context.connections.sweep_period_s
        while True:
            await asyncio.sleep(period_s)
            try:
                await self._context.connections.sweep()
                now = self._context.now()
                for listener in list(self._udp.values()):
                    listener.expire(now)
                self._datagrams.expire(now)
            except Exception:
                log.exception("a bug: a sweep for silent connections and idle flows failed")


def needs_last_state(spec: ListenerSpec) -> bool:
    """Return whether the listener needs what its predecessor has learnt until the end: local ports or pins."""
    return spec.name.protocol is L4Protocol.UDP or spec.service_port.affinity_timeout_s is not None
