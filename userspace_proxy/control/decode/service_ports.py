"""Decodes a Service into service ports. Pure; an invalid part is returned as a problem, and the rest is used."""

from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from types import MappingProxyType

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import canonical_cidr, canonical_ip, mapped_cidr, virtual_ip_errors
from userspace_proxy.control.decode.annotations import SOURCE_IP_FIELD, read_annotations
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import Family, family_of
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ConnectionPolicy, Portal, ServicePort, SourceIP

AFFINITY_TIMEOUT_S = 10_800
_PROTOCOLS = {protocol.value: protocol for protocol in L4Protocol}
_ALL_CLIENTS: Mapping[Family, str] = {4: "0.0.0.0/0", 6: "::/0"}
# No packet has a source address in these ranges.
_NO_CLIENT: Mapping[Family, str] = {4: "0.0.0.0/32", 6: "::/128"}

# Name and protocol: identifies a port of a Service, and matches an EndpointSlice's port with it (behaviours S6).
PortKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Allocation:
    """The cluster IPs of a Service, and the values allocated for fields it leaves empty.

    ``lost``: external and load balancer portals that the Service states, but another Service gets.
    """

    cluster_ips: tuple[str, ...] = ()
    node_ports: Mapping[PortKey, int] = field(default_factory=lambda: MappingProxyType({}))
    load_balancer_ips: tuple[str, ...] = ()
    health_check_node_port: int = 0
    lost: Set[Portal] = frozenset()


def service_ports(
    name: NamespacedName,
    service: api.Service,
    allocation: Allocation,
    source_ip: SourceIP = SourceIP.NODE,
    transparent_obstacle: str = "",
) -> tuple[dict[int, ServicePort], list[ConfigError]]:
    """Return the ports of a checked *service* by index in ``spec.ports``, and the problems of its other parts.

    *source_ip* is this node's default, for Services without a valid annotation. *transparent_obstacle*: why this node
    cannot keep client addresses, or "" if it can.
    """
    spec = service.spec
    assert spec is not None
    found: dict[int, ServicePort] = {}
    load_balancer_ips, problems = _load_balancer_ips(service)
    annotations, annotation_problems = read_annotations(service)
    problems += annotation_problems
    wanted = annotations.source_ip or source_ip
    if annotations.source_ip is SourceIP.TRANSPARENT and transparent_obstacle:
        reason = f"clients' addresses cannot be kept on this node: {transparent_obstacle}"
        problems.append(ConfigError(reason, field=SOURCE_IP_FIELD))
        wanted = source_ip
    # The families of the cluster IPs are the families of the Service; addresses of another one are skipped (behaviours
    # S5).
    families = set(map(family_of, allocation.cluster_ips))
    external_ips = _of_families(families, (ip for _, ip in _external_ips(spec)))
    load_balancer_ips = _of_families(families, load_balancer_ips or allocation.load_balancer_ips)
    ranges, ranges_problems = _source_ranges(spec, families, load_balancer_ips)
    problems += ranges_problems
    problems += _ports_problems(spec, wanted)
    for index, port, protocol in _served_ports(spec):
        lost = {portal.ip for portal in allocation.lost if (portal.port, portal.protocol) == (port.port, protocol)}
        found[index] = ServicePort(
            name=ServicePortName(name, port.name or "", protocol),
            port=port.port,
            cluster_ips=allocation.cluster_ips,
            node_port=_node_port(spec, port, allocation),
            external_ips=_without(lost, external_ips),
            affinity_timeout_s=affinity_timeout_s(spec),
            load_balancer_ips=_without(lost, load_balancer_ips),
            source_ranges=ranges,
            internal_local=spec.internal_traffic_policy == "Local",
            external_local=spec.external_traffic_policy == "Local",
            health_check_node_port=_health_check_node_port(spec, allocation),
            source_ip=wanted if _knows(wanted, protocol) else source_ip,
            ipvs_scheduler=annotations.ipvs_scheduler,
            weights=annotations.weights,
            balance=annotations.balance,
            slow_start_s=annotations.slow_start_s,
            probe=annotations.probe,
            connections=annotations.connections if protocol is L4Protocol.TCP else ConnectionPolicy(),
        )
    return found, problems


def _node_port(spec: api.objects.ServiceSpec, port: api.ServicePort, allocation: Allocation) -> int:
    return (port.node_port or allocation.node_ports.get(port_key(port), 0)) if has_node_ports(spec) else 0


def _health_check_node_port(spec: api.objects.ServiceSpec, allocation: Allocation) -> int:
    return (spec.health_check_node_port or allocation.health_check_node_port) if wants_health_check(spec) else 0


