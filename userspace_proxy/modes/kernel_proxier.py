"""Kernel modes: the kernel itself translates packets to endpoints, by the rules of one mode.

Every service port is planned as transparent: the model decides whose packets keep the client's address and whose are
masqueraded. No packet passes this process, so it holds only the rules that are loaded.
"""

import asyncio
import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.model.names import L4Protocol, ListenerName
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import Portal, internal_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Reach
from userspace_proxy.modes.base_proxier import BaseProxier
from userspace_proxy.modes.kernel_metrics import kernel_metrics
from userspace_proxy.modes.kernel_rules import KernelRules, NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.plans import NodeRules, Plan
from userspace_proxy.modes.translator import Translator
from userspace_proxy.netfilter.conntrack import Answering, open_connections

_DRAIN_CHECK_S = 0.2

log = logging.getLogger(__name__)


class KernelTranslator(Translator):
    """The translations of all kernel modes.

    ``masquerade_all``: endpoints see this node's address in all packets to cluster IPs. ``service_cidrs``: the cluster
    IP ranges, if an operator states them; else those of the state.
    """

    def __init__(self, rules: NodeRules, *, masquerade_all: bool = False, service_cidrs: tuple[str, ...] = ()) -> None:
        super().__init__(rules, in_kernel=True)
        self._masquerade_all = masquerade_all
        self._service_cidrs = service_cidrs

    def facts(self) -> NodeFacts:
        node, service_cidrs = self.plans.state.node, self._service_cidrs or self.plans.state.service_cidrs
        return NodeFacts(node, self.rules.detector(node), self.rules.node_ports_on(node), service_cidrs)

    def _translation(self, plan: Plan) -> Translation:
        made = super()._translation(plan)
        if not self._masquerade_all:
            return made
        internal = set(internal_portals(plan.service_port))
        routes = (_masqueraded(route) if route.portal in internal else route for route in made.routes)
        return replace(made, routes=tuple(routes))


class KernelProxier(BaseProxier):
    """Applies each state to the rules of one kernel mode."""

    def __init__(self, kernel: KernelRules, translator: KernelTranslator) -> None:
        super().__init__(kernel, translator)
        self._rules = kernel

    def metrics(self) -> Iterator[Metric]:
        if self._rules.loads:
            yield from kernel_metrics(self._rules.loads, self._conntrack, self._forgotten)
            yield from self._rules.metrics()

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            self._translator.plan(state)
            self._translator.translate()
            await self._load()
            self._plans.finish()

    def _answers(self, made: Translation) -> Mapping[Portal, Answering]:
        serving = frozenset(endpoint.address for endpoint in made.serving)
        return {route.portal: serving for route in made.routes}

    def _served_by(self, made: Translation) -> Iterator[str]:
        name = made.service_port.name
        portals = ", ".join(dict.fromkeys(str(route.portal) for route in made.routes))
        endpoints = sum(len(set(there.cluster + there.local)) for there in made.reaches.values())
        yield f"{name}: {name.protocol} {portals} -> {endpoints} endpoints"

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
        portals = {route.portal for made in self._translator.translations.values() for route in made.routes}
        portals = {portal for portal in portals if portal.protocol is L4Protocol.TCP}
        if not timeout_s or not await open_connections(portals):
            return  # refusing takes seconds with thousands of Services
        refusing = {name: _refusing(made) for name, made in self._translator.translations.items()}
        await self._kernel.load(RuleUpdate(refusing, set(refusing), facts))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while await open_connections(portals):  # noqa: ASYNC110 - the kernel sends no notices
                    await asyncio.sleep(_DRAIN_CHECK_S)


def _masqueraded(route: Route) -> Route:
    return route._replace(to=route.to._replace(transparent=False)) if isinstance(route.to, ListenerName) else route


def _refusing(made: Translation) -> Translation:
    """Return *made* without endpoints, with all portals refused.

    So no client waits for an answer, or reaches a server of this node.
    """
    routes = tuple(route._replace(to=Refusal.REJECT) for route in made.routes)
    return replace(made, routes=routes, reaches=dict.fromkeys(made.reaches, Reach()))
