"""Explains why clients of a Service would be refused: it has no usable endpoint. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice, product

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.lint.index import Index
from userspace_proxy.control.lint.single import pod_ip_fields
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import usable_endpoints
from userspace_proxy.sources.documents import Manifest

_CANDIDATES_MAX = 500
_SHOWN_MAX = 5
_LEADER = "control-plane.alpha.kubernetes.io/leader"
# From this similarity on, a label of a selector counts as misspelt: prometheus is not prometheus-adapter.
_LIKE = 0.8
REFUSED = "clients are refused"
_NO_PORTS = 1

# Index in spec.ports -> the port and its endpoints.
PortEndpoints = Mapping[int, tuple[ServicePort, tuple[Endpoint, ...]]]
Errors = Iterator[tuple[Manifest, ConfigError]]


def endpoints_of(
    index: Index, name: NamespacedName, service: api.Service, ports: Mapping[int, ServicePort]
) -> PortEndpoints:
    """Return the endpoints of each of *ports* of *service*, as the tracker finds them."""
    selector = service.spec.selector if service.spec else None
    if selector and (pods := index.selected(name.namespace, selector)):
        sources = [decode.from_pods(service, pods)]
    else:
        pieces = [manifest.object for manifest in index.pieces.get(name, ())]
        sources = [
            decode.from_slices([piece for piece in pieces if isinstance(piece, api.EndpointSlice)]),
            *(decode.from_endpoints(piece) for piece in pieces if isinstance(piece, api.Endpoints)),
        ]
    return {at: (port, decode.endpoints_of(port, sources)) for at, port in ports.items()}


def refusals(index: Index, manifest: Manifest, service: api.Service, ports: PortEndpoints) -> Errors:
    """Yield why clients of some of *ports* of *service* would be refused."""
    assert service.spec is not None
    pieces = index.pieces.get(manifest.name, ())
    selector = service.spec.selector
    pods = index.selected(manifest.name.namespace, selector) if selector else []
    templates = index.selected(manifest.name.namespace, selector, templates=True) if selector else []
    if selector:
        yield from ((manifest, error) for error in _target_ports_errors(service.spec, pods or templates))
    if pods:
        if error := _pods_error(service, pods, ports):
            yield manifest, error
    elif pieces:
        yield from _pieces_errors(manifest, service, pieces, ports) if ports else ()
    elif selector:
        yield manifest, _no_pods(index, manifest.name, selector, templates)
    elif decode.dns_target(service) is None:
        fix = f"add a selector, or an EndpointSlice or Endpoints for {manifest.name.name!r}"
        yield manifest, ConfigError("it has no selector, and nothing here gives it endpoints", field="spec", fix=fix)


# ---- Pods


def _pods_error(service: api.Service, pods: Sequence[api.Pod], ports: PortEndpoints) -> ConfigError | None:
    """Return why none of *pods* is a usable endpoint of any of *ports*, or None if that is named elsewhere."""
    field = "spec.selector"
    if not ports or any(usable_endpoints(endpoints) for _, endpoints in ports.values()):
        return None
    if not any(pod_ip_fields(pod) for pod in pods):
        which = f"Pod {pods[0].metadata.name}" if len(pods) == 1 else f"any of the {len(pods)} Pods it selects"
        fix = "add status.podIP to the Pod, as 'kubectl get pod -o yaml' shows it"
        return Note(f"no address is known of {which}", field=field, fix=fix)  # a cluster would give it one
    count = f"{len(pods)} Pods it selects"
    if any(endpoints for _, endpoints in ports.values()):
        names = f"none of the {count} is ready" if len(pods) > 1 else "the Pod it selects is not ready"
        fix = "see status.conditions there, or set publishNotReadyAddresses"
        return ConfigError(f"{REFUSED}: {names}", field=field, fix=fix)
    if all(pod.status and pod.status.phase in ("Succeeded", "Failed") for pod in pods):
        which = f"each of the {count}" if len(pods) > 1 else "the Pod it selects"
        return ConfigError(f"{REFUSED}: {which} has ended", field=field, fix="add Pods that run")
    spec_ports = (service.spec.ports if service.spec else None) or ()
    lacks_port = any(decode.target_port(port, pod) is None for port in spec_ports for pod in pods)
    is_named = lacks_port or not any(decode.pod_ips(pod) for pod in pods)  # at the port or the address
    return None if is_named else _other_family(ports, field)


def _families(ports: PortEndpoints) -> set[str]:
    return {"IPv6" if ":" in ip else "IPv4" for port, _ in ports.values() for ip in port.cluster_ips}


def _other_family(ports: PortEndpoints, field: str) -> ConfigError:
    reason = f"{REFUSED}: the Service is {' and '.join(sorted(_families(ports)))} alone, and its endpoints are not"
    return ConfigError(reason, field=field, fix="give both one family (spec.ipFamilies, clusterIPs)")


def _no_pods(
    index: Index, name: NamespacedName, selector: Mapping[str, str], templates: Sequence[api.Pod]
) -> ConfigError:
    """Return that *selector* matches no Pod, with the fix that the Pods and templates here suggest."""
    reason = f"the selector {', '.join(f'{key}={value}' for key, value in selector.items())} matches no Pod here"
    field = "spec.selector"
    if templates:
        reason += f"; the template of {templates[0].metadata.name} has these labels, but a proxy makes no Pods of it"
        reason += " (the command lab does)"
        fix = f"add the Pods, as 'kubectl get pods -o yaml' shows them, or Endpoints named {name.name!r}"
        return Note(reason, field=field, fix=fix)
    for namespace, is_template in product(islice(index.namespaces(), _CANDIDATES_MAX), (False, True)):
        if pods := index.selected(namespace, selector, templates=is_template):
            reason += f"; {pods[0].metadata.name} in namespace {namespace!r} has these labels"
            return ConfigError(reason, field=field, fix="put both into one namespace")
    held = list(islice(index.pods_in(name.namespace), _CANDIDATES_MAX))
    has_pods = any(manifest.kind == "Pod" for manifest, _ in held)
    fix = "add Pods with these labels, or correct the selector"
    for key, value in selector.items():
        others = {label: text for label, text in selector.items() if label != key}.items()
        near = [labels for _, pod in held if (labels := pod.metadata.labels or {}) and others <= labels.items()]
        values = {labels[key] for labels in near if key in labels}
        if not has_pods:  # a label that another Service selects is not a misspelt one of this Service's
            values = {text for text in values if not index.is_selected(name.namespace, key, text)}
        if similar := _similar_label(key, value, near, values, any_value=has_pods):
            return ConfigError(reason, field=api.below(field, key), fix=f"did you mean '{similar}'?")
        if values:
            fix = f"add Pods with these labels, or write '{key}: {min(values)}', as a template here has it"
    return (ConfigError if has_pods else Note)(reason, field=field, fix=fix)


def _similar_label(
    key: str, value: str, near: Sequence[Mapping[str, str]], values: Collection[str], *, any_value: bool
) -> str:
    """Return the label that is probably meant by *key* and *value*, or "".

    *near*: the labels of Pods that match the rest of the selector; *values*: their values of *key*. *any_value*:
    return one of them though none is similar; a workload that is not here may have the right one.
    """
    if match := _closest(value, values, _LIKE) or (any_value and min(values, default="")):
        return f"{key}: {match}"
    match = _closest(key, {label for labels in near for label, text in labels.items() if text == value})
    return f"{match}: {value}" if match else ""


def _target_ports_errors(spec: api.objects.ServiceSpec, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    for at, port in enumerate(spec.ports or ()):
        if (port.protocol or "TCP") in L4Protocol.__members__:
            yield from _target_port_errors(port, at, pods)


def _target_port_errors(port: api.ServicePort, index: int, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield why none of *pods* has the target of *port*."""
    wanted, field = port.target_port, f"spec.ports[{index}].targetPort"
    if not isinstance(wanted, str) or not wanted or wanted.isdigit():
        yield from _unlisted_port_errors(port, field, pods)
        return
    if not pods or any(decode.target_port(port, pod) is not None for pod in pods):
        return
    offered = [offer for pod in pods for offer in decode.offered_ports(pod)]
    same_name = [offer.protocol or "TCP" for offer in offered if offer.name == wanted]
    names = sorted({offer.name for offer in offered if offer.name})
    reason, fix = f"no Pod it selects has a port named {wanted!r}", f"their ports are called {', '.join(names)}"
    if same_name:
        reason = f"port {wanted!r} of the Pods it selects is {same_name[0]}, not {port.protocol or 'TCP'}"
        fix = "write one protocol in both places"
    elif match := _closest(wanted, names):
        fix = f"did you mean {match!r}?"
    elif not names:
        fix = "their ports have no names: write the number, or name the container's port"
    yield ConfigError(reason, field=field, fix=fix)


