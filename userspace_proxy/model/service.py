"""Service ports, and the portals at which clients find them."""

from __future__ import annotations

from dataclasses import dataclass

from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.names import L4Protocol, ServicePortName


@dataclass(frozen=True, slots=True)
class Portal:
    """One address a client may dial: a virtual IP and port, or (with no IP) a port on every node address."""

    ip: str | None
    port: int
    protocol: L4Protocol

    def __str__(self) -> str:
        return join_address(self.ip, self.port) if self.ip else f"*:{self.port}"


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service with all that decides where its traffic comes from and goes to.

    ``affinity_timeout_s`` is None without ``sessionAffinity: ClientIP``; ``node_port`` is 0 where there is none.
    """

    name: ServicePortName
    port: int
    cluster_ips: tuple[str, ...]
    node_port: int = 0
    external_ips: tuple[str, ...] = ()
    affinity_timeout_s: int | None = None


def portals(service_port: ServicePort) -> tuple[Portal, ...]:
    """Return every address at which clients may dial *service_port*, cluster IPs first."""
    protocol = service_port.name.protocol
    ips = dict.fromkeys(service_port.cluster_ips + service_port.external_ips)
    found = [Portal(ip, service_port.port, protocol) for ip in ips]
    if service_port.node_port:
        found.append(Portal(None, service_port.node_port, protocol))
    return tuple(found)
