"""The data plane in this process: listeners by service port, and what they share."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from userspace_proxy.dataplane.connections import Connections, Limits, raise_descriptor_limit
from userspace_proxy.dataplane.context import PlaneContext, Record
from userspace_proxy.dataplane.datagrams import DatagramPoller
from userspace_proxy.dataplane.groups import open_group
from userspace_proxy.dataplane.picker import PickerMemory
from userspace_proxy.dataplane.pipes import PipePool
from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.dataplane.sockets import reserve_refusing_port
from userspace_proxy.dataplane.splice.copy import CopySplicer
from userspace_proxy.dataplane.splice.pipe import PipeSplicer
from userspace_proxy.dataplane.stats import add_up
from userspace_proxy.dataplane.tcp import TcpListener
from userspace_proxy.dataplane.udp import UdpListener
from userspace_proxy.interfaces import Backends, ListenerSpec, PlaneStats, ServiceStats, Splicer
from userspace_proxy.model.names import L4Protocol, ServicePortName

_OPENED_A_STEP = 128
_LISTENERS_A_STEP = 256
# How long the one before waits for answers to datagrams that it has passed on.
_UDP_LINGER_S = 5.0
_LINGER_POLL_S = 0.1


# Engines by the name that `--splice` gives them.
SPLICERS: dict[str, Callable[[Poller, asyncio.AbstractEventLoop, PipePool], Splicer]] = {
    "auto": PipeSplicer,
    "copy": lambda poller, loop, _: CopySplicer(poller, loop),
}

log = logging.getLogger(__name__)


class LocalPlane:
    """A DataPlane whose sockets live in this process. Make it inside the running event loop."""

    def __init__(
        self,
        limits: Limits,
        record: Record | None = None,
        now: Callable[[], float] = time.monotonic,
        splice: str = "auto",
    ) -> None:
        raise_descriptor_limit()
        loop = asyncio.get_running_loop()
        self._poller = Poller(loop)
        self._datagrams = DatagramPoller(loop, now)
        self._pipes = PipePool()
        self._listeners: dict[ServicePortName, TcpListener | UdpListener] = {}
        self._udp: dict[ServicePortName, UdpListener] = {}
        self._backends: dict[ServicePortName, Backends] = {}
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
        )
        self._sweeper = asyncio.create_task(self._sweep(), name="sweep")

    def _descriptors_used(self) -> int:
        return len(self._listeners) + len(self._datagrams) + self._pipes.descriptors

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ServicePortName, str]:
        refused: dict[ServicePortName, str] = {}
        for count, spec in enumerate(specs, 1):
            try:
                if not self.configure(spec):
                    (sock,) = open_group(spec.name.protocol, spec.proxy_port, 1, self._context.limits)
                    self.serve(spec, sock)
            except OSError as error:
                refused[spec.name] = f"port {spec.proxy_port}: {error.strerror}"
            if not count % _OPENED_A_STEP:
                await asyncio.sleep(0)  # connections go on while thousands of listeners are opened
        return refused

    def configure(self, spec: ListenerSpec) -> bool:
        """Give the listener of *spec* its new portals and affinity; return whether there is one."""
        known = self._listeners.get(spec.name)
        if known is not None:
            known.configure(spec)
        return known is not None

    def serve(
        self,
        spec: ListenerSpec,
        sock: socket.socket,
        backends: Backends | None = None,
        memory: PickerMemory | None = None,
    ) -> None:
        """Serve *spec* at *sock*, which is ours from now on; it is closed where that cannot be (OSError)."""
        try:
            if spec.name.protocol is L4Protocol.UDP:
                self._udp[spec.name] = self._listeners[spec.name] = UdpListener(spec, sock, self._context)
            else:
                self._listeners[spec.name] = TcpListener(spec, sock, self._context)
        except OSError:
            sock.close()
            raise
        listener = self._listeners[spec.name]
        if backends is not None:
            self._give(spec.name, backends)
        if memory is not None:
            listener.picker.remember(memory)

    @property
    def messages(self) -> int:
        """How many small messages have passed so far."""
        return self._poller.messages

    def take_news(self) -> Iterator[list[tuple[ServicePortName, PickerMemory]]]:
        """Return what pickers have learnt since the last call, in parts that take a fraction of a millisecond each."""
        listeners = list(self._listeners.items())
        for start in range(0, len(listeners), _LISTENERS_A_STEP):
            part = listeners[start : start + _LISTENERS_A_STEP]
            yield [(name, learnt) for name, listener in part if (learnt := listener.picker.take_news()) is not None]

    async def reserve(self, port: int) -> str:
        """Hold *port* so that the kernel refuses whoever dials it; return why not ("" when held)."""
        try:
            self._reserved += reserve_refusing_port(port)
        except OSError as error:
            return f"port {port}: {error.strerror}"
        return ""

    async def update(self, backends: Mapping[ServicePortName, Backends]) -> None:
        for name, given in backends.items():
            self._give(name, given)

    def _give(self, name: ServicePortName, backends: Backends) -> None:
        listener = self._listeners.get(name)
        if listener is not None:
            self._backends[name] = backends
            listener.update(backends)

    def held(self) -> Iterator[tuple[TcpListener | UdpListener, Backends | None]]:
        """Return every listener with the endpoints that it was given: what another plane needs to take its place."""
        for name, listener in self._listeners.items():
            yield listener, self._backends.get(name)

    async def retire(self, names: Sequence[ServicePortName]) -> None:
        for name in names:
            self._udp.pop(name, None)
            self._backends.pop(name, None)
            listener = self._listeners.pop(name, None)
            if listener is not None:
                listener.close()

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        known = sum(len(listener.picker.endpoints) for listener in self._listeners.values())
        parts = self.take_stats(endpoints=known <= endpoints_max)
        return add_up(itertools.chain.from_iterable(parts), self.totals(), known if known > endpoints_max else 0)

    def take_stats(self, *, endpoints: bool) -> Iterator[list[ServiceStats]]:
        """Return what every listener has counted, in parts that take a fraction of a millisecond each."""
        for _ in self._context.connections.count_bytes():
            yield []
        part, steps = [], 0
        for name, listener in list(self._listeners.items()):
            counters, picker = listener.counters, listener.picker
            listener.count_bytes()
            counters.pins, counters.endpoints, counters.ejected = (
                picker.pins,
                len(picker.endpoints),
                len(picker.ejected),
            )
            part.append(ServiceStats(name, counters, picker.counters() if endpoints else []))
            steps += 1 + counters.flows + len(part[-1].endpoints)
            if steps >= _LISTENERS_A_STEP:
                yield part
                part, steps = [], 0
        yield part

    def totals(self) -> PlaneStats:
        """Return what is counted for the plane as a whole."""
        connections = self._context.connections
        return PlaneStats(
            services={},
            connections_open=len(connections),
            accept_paused=connections.times_paused,
            local_shortages=connections.shortages,
        )

    def cut(self) -> None:
        self._context.connections.cut_all()

    async def close(self, drain_timeout_s: float, *, handed_over: bool = False) -> None:
        """Stop. *handed_over*: another plane accepts at the same sockets, and what waits there is for it."""
        try:
            if handed_over:
                for listener in self._listeners.values():
                    listener.leave()
                await self._linger(min(drain_timeout_s, _UDP_LINGER_S))
            await self.retire(list(self._listeners))
            await self._context.connections.drain(drain_timeout_s)
        finally:
            self._context.connections.cut_all()
            self._sweeper.cancel()
            for sock in self._reserved:
                sock.close()
            self._poller.stop()
            self._datagrams.stop()
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
            except Exception:
                log.exception("a bug: this look for silent connections found nothing")
