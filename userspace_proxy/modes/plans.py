"""What a mode makes of a state: for each service port its routes, and the listeners that they lead to. Pure.

Userspace mode opens the listeners; a kernel mode takes a listener's name for a set of endpoints.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace

from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.interfaces import DROPPED, Backends, Capture, PodDetector, Redirects
from userspace_proxy.model.endpoint import Endpoint, Family, family_of
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Route, Sender, listeners, routes
from userspace_proxy.model.service import ConnectionPolicy, Portal, ServicePort, SourceIP, load_balancer_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node, Reach, reach, serving_endpoints


@dataclass(frozen=True, slots=True)
class Plan:
    """What one service port takes: listeners with their endpoints, and routes that lead clients to them.

    Made of `service_port`, `endpoints` and the node; where these are the same objects, so is the plan.
    """

    service_port: ServicePort
    endpoints: tuple[Endpoint, ...]
    listeners: Mapping[ListenerName, Backends]
    routes: tuple[Route, ...]
    reaches: Mapping[Family, Reach]

    def is_of(self, service_port: ServicePort, endpoints: tuple[Endpoint, ...]) -> bool:
        """Return whether it was made of just these."""
        return self.service_port is service_port and self.endpoints is endpoints


def plan(
    service_port: ServicePort,
    endpoints: tuple[Endpoint, ...],
    node: Node,
    *,
    detects_pods: bool,
    source_ip: SourceIP | None = None,
) -> Plan:
    """Return what *service_port* takes on *node*, with *source_ip* in place of its own where that is given. Pure."""
    routed = service_port
    if source_ip is not None:  # of a kernel mode, in which no client can wait
        routed = replace(service_port, source_ip=source_ip, connections=ConnectionPolicy())
    found: list[Route] = []
    usable: dict[Scope, tuple[Endpoint, ...]] = dict.fromkeys(Scope, ())
    reaches: dict[Family, Reach] = {}
    for family in service_port.families:
        there = reaches[family] = reach(service_port, (e for e in endpoints if family_of(e.ip) == family), node)
        usable[Scope.CLUSTER] += there.cluster
        usable[Scope.LOCAL] += there.local
        found += routes(routed, family, there, detects_pods=detects_pods)
    serving = serving_endpoints(endpoints)
    backends = {n: Backends(usable[n.scope], serving) for n in listeners(routed, detects_pods=detects_pods)}
    return Plan(service_port, endpoints, backends, tuple(found), reaches)


@dataclass(frozen=True, slots=True)
class NodeRules:
    """What rules say of this node, whatever its Services: the way of capture, who is a pod, where node ports are.

    ``pods`` tells pods; with ``pods_by_node`` those are pods whose address is in one of the node's own pod CIDRs.
    ``node_port_addresses``: CIDRs, and ``primary`` for the first address of each family; all where there are none.
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
        """Return the addresses of *node* at which node ports are served; none for all."""
        on = [ipaddress.ip_network(cidr, strict=False) for cidr in self.node_ports_on(node)]
        own = (*node.addresses, "127.0.0.1", "::1")
        return tuple(ip for ip in own if any(ipaddress.ip_address(ip) in network for network in on))

    def node_ports_on(self, node: Node) -> tuple[str, ...]:
        """Return the CIDRs of *node*'s own addresses at which node ports are served; none for all."""
        primary = {family_of(ip): ip for ip in reversed(node.addresses)}
        own = tuple(f"{ip}/{32 if family == 4 else 128}" for family, ip in primary.items())
        found = (own if given == "primary" else (given,) for given in self.node_port_addresses)
        return tuple(cidr for cidrs in found for cidr in cidrs)


