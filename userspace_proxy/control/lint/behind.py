"""Why clients of a Service would be refused: no Pod, slice or Endpoints here gives it a usable endpoint. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import islice

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
# A label of a selector is taken for a misspelt one from this likeness on: prometheus is not prometheus-adapter.
_LIKE = 0.8

Found = Iterator[tuple[Manifest, ConfigError]]
Ports = Mapping[int, tuple[ServicePort, tuple[Endpoint, ...]]]


def endpoints_of(
    index: Index, name: NamespacedName, service: api.Service, ports: Mapping[int, ServicePort]
) -> dict[int, tuple[ServicePort, tuple[Endpoint, ...]]]:
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


def refusals(index: Index, manifest: Manifest, service: api.Service, ports: Ports) -> Found:
    """Yield why clients of some of *ports* of *service* would be refused."""
    name, spec = manifest.name, service.spec
    assert spec is not None
    pieces = index.pieces.get(name, ())
    if spec.selector:
        pods = index.selected(name.namespace, spec.selector)
        templates = index.selected(name.namespace, spec.selector, templates=True)
        for at, given in enumerate(spec.ports or ()):
            if (given.protocol or "TCP") in L4Protocol.__members__:
                yield from ((manifest, error) for error in _target_port_errors(given, at, pods or templates))
        if not pods and not pieces:
            yield manifest, _no_pods(index, name, spec.selector, templates)
            return
        if pods:
            if error := _of_pods(service, pods, ports):
                yield manifest, error
            return
    if pieces and not ports:
        return
    refused = {at: port for at, (port, known) in ports.items() if not usable_endpoints(known)}
    strange = list(_strange_ports(name, service, pieces))
    is_whole = len(refused) == len(ports)
    if not pieces:
        mend = f"add a selector, or an EndpointSlice or Endpoints for {name.name!r}"
        yield manifest, ConfigError("it has no selector, and nothing here gives it endpoints", field="spec", mend=mend)
    elif strange:
        yield from strange if refused else ((piece, _as_note(error)) for piece, error in strange)
    elif refused and is_whole:
        if (why := _of_pieces(pieces, ports)) is not None:
            yield why
    else:
        for at, port in refused.items():
            said = (
                f"no EndpointSlice or Endpoints has a usable endpoint for it: clients of port {port.port} are refused"
            )
            field = f"spec.ports[{at}].name" if port.name.port_name else f"spec.ports[{at}]"
            yield manifest, ConfigError(said, field=field, mend="add a port of this name and protocol there")


def _as_note(error: ConfigError) -> Note:
    return Note(error.reason, field=error.field, mend=error.mend)


# ---- Pods


def _of_pods(service: api.Service, pods: Sequence[api.Pod], ports: Ports) -> ConfigError | None:
    """Return why none of *pods* is a usable endpoint of any of *ports*."""
    if not ports or any(usable_endpoints(known) for _, known in ports.values()):
        return None
    which = f"Pod {pods[0].metadata.name}" if len(pods) == 1 else f"any of the {len(pods)} Pods it selects"
    field = "spec.selector"
    if not any(pod_ip_fields(pod) for pod in pods):
        mend = "add status.podIP to the Pod, as 'kubectl get pod -o yaml' shows it"
        return Note(f"no address is known of {which}", field=field, mend=mend)  # a cluster would give it one
    if any(known for _, known in ports.values()):
        names = (
            f"none of the {len(pods)} Pods it selects is ready" if len(pods) > 1 else "the Pod it selects is not ready"
        )
        said = f"clients are refused: {names}"
        return ConfigError(said, field=field, mend="see status.conditions there, or set publishNotReadyAddresses")
    if all(pod.status and pod.status.phase in ("Succeeded", "Failed") for pod in pods):
        which = f"each of the {len(pods)} Pods it selects" if len(pods) > 1 else "the Pod it selects"
        said = f"clients are refused: {which} has ended"
        return ConfigError(said, field=field, mend="add Pods that run")
    spec = service.spec
    named = spec is not None and any(decode.target_port(p, pod) is None for p in spec.ports or () for pod in pods)
    if named or not any(decode.pod_ips(pod) for pod in pods):
        return None  # that a port or an address is wrong is said where it stands
    return _other_family(ports, field)


def _other_family(ports: Ports, field: str) -> ConfigError:
    families = {"IPv6" if ":" in ip else "IPv4" for port, _ in ports.values() for ip in port.cluster_ips}
    said = f"clients are refused: the Service is {' and '.join(sorted(families))} alone, and its endpoints are not"
    return ConfigError(said, field=field, mend="give both one family (spec.ipFamilies, clusterIPs)")


def _no_pods(
    index: Index, name: NamespacedName, selector: Mapping[str, str], templates: Sequence[api.Pod]
) -> ConfigError:
    said = f"the selector {', '.join(f'{key}={value}' for key, value in selector.items())} matches no Pod here"
    field = "spec.selector"
    if templates:
        maker = templates[0].metadata.name
        said = f"{said}; the template of {maker} has these labels, but a proxy makes no Pods of it"
        mend = f"add the Pods, as 'kubectl get pods -o yaml' shows them, or Endpoints named {name.name!r}"
        return Note(said, field=field, mend=mend)
    for namespace in islice(index.namespaces(), _CANDIDATES_MAX):
        for kind in (False, True):
            if pods := index.selected(namespace, selector, templates=kind):
                said = f"{said}; {pods[0].metadata.name} in namespace {namespace!r} has these labels"
                return ConfigError(said, field=field, mend="put both into one namespace")
    held = list(islice(index.pods_in(name.namespace), _CANDIDATES_MAX))
    has_pods = any(manifest.kind == "Pod" for manifest, _ in held)
    mend = "add Pods with these labels, or mend the selector"
    for key, value in selector.items():
        # Of what all other labels find. In Pods any value is offered; a workload that is not here may have its own.
        near = [
            labels
            for _, pod in held
            if (labels := pod.metadata.labels or {})
            and all(labels.get(k) == v for k, v in selector.items() if k != key)
        ]
        values = {labels[key] for labels in near if key in labels}
        if not has_pods:  # what another Service selects is no misspelt name of this one's
            values = {text for text in values if not index.is_selected(name.namespace, key, text)}
        if match := _closest(value, values, _LIKE) or (has_pods and min(values, default="")):
            return ConfigError(said, field=api.below(field, key), mend=f"did you mean '{key}: {match}'?")
        if match := _closest(key, {label for labels in near for label, text in labels.items() if text == value}):
            return ConfigError(said, field=api.below(field, key), mend=f"did you mean '{match}: {value}'?")
        if values:
            mend = f"add Pods with these labels, or write '{key}: {min(values)}', as a template here has it"
    kind_of_error = ConfigError if has_pods else Note
    return kind_of_error(said, field=field, mend=mend)


def _target_port_errors(port: api.ServicePort, index: int, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield why the target of *port* is not to be found in any of *pods*."""
    wanted, field = port.target_port, f"spec.ports[{index}].targetPort"
    if not isinstance(wanted, str) or not wanted or wanted.isdigit():
        yield from _unlisted_port_errors(port, field, pods)
        return
    if not pods or any(decode.target_port(port, pod) is not None for pod in pods):
        return
    offered = [offer for pod in pods for offer in decode.offered_ports(pod)]
    same_name = [offer.protocol or "TCP" for offer in offered if offer.name == wanted]
    names = sorted({offer.name for offer in offered if offer.name})
    if same_name:
        said = f"port {wanted!r} of the Pods it selects is {same_name[0]}, not {port.protocol or 'TCP'}"
        yield ConfigError(said, field=field, mend="write one protocol in both places")
        return
    if match := _closest(wanted, names):
        mend = f"did you mean {match!r}?"
    elif names:
        mend = f"their ports are called {', '.join(names)}"
    else:
        mend = "their ports have no names: write the number, or name the container's port"
    yield ConfigError(f"no Pod it selects has a port named {wanted!r}", field=field, mend=mend)


