"""Service ports, and the portals at which clients find them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from userspace_proxy.model.endpoint import Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ServicePortName

_ANY_ADDRESS: dict[Family, str] = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - nothing is bound


@dataclass(frozen=True, slots=True)
class Portal:
    """One address a client may dial: a virtual IP and port, or (with ``0.0.0.0`` or ``::``) a port on every node IP."""

    ip: str
    port: int
    protocol: L4Protocol

    @property
    def family(self) -> Family:
        return family_of(self.ip)

    @property
    def is_node_port(self) -> bool:
        return self.ip in _ANY_ADDRESS.values()

    def __str__(self) -> str:
        return f"*:{self.port}" if self.ip == _ANY_ADDRESS[4] else join_address(self.ip, self.port)


def node_portal(family: Family, port: int, protocol: L4Protocol) -> Portal:
    """Return the portal that is *port* on every address of this node."""
    return Portal(_ANY_ADDRESS[family], port, protocol)


class SourceIP(StrEnum):
    """Whose address an endpoint sees: this node's, the client's in a PROXY header before all bytes, or the client's."""

    NODE = "node"
    PROXY_PROTOCOL_V1 = "proxy-protocol-v1"
    PROXY_PROTOCOL_V2 = "proxy-protocol-v2"
    TRANSPARENT = "transparent"


# What a kernel may know (net/netfilter/ipvs), newest last.
IPVS_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos")

Weights = tuple[tuple[str, int], ...]
"""Endpoints' IPs, and how much of the new connections each gets."""
WEIGHT_MAX = 100


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service with all that decides where its traffic comes from and goes to.

    ``affinity_timeout_s`` is None without ``sessionAffinity: ClientIP``; ``node_port`` and ``health_check_node_port``
    are 0 where there is none. ``load_balancer_ips`` are those that this node answers for (ipMode VIP);
    ``source_ranges`` are the CIDRs that may dial these, everybody where there are none. ``internal_local``,
    ``external_local``: the traffic policy Local, for who comes by a cluster IP and for who comes another way.
    ``ipvs_scheduler``: "" for the node's default; ``weights``: of endpoints that do not have the weight 1. Of meaning
    in some kernel modes only.
    """

    name: ServicePortName
    port: int
    cluster_ips: tuple[str, ...]
    node_port: int = 0
    external_ips: tuple[str, ...] = ()
    affinity_timeout_s: int | None = None
    load_balancer_ips: tuple[str, ...] = ()
    source_ranges: tuple[str, ...] = ()
    internal_local: bool = False
    external_local: bool = False
    health_check_node_port: int = 0
    source_ip: SourceIP = SourceIP.NODE
    ipvs_scheduler: str = ""
    weights: Weights = ()

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(dict.fromkeys(map(family_of, self.cluster_ips)))

    @property
    def is_externally_accessible(self) -> bool:
        """Whether it may be dialled at anything but its cluster IPs."""
        return bool(self.node_port or self.load_balancer_ips or self.external_ips)


def internal_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield where clients inside the cluster dial *service_port*."""
    for ip in service_port.cluster_ips:
        yield Portal(ip, service_port.port, service_port.name.protocol)


def load_balancer_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield what a load balancer leads to this node as it was dialled; `source_ranges` are about these alone."""
    for ip in service_port.load_balancer_ips:
        yield Portal(ip, service_port.port, service_port.name.protocol)


def external_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield where clients outside of the cluster dial *service_port*; `external_local` is about these."""
    protocol = service_port.name.protocol
    for ip in service_port.external_ips:
        yield Portal(ip, service_port.port, protocol)
    yield from load_balancer_portals(service_port)
    if service_port.node_port:
        for family in service_port.families:
            yield node_portal(family, service_port.node_port, protocol)


def portals(service_port: ServicePort) -> tuple[Portal, ...]:
    """Return every address at which clients may dial *service_port*, cluster IPs first, each once."""
    return tuple(dict.fromkeys((*internal_portals(service_port), *external_portals(service_port))))