def _of_families(families: Set[Family], ips: Iterable[str]) -> tuple[str, ...]:
    return tuple(ip for ip in ips if family_of(ip) in families)


def _without(lost: Set[str], ips: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(ip for ip in ips if ip not in lost) if lost else ips


def own_portals(service: api.Service, allocation: Allocation) -> Iterator[Portal]:
    """Yield the portals at the cluster IPs of a checked *service*."""
    return _portals(service, allocation.cluster_ips)


def stated_portals(service: api.Service, allocation: Allocation) -> dict[Portal, str]:
    """Return portal -> the field that states it, for the external and load balancer IPs of a checked *service*."""
    spec = service.spec
    assert spec is not None
    families = set(map(family_of, allocation.cluster_ips))
    fields = {ip: f"spec.externalIPs[{index}]" for index, ip in _external_ips(spec)}
    of_ingress, _ = _load_balancer_ips(service)
    fields |= {ip: "status.loadBalancer.ingress" for ip in of_ingress if ip not in fields}
    fields |= {ip: "spec.loadBalancerIP" for ip in allocation.load_balancer_ips if not of_ingress and ip not in fields}
    return {portal: fields[portal.ip] for portal in _portals(service, _of_families(families, fields))}


def _portals(service: api.Service, ips: Iterable[str]) -> Iterator[Portal]:
    assert service.spec is not None
    for _, port, protocol in _served_ports(service.spec):
        yield from (Portal(ip, port.port, protocol) for ip in ips)


def _served_ports(spec: api.objects.ServiceSpec) -> Iterator[tuple[int, api.ServicePort, L4Protocol]]:
    """Yield the ports of *spec* whose protocol can be proxied, each with its index."""
    for index, port in enumerate(spec.ports or ()):
        if (protocol := _PROTOCOLS.get(port.protocol or "TCP")) is not None:
            yield index, port, protocol


def port_key(port: api.ServicePort) -> PortKey:
    return port.name or "", port.protocol or "TCP"


# ---- what a spec states, and what it needs


def stated_cluster_ips(spec: api.objects.ServiceSpec) -> list[tuple[str, str]]:
    """Return (field, IP as written) for each stated cluster IP, as many as *spec* has IP families (behaviours S5)."""
    if spec.cluster_ips:
        fields = [(f"spec.clusterIPs[{index}]", ip) for index, ip in enumerate(spec.cluster_ips)]
    else:
        fields = [("spec.clusterIP", spec.cluster_ip)] if spec.cluster_ip else []
    return fields[: len(spec.ip_families)] if spec.ip_families else fields


def is_headless(service: api.Service) -> bool:
    """Return whether *service* has a DNS name for each endpoint instead of a cluster IP."""
    spec = service.spec
    return spec is not None and "None" in (spec.cluster_ip, *(spec.cluster_ips or ())[:1])


def given_cluster_ips(service: api.Service) -> list[tuple[str, str]]:
    """Return (field, canonical IP) for each cluster IP that *service* states."""
    assert service.spec is not None
    return [(field, canonical_ip(ip, field)) for field, ip in stated_cluster_ips(service.spec)]


def has_node_ports(spec: api.objects.ServiceSpec) -> bool:
    """Return whether the type of *spec* has node ports; a change to another type frees them (behaviours S8)."""
    return spec.type in ("NodePort", "LoadBalancer")


def wants_node_ports(spec: api.objects.ServiceSpec) -> bool:
    """Return whether every port of *spec* needs a node port, stated or allocated (behaviours P6)."""
    return has_node_ports(spec) and not (
        spec.type == "LoadBalancer" and spec.allocate_load_balancer_node_ports is False
    )


def wants_load_balancer_ips(service: api.Service) -> bool:
    """Return whether load balancer IPs must be allocated for *service*.

    Not if it has a load balancer class or an ingress status: another load balancer is then responsible.
    """
    spec = service.spec
    return spec is not None and spec.type == "LoadBalancer" and not (spec.load_balancer_class or ingress(service))


def wants_health_check(spec: api.objects.ServiceSpec) -> bool:
    """Return whether *spec* has a health check port that reports its local endpoints (behaviours H1)."""
    return spec.type == "LoadBalancer" and spec.external_traffic_policy == "Local"


def affinity_timeout_s(spec: api.objects.ServiceSpec) -> int | None:
    if spec.session_affinity != "ClientIP":
        return None
    config = spec.session_affinity_config
    given = config.client_ip.timeout_seconds if config and config.client_ip else None
    return AFFINITY_TIMEOUT_S if given is None else given


def _source_ranges(
    spec: api.objects.ServiceSpec, families: Set[Family], load_balancer_ips: Iterable[str]
) -> tuple[tuple[str, ...], list[ConfigError]]:
    """Return the CIDRs that may dial the load balancer IPs, and their problems; no CIDRs if all clients may.

    If ranges are given but a family has none, no client of that family may dial: it gets a range that matches nothing.
    kube-proxy admits all clients of that family.
    """
    ranges, problems = _ranges_by_family(spec, families)
    if ranges is None:
        return (), []
    dialled = set(map(family_of, load_balancer_ips)) or (families if not any(ranges.values()) else set())
    for family in sorted(family for family in dialled if not ranges[family]):
        reason = f"no range is IPv{family}, so no client may dial the load balancer IPs of that family"
        fix = f"add one, such as {_ALL_CLIENTS[family]} for all clients"
        problems.append(ConfigError(reason, field="spec.loadBalancerSourceRanges", fix=fix))
    limited = {family: its for family, its in ranges.items() if not any(cidr.endswith("/0") for cidr in its)}
    return tuple(cidr for family, its in limited.items() for cidr in its or (_NO_CLIENT[family],)), problems


def _ranges_by_family(
    spec: api.objects.ServiceSpec, families: Set[Family]
) -> tuple[dict[Family, dict[str, None]] | None, list[ConfigError]]:
    """Return the source ranges of *spec* for each of *families*, and their problems; None if it has no ranges."""
    stated = enumerate(spec.load_balancer_source_ranges or () if spec.type == "LoadBalancer" else ())
    given = [(f"spec.loadBalancerSourceRanges[{index}]", cidr.strip()) for index, cidr in stated if cidr.strip()]
    problems = []
    ranges: dict[Family, dict[str, None]] = {family: {} for family in sorted(families)}
    for where, text in given:
        cidr = canonical_cidr(text, where)
        if (mapped := mapped_cidr(cidr)) is not None:
            reason = f"{text} is a range of IPv4 addresses written as IPv6, which no client is in"
            problems.append(ConfigError(reason, field=where, fix=f"write {mapped}"))
        elif family_of(cidr) in ranges:
            ranges[family_of(cidr)][cidr] = None
    return ranges if given else None, problems


def _ports_problems(spec: api.objects.ServiceSpec, source_ip: SourceIP) -> Iterator[ConfigError]:
    """Yield which ports of *spec* are not served, or not with *source_ip*."""
    others = "; the other ports are served" if len(spec.ports or ()) > 1 else ""
    for index, port in enumerate(spec.ports or ()):
        if (protocol := port.protocol or "TCP") not in _PROTOCOLS:
            yield ConfigError(
                f"{protocol!r} cannot be proxied, only TCP and UDP can",
                field=f"spec.ports[{index}].protocol",
                fix=f"remove the port, or serve it another way{others}",
            )
        elif not _knows(source_ip, protocol):
            yield ConfigError(
                f"PROXY protocol v1 knows no UDP, which port {port.port} is",
                field=SOURCE_IP_FIELD,
                fix="write proxy-protocol-v2; until then the node's default applies to this port",
            )


def _knows(source_ip: SourceIP, protocol: str) -> bool:
    """Return whether *protocol* can have the source address *source_ip*."""
    return source_ip is not SourceIP.PROXY_PROTOCOL_V1 or protocol == L4Protocol.TCP


def _external_ips(spec: api.objects.ServiceSpec) -> Iterator[tuple[int, str]]:
    given = enumerate(spec.external_ips or ())
    return ((index, canonical_ip(ip, f"spec.externalIPs[{index}]")) for index, ip in given if ip.strip())


def ingress(service: api.Service) -> list[api.objects.LoadBalancerIngress]:
    """Return the addresses at which load balancers publish *service*."""
    status = service.status.load_balancer if service.status else None
    return (status.ingress if status else None) or []


def _load_balancer_ips(service: api.Service) -> tuple[tuple[str, ...], list[ConfigError]]:
    """Return the load balancer IPs whose traffic arrives here, and the problems of the others.

    With ipMode Proxy the load balancer dials the nodes itself, and clients must go through it (behaviours P3).
    """
    found: dict[str, None] = {}
    problems = []
    assert service.spec is not None
    for index, item in enumerate(ingress(service) if service.spec.type == "LoadBalancer" else ()):
        if item.ip and item.ip.strip() and item.ip_mode in (None, "", "VIP"):
            errors = list(virtual_ip_errors(item.ip, f"status.loadBalancer.ingress[{index}].ip"))
            problems += errors
            if not errors:
                found[canonical_ip(item.ip)] = None
    return tuple(found), problems
