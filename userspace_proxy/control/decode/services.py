"""Checks that reject a whole Service, each with its field and how to fix it. Pure."""

import re
from collections.abc import Iterator

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import (
    as_number,
    canonical_cidr,
    canonical_ip,
    number_errors,
    virtual_ip_errors,
)
from userspace_proxy.control.decode.service_ports import affinity_timeout_s, is_headless, stated_cluster_ips
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import family_of

# Names the proxy that serves the Service instead of the default one (behaviours S2).
_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
AFFINITY_TIMEOUT_MAX_S = 86_400

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
_POLICIES = ("Cluster", "Local")
_FAMILIES = ("IPv4", "IPv6")


def is_proxied(service: api.Service, proxy_name: str = "") -> bool:
    """Return whether the proxy named *proxy_name* ("" for the default one) serves *service* (behaviours S1, S2)."""
    spec = service.spec
    if spec is None or spec.type == "ExternalName":
        return False
    is_for_this_proxy = (service.metadata.labels or {}).get(_PROXY_NAME_LABEL) == (proxy_name or None)
    return is_for_this_proxy and not is_headless(service)


def check_service(service: api.Service, proxy_name: str = "") -> None:
    """Raise the first error that rejects the whole *service*."""
    if error := next(service_errors(service, proxy_name), None):
        raise error


def service_errors(service: api.Service, proxy_name: str = "") -> Iterator[ConfigError]:
    """Yield every error that rejects the whole *service*."""
    metadata, spec = service.metadata, service.spec
    for field, name in (("metadata.name", metadata.name), ("metadata.namespace", metadata.namespace or "default")):
        if not _LABEL.fullmatch(name):
            yield ConfigError(f"{name!r} is not a valid name", field=field, fix=_as_label(name))
    if spec is None:
        yield ConfigError("the Service has no spec", fix="add spec.ports")
        return
    if spec.type is not None and spec.type not in _TYPES:
        fix = f"write one of {', '.join(_TYPES)}"
        yield ConfigError(f"{spec.type!r} is no Service type", field="spec.type", fix=fix)
    if not is_proxied(service, proxy_name):
        return
    if not spec.ports:
        fix = "add spec.ports, a list with at least one port"
        yield ConfigError("the Service has no ports", field="spec", fix=fix)
    yield from _ports_errors(spec.ports or [])
    yield from _affinity_errors(spec)
    yield from _cluster_ips_errors(spec)
    yield from _policy_errors(spec)
    yield from _outside_errors(spec)


def _outside_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    """Yield the errors in external IPs and source ranges; empty texts are skipped."""
    for index, ip in enumerate(spec.external_ips or ()):
        if ip.strip():
            yield from virtual_ip_errors(ip, f"spec.externalIPs[{index}]")
    for index, cidr in enumerate(spec.load_balancer_source_ranges or ()):
        try:
            if cidr.strip():  # without an invalid range all clients would be admitted
                canonical_cidr(cidr, f"spec.loadBalancerSourceRanges[{index}]")
        except ConfigError as error:
            yield error


def _policy_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    for field, given in (
        ("spec.internalTrafficPolicy", spec.internal_traffic_policy),
        ("spec.externalTrafficPolicy", spec.external_traffic_policy),
    ):
        if given and given not in _POLICIES:
            yield ConfigError(f"{given!r} is no traffic policy", field=field, fix="write Cluster or Local")
    if spec.health_check_node_port:
        yield from _health_check_errors(spec, spec.health_check_node_port)


def _health_check_errors(spec: api.objects.ServiceSpec, number: int) -> Iterator[ConfigError]:
    field = "spec.healthCheckNodePort"
    yield from number_errors(number, field)
    for index, port in enumerate(spec.ports or ()):
        if port.node_port == number and (port.protocol or "TCP") == "TCP":
            reason = f"{number} is already the node port of ports[{index}]"
            yield ConfigError(reason, field=field, fix="choose another one, or leave it out")


def _cluster_ips_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    fields = stated_cluster_ips(spec)
    for index, family in enumerate(spec.ip_families or ()):
        if family not in _FAMILIES:
            fix = f"write {' or '.join(_FAMILIES)}"
            yield ConfigError(f"{family!r} is no IP family", field=f"spec.ipFamilies[{index}]", fix=fix)
    both = [("spec.clusterIP", spec.cluster_ip)] if spec.cluster_ip and spec.cluster_ips else []
    if errors := [error for field, given in [*both, *fields] for error in virtual_ip_errors(given, field)]:
        yield from errors
        return
    yield from _families_errors(spec, [(field, canonical_ip(given)) for field, given in fields])
    if spec.cluster_ips and spec.cluster_ip and canonical_ip(spec.cluster_ip) != canonical_ip(spec.cluster_ips[0]):
        reason, fix = "is not the first of spec.clusterIPs", "write the same address in both, or leave one field out"
        yield ConfigError(f"{spec.cluster_ip} {reason}", field="spec.clusterIP", fix=fix)


