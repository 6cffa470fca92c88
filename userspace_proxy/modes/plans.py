"""Plan each service port of a state: its routes, and the listeners that these name. Pure.

Userspace mode opens the listeners. In kernel modes, a listener's name stands for a set of endpoints.
"""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace

from userspace_proxy.model.endpoint import Endpoint, Family, family_of
from userspace_proxy.model.listeners import Backends
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName
from userspace_proxy.model.redirects import Capture, PodDetector
from userspace_proxy.model.routes import Route, listeners, routes
from userspace_proxy.model.service import ConnectionPolicy, Portal, ServicePort, SourceIP, load_balancer_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node, Reach, held_once, reach, serving_endpoints

# All plans of userspace mode share this value.
_NO_REACHES: Mapping[Family, Reach] = {}


@dataclass(frozen=True, slots=True)
class Plan:
    """The listeners of one service port with their endpoints, and the routes of its clients to them.

    Depends on ``service_port``, ``endpoints`` and the node only. ``reaches``: of kernel modes.
    """

    service_port: ServicePort
    endpoints: tuple[Endpoint, ...]
    listeners: Mapping[ListenerName, Backends]
    routes: tuple[Route, ...]
    reaches: Mapping[Family, Reach]

    def is_of(self, service_port: ServicePort, endpoints: tuple[Endpoint, ...]) -> bool:
        """Return whether the plan was made from these objects."""
        return self.service_port is service_port and self.endpoints is endpoints


def plan(
    service_port: ServicePort,
    endpoints: tuple[Endpoint, ...],
    node: Node,
    *,
    detects_pods: bool,
    in_kernel: bool = False,
) -> Plan:
    """Return the plan of *service_port* on *node*. *in_kernel*: of a kernel mode.

    These keep clients' addresses, and cannot hold connections.
    """
    routed = service_port
    if in_kernel:
        routed = replace(service_port, source_ip=SourceIP.TRANSPARENT, connections=ConnectionPolicy())
    found: list[Route] = []
    usable: dict[Scope, tuple[Endpoint, ...]] = dict.fromkeys(Scope, ())
    reaches: dict[Family, Reach] = {}
    for family in service_port.families:
        its = held_once(tuple(e for e in endpoints if family_of(e.ip) == family), endpoints)
        there = reaches[family] = reach(service_port, its, node)
        usable[Scope.CLUSTER] += there.cluster
        usable[Scope.LOCAL] += there.local
        found += routes(routed, family, there, detects_pods=detects_pods)
    serving = serving_endpoints(endpoints)
    backends = {n: Backends(usable[n.scope], serving) for n in listeners(routed, detects_pods=detects_pods)}
    return Plan(service_port, endpoints, backends, tuple(found), reaches if in_kernel else _NO_REACHES)


@dataclass(frozen=True, slots=True)
class NodeRules:
    """The settings of rules that do not depend on Services.

    ``pods`` detects packets of pods. With ``pods_by_node``, the node's pod CIDRs do so instead.
    ``node_port_addresses``: CIDRs, and ``primary`` for the first address of each family. All addresses serve node ports
    if it is empty.
    """

    capture: Capture = Capture.REDIRECT
    pods: PodDetector | None = None
    pods_by_node: bool = False
    node_port_addresses: tuple[str, ...] = ()

    def detector(self, node: Node) -> PodDetector | None:
        if self.pods_by_node:
            return PodDetector(cidrs=node.pod_cidrs) if node.pod_cidrs else None
        return self.pods

    def detects_pods(self, node: Node) -> bool:
        return self.detector(node) is not None

    def node_port_ips(self, node: Node) -> tuple[str, ...]:
        """Return the addresses of *node* that serve node ports; empty for all."""
        on = [ipaddress.ip_network(cidr, strict=False) for cidr in self.node_ports_on(node)]
        if {network.version for network in on} == {network.version for network in on if not network.prefixlen}:
            return ()  # not those that the Node states, as one of them may be on a gateway
        own = (*node.addresses, "127.0.0.1", "::1")
        return tuple(ip for ip in own if any(ipaddress.ip_address(ip) in network for network in on))

    def node_ports_on(self, node: Node) -> tuple[str, ...]:
        """Return the CIDRs of the addresses of *node* that serve node ports; empty for all."""
        primary = {family_of(ip): ip for ip in reversed(node.addresses)}
        own = tuple(f"{ip}/{32 if family == 4 else 128}" for family, ip in primary.items())
        found = (own if given == "primary" else (given,) for given in self.node_port_addresses)
        return tuple(cidr for cidrs in found for cidr in cidrs)


