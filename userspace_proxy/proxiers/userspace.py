"""Userspace mode: a listener for each service port, and rules that lead its portals there.

Always in this order: open, load, retire. So no rule ever points at a port nobody listens on, and a refused
load leaves the old rules *and* the old listeners serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from collections.abc import AsyncIterator, Container, Iterable, Mapping

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Backends, Capture, DataPlane, Kernel, ListenerSpec, Redirects
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.service import Portal, ServicePort, portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import serving_endpoints, usable_endpoints
from userspace_proxy.rules.conntrack import changed_udp_portals, forget_udp_flows

_PORT_TRIES = 64
_REFUSING = "nobody listens"
# A notice is the first of several; and whoever changes rules all the time is not answered all the time.
_SETTLE_S = 0.05
_REPAIR_PAUSE_S = 0.3
_LOOK_EVERY_S = 30.0
# New service ports that are told one by one.
_TOLD_MAX = 20

log = logging.getLogger(__name__)


class ProxyPorts:
    """The numbers for proxy ports: an allocator for each protocol over one range."""

    def __init__(self, first: int, last: int, remembered: Mapping[str, int]) -> None:
        self._first = first
        self._last = last
        numbers = {key: port - first for key, port in remembered.items()}
        self._allocators = {
            protocol: Allocator(last - first + 1, {k: n for k, n in numbers.items() if k.endswith(protocol)})
            for protocol in L4Protocol
        }

    @property
    def changes(self) -> int:
        return sum(allocator.changes for allocator in self._allocators.values())

    def memory(self) -> dict[str, int]:
        """Return key -> port, for the next process."""
        held = {}
        for allocator in self._allocators.values():
            held.update({key: number + self._first for key, number in allocator.memory().items()})
        return held

    def next_for(self, name: ServicePortName, refused: set[int]) -> int | None:
        """Take the next port to try for *name*, but none of *refused*; None when there is none left."""
        return self._take(self._allocators[name.protocol], name.key, refused)

    def next_refusing(self, refused: set[int]) -> int | None:
        """Take a port for both protocols, at which nobody shall listen."""
        tcp, udp = self._allocators[L4Protocol.TCP], self._allocators[L4Protocol.UDP]
        port = self._take(tcp, f"{_REFUSING}/TCP", refused)
        if port is not None and not udp.take(f"{_REFUSING}/UDP", port - self._first):
            return self.next_refusing(refused | {port})
        return port

    def _take(self, allocator: Allocator, key: str, refused: set[int]) -> int | None:
        for number in allocator.candidates(key):
            port = number + self._first
            if port not in refused:
                allocator.take(key, number)
                return port
        return None

    def hold(self, name: ServicePortName, port: int) -> None:
        """Know that *name* has *port*, wherever it got it."""
        if self._first <= port <= self._last:
            self._allocators[name.protocol].take(name.key, port - self._first)

    def release(self, name: ServicePortName) -> None:
        self._allocators[name.protocol].release(name.key)


def redirects_to(
    opened: Mapping[ServicePortName, int],
    state: ProxyState,
    backed: Container[ServicePortName],
    refuse_port: int,
    capture: Capture,
) -> tuple[Redirects, dict[Portal, ServicePortName]]:
    """Return the rules that lead the portals of *opened* (name -> proxy port) there. Pure.

    Those not in *backed* have no endpoint and are led to *refuse_port*. Of two with one portal the first has
    it; the second part says who else claimed one.
    """
    ports: dict[Portal, int] = {}
    names: dict[Portal, ServicePortName] = {}
    claimed: dict[Portal, ServicePortName] = {}
    for name, proxy_port in opened.items():
        for portal in portals(state.service_ports[name]):
            if names.setdefault(portal, name) is name:
                ports[portal] = proxy_port if name in backed else refuse_port
            else:
                claimed[portal] = name
    return Redirects(ports, names, refuse_port, capture), claimed


def planned_redirects(state: ProxyState, ports: ProxyPorts, capture: Capture) -> Redirects:
    """Return the rules for *state* as if every port were free; nothing is opened or loaded."""
    refuse_port = ports.next_refusing(set()) or 0
    opened = {name: port for name in state.service_ports if (port := ports.next_for(name, set()))}
    backed = {name for name, known in state.endpoints.items() if usable_endpoints(known)}
    return redirects_to(opened, state, backed, refuse_port, capture)[0]


class UserspaceProxier:
    """Holds what is open and what is loaded, and brings both to each new state."""

    def __init__(self, plane: DataPlane, kernel: Kernel, ports: ProxyPorts, capture: Capture) -> None:
        self._plane = plane
        self._kernel = kernel
        self._ports = ports
        self._capture = capture
        self._lock = asyncio.Lock()
        self._state = ProxyState()
        self._opened: dict[ServicePortName, ListenerSpec] = {}
        self._given: dict[ServicePortName, tuple[Endpoint, ...]] = {}
        self._backed: set[ServicePortName] = set()
        self._loaded: Redirects | None = None
        self._outdated = True  # until a load has succeeded, however often it is refused
        self._claimed: dict[Portal, ServicePortName] = {}
        self._told: set[ServicePortName] = set()
        self._refuse_port = 0
        self.unopened: dict[ServicePortName, str] = {}
        self.loads = 0
        self.repairs = 0

    @property
    def service_ports(self) -> int:
        return len(self._opened)

    @property
    def capture(self) -> Capture:
        return self._capture

    # ---- from one process to the next

    def adopt(self, specs: Iterable[ListenerSpec]) -> None:
        """Take these for opened: the data plane has them from the process before. Before the first sync."""
        for spec in specs:
            self._opened[spec.name] = spec
            self._ports.hold(spec.name, spec.proxy_port)
        self._told.update(self._opened)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Change nothing while the block runs."""
        async with self._lock:
            yield

    # ---- sync

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            self._state = state
            self._outdated |= await self._open(state.service_ports)
            emptied = await self._update(state.endpoints)
            gone = [name for name in self._opened if name not in state.service_ports]
            if self._outdated or gone:
                await self._load(state)
            await self._give(emptied, state)  # now that nobody is led there any more
            self._tell_new(state)
            await self._retire(gone)

    def _tell_new(self, state: ProxyState) -> None:
        """Say what is served from now on: the addresses are news where they were allocated."""
        new = [name for name in state.service_ports if name in self._opened and name not in self._told]
        for name in new[:_TOLD_MAX]:
            shown = ", ".join(map(str, portals(state.service_ports[name])))
            usable = len(usable_endpoints(state.endpoints[name]))
            port = self._opened[name].proxy_port
            log.info("%s: %s %s -> proxy port %d -> %d endpoints", name, name.protocol, shown, port, usable)
        if len(new) > _TOLD_MAX:
            log.info("... and %d more service ports", len(new) - _TOLD_MAX)
        self._told |= set(new)

    async def _open(self, wanted: Mapping[ServicePortName, ServicePort]) -> bool:
        """Open or configure listeners; return whether a rule may have to change."""
        if not self._refuse_port:
            await self._reserve_refuse_port()
        specs = []
        for name, service_port in wanted.items():
            held = self._opened.get(name)
            if held is not None and (held.service_port is service_port or held.service_port == service_port):
                continue
            port = held.proxy_port if held else self._ports.next_for(name, set())
            if port is None:
                self._note_unopened(name, "no proxy port is left; widen --proxy-port-range")
            else:
                specs.append(ListenerSpec(service_port, port))
        moved = bool(specs)
        tried: dict[ServicePortName, set[int]] = {}
        while specs:
            refused = await self._plane.open(specs)
            opened = [spec for spec in specs if spec.name not in refused]
            for spec in opened:
                self._opened[spec.name] = spec
                self.unopened.pop(spec.name, None)
            specs = [
                ListenerSpec(spec.service_port, port)
                for spec in specs
                if spec.name in refused
                and (port := self._another_port(spec, refused[spec.name], tried.setdefault(spec.name, set())))
            ]
        return moved

    def _another_port(self, spec: ListenerSpec, why: str, tried: set[int]) -> int | None:
        """Return the port to try next for a listener that could not be opened; None to give up until the next sync."""
        tried.add(spec.proxy_port)
        self._ports.release(spec.name)
        # Another port does not help against a want of descriptors.
        hopeless = len(tried) >= _PORT_TRIES or os.strerror(errno.EMFILE) in why
        port = None if hopeless else self._ports.next_for(spec.name, tried)
        if port is None:
            self._note_unopened(spec.name, why)
        return port

    def _note_unopened(self, name: ServicePortName, why: str) -> None:
        if self.unopened.get(name) != why:
            log.error("service port %s has no listener: %s", name, why)
        self.unopened[name] = why

    async def _reserve_refuse_port(self) -> None:
        refused: set[int] = set()
        why = "all are taken"
        while len(refused) < _PORT_TRIES:
            port = self._ports.next_refusing(refused)
            if port is None:
                break
            why = await self._plane.reserve(port)
            if not why:
                self._refuse_port = port
                return
            refused.add(port)
        raise SyncError(f"no port of --proxy-port-range can be held ({why}); choose another range")

    async def _update(self, endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]]) -> list[ServicePortName]:
        """Give changed endpoints to the data plane; return the service ports that have none left.

        These keep what they have until the rules refuse for them: nobody is accepted only to be reset.
        """
        given, emptied = [], []
        for name, known in endpoints.items():
            if self._given.get(name) is known:
                continue
            usable = bool(usable_endpoints(known))
            self._outdated |= (name in self._backed) is not usable
            if usable:
                self._backed.add(name)
                given.append(name)
            else:
                self._backed.discard(name)
                emptied.append(name)
        await self._give(given, self._state)
        return emptied

    async def _give(self, names: list[ServicePortName], state: ProxyState) -> None:
        if not names:
            return
        known = {name: state.endpoints[name] for name in names}
        await self._plane.update({n: Backends(usable_endpoints(e), serving_endpoints(e)) for n, e in known.items()})
        self._given.update(known)

    async def _load(self, state: ProxyState) -> None:
        redirects = self._redirects(state)
        if redirects != self._loaded:
            await self._replace(redirects)
        self._outdated = False

    async def _replace(self, redirects: Redirects) -> None:
        await self._kernel.load(redirects)
        self.loads += 1
        before = self._loaded.ports if self._loaded else {}
        self._loaded = redirects
        if changed := changed_udp_portals(before, redirects.ports):
            await forget_udp_flows(changed)

    def _redirects(self, state: ProxyState) -> Redirects:
        opened = {name: self._opened[name].proxy_port for name in state.service_ports if name in self._opened}
        redirects, claimed = redirects_to(opened, state, self._backed, self._refuse_port, self._capture)
        for portal, name in claimed.items():
            if self._claimed.get(portal) != name:
                log.warning("%s is claimed by %s and by %s; the first has it", portal, redirects.names[portal], name)
        self._claimed = claimed
        return redirects

    async def _retire(self, gone: list[ServicePortName]) -> None:
        for name in [name for name in self.unopened if name not in self._state.service_ports]:
            del self.unopened[name]
        if not gone:
            return
        await self._plane.retire(gone)
        for name in gone:
            del self._opened[name]
            self._told.discard(name)
            self._given.pop(name, None)
            self._backed.discard(name)
            self._ports.release(name)

    # ---- what happens without a new state

    async def set_capture(self, capture: Capture) -> None:
        """Lead packets to us in another way, from now on.

        Raises:
            SyncError: refused; the way before is still in force.
        """
        async with self._lock:
            before, self._capture = self._capture, capture
            if self._loaded is None:
                return
            try:
                await self._load(self._state)
            except SyncError:
                self._capture = before
                raise

    async def keep_rules(self) -> None:
        """Load our rules again whenever somebody else removed or changed them. Runs until cancelled."""
        changed = asyncio.Event()
        await self._kernel.watch(changed.set)
        try:
            while True:
                try:
                    async with asyncio.timeout(_LOOK_EVERY_S):
                        await changed.wait()
                    await asyncio.sleep(_SETTLE_S)
                except TimeoutError:
                    pass
                changed.clear()
                try:
                    await self._repair()
                    if self.unopened:
                        await self.sync(self._state)
                except SyncError as error:
                    log.error("rules were changed by somebody else and cannot be loaded again: %s", error)  # noqa: TRY400
                    changed.set()
                    await asyncio.sleep(1)
        finally:
            self._kernel.unwatch()

    async def _repair(self) -> None:
        async with self._lock:
            if self._loaded is None or await self._kernel.is_intact():
                return
            log.warning("our rules were removed or changed by somebody else; loading them again")
            await self._kernel.reload()
            self.repairs += 1
            await forget_udp_flows(changed_udp_portals({}, self._loaded.ports))
        await asyncio.sleep(_REPAIR_PAUSE_S)

    def cut(self) -> None:
        """End every open connection now; for somebody who will not wait for the drain."""
        self._plane.cut()

    async def close(self, drain_timeout_s: float) -> None:
        async with self._lock:
            await self._lead_nobody_here()
            await self._plane.close(drain_timeout_s)
            try:
                await self._kernel.remove()
            except SyncError as error:
                log.error("rules were left behind (`userspace-proxy cleanup` removes them): %s", error)  # noqa: TRY400

    async def _lead_nobody_here(self) -> None:
        """Take the redirects away, but not yet the chains they stand in.

        With its last NAT chain the kernel stops translating *open* connections too, and they are to be drained.
        """
        if self._loaded is None:
            return
        try:
            await self._kernel.load(Redirects(capture=self._loaded.capture))
        except SyncError as error:
            log.error("redirects could not be taken away: %s", error)  # noqa: TRY400
            return
        await forget_udp_flows(changed_udp_portals(self._loaded.ports, {}))
