"""Explains why clients of a Service would be refused: it has no usable endpoint. Pure."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice, product
from operator import itemgetter

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.lint.index import Index
from userspace_proxy.control.lint.single import address_fields
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.model.endpoint import Endpoint, family_of
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
        yield from ((manifest, error) for error in islice(_pods_errors(service.spec, pods, ports), 1))
    elif pieces:
        yield from _pieces_errors(manifest, service, pieces, ports) if ports else ()
    elif selector:
        yield manifest, _no_pods(index, manifest.name, selector, templates)
    elif decode.dns_target(service) is None:
        fix = f"add a selector, or an EndpointSlice or Endpoints for {manifest.name.name!r}"
        yield manifest, ConfigError("it has no selector, and nothing here gives it endpoints", field="spec", fix=fix)


# ---- Pods


def _pods_errors(spec: api.objects.ServiceSpec, pods: Sequence[api.Pod], ports: PortEndpoints) -> Iterator[ConfigError]:
    """Yield why none of *pods* is a usable endpoint of any of *ports*; the first reason explains the most.

    Yield nothing if the reason is named at a port or an address.
    """
    if not ports or any(usable_endpoints(endpoints) for _, endpoints in ports.values()):
        return
    field, those = "spec.selector", f"the {len(pods)} Pods it selects"
    one, none, each = f"any of {those}", f"none of {those} is ready", f"each of {those}"
    if len(pods) == 1:
        one, none, each = f"Pod {pods[0].metadata.name}", "the Pod it selects is not ready", "the Pod it selects"
    if not any(ip for pod in pods for _, ip in address_fields(pod)):
        fix = "add status.podIP to the Pod, as 'kubectl get pod -o yaml' shows it"
        yield Note(f"no address is known of {one}", field=field, fix=fix)  # a cluster would give it one
    if any(endpoints for _, endpoints in ports.values()):
        fix = "see status.conditions there, or set publishNotReadyAddresses"
        yield ConfigError(f"{REFUSED}: {none}", field=field, fix=fix)
    if all(map(decode.has_ended, pods)):
        yield ConfigError(f"{REFUSED}: {each} has ended", field=field, fix="add Pods that run")
    lacks_port = any(decode.target_port(port, pod) is None for port in spec.ports or () for pod in pods)
    if any(map(decode.pod_ips, pods)) and not lacks_port:
        yield _other_family(ports, field)


def _families(ports: PortEndpoints) -> set[str]:
    return {f"IPv{family_of(ip)}" for port, _ in ports.values() for ip in port.cluster_ips}


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
    if elsewhere := next(_selected_elsewhere(index, selector), ""):
        return ConfigError(f"{reason}; {elsewhere} has these labels", field=field, fix="put both into one namespace")
    held = list(islice(index.pods_in(name.namespace), _CANDIDATES_MAX))
    has_pods = any(manifest.kind == "Pod" for manifest, _ in held)
    fix = "add Pods with these labels, or correct the selector"
    for key, value in selector.items():
        near = _near_labels(selector, key, held)
        # A label that another Service selects is not a misspelt one of this Service's.
        values = {text for labels in near if (text := labels.get(key)) is not None}
        values -= set() if has_pods else {text for text in values if index.pods.is_selected(name.namespace, key, text)}
        if similar := _similar_label(key, value, near, values, any_value=has_pods):
            return ConfigError(reason, field=api.below(field, key), fix=f"did you mean '{similar}'?")
        if values:
            fix = f"add Pods with these labels, or write '{key}: {min(values)}', as a template here has it"
    return (ConfigError if has_pods else Note)(reason, field=field, fix=fix)


def _near_labels(
    selector: Mapping[str, str], key: str, held: Iterable[tuple[Manifest, api.Pod]]
) -> list[Mapping[str, str]]:
    """Return the labels of those of *held* that *selector* matches without its *key*."""
    others = selector.items() - {(key, selector[key])}
    return [labels for _, pod in held if (labels := pod.metadata.labels or {}) and others <= labels.items()]


def _selected_elsewhere(index: Index, selector: Mapping[str, str]) -> Iterator[str]:
    """Yield a Pod or template that *selector* matches in each namespace with one."""
    for namespace, is_template in product(islice(index.namespaces(), _CANDIDATES_MAX), (False, True)):
        if pods := index.selected(namespace, selector, templates=is_template):
            yield f"{pods[0].metadata.name} in namespace {namespace!r}"


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
    if piece.object is not None and _LEADER in (piece.object.metadata.annotations or {}):
        return None  # a lock by which components elect a leader
    is_slice = isinstance(piece.object, api.EndpointSlice)
    field = api.below("metadata.labels", decode.SERVICE_NAME_LABEL) if is_slice else "metadata.name"
    reason = f"there is no Service {name} here"
    is_empty = isinstance(piece.object, api.Endpoints) and not piece.object.subsets
    if fix := next(_meant_services(index, name, is_empty=is_empty), ""):
        return ConfigError(reason, field=field, fix=fix)
    return None if is_empty else Note(reason, field=field, fix="write the name of its Service, or add the Service")


def _meant_services(index: Index, name: NamespacedName, *, is_empty: bool) -> Iterator[str]:
    """Yield which Service is probably meant by *name*, the likeliest first. *is_empty*: by Endpoints without any."""

    def waits(namespace: str, other: str) -> bool:
        """Return whether the Service *other* takes its endpoints from slices or Endpoints."""
        service = index.services[NamespacedName(namespace, other)][0].object
        spec = service.spec if isinstance(service, api.Service) else None
        return not (spec and (spec.selector or spec.type == "ExternalName"))

    spaces = (space for space, names in index.names_in.items() if name.name in names)
    if elsewhere := sorted(space for space in spaces if waits(space, name.name)):
        yield f"write 'namespace: {elsewhere[0]}', where the Service {name.name} is"
    names = index.names_in.get(name.namespace, set())
    if (match := _closest(name.name, names)) and waits(name.namespace, match):
        yield f"did you mean {match!r}?"
    some = islice(names, 0 if is_empty else _CANDIDATES_MAX)
    idle = (other for other in some if not index.pieces.get(NamespacedName(name.namespace, other)))
    waiting = list(islice((other for other in idle if waits(name.namespace, other)), 2))
    if len(waiting) == 1:
        yield f"did you mean {waiting[0]!r}, which has no endpoints?"


def _pieces_errors(
    manifest: Manifest, service: api.Service, pieces: Sequence[Manifest], ports: PortEndpoints
) -> Errors:
    """Yield why *pieces* give some of *ports* no usable endpoint, and which of their ports the Service lacks."""
    refused = {at: port for at, (port, endpoints) in ports.items() if not usable_endpoints(endpoints)}
    if unmatched := [(piece, error) for piece in pieces for error in _unmatched_ports(manifest.name, service, piece)]:
        kind = ConfigError if refused else Note
        yield from ((piece, kind(error.reason, field=error.field, fix=error.fix)) for piece, error in unmatched)
    elif len(refused) < len(ports):
        yield from ((manifest, _no_such_port(at, port)) for at, port in refused.items())
    else:
        _, why, piece = min(((*_reason(piece, ports), piece) for piece in pieces), key=itemgetter(0))
        if why is not None:
            yield piece, why


def _no_such_port(at: int, port: ServicePort) -> ConfigError:
    reason = "no EndpointSlice or Endpoints has a usable endpoint for it"
    return ConfigError(
        f"{reason}: clients of port {port.port} are refused",
        field=f"spec.ports[{at}].name" if port.name.port_name else f"spec.ports[{at}]",
        fix="add a port of this name and protocol there",
    )


def _unmatched_ports(name: NamespacedName, service: api.Service, piece: Manifest) -> Iterator[ConfigError]:
    """Yield the ports of *piece* that no port of *service* has; they match by name and protocol."""
    wanted = {decode.port_key(port) for port in (service.spec.ports if service.spec else None) or ()}
    for field, port in _ports_of(piece):
        key = port.name or "", port.protocol or "TCP"
        if key not in wanted and key[1] in ("TCP", "UDP", "SCTP"):
            yield _unmatched_port(name, wanted, field, key)


def _unmatched_port(
    name: NamespacedName, wanted: Collection[decode.PortKey], field: str, key: decode.PortKey
) -> ConfigError:
    port_name, protocol = key
    if protocols := sorted(other for its_name, other in wanted if its_name == port_name):
        reason = f"the Service's port is {protocols[0]}, not {protocol}"
        return ConfigError(reason, field=f"{field}.protocol", fix=f"write {protocols[0]}")
    names = ", ".join(sorted({its_name for its_name, _ in wanted} - {""}))
    reason = f"Service {name} has no port {f'named {port_name!r}' if port_name else 'without a name'}"
    fix = f"name it as the Service does: {names}" if names else "leave the name out, as the Service does"
    return ConfigError(reason, field=f"{field}.name", fix=fix)


def _ports_of(piece: Manifest) -> Iterator[tuple[str, api.objects.EndpointPort]]:
    if isinstance(piece.object, api.EndpointSlice):
        yield from ((f"ports[{at}]", port) for at, port in enumerate(piece.object.ports or ()))
    elif isinstance(piece.object, api.Endpoints):
        for index, subset in enumerate(piece.object.subsets or ()):
            yield from ((f"subsets[{index}].ports[{at}]", port) for at, port in enumerate(subset.ports or ()))


# A rank (the lowest explains the most) and an error.
_Reason = tuple[int, ConfigError | None]


def _reason(piece: Manifest, ports: PortEndpoints) -> _Reason:
    """Return why *piece* has no usable endpoint for any of *ports*."""
    given = piece.object
    is_slice = isinstance(given, api.EndpointSlice)
    field, obstacle = "endpoints" if is_slice else "subsets", _obstacle(given)
    addresses = [ip for _, ip in address_fields(given)]
    if not addresses and (obstacle is None or obstacle[0] == _NO_PORTS):
        reason = f"{REFUSED}: it has no addresses"
        return 4, Note(reason, field=field, fix="add some, or leave it so if that is meant")
    if obstacle is not None:
        return obstacle
    if any(endpoints for _, endpoints in ports.values()):
        return 2, ConfigError(f"{REFUSED}: no endpoint is ready", field=field, fix="see why, or make one ready")
    families = {f"IPv{family_of(ip)}" for ip in addresses}
    if any(map(decode.is_ip, addresses)) and not families & _families(ports):
        return 3, _other_family(ports, "addressType" if is_slice else field)
    return 5, None  # what is wrong with the addresses is named where they stand


def _obstacle(given: object) -> _Reason | None:
    """Return why no proxy can use the addresses of *given*, a slice or Endpoints, or None."""
    match given:
        case api.EndpointSlice(address_type="FQDN"):
            fix = "write IPv4 or IPv6; a proxy reads no others"
            return 3, ConfigError(f"{REFUSED}: 'FQDN' cannot be proxied", field="addressType", fix=fix)
        case api.EndpointSlice() if not any(port.port for port in given.ports or ()):
            fix = "add 'ports', as the Service's"
            return _NO_PORTS, ConfigError(f"{REFUSED}: the slice has no ports", field="ports", fix=fix)
        case api.Endpoints() if without := [at for at, subset in enumerate(given.subsets or ()) if not subset.ports]:
            if len(without) < len(given.subsets or ()):
                reason = f"{REFUSED}: addresses and ports stand in two subsets; a '-' begins a new one"
                return 0, ConfigError(reason, field="subsets", fix="join them: remove the '-' before 'ports'")
            reason = f"{REFUSED}: the subset has no ports"
            return _NO_PORTS, ConfigError(reason, field=f"subsets[{without[0]}]", fix="add 'ports' to it")
    return None


def _closest(word: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """Return which of *names* is probably meant by *word*; "" if none is similar, or if there are too many."""
    matches = get_close_matches(word, names, n=1, cutoff=cutoff) if len(names) <= _CANDIDATES_MAX else []
    return matches[0] if matches else ""
