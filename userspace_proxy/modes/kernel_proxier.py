"""Kernel modes: the kernel itself translates packets to endpoints, by the rules of one mode.

Every service port is planned as transparent: the model decides whose packets keep the client's address and whose are
masqueraded. No packet passes this process, so it holds only the rules that are loaded.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import Portal, ServicePort, SourceIP, internal_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import serving_endpoints
from userspace_proxy.modes.base_proxier import BaseProxier, log_served
from userspace_proxy.modes.kernel_metrics import kernel_metrics
from userspace_proxy.modes.kernel_rules import KernelRules, NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.plans import NodeRules, Plan, restricted_portals
from userspace_proxy.modes.portal_owners import PortalOwners
from userspace_proxy.netfilter.conntrack import Answering, forget_early_connections, forget_udp_flows, open_connections

_DRAIN_CHECK_S = 0.2

log = logging.getLogger(__name__)


class KernelProxier(BaseProxier):
    """Applies each state to the rules of one kernel mode.

    ``masquerade_all``: endpoints see this node's address in all packets to cluster IPs. ``service_cidrs``: the cluster
    IP ranges, if an operator states them; else those of the state.
    """

    def __init__(
        self,
        kernel: KernelRules,
        rules: NodeRules,
        *,
        masquerade_all: bool = False,
        service_cidrs: tuple[str, ...] = (),
    ) -> None:
        super().__init__(kernel, rules, SourceIP.TRANSPARENT)
        self._kernel = kernel
        self._masquerade_all = masquerade_all
        self._service_cidrs = service_cidrs
        self._owners = PortalOwners()
        self._translations: dict[ServicePortName, Translation] = {}
        # The endpoints that may answer for each UDP portal, and the TCP portals, as loaded.
        self._answering: dict[ServicePortName, dict[Portal, Answering]] = {}
        self._served: dict[ServicePortName, frozenset[Portal]] = {}
        self._unloaded: set[ServicePortName] = set()  # service ports whose translations differ from the loaded ones
        self._loaded: NodeFacts | None = None
        self._conntrack = Histogram(SYNC_BOUNDS_S)  # searches for stale UDP flows
        self._forgotten = Counter[str]()  # deleted UDP flows, by IP family

    def metrics(self) -> Iterator[Metric]:
        if self._kernel.loads:
            yield from kernel_metrics(self._kernel.loads, self._conntrack, self._forgotten)
            yield from self._kernel.metrics()

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            _, facts = self.translated(state)
            changed = self._unloaded
            if changed or facts != self._loaded:
                await self._kernel.load(RuleUpdate(self._translations, changed, facts))
                self.loads += 1
                self.repairer.check_now()
            self._unloaded = set()
            self._loaded = facts
            self._plans.finish()
            self._log_new()
            if stale := self._changed_flows(changed):
                await self._forget(stale)
            if new := self._new_tcp_portals(changed):
                await forget_early_connections(new)

    def translated(self, state: ProxyState) -> tuple[Mapping[ServicePortName, Translation], NodeFacts]:
        """Return what a sync would load for *state*. Loads nothing."""
        self._plans.update(state, self._rules)
        self._translate()
        node = self._plans.state.node
        service_cidrs = self._service_cidrs or self._plans.state.service_cidrs
        facts = NodeFacts(node, self._rules.detector(node), self._rules.node_ports_on(node), service_cidrs)
        return self._translations, facts

    def _translate(self) -> None:
        """Update the translations of unfinished plans, and of service ports that gained a portal."""
        gone, plans = self._plans.gone, self._plans.unfinished
        changed = {plan.service_port.name for plan in plans} | set(gone)
        for name in gone:
            changed |= self._owners.give_up(name)
            self._translations.pop(name, None)
        for plan in plans:
            changed |= self._owners.claim(plan.service_port.name, {route.portal for route in plan.routes})
        for name in changed:
            if (planned := self._plans.held.get(name)) is not None:
                self._translations[name] = self._translation(planned)
        self._unloaded |= changed

    def _translation(self, plan: Plan) -> Translation:
        service_port = plan.service_port
        routes = tuple(route for route in plan.routes if self._is_owner(service_port, route.portal))
        if self._masquerade_all:
            internal = set(internal_portals(service_port))
            routes = tuple(_masqueraded(route) if route.portal in internal else route for route in routes)
        restricted = restricted_portals(service_port, self._plans.state.node).items()
        allowed = {portal: cidrs for portal, cidrs in restricted if self._is_owner(service_port, portal)}
        return Translation(service_port, routes, plan.reaches, allowed, serving_endpoints(plan.endpoints))

    def _is_owner(self, service_port: ServicePort, portal: Portal) -> bool:
        return self._owners.owner(portal) == service_port.name

    async def _forget(self, flows: Mapping[Portal, Answering]) -> None:
        with self._conntrack.timed():
            for family, count in (await forget_udp_flows(flows)).items():
                self._forgotten[f"IPv{family}"] += count

    def _changed_flows(self, changed: Iterable[ServicePortName]) -> dict[Portal, Answering]:
        """Return the UDP portals of *changed* that differ, each with the endpoints whose flows may continue.

        Without any such endpoint all flows are stale: they would keep a deleted endpoint (kubernetes#139628).
        """
        stale: dict[Portal, Answering] = {}
        for name in changed:
            if name.protocol is not L4Protocol.UDP:
                continue
            before, after = self._answering.pop(name, {}), self._answers(self._translations.get(name))
            if after:
                self._answering[name] = after
            stale |= {portal: serving for portal, serving in after.items() if before.get(portal) != serving}
            gone = before.keys() - after.keys()
            stale |= {portal: frozenset() for portal in gone if self._owners.owner(portal) is None}
        return stale

    @staticmethod
    def _answers(made: Translation | None) -> dict[Portal, Answering]:
        if made is None:
            return {}
        serving = frozenset(endpoint.address for endpoint in made.serving)
        return {route.portal: serving for route in made.routes}

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

    def _log_new(self) -> None:
        new = self._owners.new
        log_served((_served(self._translations[name]) for name in sorted(new)), len(new))
        new.clear()

    def _is_loaded(self) -> bool:
        return self._loaded is not None

    async def _forget_all_flows(self) -> None:
        flows = {portal: serving for held in self._answering.values() for portal, serving in held.items()}
        if flows:
            await self._forget(flows)
        await forget_early_connections(frozenset[Portal]().union(*self._served.values()))

    async def close(self, drain_timeout_s: float) -> None:
        """Remove the rules. While open connections drain, which need the rules, refuse new ones."""
        async with self._lock:
            try:
                if self._loaded is not None:
                    await self._drain(drain_timeout_s, self._loaded)
            except SyncError as error:
                log.warning("open connections are not waited for: %s", error)
            await self._remove_rules()

    async def _drain(self, timeout_s: float, facts: NodeFacts) -> None:
        portals = {route.portal for made in self._translations.values() for route in made.routes}
        portals = {portal for portal in portals if portal.protocol is L4Protocol.TCP}
        if not timeout_s or not await open_connections(portals):
            return  # refusing takes seconds with thousands of Services
        refusing = {name: _refusing(made) for name, made in self._translations.items()}
        await self._kernel.load(RuleUpdate(refusing, set(refusing), facts))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await open_connections(portals):  # noqa: ASYNC110 - the kernel sends no notices
                    await asyncio.sleep(_DRAIN_CHECK_S)


def _served(made: Translation) -> str:
    name = made.service_port.name
    portals = ", ".join(dict.fromkeys(str(route.portal) for route in made.routes))
    endpoints = sum(len(set(there.cluster + there.local)) for there in made.reaches.values())
    return f"{name}: {name.protocol} {portals} -> {endpoints} endpoints"


def _masqueraded(route: Route) -> Route:
    return route._replace(to=route.to._replace(transparent=False)) if isinstance(route.to, ListenerName) else route


def _refusing(made: Translation) -> Translation:
    """Return *made* with all portals refused: no client waits for an answer, or reaches a server of this node."""
    routes = (r._replace(to=Refusal.REJECT) if isinstance(r.to, ListenerName) else r for r in made.routes)
    return replace(made, routes=tuple(routes))
