"""API structs -> model values. Pure; what makes no sense is refused with the field and the mend.

A ConfigError that is *raised* refuses the whole object; one that is *returned* is about one port, and the
object's other ports go on.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from userspace_proxy import api
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import Endpoint, without_duplicates
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
# Whoever sets these says which other proxy is to serve it, or that none is (behaviours S2, S3).
_PROXY_NAME_LABEL = "service.kubernetes.io/service-proxy-name"
_HEADLESS_LABEL = "service.kubernetes.io/headless"
_TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
_LEAVING_TAINT = "ToBeDeletedByClusterAutoscaler"
AFFINITY_TIMEOUT_S = 10_800
AFFINITY_TIMEOUT_MAX_S = 86_400

# A service's endpoints by what an EndpointSlice port is matched with: its name and protocol (behaviours S6).
PortKey = tuple[str, str]
EndpointsByPort = Mapping[PortKey, list[Endpoint]]

_LABEL = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]{1,9}")
_TYPES = ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName")
_PROTOCOLS = ("TCP", "UDP", "SCTP")
# Canonical addresses that the API refuses as those of Services and endpoints; a match is ten times cheaper than asking
# `ipaddress`.
_SPECIAL_IP = re.compile(
    r"(?P<unspecified>0\.0\.0\.0\Z|::\Z)|(?P<broadcast>255\.255\.255\.255\Z)|(?P<loopback>127\.|::1\Z)"
    r"|(?P<multicast>22[4-9]\.|23[0-9]\.|ff[0-9a-f]{2}:)|(?P<link_local>169\.254\.|fe[89ab][0-9a-f]:)"
)


# ---- Service


def is_proxied(service: api.Service, proxy_name: str = "") -> bool:
    """Return whether the proxy of *proxy_name* ("" for the one without a name) serves *service* (behaviours S1, S2)."""
    spec = service.spec
    if spec is None or spec.type == "ExternalName":
        return False
    if (service.metadata.labels or {}).get(_PROXY_NAME_LABEL) != (proxy_name or None):
        return False
    return "None" not in (spec.cluster_ip, *(spec.cluster_ips or ())[:1])


def check_service(service: api.Service, proxy_name: str = "") -> None:
    """Raise ConfigError for the first thing that makes *service* unusable as a whole."""
    if error := next(service_errors(service, proxy_name), None):
        raise error


def service_errors(service: api.Service, proxy_name: str = "") -> Iterator[ConfigError]:
    """Yield everything that makes *service* unusable as a whole."""
    name, spec = service.metadata.name, service.spec
    if not _LABEL.fullmatch(name):
        yield ConfigError(f"{name!r} is not a valid name", field="metadata.name", mend=_as_label(name))
    namespace = service.metadata.namespace
    if namespace and not _LABEL.fullmatch(namespace):
        yield ConfigError(f"{namespace!r} is not a valid name", field="metadata.namespace", mend=_as_label(namespace))
    if spec is None:
        yield ConfigError("the Service has no spec", mend="add spec.ports")
        return
    if spec.type is not None and spec.type not in _TYPES:
        yield ConfigError(
            f"{spec.type!r} is no Service type", field="spec.type", mend=f"write one of {', '.join(_TYPES)}"
        )
    if not is_proxied(service, proxy_name):
        return
    if not spec.ports:
        yield ConfigError(
            "the Service has no ports", field="spec", mend="add spec.ports, a list with at least one port"
        )
    yield from _ports_errors(spec.ports or [])
    yield from _affinity_errors(spec)
    yield from _cluster_ips_errors(spec)
    for index, ip in enumerate(spec.external_ips or ()):
        yield from virtual_ip_errors(ip, f"spec.externalIPs[{index}]")


def _cluster_ips_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    fields = _cluster_ip_fields(spec)
    both = [("spec.clusterIP", spec.cluster_ip)] if spec.cluster_ip and spec.cluster_ips else []
    if errors := [error for field, given in [*both, *fields] for error in virtual_ip_errors(given, field)]:
        yield from errors
        return
    families: set[bool] = set()
    for field, given in fields:
        ip = canonical_ip(given)
        if (":" in ip) in families:
            yield ConfigError(f"{ip} is a second one of its family", field=field, mend="keep one a family")
        families.add(":" in ip)
    if spec.cluster_ips and spec.cluster_ip and canonical_ip(spec.cluster_ip) != canonical_ip(spec.cluster_ips[0]):
        yield ConfigError(
            f"{spec.cluster_ip} is not the first of spec.clusterIPs",
            field="spec.clusterIP",
            mend="write the same address in both, or leave one field out",
        )


def _ports_errors(ports: list[api.ServicePort]) -> Iterator[ConfigError]:
    names: dict[str, int] = {}
    numbers: dict[tuple[int, str], int] = {}
    node_ports: dict[tuple[int, str], int] = {}
    for index, port in enumerate(ports):
        field = f"spec.ports[{index}]"
        yield from number_errors(port.port, f"{field}.port")
        if (target := _as_number(port.target_port)) is not None and port.target_port != 0:  # 0: the same as port
            yield from number_errors(target, f"{field}.targetPort")
        if port.node_port:
            yield from number_errors(port.node_port, f"{field}.nodePort")
        protocol = port.protocol or "TCP"
        if protocol not in _PROTOCOLS:
            yield ConfigError(f"{protocol!r} is no protocol", field=f"{field}.protocol", mend="write TCP or UDP")
        if len(ports) > 1 and not port.name:
            yield ConfigError(
                "a Service with several ports must name each", field=field, mend="add a name, such as 'name: http'"
            )
        if port.name:
            if not _LABEL.fullmatch(port.name):
                yield ConfigError(
                    f"{port.name!r} is not a valid name", field=f"{field}.name", mend=_as_label(port.name)
                )
            if (first := names.setdefault(port.name, index)) != index:
                yield ConfigError(
                    f"the name {port.name!r} is already that of ports[{first}]",
                    field=f"{field}.name",
                    mend="give each port a name of its own",
                )
        if (first := numbers.setdefault((port.port, protocol), index)) != index:
            yield ConfigError(
                f"{protocol} port {port.port} is already ports[{first}]",
                field=f"{field}.port",
                mend="remove one of them",
            )
        if port.node_port and (first := node_ports.setdefault((port.node_port, protocol), index)) != index:
            yield ConfigError(
                f"{protocol} node port {port.node_port} is already that of ports[{first}]",
                field=f"{field}.nodePort",
                mend="give each port a node port of its own",
            )


def _as_number(target: int | str | None) -> int | None:
    """Return a targetPort that is a number, in quotes or not; None for a name, and where there is none."""
    if isinstance(target, str):
        return int(target) if _NUMBER.fullmatch(target) else None
    return target


def _is_port(port: int | None) -> bool:
    return port is not None and 1 <= port <= 65_535


def number_errors(port: int, field: str) -> Iterator[ConfigError]:
    """Yield why *port* is no port number, if it is none."""
    if not _is_port(port):
        yield ConfigError(f"{port} is not a port", field=field, mend="write a number from 1 to 65535")


def _affinity_errors(spec: api.objects.ServiceSpec) -> Iterator[ConfigError]:
    if spec.session_affinity not in (None, "", "None", "ClientIP"):
        yield ConfigError(
            f"{spec.session_affinity!r} is no session affinity",
            field="spec.sessionAffinity",
            mend="write ClientIP or None",
        )
    timeout_s = _affinity_timeout_s(spec)
    if timeout_s is not None and not 1 <= timeout_s <= AFFINITY_TIMEOUT_MAX_S:
        yield ConfigError(
            f"{timeout_s} s is out of range",
            field="spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            mend=f"write a number from 1 to {AFFINITY_TIMEOUT_MAX_S}",
        )


def _affinity_timeout_s(spec: api.objects.ServiceSpec) -> int | None:
    if spec.session_affinity != "ClientIP":
        return None
    config = spec.session_affinity_config
    given = config.client_ip.timeout_seconds if config and config.client_ip else None
    return AFFINITY_TIMEOUT_S if given is None else given


def _cluster_ip_fields(spec: api.objects.ServiceSpec) -> list[tuple[str, str]]:
    if spec.cluster_ips:
        return [(f"spec.clusterIPs[{index}]", ip) for index, ip in enumerate(spec.cluster_ips)]
    return [("spec.clusterIP", spec.cluster_ip)] if spec.cluster_ip else []


def given_cluster_ips(service: api.Service) -> list[tuple[str, str]]:
    """Return (field, canonical IP) for each cluster IP that *service* states."""
    assert service.spec is not None
    return [(field, canonical_ip(ip, field)) for field, ip in _cluster_ip_fields(service.spec)]


def canonical_ip(ip: str, field: str = "") -> str:
    """Return *ip* in canonical form; zeros in front are read as decimal, as older manifests write them.

    An IPv4 address written as IPv6 (``::ffff:10.96.0.10``) is the IPv4 address, as it is for Kubernetes. A zone
    (``fe80::1%eth0``) is refused: it means something on one host only, and no rule could match it.

    Raises:
        ConfigError: it is no IP address.
    """
    try:
        socket.inet_pton(socket.AF_INET, ip)
    except (OSError, ValueError):
        pass
    else:
        return ip  # it takes canonical IPv4 only, and is fifteen times faster than what follows
    text = ip.strip()
    if "." in text and ":" not in text:
        text = ".".join(part.lstrip("0") or part[:1] for part in text.split("."))
    if "%" in text:
        raise ConfigError(f"{ip!r} has a zone", field=field, mend="write the address alone")
    try:
        address = ipaddress.ip_address(text)
        return str((address.ipv4_mapped if address.version == 6 else None) or address)
    except ValueError:
        if ip.strip().lower() == "none":
            raise ConfigError(
                f"{ip!r} is no IP address", field=field, mend="a headless Service has 'None', with a capital N"
            ) from None
        raise ConfigError(
            f"{ip!r} is no IP address", field=field, mend="write one such as 10.96.0.10, or leave it out"
        ) from None


def virtual_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield why *ip* is no address that a Service can have for its own, if it is none."""
    try:
        special = _SPECIAL_IP.match(canonical_ip(ip, field))
    except ConfigError as error:
        yield error
        return
    if special:
        yield ConfigError(
            f"{ip!r} is {_named(special)}, which no Service can have", field=field, mend="choose one such as 10.96.0.10"
        )


