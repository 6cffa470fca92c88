"""Keep the translations of the desired state: what the rules of a mode are made from. Pure, but for log lines."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.routes import Route
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import serving_endpoints
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation, portals_of
from userspace_proxy.modes.plans import NodeRules, Plan, Plans, restricted_portals
from userspace_proxy.modes.portal_owners import PortalOwners

# Most service ports may be dialled by everybody: they share this value.
_BY_EVERYBODY: Mapping[Portal, tuple[str, ...]] = {}


class Translator(ABC):
    """Translates plans. The cost follows the changes.

    ``unloaded``: the service ports whose translations differ from the loaded ones, each with the loaded one. The caller
    empties it.
    """

    def __init__(self, rules: NodeRules, *, in_kernel: bool = False) -> None:
        """*in_kernel*: as in `plan`."""
        self.rules = rules
        self.plans = Plans(in_kernel=in_kernel)
        self.owners = PortalOwners()
        self.translations: dict[ServicePortName, Translation] = {}
        self.unloaded: dict[ServicePortName, Translation | None] = {}
        self._outdated: set[ServicePortName] = set()  # their translations, though their plans have not changed

    @abstractmethod
    def facts(self) -> NodeFacts:
        """Return the facts about the node that the rules need."""

    def plan(self, state: ProxyState) -> None:
        """Plan the changed service ports of *state*."""
        self.plans.update(state, self.rules)

    def translate(self) -> None:
        """Translate unfinished plans, and those of service ports that gained a portal."""
        planned = (plan.service_port.name for plan in self.plans.unfinished)
        names = dict.fromkeys((*self.plans.gone, *planned, *sorted(self._outdated)))
        touched = dict(names)
        for name in names:
            portals = {route.portal for route in self._routes(name)}
            touched |= dict.fromkeys(self.owners.claim(name, portals, portals_of(self.translations.get(name))))
        for name in touched:
            before, plan = self.translations.get(name), self.plans.held.get(name)
            made = self._translation(plan) if plan is not None else None
            if made == before:
                continue
            self.unloaded.setdefault(name, before)
            if made is not None:
                self.translations[name] = made
            else:
                del self.translations[name]
        self._outdated.clear()

    def _routes(self, name: ServicePortName) -> Iterable[Route]:
        """Return the routes of *name* that can be in force."""
        planned = self.plans.held.get(name)
        return planned.routes if planned is not None else ()

    def _translation(self, plan: Plan) -> Translation:
        service_port = plan.service_port
        routes = tuple(route for route in self._routes(service_port.name) if self._is_owner(service_port, route.portal))
        routes = plan.routes if len(routes) == len(plan.routes) else routes  # held once
        restricted = restricted_portals(service_port, self.plans.state.node).items()
        allowed = {portal: cidrs for portal, cidrs in restricted if self._is_owner(service_port, portal)}
        serving = serving_endpoints(plan.endpoints)
        return Translation(service_port, routes, plan.reaches, allowed or _BY_EVERYBODY, serving)

    def _is_owner(self, service_port: ServicePort, portal: Portal) -> bool:
        return self.owners.owner(portal) == service_port.name
