"""What health-check node ports say: how many endpoints of a Service are on this node."""

from __future__ import annotations

from dataclasses import dataclass

from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.state import ProxyState


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The port at which load balancers ask for a Service, and what they are told."""

    port: int
    local_endpoints: int


def health_checks(state: ProxyState) -> dict[NamespacedName, HealthCheck]:
    """Return what is to be told of each Service that has a health-check node port and keeps external traffic local.

    Counted are the ready endpoints on this node, by IP: two ports of a pod are one, and so are the two families of a
    dual-stack pod. Those that serve while they terminate take traffic and are not counted: load balancers are to leave.
    """
    ports: dict[NamespacedName, int] = {}
    local: dict[NamespacedName, set[str]] = {}
    for name, service_port in state.service_ports.items():
        if service_port.health_check_node_port and service_port.external_local:
            ports[name.service] = service_port.health_check_node_port
            ips = local.setdefault(name.service, set())
            if state.node.name:
                ips.update(e.ip for e in state.endpoints[name] if e.ready and e.node_name == state.node.name)
    return {service: HealthCheck(port, _largest_family(local[service])) for service, port in ports.items()}


def _largest_family(ips: set[str]) -> int:
    """Return how many of *ips* are of one family: as kube-proxy, which is one proxy for each, would count."""
    ipv6 = sum(":" in ip for ip in ips)
    return max(ipv6, len(ips) - ipv6)