def backend_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield why *ip* is no address of a backend, if it is none."""
    mend = "write the backend's address, such as 10.244.0.2"
    try:
        special = _no_backend(canonical_ip(ip, field))
    except ConfigError as error:
        is_name = ":" not in ip and any(letter.isalpha() for letter in ip)
        mend = f"{mend}; names are not resolved" if is_name else mend
        yield ConfigError(error.reason, field=field, mend=mend)
        return
    if special:
        yield ConfigError(f"{ip!r} is {_named(special)}, which no backend can have", field=field, mend=mend)


def _no_backend(ip: str) -> re.Match[str] | None:
    """Return why the canonical *ip* is none of a backend.

    The API refuses loopback addresses, too. Here they are allowed: who tries a proxy on one host with manifests of
    his own has his backends there.
    """
    special = _SPECIAL_IP.match(ip)
    return None if special and special.lastgroup == "loopback" else special


def _named(special: re.Match[str]) -> str:
    name = (special.lastgroup or "").replace("_", "-")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} address"


def service_ports(
    name: NamespacedName, service: api.Service, cluster_ips: tuple[str, ...]
) -> tuple[dict[int, ServicePort], list[ConfigError]]:
    """Return the ports of a checked *service* by their index in ``spec.ports``, and what is wrong with the others."""
    spec = service.spec
    assert spec is not None
    found: dict[int, ServicePort] = {}
    problems = []
    external = tuple(canonical_ip(ip) for ip in spec.external_ips or ())
    has_node_ports = spec.type in ("NodePort", "LoadBalancer")  # another type frees them at once (behaviours S8)
    for index, port in enumerate(spec.ports or ()):
        protocol = port.protocol or "TCP"
        if protocol not in L4Protocol.__members__:
            problems.append(
                ConfigError(
                    f"{protocol!r} cannot be proxied, only TCP and UDP can",
                    field=f"spec.ports[{index}].protocol",
                    mend="remove the port, or serve it another way"
                    + ("; the other ports are served" if len(spec.ports or ()) > 1 else ""),
                )
            )
            continue
        found[index] = ServicePort(
            name=ServicePortName(name, port.name or "", L4Protocol(protocol)),
            port=port.port,
            cluster_ips=cluster_ips,
            node_port=(port.node_port or 0) if has_node_ports else 0,
            external_ips=external,
            affinity_timeout_s=_affinity_timeout_s(spec),
        )
    return found, problems


def _as_label(name: str) -> str:
    suggestion = re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-")[:63].strip("-")
    hint = f", such as {suggestion!r}" if suggestion else ""
    return f"use small letters, digits and '-', 63 at most, first and last no '-'{hint}"


def trigger_time(piece: api.EndpointSlice) -> float | None:
    """Return when the change happened that made the controller write *piece*: wall-clock seconds; None if unknown."""
    try:
        return datetime.fromisoformat((piece.metadata.annotations or {})[_TRIGGER_TIME]).timestamp()
    except (KeyError, ValueError):
        return None


# ---- Node


def is_eligible(node: api.Node | None) -> bool:
    """Return whether load balancers may send traffic to *node*: it is known and not about to go (behaviours Z2)."""
    if node is None:
        return False
    taints = (node.spec.taints if node.spec else None) or ()
    return node.metadata.deletion_timestamp is None and all(taint.key != _LEAVING_TAINT for taint in taints)


# ---- endpoints, as EndpointSlice, Endpoints and Pod state them


def service_of(piece: api.EndpointSlice, namespace: str) -> NamespacedName | None:
    """Return the Service that an EndpointSlice belongs to; None where it says none, or is not for proxies (S3, S4)."""
    labels = piece.metadata.labels or {}
    name = labels.get(SERVICE_NAME_LABEL)
    return NamespacedName(namespace, name) if name and _HEADLESS_LABEL not in labels else None


def from_slices(slices: Iterable[api.EndpointSlice]) -> EndpointsByPort:
    """Return the endpoints of one Service's *slices*; what is incomplete is passed over (behaviours S4, S6)."""
    found: dict[PortKey, list[Endpoint]] = defaultdict(list)
    for piece in slices:
        if piece.address_type not in ("IPv4", "IPv6"):
            continue
        for port in piece.ports or ():
            if port.port is None or not _is_port(port.port):
                continue
            endpoints = found[port.name or "", port.protocol or "TCP"]
            for item in piece.endpoints or ():
                ip = _ip_or_none(item.addresses[0]) if item.addresses else None
                if ip is None:
                    continue
                conditions = item.conditions
                endpoints.append(
                    Endpoint(
                        ip=ip,
                        port=port.port,
                        ready=conditions is None or conditions.ready is not False,
                        serving=conditions is None or conditions.serving is not False,
                        terminating=conditions is not None and conditions.terminating is True,
                        node_name=item.node_name,
                    )
                )
    return found


