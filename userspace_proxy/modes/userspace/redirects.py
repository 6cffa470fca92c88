"""The translations of userspace mode: the proxy port for each portal and sender."""

from collections.abc import Iterator
from dataclasses import replace

from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import ListenerName, ServicePortName
from userspace_proxy.model.redirects import DROPPED
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.plans import NodeRules, Plan
from userspace_proxy.modes.translator import Translator


class RedirectTranslator(Translator):
    """Translates routes to open listeners. A change of endpoints changes nothing here, except for the first and last.

    ``opened``: the open listeners. ``refuse_port``: as in `NodeFacts`.
    """

    def __init__(self, rules: NodeRules) -> None:
        super().__init__(rules)
        self.opened: dict[ListenerName, ListenerSpec] = {}
        self.refuse_port = 0
        self._is_transparent = False

    def open(self, spec: ListenerSpec) -> None:
        """Note that the listener *spec* is open."""
        self.opened[spec.name] = spec
        self._outdated.add(spec.name.service_port)
        # Stays: open connections may outlive the last transparent listener, and need their replies.
        self._is_transparent |= spec.transparent

    def open_all(self, ports: ProxyPorts) -> None:
        """Note the listeners of all plans as open, as if every port were free."""
        self.refuse_port = ports.next_refusing(set()) or 0
        for plan in self.plans.held.values():
            for name in plan.listeners:
                if port := ports.next_for(name, set()):
                    self.open(ListenerSpec(plan.service_port, port, name.scope, name.transparent))

    def facts(self) -> NodeFacts:
        node = self.plans.state.node
        return NodeFacts(
            pods=self.rules.detector(node),
            node_ports_on=self.rules.node_ports_on(node),
            refuse_port=self.refuse_port,
            capture=self.rules.capture,
            transparent=self._is_transparent,
        )

    def _routes(self, name: ServicePortName) -> Iterator[Route]:
        """Yield the routes of *name*, except those to listeners that could not be opened."""
        return (route for route in super()._routes(name) if isinstance(route.to, Refusal) or route.to in self.opened)

    def _translation(self, plan: Plan) -> Translation:
        made = super()._translation(plan)
        ports = tuple(self._port(route.to) for route in made.routes)
        made = replace(made, serving=(), ports=ports)
        held = self.translations.get(plan.service_port.name)
        # What the rules do not depend on may differ.
        return held if held is not None and replace(made, service_port=held.service_port) == held else made

    def _port(self, to: ListenerName | Refusal) -> int:
        if isinstance(to, Refusal):
            return self.refuse_port if to is Refusal.REJECT else DROPPED
        return self.opened[to].proxy_port
