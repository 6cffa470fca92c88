"""Service ports, and the portals at which clients reach them."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from userspace_proxy.model.endpoint import Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.probe import ProbeSpec

_ANY_ADDRESS: dict[Family, str] = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - nothing is bound


class Portal(NamedTuple):
    """One address that clients may dial: a virtual IP and port, or a port on every node IP (``0.0.0.0`` or ``::``)."""

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
    """Return the portal for *port* on every address of this node."""
    return Portal(_ANY_ADDRESS[family], port, protocol)


class SourceIP(StrEnum):
    """The source address that endpoints see.

    NODE: this node's. PROXY_PROTOCOL_V1, PROXY_PROTOCOL_V2: this node's, with the client's in a header before the first
    byte. TRANSPARENT: the client's.
    """

    NODE = "node"
    PROXY_PROTOCOL_V1 = "proxy-protocol-v1"
    PROXY_PROTOCOL_V2 = "proxy-protocol-v2"
    TRANSPARENT = "transparent"


class Balance(StrEnum):
    """The algorithm that chooses an endpoint for a new connection or flow."""

    ROUND_ROBIN = "round-robin"
    LEAST_CONNECTIONS = "least-connections"
    RANDOM = "random"
    SOURCE_HASH = "source-hash"


# Schedulers that a kernel may offer (net/netfilter/ipvs), newest last.
IPVS_SCHEDULERS = ("rr", "wrr", "lc", "wlc", "lblc", "lblcr", "dh", "sh", "sed", "nq", "fo", "ovf", "mh", "twos")

Weights = tuple[tuple[str, int], ...]
"""Endpoint IPs with their relative shares of new connections."""
WEIGHT_MAX = 100


@dataclass(frozen=True, slots=True)
class ConnectionPolicy:
    """When open TCP connections are closed, and how long new ones wait for an endpoint, in userspace mode.

    ``drain_s``: how long connections continue whose endpoint is removed; None for as long as they last, 0 for a reset
    at once. ``max_age_s``: the age from which an idle connection is closed; 0 for none. ``force_s``: how long after
    that a busy one is reset; None for never. ``wait_s``: how long new connections wait if there is no endpoint.
    """

    drain_s: float | None = None
    max_age_s: float = 0.0
    force_s: float | None = None
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ServicePort:
    """One port of a Service, with every field that decides where its traffic comes from and goes to.

    ``affinity_timeout_s`` is None without ``sessionAffinity: ClientIP``. ``node_port`` and ``health_check_node_port``
    are 0 if unset. ``load_balancer_ips``: those that this node answers for (ipMode VIP). ``source_ranges``: the CIDRs
    that may dial these; empty allows all. ``internal_local``, ``external_local``: traffic policy Local, for clients of
    a cluster IP and for clients of the other portals.
    ``ipvs_scheduler``: "" for the node's default. ``weights``: of endpoints with a weight other than 1. ``balance``:
    None if the Service states none; each mode has its default. ``slow_start_s``: how long the share of an endpoint
    that is new or has recovered grows; 0 for no slow start. Each applies in some modes only.
    ``probe``: the active health check of its endpoints, or None. ``connections``: in userspace mode, for TCP.
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
    balance: Balance | None = None
    slow_start_s: float = 0.0
    probe: ProbeSpec | None = None
    connections: ConnectionPolicy = ConnectionPolicy()

    @property
    def families(self) -> tuple[Family, ...]:
        return tuple(dict.fromkeys(map(family_of, self.cluster_ips)))

    @property
    def is_externally_accessible(self) -> bool:
        """Whether it has a portal other than its cluster IPs."""
        return bool(self.node_port or self.load_balancer_ips or self.external_ips)


def internal_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield the portals for clients inside the cluster."""
    for ip in service_port.cluster_ips:
        yield Portal(ip, service_port.port, service_port.name.protocol)


def load_balancer_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield the portals at load balancer IPs; `source_ranges` apply to these alone."""
    for ip in service_port.load_balancer_ips:
        yield Portal(ip, service_port.port, service_port.name.protocol)


def external_portals(service_port: ServicePort) -> Iterator[Portal]:
    """Yield the portals for clients outside the cluster; `external_local` applies to these."""
    protocol = service_port.name.protocol
    for ip in service_port.external_ips:
        yield Portal(ip, service_port.port, protocol)
    yield from load_balancer_portals(service_port)
    if service_port.node_port:
        for family in service_port.families:
            yield node_portal(family, service_port.node_port, protocol)


def portals(service_port: ServicePort) -> tuple[Portal, ...]:
    """Return every portal of *service_port*, cluster IPs first, without duplicates."""
    return tuple(dict.fromkeys((*internal_portals(service_port), *external_portals(service_port))))