class Plans:
    """The plans for a state, brought to each new one at the cost of what changed.

    What changed stays unfinished until `finish`, over however many states: so a sync that failed is repeated.
    ``source_ip``: whose address endpoints see, whatever service ports say of it.
    """

    def __init__(self, source_ip: SourceIP | None = None) -> None:
        self._source_ip = source_ip
        self.state = ProxyState()
        self.held: dict[ServicePortName, Plan] = {}
        self._unfinished: dict[ServicePortName, None] = {}
        self._gone: dict[ServicePortName, None] = {}

    def update(self, state: ProxyState, rules: NodeRules) -> bool:
        """Make plans anew for what changed; return whether that is more than endpoints of service ports that have some.

        Then rules have to be changed in userspace mode too.
        """
        before, detects_pods = self.state, rules.detects_pods(state.node)
        is_another = state.node != before.node
        for name in self._suspects(state):
            service_port, endpoints, held = state.service_ports[name], state.endpoints[name], self.held.get(name)
            if held is None or not held.is_of(service_port, endpoints) or state.node is not before.node:
                made = plan(service_port, endpoints, state.node, detects_pods=detects_pods, source_ip=self._source_ip)
                self.held[name] = made
                self._unfinished[name] = None
                self._gone.pop(name, None)
                is_another |= held is None or held.routes != made.routes or held.service_port != made.service_port
        is_one_gone = len(self.held) != len(state.service_ports)  # all of these are held by now
        for name in [name for name in self.held if name not in state.service_ports] if is_one_gone else ():
            del self.held[name]
            self._unfinished.pop(name, None)
            self._gone[name] = None
            is_another = True
        self.state = state
        return is_another

    def _suspects(self, state: ProxyState) -> list[ServicePortName]:
        """Return whose plans may have to be made anew: names are looked up only if their order is new."""
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
        """The plans of which something is still to be done."""
        return [self.held[name] for name in self._unfinished]

    @property
    def gone(self) -> list[ServicePortName]:
        """The service ports that were planned, and are to be taken away."""
        return list(self._gone)

    def finish(self) -> None:
        """Know that all of it is done."""
        self._unfinished.clear()
        self._gone.clear()


def redirects_to(
    opened: Mapping[ListenerName, int],
    plans: Mapping[ServicePortName, Plan],
    refuse_port: int,
    rules: NodeRules,
    node: Node,
) -> tuple[Redirects, dict[Portal, ServicePortName]]:
    """Return the rules that make the routes of *plans* true, with *opened* (listener -> proxy port). Pure.

    Portals without endpoints are led to *refuse_port*, and those of listeners that could not be opened nowhere. Of
    two with one portal the first has it; the second part says who else claimed one.
    """
    ports: dict[Portal, int] = {}
    exceptions: dict[Sender, dict[Portal, int]] = {}
    allowed: dict[Portal, tuple[str, ...]] = {}
    names: dict[Portal, ServicePortName] = {}
    claimed: dict[Portal, ServicePortName] = {}
    refused = {Refusal.REJECT: refuse_port, Refusal.DROP: DROPPED}
    for name, planned in plans.items():
        for portal, sender, to in planned.routes:
            port = refused[to] if isinstance(to, Refusal) else opened.get(to)
            if port is None:
                continue
            if names.setdefault(portal, name) is not name:
                claimed[portal] = name
            elif sender is Sender.ANYBODY:
                ports[portal] = port
            else:
                exceptions.setdefault(sender, {})[portal] = port
        if planned.service_port.source_ranges:
            for portal in load_balancer_portals(planned.service_port):
                if names.get(portal) is name and (cidrs := allowed_to_dial(planned.service_port, portal, node)):
                    allowed[portal] = cidrs
    return (
        Redirects(
            ports,
            names,
            refuse_port,
            rules.capture,
            exceptions,
            allowed,
            rules.node_ports_on(node),
            rules.detector(node),
            any(listener.transparent for listener in opened),
        ),
        claimed,
    )


def allowed_to_dial(service_port: ServicePort, portal: Portal, node: Node) -> tuple[str, ...]:
    """Return who may dial *portal*, nobody in particular for all: ranges of the other family say nothing of it.

    Where this node may, its address there may be the sender's, and so may dial, too (P4).
    """
    ranges = tuple(text for text in service_port.source_ranges if family_of(text) == portal.family)
    networks = [ipaddress.ip_network(text) for text in ranges]
    if any(ipaddress.ip_address(ip) in network for ip in node.addresses for network in networks):
        return (*ranges, f"{portal.ip}/{32 if portal.family == 4 else 128}")
    return ranges


def planned_redirects(state: ProxyState, ports: ProxyPorts, rules: NodeRules) -> Redirects:
    """Return the rules for *state* as if every port were free; nothing is opened or loaded."""
    refuse_port = ports.next_refusing(set()) or 0
    plans = {
        name: plan(service_port, state.endpoints[name], state.node, detects_pods=rules.detects_pods(state.node))
        for name, service_port in state.service_ports.items()
    }
    wanted = (listener for planned in plans.values() for listener in planned.listeners)
    opened = {listener: port for listener in wanted if (port := ports.next_for(listener, set()))}
    return redirects_to(opened, plans, refuse_port, rules, state.node)[0]
