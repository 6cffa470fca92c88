"""Compute the answers of health-check node ports: the number of a Service's endpoints on this node."""

from dataclasses import dataclass

from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.state import ProxyState


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The health-check node port of one Service, and the number of endpoints to report there."""

    port: int
    local_endpoints: int


def health_checks(state: ProxyState) -> dict[NamespacedName, HealthCheck]:
    """Return the health check of each Service with a health-check node port and ``externalTrafficPolicy: Local``.

    The count is of ready endpoints on this node, by IP: two ports of a pod count once, and so do the two families of a
    dual-stack pod. Endpoints that serve while terminating take traffic but do not count: load balancers must leave.
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
    """Return the larger of the counts per IP family, as kube-proxy (one proxier per family) would report."""
    ipv6 = sum(":" in ip for ip in ips)
    return max(ipv6, len(ips) - ipv6)