def _families_errors(spec: api.objects.ServiceSpec, ips: list[tuple[str, str]]) -> Iterator[ConfigError]:
    """Yield which of *ips* (with their fields) repeats a family, or has another one than ipFamilies says."""
    families = [f"IPv{family_of(ip)}" for _, ip in ips]
    for index, (field, ip) in enumerate(ips):
        family = families[index]
        if family in families[:index]:
            yield ConfigError(f"{ip} is a second one of its family", field=field, fix="keep one for each family")
        stated = spec.ip_families[index] if spec.ip_families else family
        if stated != family and stated in _FAMILIES:
            fix = f"write {family}, or choose an address that is {stated}"
            yield ConfigError(f"{ip} is {family}", field=f"spec.ipFamilies[{index}]", fix=fix)
            break  # the other entry has the same cause


def _ports_errors(ports: list[api.ServicePort]) -> Iterator[ConfigError]:
    unnamed = [index for index, port in enumerate(ports) if not port.name]
    if unnamed and len(ports) > 1:
        reason = f"a Service with several ports must name each; {len(unnamed)} of {len(ports)} have no name"
        yield ConfigError(reason, field=f"spec.ports[{unnamed[0]}]", fix="add names, such as 'name: http'")
    first: dict[tuple[str, object], int] = {}
    for index, port in enumerate(ports):
        yield from _port_errors(port, port.protocol or "TCP", f"spec.ports[{index}]")
        for part, value, reason, fix in _unique_parts(port, port.protocol or "TCP"):
            if (other := first.setdefault((part, value), index)) != index:
                yield ConfigError(f"{reason} ports[{other}]", field=f"spec.ports[{index}].{part}", fix=fix)


def _unique_parts(port: api.ServicePort, protocol: str) -> Iterator[tuple[str, object, str, str]]:
    """Yield the parts of *port* that no other port has: field, value, and the reason and fix of a repetition."""
    if port.name:
        yield "name", port.name, f"the name {port.name!r} is already that of", "give each port a name of its own"
    yield "port", (port.port, protocol), f"{protocol} port {port.port} is already", "remove one of them"
    if port.node_port:
        reason = f"{protocol} node port {port.node_port} is already that of"
        yield "nodePort", (port.node_port, protocol), reason, "give each port a node port of its own"


def _port_errors(port: api.ServicePort, protocol: str, field: str) -> Iterator[ConfigError]:
    yield from number_errors(port.port, f"{field}.port")
    if (target := as_number(port.target_port)) is not None and port.target_port != 0:  # 0: the same as port
        yield from number_errors(target, f"{field}.targetPort")
    if port.node_port:
        yield from number_errors(port.node_port, f"{field}.nodePort")
    if protocol not in _PROTOCOLS:
        yield ConfigError(f"{protocol!r} is no protocol", field=f"{field}.protocol", fix="write TCP or UDP")
    if port.name and not _LABEL.fullmatch(port.name):
        yield ConfigError(f"{port.name!r} is not a valid name", field=f"{field}.name", fix=_as_label(port.name))


def _affinity_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    if spec.session_affinity not in (None, "", "None", "ClientIP"):
        reason = f"{spec.session_affinity!r} is no session affinity"
        yield ConfigError(reason, field="spec.sessionAffinity", fix="write ClientIP or None")
    timeout_s = affinity_timeout_s(spec)
    if timeout_s is not None and not 1 <= timeout_s <= AFFINITY_TIMEOUT_MAX_S:
        field, fix = "spec.sessionAffinityConfig.clientIP.timeoutSeconds", "write a number from 1 to"
        yield ConfigError(f"{timeout_s} s is out of range", field=field, fix=f"{fix} {AFFINITY_TIMEOUT_MAX_S}")


def _as_label(name: str) -> str:
    suggestion = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:63].strip("-")
    hint = f", such as {suggestion!r}" if suggestion else ""
    return f"use small letters, digits and '-', 63 at most, first and last no '-'{hint}"