def from_endpoints(given: api.Endpoints) -> EndpointsByPort:
    """Return the endpoints of an Endpoints object, the older form of EndpointSlices."""
    found: dict[PortKey, list[Endpoint]] = defaultdict(list)
    for subset in given.subsets or ():
        for port in subset.ports or ():
            endpoints = found[port.name or "", port.protocol or "TCP"]
            for addresses, ready in ((subset.addresses, True), (subset.not_ready_addresses, False)):
                for address in addresses or ():
                    ip = _ip_or_none(address.ip)
                    if port.port is not None and _is_port(port.port) and ip is not None:
                        endpoints.append(Endpoint(ip, port.port, ready, ready, node_name=address.node_name))
    return found


def from_pods(service: api.Service, pods: Iterable[api.Pod]) -> EndpointsByPort:
    """Return the endpoints that the endpoints controller would make of the *pods* that *service* selects."""
    spec = service.spec
    assert spec is not None
    found: dict[PortKey, list[Endpoint]] = defaultdict(list)
    for pod in pods:
        ips = pod_ips(pod)
        if not ips or (pod.status and pod.status.phase in ("Succeeded", "Failed")):
            continue
        answers = is_ready(pod)
        terminating = pod.metadata.deletion_timestamp is not None
        ready = (answers and not terminating) or bool(spec.publish_not_ready_addresses)
        for port in spec.ports or ():
            number = target_port(port, pod)
            if number is None:
                continue
            endpoints = found[port.name or "", port.protocol or "TCP"]
            node = pod.spec.node_name if pod.spec else None
            endpoints.extend(Endpoint(ip, number, ready, answers or ready, terminating, node) for ip in ips)
    return found