def _unlisted_port_errors(port: api.ServicePort, field: str, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield that no container lists the number that is *port*'s target; only if each lists some of its protocol.

    The list binds no container, which may listen at other ports; but mixing up the two is a common mistake.
    """
    number, protocol = port.target_port, port.protocol or "TCP"
    if not isinstance(number, int) or not decode.is_port(number):
        return
    containers = [container for pod in pods if pod.spec for container in pod.spec.containers or ()]
    listed = [
        {offer.container_port for offer in container.ports or () if (offer.protocol or "TCP") == protocol}
        for container in containers
    ]
    if not listed or not all(listed) or any(number in numbers for numbers in listed):
        return
    shown = ", ".join(map(str, sorted(set[int]().union(*listed))[:_SHOWN_MAX]))
    said = f"no container of the Pods that the selector finds lists port {number} (they list {shown})"
    yield Note(said, field=field, mend="if nothing listens there, connections are refused")


# ---- EndpointSlices and Endpoints


def orphan_error(index: Index, name: NamespacedName, piece: Manifest) -> ConfigError | None:
    """Return why *piece* belongs to no Service here: there is none of *name*."""
    is_slice = isinstance(piece.object, api.EndpointSlice)
    field = api.below("metadata.labels", decode.SERVICE_NAME_LABEL) if is_slice else "metadata.name"
    if piece.object is not None and _LEADER in (piece.object.metadata.annotations or {}):
        return None  # a lock by which components elect a leader
    said = f"there is no Service {name} here"

    def waits(namespace: str, other: str) -> bool:
        service = index.services[NamespacedName(namespace, other)][0].object
        spec = service.spec if isinstance(service, api.Service) else None
        return not (spec and (spec.selector or spec.type == "ExternalName"))

    if elsewhere := sorted(space for space in index.namespaces_of.get(name.name, ()) if waits(space, name.name)):
        mend = f"write 'namespace: {elsewhere[0]}', where the Service {name.name} is"
        return ConfigError(said, field=field, mend=mend)
    names = index.names_in.get(name.namespace, set())
    if (match := _closest(name.name, names)) and waits(name.namespace, match):
        return ConfigError(said, field=field, mend=f"did you mean {match!r}?")
    if isinstance(piece.object, api.Endpoints) and not piece.object.subsets:
        return None
    some = islice(names, _CANDIDATES_MAX)
    idle = (other for other in some if not index.pieces.get(NamespacedName(name.namespace, other)))
    waiting = list(islice((other for other in idle if waits(name.namespace, other)), 2))
    if len(waiting) == 1:
        return ConfigError(said, field=field, mend=f"did you mean {waiting[0]!r}, which has no endpoints?")
    return Note(said, field=field, mend="write the name of its Service, or add the Service")


def _strange_ports(name: NamespacedName, service: api.Service, pieces: Sequence[Manifest]) -> Found:
    """Yield the ports of *pieces* that no port of *service* has: they match by name and protocol."""
    spec = service.spec
    wanted = {(port.name or "", port.protocol or "TCP") for port in (spec.ports if spec else None) or ()}
    for piece in pieces:
        for field, port in _ports_of(piece):
            key = (port.name or "", port.protocol or "TCP")
            if key in wanted or key[1] not in ("TCP", "UDP", "SCTP"):
                continue
            protocols = sorted(protocol for port_name, protocol in wanted if port_name == key[0])
            if protocols:
                said, mend = f"the Service's port is {protocols[0]}, not {key[1]}", f"write {protocols[0]}"
                yield piece, ConfigError(said, field=f"{field}.protocol", mend=mend)
                continue
            shown = f"named {key[0]!r}" if key[0] else "without a name"
            names = ", ".join(sorted({port_name for port_name, _ in wanted} - {""}))
            mend = f"name it as the Service does: {names}" if names else "leave the name out, as the Service does"
            yield piece, ConfigError(f"Service {name} has no port {shown}", field=f"{field}.name", mend=mend)


def _ports_of(piece: Manifest) -> Iterator[tuple[str, api.objects.EndpointPort]]:
    if isinstance(piece.object, api.EndpointSlice):
        yield from ((f"ports[{at}]", port) for at, port in enumerate(piece.object.ports or ()))
    elif isinstance(piece.object, api.Endpoints):
        for index, subset in enumerate(piece.object.subsets or ()):
            yield from ((f"subsets[{index}].ports[{at}]", port) for at, port in enumerate(subset.ports or ()))


def _of_pieces(pieces: Sequence[Manifest], ports: Ports) -> tuple[Manifest, ConfigError] | None:
    """Return why none of *pieces* has a usable endpoint for any of *ports*, at the one with the most to say."""
    is_unready = any(known for _, known in ports.values())
    reasons = []
    for piece in pieces:
        rank, error = _of_piece(piece, ports, is_unready=is_unready)
        reasons.append((rank, piece, error))
    _, piece, found = min(reasons, key=lambda reason: reason[0])
    return (piece, found) if found is not None else None


def _of_piece(piece: Manifest, ports: Ports, *, is_unready: bool) -> tuple[int, ConfigError | None]:
    refused = "clients are refused: "
    if isinstance(piece.object, api.EndpointSlice):
        field = "endpoints"
        addresses = [ip for endpoint in piece.object.endpoints or () for ip in endpoint.addresses or ()]
        has_ports = any(port.port for port in piece.object.ports or ())
        no_ports = ConfigError(f"{refused}the slice has no ports", field="ports", mend="add 'ports', as the Service's")
        if piece.object.address_type == "FQDN":
            mend = "write IPv4 or IPv6; a proxy reads no others"
            return 3, ConfigError(f"{refused}'FQDN' cannot be proxied", field="addressType", mend=mend)
        is_apart = False
    else:
        assert isinstance(piece.object, api.Endpoints)
        field, subsets = "subsets", piece.object.subsets or ()
        addresses = [
            address.ip
            for subset in subsets
            for address in [*(subset.addresses or ()), *(subset.not_ready_addresses or ())]
        ]
        at = next((at for at, subset in enumerate(subsets) if not subset.ports), 0)
        has_ports = all(subset.ports for subset in subsets)
        is_apart = any(subset.ports for subset in subsets) and not has_ports
        no_ports = ConfigError(f"{refused}the subset has no ports", field=f"subsets[{at}]", mend="add 'ports' to it")
    if is_apart:
        said = f"{refused}addresses and ports stand in two subsets; a '-' begins a new one"
        return 0, ConfigError(said, field=field, mend="join them: remove the '-' before 'ports'")
    if not addresses:
        return 4, Note(f"{refused}it has no addresses", field=field, mend="add some, or leave it so if that is meant")
    if not has_ports:
        return 1, no_ports
    if is_unready:
        return 2, ConfigError(f"{refused}no endpoint is ready", field=field, mend="see why, or make one ready")
    if any(decode.is_ip(ip) for ip in addresses):
        families = {":" in ip for port, _ in ports.values() for ip in port.cluster_ips}
        if not families & {":" in ip for ip in addresses}:
            return 3, _other_family(ports, "addressType" if field == "endpoints" else field)
    return 5, None  # what is wrong with them is said where it stands


def _closest(word: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """Return which of *names* may be meant by *word*; "" if none is like it, or there are too many to look at."""
    matches = get_close_matches(word, names, n=1, cutoff=cutoff) if len(names) <= _CANDIDATES_MAX else []
    return matches[0] if matches else ""
