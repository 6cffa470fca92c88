"""Decodes the names and addresses that cluster DNS publishes for a Service. Pure; incomplete entries are skipped."""

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import backend_ip, is_port
from userspace_proxy.control.decode.endpoints import has_ended, is_ready, pod_ips, target_port
from userspace_proxy.control.decode.service_ports import stated_cluster_ips
from userspace_proxy.model.dns_names import DnsHost, HostGroup, NamedPort, ServiceNames
from userspace_proxy.model.endpoint import family_of

# Also names that are no host names, such as those with an underscore, are published.
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}")

_Groups = dict[tuple[NamedPort, ...], dict[DnsHost, None]]


def external_name(service: api.Service) -> str:
    """Return the name that *service* stands for, without a final dot; "" if it has none."""
    spec = service.spec
    name = (spec.external_name or "").rstrip(".") if spec is not None and spec.type == "ExternalName" else ""
    return name if all(map(_LABEL.fullmatch, name.split("."))) else ""


def valid_cluster_ips(service: api.Service) -> tuple[str, ...]:
    """Return the cluster IPs that *service* states, without invalid ones."""
    stated = stated_cluster_ips(service.spec) if service.spec else []
    return tuple(ip for _, given in stated if (ip := backend_ip(given)) is not None)


def cluster_ip_names(service: api.Service, cluster_ips: tuple[str, ...]) -> ServiceNames:
    ports = service.spec.ports if service.spec else None
    return ServiceNames(cluster_ips, _named_ports((port.name, port.protocol, port.port) for port in ports or ()))


def headless_names(
    service: api.Service,
    pods: Sequence[api.Pod],
    slices: Iterable[api.EndpointSlice],
    endpoints: api.Endpoints | None,
) -> ServiceNames:
    """Return the names of the headless *service*: from its *pods*, or else from its *slices* and *endpoints*.

    An endpoint counts if it is ready, or if the Service publishes addresses that are not.
    """
    spec = service.spec
    publishes_all = spec is not None and bool(spec.publish_not_ready_addresses)
    groups: _Groups = defaultdict(dict)
    if pods:
        _add_pods(groups, service, pods, publishes_all=publishes_all)
    else:
        for piece in slices:
            _add_slice(groups, piece, publishes_all=publishes_all)
        for subset in (endpoints.subsets if endpoints else None) or ():
            _add_subset(groups, subset, publishes_all=publishes_all)
    return ServiceNames(groups=tuple(HostGroup(ports, tuple(hosts)) for ports, hosts in groups.items() if hosts))


def _add_slice(groups: _Groups, piece: api.EndpointSlice, *, publishes_all: bool) -> None:
    if piece.address_type not in ("IPv4", "IPv6"):
        return
    hosts = groups[_ports_of(piece.ports)]
    for item in piece.endpoints or ():
        ready = item.conditions is None or item.conditions.ready is not False
        if item.addresses and (ready or publishes_all):
            _add(hosts, item.hostname, item.addresses[0])


def _add_subset(groups: _Groups, subset: api.objects.EndpointSubset, *, publishes_all: bool) -> None:
    unready = subset.not_ready_addresses if publishes_all else None
    for address in (*(subset.addresses or ()), *(unready or ())):
        _add(groups[_ports_of(subset.ports)], address.hostname, address.ip)


def _ports_of(ports: Sequence[api.objects.EndpointPort] | None) -> tuple[NamedPort, ...]:
    return _named_ports((port.name, port.protocol, port.port) for port in ports or ())


def _add_pods(groups: _Groups, service: api.Service, pods: Iterable[api.Pod], *, publishes_all: bool) -> None:
    spec = service.spec
    assert spec is not None
    for pod in pods:
        if has_ended(pod) or not (publishes_all or _takes_traffic(pod)):
            continue
        ports = _named_ports((port.name, port.protocol, target_port(port, pod)) for port in spec.ports or ())
        for ip in _of_families(spec, pod_ips(pod)):
            _add(groups[ports], _hostname(service, pod), ip)


def _takes_traffic(pod: api.Pod) -> bool:
    return is_ready(pod) and pod.metadata.deletion_timestamp is None


def _hostname(service: api.Service, pod: api.Pod) -> str | None:
    """Return the hostname of *pod*, which the endpoints controller gives only below the pod's subdomain."""
    is_below = pod.spec is not None and pod.spec.subdomain == service.metadata.name
    return pod.spec.hostname if pod.spec is not None and is_below else None


def _of_families(spec: api.objects.ServiceSpec, ips: list[str]) -> list[str]:
    """Return those of a pod's *ips* that a Service has: without families of its own, the pod's first."""
    if spec.ip_family_policy in ("PreferDualStack", "RequireDualStack"):
        return ips
    if not spec.ip_families:
        return ips[:1]
    return [ip for ip in ips if f"IPv{family_of(ip)}" in spec.ip_families]


def _add(hosts: dict[DnsHost, None], hostname: str | None, given: str) -> None:
    if (ip := backend_ip(given)) is not None:
        is_name = hostname is not None and _LABEL.fullmatch(hostname)
        hosts[DnsHost(hostname if hostname and is_name else dashed(ip), ip)] = None


def dashed(ip: str) -> str:
    """Return the hostname of an endpoint that has none of its own: its address with dashes, as in CoreDNS."""
    return ip.replace(".", "-").replace(":", "-")


def _named_ports(given: Iterable[tuple[str | None, str | None, int | None]]) -> tuple[NamedPort, ...]:
    return tuple(
        NamedPort(name, protocol or "TCP", number)
        for name, protocol, number in given
        if name and number is not None and is_port(number)
    )