def _unlisted_port_errors(port: api.ServicePort, field: str, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield that no container lists the number that *port* targets; only if each lists some of its protocol.

    The list does not bind a container, which may listen at other ports; but mixing up the two is a common mistake.
    """
    number, protocol = port.target_port, port.protocol or "TCP"
    containers = [container for pod in pods if pod.spec for container in pod.spec.containers or ()]
    listed = [
        {offer.container_port for offer in container.ports or () if (offer.protocol or "TCP") == protocol}
        for container in containers
    ]
    is_number = isinstance(number, int) and decode.is_port(number)
    if is_number and listed and all(listed) and not any(number in numbers for numbers in listed):
        shown = ", ".join(map(str, sorted(set[int]().union(*listed))[:_SHOWN_MAX]))
        reason = f"no container of the Pods that the selector finds lists port {number} (they list {shown})"
        yield Note(reason, field=field, fix="if nothing listens there, connections are refused")


# ---- EndpointSlices and Endpoints


def orphan_error(index: Index, name: NamespacedName, piece: Manifest) -> ConfigError | None:
    """Return an error if *piece* belongs to the Service *name*, which does not exist; None if it needs no Service."""
    is_slice = isinstance(piece.object, api.EndpointSlice)
    field = api.below("metadata.labels", decode.SERVICE_NAME_LABEL) if is_slice else "metadata.name"
    if piece.object is not None and _LEADER in (piece.object.metadata.annotations or {}):
        return None  # a lock by which components elect a leader
    reason = f"there is no Service {name} here"

    def waits(namespace: str, other: str) -> bool:
        """Return whether the Service *other* takes its endpoints from slices or Endpoints."""
        service = index.services[NamespacedName(namespace, other)][0].object
        spec = service.spec if isinstance(service, api.Service) else None
        return not (spec and (spec.selector or spec.type == "ExternalName"))

    if elsewhere := sorted(space for space in index.namespaces_of.get(name.name, ()) if waits(space, name.name)):
        fix = f"write 'namespace: {elsewhere[0]}', where the Service {name.name} is"
        return ConfigError(reason, field=field, fix=fix)
    names = index.names_in.get(name.namespace, set())
    if (match := _closest(name.name, names)) and waits(name.namespace, match):
        return ConfigError(reason, field=field, fix=f"did you mean {match!r}?")
    if isinstance(piece.object, api.Endpoints) and not piece.object.subsets:
        return None
    some = islice(names, _CANDIDATES_MAX)
    idle = (other for other in some if not index.pieces.get(NamespacedName(name.namespace, other)))
    waiting = list(islice((other for other in idle if waits(name.namespace, other)), 2))
    if len(waiting) == 1:
        return ConfigError(reason, field=field, fix=f"did you mean {waiting[0]!r}, which has no endpoints?")
    return Note(reason, field=field, fix="write the name of its Service, or add the Service")


def _pieces_errors(
    manifest: Manifest, service: api.Service, pieces: Sequence[Manifest], ports: PortEndpoints
) -> Errors:
    """Yield why *pieces* give some of *ports* no usable endpoint, and which of their ports the Service lacks."""
    refused = {at: port for at, (port, endpoints) in ports.items() if not usable_endpoints(endpoints)}
    unmatched = [(piece, error) for piece in pieces for error in _unmatched_ports(manifest.name, service, piece)]
    if unmatched:
        for piece, error in unmatched:
            yield piece, error if refused else Note(error.reason, field=error.field, fix=error.fix)
    elif len(refused) < len(ports):
        for at, port in refused.items():
            reason = "no EndpointSlice or Endpoints has a usable endpoint for it"
            field = f"spec.ports[{at}].name" if port.name.port_name else f"spec.ports[{at}]"
            error = ConfigError(
                f"{reason}: clients of port {port.port} are refused",
                field=field,
                fix="add a port of this name and protocol there",
            )
            yield manifest, error
    else:
        reasons = [(*_piece_error(piece, ports), piece) for piece in pieces]
        _, why, piece = min(reasons, key=lambda reason: reason[0])
        if why is not None:
            yield piece, why


def _unmatched_ports(name: NamespacedName, service: api.Service, piece: Manifest) -> Iterator[ConfigError]:
    """Yield the ports of *piece* that no port of *service* has; they match by name and protocol."""
    wanted = {decode.port_key(port) for port in (service.spec.ports if service.spec else None) or ()}
    names = ", ".join(sorted({name for name, _ in wanted} - {""}))
    for field, port in _ports_of(piece):
        port_name, protocol = port.name or "", port.protocol or "TCP"
        if (port_name, protocol) in wanted or protocol not in ("TCP", "UDP", "SCTP"):
            continue
        if protocols := sorted(other for its_name, other in wanted if its_name == port_name):
            reason = f"the Service's port is {protocols[0]}, not {protocol}"
            yield ConfigError(reason, field=f"{field}.protocol", fix=f"write {protocols[0]}")
            continue
        reason = f"Service {name} has no port {f'named {port_name!r}' if port_name else 'without a name'}"
        fix = f"name it as the Service does: {names}" if names else "leave the name out, as the Service does"
        yield ConfigError(reason, field=f"{field}.name", fix=fix)


def _ports_of(piece: Manifest) -> Iterator[tuple[str, api.objects.EndpointPort]]:
    if isinstance(piece.object, api.EndpointSlice):
        yield from ((f"ports[{at}]", port) for at, port in enumerate(piece.object.ports or ()))
    elif isinstance(piece.object, api.Endpoints):
        for index, subset in enumerate(piece.object.subsets or ()):
            yield from ((f"subsets[{index}].ports[{at}]", port) for at, port in enumerate(subset.ports or ()))


# A rank (the lowest explains the most) and an error.
_Reason = tuple[int, ConfigError | None]


def _piece_error(piece: Manifest, ports: PortEndpoints) -> _Reason:
    """Return why *piece* has no usable endpoint for any of *ports*."""
    if isinstance(piece.object, api.EndpointSlice):
        field, (addresses, obstacle) = "endpoints", _slice_content(piece.object)
    else:
        assert isinstance(piece.object, api.Endpoints)
        field, (addresses, obstacle) = "subsets", _endpoints_content(piece.object)
    if not addresses and (obstacle is None or obstacle[0] == _NO_PORTS):
        reason = f"{REFUSED}: it has no addresses"
        return 4, Note(reason, field=field, fix="add some, or leave it so if that is meant")
    if obstacle is not None:
        return obstacle
    if any(endpoints for _, endpoints in ports.values()):
        reason = f"{REFUSED}: no endpoint is ready"
        return 2, ConfigError(reason, field=field, fix="see why, or make one ready")
    families = {"IPv6" if ":" in ip else "IPv4" for ip in addresses}
    if any(map(decode.is_ip, addresses)) and not families & _families(ports):
        return 3, _other_family(ports, "addressType" if field == "endpoints" else field)
    return 5, None  # what is wrong with the addresses is named where they stand


def _slice_content(piece: api.EndpointSlice) -> tuple[list[str], _Reason | None]:
    """Return the addresses of *piece*, and why no proxy can use them."""
    addresses = [ip for endpoint in piece.endpoints or () for ip in endpoint.addresses or ()]
    if piece.address_type == "FQDN":
        fix = "write IPv4 or IPv6; a proxy reads no others"
        return addresses, (3, ConfigError(f"{REFUSED}: 'FQDN' cannot be proxied", field="addressType", fix=fix))
    if any(port.port for port in piece.ports or ()):
        return addresses, None
    reason = f"{REFUSED}: the slice has no ports"
    return addresses, (_NO_PORTS, ConfigError(reason, field="ports", fix="add 'ports', as the Service's"))


def _endpoints_content(given: api.Endpoints) -> tuple[list[str], _Reason | None]:
    """Return the addresses of *given*, and why no proxy can use them."""
    subsets = given.subsets or ()
    addresses = [each.ip for s in subsets for each in (*(s.addresses or ()), *(s.not_ready_addresses or ()))]
    without = [at for at, subset in enumerate(subsets) if not subset.ports]
    if not without:
        return addresses, None
    if len(without) < len(subsets):
        reason = f"{REFUSED}: addresses and ports stand in two subsets; a '-' begins a new one"
        return addresses, (0, ConfigError(reason, field="subsets", fix="join them: remove the '-' before 'ports'"))
    reason = f"{REFUSED}: the subset has no ports"
    return addresses, (_NO_PORTS, ConfigError(reason, field=f"subsets[{without[0]}]", fix="add 'ports' to it"))


def _closest(word: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """Return which of *names* is probably meant by *word*; "" if none is similar, or if there are too many."""
    matches = get_close_matches(word, names, n=1, cutoff=cutoff) if len(names) <= _CANDIDATES_MAX else []
    return matches[0] if matches else ""
