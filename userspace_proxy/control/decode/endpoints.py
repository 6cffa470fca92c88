"""Decodes EndpointSlices, Endpoints and Pods into endpoints. Pure; incomplete entries are skipped."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from functools import lru_cache, partial

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import as_number, backend_ip, is_port
from userspace_proxy.control.decode.service_ports import PortKey, port_key
from userspace_proxy.model.endpoint import Endpoint, without_duplicates
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.service import ServicePort

SERVICE_NAME_LABEL = "kubernetes.io/service-name"
# Slices with this label are not for proxies (behaviours S3).
_HEADLESS_LABEL = "service.kubernetes.io/headless"
_TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"

_NO_CONDITIONS, _NO_HINTS = api.objects.EndpointConditions(), api.objects.EndpointHints()

# The endpoints of one Service.
EndpointsByPort = Mapping[PortKey, list[Endpoint]]


def trigger_time(piece: api.EndpointSlice) -> float | None:
    """Return the wall-clock second of the change that made the controller write *piece*, or None if unknown."""
    try:
        return datetime.fromisoformat((piece.metadata.annotations or {})[_TRIGGER_TIME]).timestamp()
    except (KeyError, ValueError):
        return None


def service_of(piece: api.EndpointSlice, namespace: str) -> NamespacedName | None:
    """Return the Service of *piece*, or None if it names none (behaviours S4)."""
    name = (piece.metadata.labels or {}).get(SERVICE_NAME_LABEL)
    return NamespacedName(namespace, name) if name else None


def from_slices(slices: Iterable[api.EndpointSlice]) -> EndpointsByPort:
    """Return the endpoints of one Service's *slices* for proxies, without incomplete entries (behaviours S3-S6)."""
    return _by_port((piece.ports, partial(_slice_endpoints, piece)) for piece in filter(_is_for_proxies, slices))


def _by_port(
    parts: Iterable[tuple[Sequence[api.objects.EndpointPort] | None, Callable[[int], Iterable[Endpoint]]]],
) -> EndpointsByPort:
    """Return the endpoints of *parts*: their ports, and a function that returns their endpoints at a port."""
    found: dict[PortKey, list[Endpoint]] = defaultdict(list)
    for ports, endpoints_at in parts:
        for port in ports or ():
            if port.port is not None and is_port(port.port):
                found[port.name or "", port.protocol or "TCP"].extend(endpoints_at(port.port))
    return found


def _is_for_proxies(piece: api.EndpointSlice) -> bool:
    return piece.address_type in ("IPv4", "IPv6") and _HEADLESS_LABEL not in (piece.metadata.labels or {})


def _slice_endpoints(piece: api.EndpointSlice, port: int) -> Iterator[Endpoint]:
    for item in piece.endpoints or ():
        ip = backend_ip(item.addresses[0]) if item.addresses else None
        if ip is None:
            continue
        conditions, hints = item.conditions or _NO_CONDITIONS, item.hints or _NO_HINTS
        yield Endpoint(
            ip=ip,
            port=port,
            ready=conditions.ready is not False,
            serving=conditions.serving is not False,
            terminating=conditions.terminating is True,
            node_name=item.node_name,
            zone_hints=_named(hints.for_zones),
            node_hints=_named(hints.for_nodes),
        )


def _named(hints: Sequence[api.objects.Hint] | None) -> tuple[str, ...]:
    return _shared(tuple(hint.name for hint in hints if hint.name)) if hints else ()


