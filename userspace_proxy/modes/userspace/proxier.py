"""Userspace mode: listeners for each service port, and rules that lead its portals there.

Always in this order: open, load, retire. So no rule ever points at a port nobody listens on, and a refused
load leaves the old rules *and* the old listeners serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterable, Mapping, Set
from dataclasses import replace

from prometheus_client.core import Metric

from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import DROPPED, NO_ROOM, Backends, Capture, DataPlane, Kernel, ListenerSpec, Redirects
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.service import Portal, portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.modes.plans import NodeRules, Plan, Plans, redirects_to
from userspace_proxy.modes.repairs import REPAIR_PAUSE_S, Keeper
from userspace_proxy.modes.userspace.capture import watch_interfaces
from userspace_proxy.netfilter.conntrack import (
    ANY_IP,
    Answering,
    changed_udp_portals,
    forget_early_connections,
    forget_udp_flows,
    new_tcp_portals,
    udp_ports,
)

_PORT_TRIES = 64
# Between two tries to open listeners for which there was no port, descriptor or memory.
_OPEN_AGAIN_S = 3.0
# New service ports that are told one by one.
_TOLD_MAX = 20

log = logging.getLogger(__name__)


class UserspaceProxier:
    """Holds what is open and what is loaded, and brings both to each new state."""

    def __init__(
        self,
        plane: DataPlane,
        kernel: Kernel,
        ports: ProxyPorts,
        rules: NodeRules,
        *,
        watches_interfaces: bool = False,
    ) -> None:
        """*watches_interfaces*: change how packets are captured where REDIRECT cannot work."""
        self._plane = plane
        self._kernel = kernel
        self._ports = ports
        self._rules = rules
        self._watches_interfaces = watches_interfaces
        self._lock = asyncio.Lock()
        self._plans = Plans()
        self._opened: dict[ListenerName, ListenerSpec] = {}
        self._given: dict[ListenerName, Backends] = {}
        self._loaded: Redirects | None = None
        self._outdated = True  # until a load has succeeded, however often it is refused
        self._claimed: dict[Portal, ServicePortName] = {}
        self._told: set[ServicePortName] = set()
        self._strayed: set[ServicePortName] = set()  # flows of theirs may go where no policy leads any more
        self._losing: set[ServicePortName] = set()  # UDP, some endpoint serves no more, since the last finished sync
        self._refuse_port = 0
        self.unopened: dict[ListenerName, str] = {}
        self.loads = 0
        self.keeper = Keeper(kernel)
        self.repairs = 0

    @property
    def service_ports(self) -> int:
        return len(self._plans.held)

    @property
    def capture(self) -> Capture:
        return self._rules.capture

    # ---- from one process to the next

    def adopt(self, specs: Iterable[ListenerSpec]) -> None:
        """Take these for opened: the data plane has them from the process before. Before the first sync."""
        for spec in specs:
            self._opened[spec.name] = spec
            self._ports.hold(spec.name, spec.proxy_port)
        self._told.update(name.service_port for name in self._opened)

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Change nothing while the block runs."""
        async with self._lock:
            yield

    # ---- sync

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            await self._sync(state)

    async def _sync(self, state: ProxyState) -> None:
        self._outdated |= self._plans.update(state, self._rules)
        self._told.difference_update(self._plans.gone)
        changed = self._plans.unfinished
        await self._open(changed)
        self._losing |= self._losing_endpoints(changed)
        emptied = await self._give_usable(changed)
        gone = [name for name in self._opened if not self._is_wanted(name)]
        if self._outdated:
            await self._load(self._losing)
        await self._give(emptied)  # now that nobody is led there any more
        self._tell_new(changed)
        await self._retire(gone)
        if strayed := self._losing & self._strayed:
            await self._forget_strayed_flows(strayed)
        self._losing.clear()
        self._plans.finish()

    def _is_wanted(self, name: ListenerName) -> bool:
        planned = self._plans.held.get(name.service_port)
        return planned is not None and name in planned.listeners

    def _tell_new(self, changed: Iterable[Plan]) -> None:
        """Say what is served from now on: the addresses are news where they were allocated."""
        new = [
            p for p in changed if p.service_port.name not in self._told and any(n in self._opened for n in p.listeners)
        ]
        for planned in new[:_TOLD_MAX]:
            name = planned.service_port.name
            shown = ", ".join(dict.fromkeys(map(str, portals(planned.service_port))))
            for listener, backends in planned.listeners.items():
                if (spec := self._opened.get(listener)) is not None:
                    port, usable = spec.proxy_port, len(backends.usable)
                    log.info("%s: %s %s -> proxy port %d -> %d endpoints", listener, name.protocol, shown, port, usable)
        if len(new) > _TOLD_MAX:
            log.info("... and %d more service ports", len(new) - _TOLD_MAX)
        self._told.update(planned.service_port.name for planned in new)

    async def _open(self, changed: Iterable[Plan]) -> None:
        """Open or configure the listeners of *changed*, and those that could not be opened before."""
        if not self._refuse_port:
            await self._reserve_refuse_port()
        wanted = {name: planned.service_port for planned in changed for name in planned.listeners}
        wanted |= {n: self._plans.held[n.service_port].service_port for n in self.unopened if self._is_wanted(n)}
        specs = []
        for name, service_port in wanted.items():
            held = self._opened.get(name)
            if held is not None and held.service_port == service_port:
                continue
            port = held.proxy_port if held else self._ports.next_for(name, set())
            if port is None:
                self._note_unopened(name, "no proxy port is left; widen --proxy-port-range")
            else:
                specs.append(ListenerSpec(service_port, port, name.scope, name.transparent))
        self._outdated |= bool(specs)
        tried: dict[ListenerName, set[int]] = {}
        while specs:
            refused = await self._plane.open(specs)
            opened = [spec for spec in specs if spec.name not in refused]
            for spec in opened:
                self._opened[spec.name] = spec
                self.unopened.pop(spec.name, None)
            specs = [
                replace(spec, proxy_port=port)
                for spec in specs
                if spec.name in refused
                and (port := self._another_port(spec, refused[spec.name], tried.setdefault(spec.name, set())))
            ]

    def _another_port(self, spec: ListenerSpec, why: str, tried: set[int]) -> int | None:
        """Return the port to try next for a listener that could not be opened; None to give up until the next sync."""
        tried.add(spec.proxy_port)
        self._ports.release(spec.name)
        hopeless = len(tried) >= _PORT_TRIES or why.startswith(NO_ROOM)
        port = None if hopeless else self._ports.next_for(spec.name, tried)
        if port is None:
            self._note_unopened(spec.name, why)
        return port

    def _note_unopened(self, name: ListenerName, why: str) -> None:
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

    async def _give_usable(self, changed: Iterable[Plan]) -> dict[ListenerName, Backends]:
        """Give the data plane the endpoints of *changed*; return what it is to be given once the rules are loaded.

        Listeners that have none left keep what they have until the rules refuse for them: nobody is accepted only to
        be reset.
        """
        given: dict[ListenerName, Backends] = {}
        emptied: dict[ListenerName, Backends] = {}
        for planned in changed:
            for name, backends in planned.listeners.items():
                if self._given.get(name) != backends:
                    (given if backends.usable else emptied)[name] = backends
        await self._give(given)
        return emptied

    async def _give(self, backends: Mapping[ListenerName, Backends]) -> None:
        if backends:
            await self._plane.update(backends)
            self._given.update(backends)

    async def _load(self, losing: Set[ServicePortName] = frozenset()) -> None:
        redirects = self._redirects()
        if redirects != self._loaded:
            await self._replace(redirects, losing)
        self._outdated = False

    async def _replace(self, redirects: Redirects, losing: Set[ServicePortName]) -> None:
        await self._kernel.load(redirects)
        self.loads += 1
        self.keeper.look_now()
        before, self._loaded = self._loaded, redirects
        changed = {
            portal: ports if redirects.names.get(portal) in losing else ports | self._let_stay(portal)
            for portal, ports in changed_udp_portals(before or Redirects(), redirects).items()
        }
        if changed:
            await forget_udp_flows(changed)
        if new := new_tcp_portals(before or Redirects(), redirects):
            await forget_early_connections(new)

    def _let_stay(self, portal: Portal) -> Answering:
        """Return where flows to *portal* may stay, though the policy of today leads new ones elsewhere (U3)."""
        assert self._loaded is not None
        if self._loaded.ports.get(portal) in (None, DROPPED, self._refuse_port):
            return frozenset()
        service_port = self._loaded.names[portal]
        self._strayed.add(service_port)
        opened = (self._opened.get(name) for name in self._plans.held[service_port].listeners)
        return {(ANY_IP, spec.proxy_port) for spec in opened if spec is not None}

    def _losing_endpoints(self, changed: Iterable[Plan]) -> set[ServicePortName]:
        """Return the UDP service ports of *changed* of which some endpoint serves no more."""
        return {
            name.service_port
            for planned in changed
            for name, backends in planned.listeners.items()
            if name.protocol is L4Protocol.UDP
            and (held := self._given.get(name)) is not None
            and not {e.address for e in held.serving} <= {e.address for e in backends.serving}
        }

    async def _forget_strayed_flows(self, names: Set[ServicePortName]) -> None:
        """Have the flows of *names* follow the policy of today: some endpoint to which they might stray is gone."""
        if self._loaded is not None:
            known = udp_ports(self._loaded)
            served = (self._plans.held[name].service_port for name in names if name in self._plans.held)
            asked = (portal for service_port in served for portal in portals(service_port))
            await forget_udp_flows({portal: known[portal] for portal in asked if portal in known})
        self._strayed -= names

    def _redirects(self) -> Redirects:
        opened = {name: spec.proxy_port for name, spec in self._opened.items()}
        redirects, claimed = redirects_to(
            opened, self._plans.held, self._refuse_port, self._rules, self._plans.state.node
        )
        if self._loaded is not None and self._loaded.transparent:
            # Open connections may outlive the last transparent listener, and answers to them have to come to us.
            redirects = replace(redirects, transparent=True)
        for portal, name in claimed.items():
            if self._claimed.get(portal) != name:
                log.warning("%s is claimed by %s and by %s; the first has it", portal, redirects.names[portal], name)
        self._claimed = claimed
        return redirects

    async def _retire(self, gone: list[ListenerName]) -> None:
        for name in [name for name in self.unopened if not self._is_wanted(name)]:
            del self.unopened[name]
        if not gone:
            return
        await self._plane.retire(gone)
        for name in gone:
            del self._opened[name]
            self._given.pop(name, None)
            self._ports.release(name)

    # ---- what happens without a new state

    async def set_capture(self, capture: Capture) -> None:
        """Lead packets to us in another way, from now on.

        Raises:
            SyncError: refused; the way before is still in force.
        """
        async with self._lock:
            await self._change_rules(replace(self._rules, capture=capture))

    async def _change_rules(self, rules: NodeRules) -> None:
        before, self._rules = self._rules, rules
        if self._loaded is None:
            return
        try:
            await self._load()
        except SyncError:
            self._rules = before
            raise

    def metrics(self) -> Iterable[Metric]:
        return ()

    async def run(self) -> None:
        """Load our rules again when others changed them, open what could not be opened. Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.keeper.keep(self._repair), name="repair")
            group.create_task(self._keep_opening(), name="open again")
            if self._watches_interfaces:
                group.create_task(watch_interfaces(self), name="watch interfaces")

    async def _keep_opening(self) -> None:
        """Try listeners again that could not be opened: there may be room now."""
        while True:
            await asyncio.sleep(_OPEN_AGAIN_S)
            with contextlib.suppress(SyncError):  # the controller tries again what else was to be done
                await self._open_again()

    async def _open_again(self) -> None:
        if self.unopened:
            async with self._lock:  # of which another sync may have had the turn: the state is today's
                await self._sync(self._plans.state)

    async def _repair(self) -> None:
        async with self._lock:
            is_repaired = self._loaded is not None and await self.keeper.repaired()
            if is_repaired and self._loaded is not None:
                self.repairs += 1
                await forget_udp_flows(changed_udp_portals(Redirects(), self._loaded))
                await forget_early_connections(new_tcp_portals(Redirects(), self._loaded))
        if is_repaired:
            await asyncio.sleep(REPAIR_PAUSE_S)
        await self._open_again()

    def cut(self) -> None:
        """End every open connection now; for somebody who will not wait for the drain."""
        self._plane.cut()

    async def close(self, drain_timeout_s: float) -> None:
        async with self._lock:
            await self._remove_redirects()
            await self._plane.close(drain_timeout_s)
            try:
                await self._kernel.remove()
            except SyncError as error:
                log.error("rules were left behind (`userspace-proxy cleanup` removes them): %s", error)  # noqa: TRY400

    async def _remove_redirects(self) -> None:
        """Take the redirects away, but not yet the chains they stand in.

        With its last NAT chain the kernel stops translating *open* connections too, and they are to be drained.
        """
        if self._loaded is None:
            return
        try:
            await self._kernel.load(Redirects(capture=self._loaded.capture, transparent=self._loaded.transparent))
        except SyncError as error:
            log.error("redirects could not be taken away: %s", error)  # noqa: TRY400
            return
        await forget_udp_flows(changed_udp_portals(self._loaded, Redirects()))