def pod_ips(pod: api.Pod) -> list[str]:
    """Return the addresses of *pod*, one a family; none while it has no status."""
    status = pod.status
    if status is None:
        return []
    given = [item.ip for item in status.pod_ips or () if item.ip] or ([status.pod_ip] if status.pod_ip else [])
    return [ip for ip in map(_ip_or_none, given) if ip is not None]


def is_ready(pod: api.Pod) -> bool:
    """Return whether *pod* has the condition Ready; one that states no conditions at all is taken to be.

    A kubelet always states conditions; a manifest written by hand that gives a podIP means "it is there".
    """
    conditions = pod.status.conditions if pod.status else None
    if conditions is None:
        return True
    return any(c.type == "Ready" and c.status == "True" for c in conditions)


def target_port(port: api.ServicePort, pod: api.Pod) -> int | None:
    """Return the number of *port*'s target in *pod*; None when it names a port that the pod does not have."""
    wanted = port.target_port
    if wanted is None or wanted in (0, ""):
        return port.port
    if (number := _as_number(wanted)) is not None:
        return number
    for offered in offered_ports(pod):
        same = offered.name == wanted and (offered.protocol or "TCP") == (port.protocol or "TCP")
        if same and _is_port(offered.container_port):
            return offered.container_port
    return None


def offered_ports(pod: api.Pod) -> list[api.objects.ContainerPort]:
    """Return the ports that the containers of *pod* name."""
    spec = pod.spec
    if spec is None:
        return []
    # Of the init containers only sidecars (restartPolicy: Always) are there when traffic comes.
    sidecars = [c for c in spec.init_containers or () if c.restart_policy == "Always"]
    return [port for container in [*(spec.containers or ()), *sidecars] for port in container.ports or ()]


def endpoints_of(service_port: ServicePort, sources: Iterable[EndpointsByPort]) -> tuple[Endpoint, ...]:
    """Return the endpoints of *service_port* out of *sources*: same port name and protocol, each address once.

    Only families that the Service itself has: a dual-stack pod is one endpoint of a single-stack Service.
    """
    families = {":" in ip for ip in service_port.cluster_ips}
    key = (service_port.name.port_name, str(service_port.name.protocol))
    return without_duplicates([e for found in sources for e in found.get(key, ()) if (":" in e.ip) in families])


def _ip_or_none(ip: str) -> str | None:
    """Return *ip* in canonical form; None where it is none that a backend can have."""
    try:
        canonical = canonical_ip(ip)
    except ConfigError:
        return None
    return None if _no_backend(canonical) else canonical