@lru_cache(maxsize=1024)
def _shared(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the tuple that equal calls share: a zone may have 100,000 endpoints."""
    return names


def from_endpoints(given: api.Endpoints) -> EndpointsByPort:
    """Return the endpoints of an Endpoints object, the older form of EndpointSlices."""
    return _by_port((subset.ports, partial(_subset_endpoints, subset)) for subset in given.subsets or ())


def _subset_endpoints(subset: api.objects.EndpointSubset, port: int) -> Iterator[Endpoint]:
    for addresses, ready in ((subset.addresses, True), (subset.not_ready_addresses, False)):
        for address in addresses or ():
            if (ip := backend_ip(address.ip)) is not None:
                yield Endpoint(ip, port, ready, ready, node_name=address.node_name)


def from_pods(service: api.Service, pods: Iterable[api.Pod]) -> EndpointsByPort:
    """Return the endpoints that Kubernetes' endpoints controller would derive from the selected *pods*."""
    spec = service.spec
    assert spec is not None
    found: dict[PortKey, list[Endpoint]] = defaultdict(list)
    for pod in pods:
        endpoints = list(_pod_endpoints(pod, publishes_all=bool(spec.publish_not_ready_addresses)))
        for port in spec.ports or () if endpoints else ():
            if (number := target_port(port, pod)) is not None:
                found[port_key(port)] += [replace(endpoint, port=number) for endpoint in endpoints]
    return found


def _pod_endpoints(pod: api.Pod, *, publishes_all: bool) -> Iterator[Endpoint]:
    """Yield an endpoint for each address of *pod*, without a port; none if the pod has ended."""
    answers, terminating = is_ready(pod), pod.metadata.deletion_timestamp is not None
    ready = (answers and not terminating) or publishes_all
    node = pod.spec.node_name if pod.spec else None
    for ip in pod_ips(pod) if not has_ended(pod) else ():
        yield Endpoint(ip, 0, ready, answers or ready, terminating, node)


def has_ended(pod: api.Pod) -> bool:
    """Return whether the containers of *pod* have ended for good."""
    return pod.status is not None and pod.status.phase in ("Succeeded", "Failed")


def pod_ips(pod: api.Pod) -> list[str]:
    """Return the addresses of *pod*, one for each IP family; none if it has no status yet."""
    status = pod.status
    if status is None:
        return []
    given = [item.ip for item in status.pod_ips or () if item.ip] or ([status.pod_ip] if status.pod_ip else [])
    return [ip for ip in map(backend_ip, given) if ip is not None]


def is_ready(pod: api.Pod) -> bool:
    """Return whether *pod* is Ready; a pod without any conditions counts as ready.

    A kubelet always sets conditions. A manifest written by hand that gives only a podIP means that the pod is running.
    """
    conditions = pod.status.conditions if pod.status else None
    if conditions is None:
        return True
    return any(c.type == "Ready" and c.status == "True" for c in conditions)


def target_port(port: api.ServicePort, pod: api.Pod) -> int | None:
    """Return the port number that *port* targets in *pod*, or None if the pod has no port of that name."""
    wanted = port.target_port
    if wanted is None or wanted in (0, ""):
        return port.port
    if (number := as_number(wanted)) is not None:
        return number
    for offered in offered_ports(pod):
        same = offered.name == wanted and (offered.protocol or "TCP") == (port.protocol or "TCP")
        if same and is_port(offered.container_port):
            return offered.container_port
    return None


def offered_ports(pod: api.Pod) -> list[api.objects.ContainerPort]:
    """Return the ports that the containers of *pod* name."""
    spec = pod.spec
    if spec is None:
        return []
    # Of the init containers, only sidecars (restartPolicy: Always) still run when traffic arrives.
    sidecars = [c for c in spec.init_containers or () if c.restart_policy == "Always"]
    return [port for container in [*(spec.containers or ()), *sidecars] for port in container.ports or ()]


def endpoints_of(service_port: ServicePort, sources: Iterable[EndpointsByPort]) -> tuple[Endpoint, ...]:
    """Return the endpoints in *sources* for *service_port*: same port name and protocol, without duplicates.

    Only IP families of the Service count: a dual-stack pod is one endpoint of a single-stack Service.
    """
    families = {":" in ip for ip in service_port.cluster_ips}
    key = (service_port.name.port_name, str(service_port.name.protocol))
    return without_duplicates([e for found in sources for e in found.get(key, ()) if (":" in e.ip) in families])