class Plans:
    """The plans for the desired state. The cost of an update follows the changes.

    Changed plans stay unfinished until `finish`. If a sync fails, the next one therefore gets them again.
    """

    def __init__(self, *, in_kernel: bool = False) -> None:
        """*in_kernel*: as in `plan`."""
        self._in_kernel = in_kernel
        self.state = ProxyState()
        self.held: dict[ServicePortName, Plan] = {}
        self._unfinished: dict[ServicePortName, None] = {}
        self._gone: dict[ServicePortName, None] = {}

    def update(self, state: ProxyState, rules: NodeRules) -> None:
        """Plan the changed service ports."""
        before, detects_pods = self.state, rules.detects_pods(state.node)
        for name in self._suspects(state):
            service_port, endpoints, held = state.service_ports[name], state.endpoints[name], self.held.get(name)
            if held is None or not held.is_of(service_port, endpoints) or state.node is not before.node:
                made = plan(service_port, endpoints, state.node, detects_pods=detects_pods, in_kernel=self._in_kernel)
                self.held[name] = made
                self._unfinished[name] = None
                self._gone.pop(name, None)
        is_removed = len(self.held) != len(state.service_ports)
        for name in [name for name in self.held if name not in state.service_ports] if is_removed else ():
            del self.held[name]
            self._unfinished.pop(name, None)
            self._gone[name] = None
        self.state = state

    def _suspects(self, state: ProxyState) -> list[ServicePortName]:
        """Return the service ports whose plans may be outdated."""
        if state.node is not self.state.node or len(self.held) != len(state.service_ports):
            return list(state.service_ports)
        given = zip(state.service_ports.items(), state.endpoints.values(), self.held.values(), strict=True)
        return [
            n
            for (n, port), endpoints, held in given
            if held.service_port is not port or held.endpoints is not endpoints
        ]

    @property
    def unfinished(self) -> list[Plan]:
        """The new and changed plans that no sync has finished."""
        return [self.held[name] for name in self._unfinished]

    @property
    def gone(self) -> list[ServicePortName]:
        """The removed service ports that no sync has finished."""
        return list(self._gone)

    def finish(self) -> None:
        """Note that a sync has applied all plans."""
        self._unfinished.clear()
        self._gone.clear()


def restricted_portals(service_port: ServicePort, node: Node) -> dict[Portal, tuple[str, ...]]:
    """Return the portals that only some clients may dial, and the CIDRs of these clients."""
    portals = load_balancer_portals(service_port) if service_port.source_ranges else ()
    return {portal: cidrs for portal in portals if (cidrs := allowed_to_dial(service_port, portal, node))}


def allowed_to_dial(service_port: ServicePort, portal: Portal, node: Node) -> tuple[str, ...]:
    """Return the CIDRs that may dial *portal*; empty for all. Ranges of the other family do not restrict it.

    If this node may dial, so may the portal's own address, which this node may use as source (kube-proxy's chain
    KUBE-FW has the same exception).
    """
    ranges = tuple(text for text in service_port.source_ranges if family_of(text) == portal.family)
    networks = [ipaddress.ip_network(text) for text in ranges]
    if any(ipaddress.ip_address(ip) in network for ip in node.addresses for network in networks):
        return (*ranges, f"{portal.ip}/{32 if portal.family == 4 else 128}")
    return ranges
