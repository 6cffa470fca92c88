"""Kernel modes: the kernel itself leads each packet to an endpoint, by the tables of one mode.

A service port is served as if it were transparent: the model says for whom the client's address is kept and for whom
it has to be this node's (masquerade). Nothing of ours stands in a packet's way; what is held here is what is loaded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import KernelTables, NodeFacts, Translation
from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.routes import Refusal
from userspace_proxy.model.service import Portal, SourceIP, internal_portals, load_balancer_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import serving_endpoints
from userspace_proxy.modes.kernel_metrics import kernel_metrics
from userspace_proxy.modes.plans import NodeRules, Plan, Plans, allowed_to_dial
from userspace_proxy.modes.repairs import REPAIR_PAUSE_S, Keeper
from userspace_proxy.netfilter.conntrack import Answering, forget_early_connections, forget_udp_flows, open_connections

# New service ports that are told one by one.
_TOLD_MAX = 20
_DRAIN_LOOK_S = 0.2

log = logging.getLogger(__name__)


class KernelProxier:
    """Holds what is loaded, and brings it to each new state.

    ``masquerade_all``: whoever dials a cluster IP is seen by endpoints as this node. ``service_cidrs``: where cluster
    IPs are from, where an operator says so; else the state does.
    """

    def __init__(
        self,
        tables: KernelTables,
        rules: NodeRules,
        *,
        masquerade_all: bool = False,
        service_cidrs: tuple[str, ...] = (),
    ) -> None:
        self._tables = tables
        self._rules = rules
        self._masquerade_all = masquerade_all
        self._service_cidrs = service_cidrs
        self._lock = asyncio.Lock()
        self._plans = Plans(SourceIP.TRANSPARENT)
        self._claims = Claims()
        self._translations: dict[ServicePortName, Translation] = {}
        # Of UDP, what is in force: which answers are right, by portal.
        self._answering: dict[ServicePortName, dict[Portal, Answering]] = {}
        self._served: dict[ServicePortName, frozenset[Portal]] = {}  # TCP
        self._unloaded: set[ServicePortName] = set()  # whose translations differ from what is loaded
        self._loaded: NodeFacts | None = None
        self.unopened: Mapping[ListenerName, str] = {}  # there is nothing to open
        self.loads = 0
        self.keeper = Keeper(tables)
        self.repairs = 0
        self.conntrack = Histogram(SYNC_BOUNDS_S)  # looks for stale UDP flows
        self.forgotten = Counter[str]()  # such flows, by IP family

    def metrics(self) -> Iterator[Metric]:
        """Yield the metrics that this mode has and others have not."""
        if self._tables.loads:
            yield from kernel_metrics(self._tables.loads, self.conntrack, self.forgotten)
            yield from self._tables.metrics()

    @property
    def service_ports(self) -> int:
        return len(self._plans.held)

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            _, facts = self.translated(state)
            changed = self._unloaded
            if changed or facts != self._loaded:
                await self._tables.load(self._translations, changed, facts)
                self.loads += 1
                self.keeper.look_now()
            self._unloaded = set()
            self._loaded = facts
            self._plans.finish()
            self._tell_new()
            if stale := self._changed_flows(changed):
                await self._forget(stale)
            if new := self._new_tcp_portals(changed):
                await forget_early_connections(new)

    def translated(self, state: ProxyState) -> tuple[Mapping[ServicePortName, Translation], NodeFacts]:
        """Return what would be loaded for *state*; nothing is."""
        self._plans.update(state, self._rules)
        self._translate()
        return self._translations, self._facts()

    def _translate(self) -> None:
        """Make the translations of what is unfinished anew, and of those who come to portals that others gave up."""
        gone, plans = self._plans.gone, self._plans.unfinished
        changed = {plan.service_port.name for plan in plans} | set(gone)
        for name in gone:
            changed |= self._claims.give_up(name)
            self._translations.pop(name, None)
        for plan in plans:
            changed |= self._claims.claim(plan.service_port.name, {route.portal for route in plan.routes})
        for name in changed:
            if (planned := self._plans.held.get(name)) is not None:
                self._translations[name] = self._translation(planned)
        self._unloaded |= changed

    def _translation(self, plan: Plan) -> Translation:
        name, service_port = plan.service_port.name, plan.service_port
        routes = [route for route in plan.routes if self._claims.holder(route.portal) == name]
        if self._masquerade_all:
            internal = set(internal_portals(service_port))
            routes = [
                route._replace(to=route.to._replace(transparent=False))
                if route.portal in internal and isinstance(route.to, ListenerName)
                else route
                for route in routes
            ]
        allowed = {}
        if service_port.source_ranges:
            for portal in load_balancer_portals(service_port):
                if self._claims.holder(portal) == name:
                    allowed[portal] = allowed_to_dial(service_port, portal, self._plans.state.node)
        allowed = {portal: cidrs for portal, cidrs in allowed.items() if cidrs}
        return Translation(service_port, tuple(routes), plan.reaches, allowed, serving_endpoints(plan.endpoints))

    def _facts(self) -> NodeFacts:
        node = self._plans.state.node
        service_cidrs = self._service_cidrs or self._plans.state.service_cidrs
        return NodeFacts(node, self._rules.detector(node), self._rules.node_ports_on(node), service_cidrs)

    async def _forget(self, flows: Mapping[Portal, Answering]) -> None:
        with self.conntrack.timed():
            for family, count in (await forget_udp_flows(flows)).items():
                self.forgotten[f"IPv{family}"] += count

    def _changed_flows(self, changed: Iterable[ServicePortName]) -> dict[Portal, Answering]:
        """Return which UDP portals have changed, and which endpoints may go on answering for them.

        None where there is no such endpoint: a flow that went on would keep one that is gone (kubernetes#139628).
        """
        stale: dict[Portal, Answering] = {}
        for name in changed:
            if name.protocol is not L4Protocol.UDP:
                continue
            before = self._answering.pop(name, {})
            if (made := self._translations.get(name)) is not None:
                serving = frozenset(e.address for e in made.serving)
                after: dict[Portal, Answering] = {route.portal: serving for route in made.routes}
                self._answering[name] = after
                stale |= {portal: serving for portal in after if before.get(portal) != serving}
                before = {portal: wanted for portal, wanted in before.items() if portal not in after}
            stale |= {portal: frozenset() for portal in before if self._claims.holder(portal) is None}
        return stale

    def _new_tcp_portals(self, changed: Iterable[ServicePortName]) -> set[Portal]:
        """Return the TCP portals of *changed* that were not served before."""
        new: set[Portal] = set()
        for name in changed:
            if name.protocol is L4Protocol.TCP:
                before = self._served.pop(name, frozenset())
                if (made := self._translations.get(name)) is not None:
                    after = self._served[name] = frozenset(route.portal for route in made.routes)
                    new |= after - before
        return new

    def _tell_new(self) -> None:
        """Say what is served from now on: the addresses are news where they were allocated."""
        new = self._claims.new
        for name in sorted(new)[:_TOLD_MAX]:
            made = self._translations[name]
            shown = ", ".join(dict.fromkeys(str(route.portal) for route in made.routes))
            endpoints = sum(len(set(there.cluster + there.local)) for there in made.reaches.values())
            log.info("%s: %s %s -> %d endpoints", name, name.protocol, shown, endpoints)
        if len(new) > _TOLD_MAX:
            log.info("... and %d more service ports", len(new) - _TOLD_MAX)
        self._claims.new.clear()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Nothing is loaded or repaired meanwhile."""
        async with self._lock:
            yield

    async def run(self) -> None:
        """Load our rules again whenever somebody else removed or changed them. Runs until cancelled."""
        await self.keeper.keep(self._repair)

    async def _repair(self) -> None:
        async with self._lock:
            if self._loaded is None or not await self.keeper.repaired():
                return
            self.repairs += 1
            flows = {portal: wanted for held in self._answering.values() for portal, wanted in held.items()}
            if flows:
                await self._forget(flows)
            await forget_early_connections(frozenset[Portal]().union(*self._served.values()))
        await asyncio.sleep(REPAIR_PAUSE_S)

    async def close(self, drain_timeout_s: float) -> None:
        """Take the rules away; while connections are open, which stop with them, whoever is new is refused."""
        async with self._lock:
            try:
                if self._loaded is not None:
                    await self._drain(drain_timeout_s, self._loaded)
            except SyncError as error:
                log.warning("open connections are not waited for: %s", error)
            try:
                await self._tables.remove()
            except SyncError as error:
                log.error("rules were left behind (`userspace-proxy cleanup` removes them): %s", error)  # noqa: TRY400

    async def _drain(self, timeout_s: float, facts: NodeFacts) -> None:
        portals = {route.portal for made in self._translations.values() for route in made.routes}
        portals = {portal for portal in portals if portal.protocol is L4Protocol.TCP}
        if not timeout_s or not await open_connections(portals):
            return  # with thousands of Services it takes seconds to refuse them all
        refusing = {name: _refusing(made) for name, made in self._translations.items()}
        await self._tables.load(refusing, set(refusing), facts)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await open_connections(portals):  # noqa: ASYNC110 - the kernel tells nobody
                    await asyncio.sleep(_DRAIN_LOOK_S)


def _refusing(made: Translation) -> Translation:
    """Return *made* with its portals refused: nobody waits in vain there, or meets a server of this node's own."""
    routes = (
        route._replace(to=Refusal.REJECT) if isinstance(route.to, ListenerName) else route for route in made.routes
    )
    return replace(made, routes=tuple(routes))


class Claims:
    """Whose portal is whose: of several who claim one, the first has it, and the next when that one gives it up.

    ``new``: who has claimed for the first time, for whoever wants to tell; he clears it.
    """

    def __init__(self) -> None:
        self._claimants: dict[Portal, list[ServicePortName]] = {}
        self._portals: dict[ServicePortName, set[Portal]] = {}
        self.new: set[ServicePortName] = set()

    def holder(self, portal: Portal) -> ServicePortName | None:
        claimants = self._claimants.get(portal)
        return claimants[0] if claimants else None

    def claim(self, name: ServicePortName, portals: set[Portal]) -> set[ServicePortName]:
        """Let *name* claim just *portals*; return who else has come to one of those that it gave up."""
        before = self._portals.get(name)
        if before is None:
            self.new.add(name)
            before = set()
        self._portals[name] = portals
        for portal in portals - before:
            claimants = self._claimants.setdefault(portal, [])
            claimants.append(name)
            if len(claimants) > 1:
                log.warning("%s is claimed by %s and by %s; the first has it", portal, claimants[0], name)
        return self._leave(name, before - portals)

    def give_up(self, name: ServicePortName) -> set[ServicePortName]:
        """Let *name* claim nothing; return who has come to a portal by it."""
        self.new.discard(name)
        return self._leave(name, self._portals.pop(name, set()))

    def _leave(self, name: ServicePortName, portals: Iterable[Portal]) -> set[ServicePortName]:
        heirs = set()
        for portal in portals:
            claimants = self._claimants[portal]
            was_holder = claimants[0] == name
            claimants.remove(name)
            if not claimants:
                del self._claimants[portal]
            elif was_holder:
                heirs.add(claimants[0])
        return heirs
