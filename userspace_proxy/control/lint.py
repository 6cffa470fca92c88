"""What is wrong with manifests, of each by itself and of one with another, for `check`. Pure.

The rules that `run` refuses objects by are decode's; here are those that it cannot refuse by, because what
is missing may come later. What follows from a mistake that was named already is not named again.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.allotments import Allotments
from userspace_proxy.control.fields import field_errors, is_meant, kind_errors
from userspace_proxy.control.pools import NODE_PORTS
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import ConfigError
from userspace_proxy.interfaces import EventType, ObjectEvent
from userspace_proxy.model.names import L4Protocol, NamespacedName
from userspace_proxy.sources.documents import Manifest, Problem, duplicates
from userspace_proxy.sources.lines import Lines

_WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job")
# RFC 6335: what a named port may be called.
_PORT_NAME = re.compile(r"(?=.{1,15}$)(?=.*[a-z])[a-z0-9]+(-[a-z0-9]+)*")
_CANDIDATES_MAX = 500
_SHOWN_PORTS_MAX = 5

_Object = TypeVar("_Object", api.Service, api.EndpointSlice, api.Endpoints, api.Pod)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. ``line`` is None where the whole file is meant, ``object`` "" where none is known."""

    file: str
    line: int | None
    field: str
    problem: str
    mend: str
    object: str

    @property
    def where(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.where, self.field, "; ".join(filter(None, (self.problem, self.mend))))))


def lint(manifests: Sequence[Manifest], problems: Iterable[Problem] = ()) -> list[Finding]:
    """Return what is wrong with *manifests*, read for a check, and the *problems* of reading them, by file and line."""
    found = [_of_problem(problem) for problem in [*problems, *duplicates(m for m in manifests if m.object)]]
    lines = Lines()
    for manifest, error in _Input(manifests).errors():
        line = lines.line_of(manifest.place, error.field)
        found.append(Finding(manifest.place.document.path, line, error.field, error.reason, error.mend, str(manifest)))
    return sorted(dict.fromkeys(found), key=lambda finding: (finding.file, finding.line or 0))


def _of_problem(problem: Problem) -> Finding:
    error = problem.error
    return Finding(problem.path, problem.line, error.field, error.reason, error.mend, problem.object)


class _Input:
    """All manifests, by what their rules ask for."""

    def __init__(self, manifests: Sequence[Manifest]) -> None:
        self._manifests = manifests
        # Those with a fault count too: what belongs to them has its Service.
        self._service_names: dict[str, set[str]] = defaultdict(set)
        for manifest in manifests:
            if manifest.kind == "Service":
                self._service_names[manifest.name.namespace].add(manifest.name.name)
        self._services = {m.name: service for m, service in _objects(manifests, api.Service)}
        self._with_endpoints = {
            *(m.name for m, _ in _objects(manifests, api.Endpoints)),
            *(decode.service_of(piece, m.name.namespace) for m, piece in _objects(manifests, api.EndpointSlice)),
        }
        pods = {m.name: pod for m, pod in _objects(manifests, api.Pod)}
        templates = {_template_name(m): pod for m in manifests if m.kind in _WORKLOADS if (pod := _template(m))}
        self._pods, self._templates = _tracking(pods), _tracking(templates)
        self._labels: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for name, pod in [*pods.items(), *templates.items()]:
            for key, value in (pod.metadata.labels or {}).items():
                self._labels[name.namespace][key].add(value)
        self._allotments = Allotments([])

    def errors(self) -> Iterator[tuple[Manifest, ConfigError]]:
        """Yield what is wrong, with the manifest it is wrong in."""
        for manifest in self._manifests:
            for error in self._errors_of(manifest):
                yield manifest, error

    def _errors_of(self, manifest: Manifest) -> Iterator[ConfigError]:
        if manifest.kind not in api.KINDS or (manifest.object is None and not manifest.errors):
            yield from kind_errors(manifest.kind)
            return
        shape = list(field_errors(manifest.kind, manifest.plain or {}))
        unknown: dict[str, list[ConfigError]] = defaultdict(list)
        for error in shape:
            unknown[error.field.rpartition(".")[0]].append(error)
        shape += [error for error in manifest.errors if not _follows(error, unknown[error.field])]
        yield from shape
        match manifest.object:
            case api.Service() as service:
                yield from self._service_errors(manifest, service, shape)
            case api.EndpointSlice() as piece:
                yield from self._slice_errors(manifest, piece)
            case api.Endpoints() as endpoints:
                yield from self._endpoints_errors(manifest, endpoints)
            case api.Pod() as pod:
                for field, ip in _pod_ip_fields(pod):
                    yield from decode.backend_ip_errors(ip, field)

    # ---- a Service, and what stands behind it

    def _service_errors(
        self, manifest: Manifest, service: api.Service, shape: Sequence[ConfigError]
    ) -> Iterator[ConfigError]:
        # That there are no ports, or no spec, is not said again where one is misplaced or misspelt.
        own = [error for error in decode.service_errors(service) if not (shape and error.field in ("", "spec"))]
        yield from own
        if service.spec is None or not decode.is_proxied(service):
            return
        named = {error.field for error in own}
        yield from (error for error in self._conflicts(manifest.name, service) if error.field not in named)
        yield from _idle_field_errors(service)
        # Nor what follows from a selector that is wrong in itself.
        if not any(error.field.startswith("spec.selector") for error in shape):
            yield from self._behind(manifest.name, service, is_whole=not shape and not own)

    def _conflicts(self, name: NamespacedName, service: api.Service) -> Iterator[ConfigError]:
        """Yield what `run` finds when it comes to serve *service*."""
        try:
            yield from decode.service_ports(name, service, decode.Allotted())[1]
        except ConfigError as error:
            yield error
        try:
            self._allotments.assign(name, service)
        except ConfigError as error:
            yield error

    def _behind(self, name: NamespacedName, service: api.Service, *, is_whole: bool) -> Iterator[ConfigError]:
        """Yield why *service* has no endpoints, or not for each of its ports."""
        assert service.spec is not None
        selector = service.spec.selector
        if not selector:
            if name not in self._with_endpoints and is_whole:
                mend = f"add a selector, or an EndpointSlice or Endpoints for {name.name!r}"
                yield ConfigError("it has no selector, and nothing here gives it endpoints", field="spec", mend=mend)
            return
        pods = self._pods.selected_pods(name, service)
        templates = self._templates.selected_pods(name, service)
        if not pods and name not in self._with_endpoints:
            yield self._no_pods(name, service, selector, templates)
        elif pods and not any(_pod_ip_fields(pod) for pod in pods):
            which = f"Pod {pods[0].metadata.name}" if len(pods) == 1 else f"any of the {len(pods)} Pods it selects"
            mend = "add status.podIP to the Pod, as 'kubectl get pod -o yaml' shows it"
            yield ConfigError(f"no address is known of {which}", field="spec.selector", mend=mend)
        for index, port in enumerate(service.spec.ports or ()):
            if (port.protocol or "TCP") in L4Protocol.__members__:
                yield from _target_port_errors(port, index, pods or templates)

    def _no_pods(
        self, name: NamespacedName, service: api.Service, selector: Mapping[str, str], templates: Sequence[api.Pod]
    ) -> ConfigError:
        said = f"the selector {', '.join(f'{key}={value}' for key, value in selector.items())} matches no Pod here"
        field = "spec.selector"
        if templates:
            maker = templates[0].metadata.name
            said = f"{said}; the template of {maker} has these labels, but a proxy makes no Pods of it"
            mend = f"add the Pods, as 'kubectl get pods -o yaml' shows them, or Endpoints named {name.name!r}"
            return ConfigError(said, field=field, mend=mend)
        for namespace in self._labels:
            there = NamespacedName(namespace, name.name)
            if pods := [*self._pods.selected_pods(there, service), *self._templates.selected_pods(there, service)]:
                said = f"{said}; {pods[0].metadata.name} in namespace {namespace!r} has these labels"
                return ConfigError(said, field=field, mend="put both into one namespace")
        labels = self._labels[name.namespace]
        for key, value in selector.items():
            if key in labels and value not in labels[key]:
                best = _closest(value, labels[key]) or min(labels[key])
                return ConfigError(said, field=api.below(field, key), mend=f"did you mean '{key}: {best}'?")
            if key not in labels and (match := _closest(key, labels)):
                return ConfigError(said, field=api.below(field, key), mend=f"did you mean '{match}: {value}'?")
        return ConfigError(said, field=field, mend="add Pods with these labels, or mend the selector")

    # ---- EndpointSlices and Endpoints

    def _slice_errors(self, manifest: Manifest, piece: api.EndpointSlice) -> Iterator[ConfigError]:
        endpoints = piece.endpoints or ()
        if piece.address_type not in ("IPv4", "IPv6"):
            mend = "write IPv4 or IPv6; a proxy reads no others"
            yield ConfigError(f"{piece.address_type!r} cannot be proxied", field="addressType", mend=mend)
            endpoints = ()  # what their addresses should be is not known
        for index, endpoint in enumerate(endpoints):
            for at, ip in enumerate(endpoint.addresses or ()):
                yield from decode.backend_ip_errors(ip, f"endpoints[{index}].addresses[{at}]")
        service = decode.service_of(piece, manifest.name.namespace)
        if service is None:
            candidates = self._service_names.get(manifest.name.namespace, set())
            label = f"{decode.SERVICE_NAME_LABEL}: {min(candidates) if len(candidates) == 1 else 'NAME'}"
            said = f"the label {decode.SERVICE_NAME_LABEL} is missing, so it belongs to no Service"
            yield ConfigError(said, field="metadata.labels", mend=f"add '{label}'")
        else:
            yield from self._name_errors(service, api.below("metadata.labels", decode.SERVICE_NAME_LABEL))
            yield from self._port_errors(service, piece.ports, "ports")

    def _endpoints_errors(self, manifest: Manifest, endpoints: api.Endpoints) -> Iterator[ConfigError]:
        yield from self._name_errors(manifest.name, "metadata.name")
        for index, subset in enumerate(endpoints.subsets or ()):
            field = f"subsets[{index}]"
            for part, addresses in (
                ("addresses", subset.addresses),
                ("notReadyAddresses", subset.not_ready_addresses),
            ):
                for at, address in enumerate(addresses or ()):
                    yield from decode.backend_ip_errors(address.ip, f"{field}.{part}[{at}].ip")
            yield from self._port_errors(manifest.name, subset.ports, f"{field}.ports")

    def _name_errors(self, service: NamespacedName, field: str) -> Iterator[ConfigError]:
        """Yield why the name of a Service, which *field* states, is none of ours."""
        names = self._service_names.get(service.namespace, set())
        if service.name in names:
            return
        said = f"there is no Service {service} here"
        elsewhere = sorted(space for space, known in self._service_names.items() if service.name in known)
        if elsewhere:
            mend = f"write 'namespace: {elsewhere[0]}', where the Service {service.name} is"
        elif match := _closest(service.name, names):
            mend = f"did you mean {match!r}?"
        else:
            mend = "write the name of its Service, or add the Service"
        yield ConfigError(said, field=field, mend=mend)

    def _port_errors(
        self, name: NamespacedName, ports: Sequence[api.objects.EndpointPort] | None, field: str
    ) -> Iterator[ConfigError]:
        """Yield what is wrong with *ports*, of endpoints of the Service *name*: they match its ports by name."""
        service = self._services.get(name)
        spec = service.spec if service and decode.is_proxied(service) else None
        wanted = {(port.name or "", port.protocol or "TCP") for port in (spec.ports if spec else None) or ()}
        for index, port in enumerate(ports or ()):
            here = f"{field}[{index}]"
            if port.port is not None:
                yield from decode.number_errors(port.port, f"{here}.port")
            key = (port.name or "", port.protocol or "TCP")
            if not wanted or key in wanted:
                continue
            protocols = sorted(protocol for port_name, protocol in wanted if port_name == key[0])
            if protocols:
                said, mend = f"the Service's port is {protocols[0]}, not {key[1]}", f"write {protocols[0]}"
                yield ConfigError(said, field=f"{here}.protocol", mend=mend)
                continue
            shown = f"named {key[0]!r}" if key[0] else "without a name"
            names = sorted({port_name for port_name, _ in wanted} - {""})
            mend = (
                f"name it as the Service does: {', '.join(names)}"
                if names
                else "leave the name out, as the Service does"
            )
            yield ConfigError(f"Service {name} has no port {shown}", field=f"{here}.name", mend=mend)


# ---- rules of single objects


def _idle_field_errors(service: api.Service) -> Iterator[ConfigError]:
    """Yield the fields and annotations of *service* that a cluster would refuse, or that count for nothing here."""
    spec = service.spec
    assert spec is not None
    kind = spec.type or "ClusterIP"
    numbers = [(f"spec.ports[{index}].nodePort", port.node_port) for index, port in enumerate(spec.ports or ())]
    for field, number in (*numbers, ("spec.healthCheckNodePort", spec.health_check_node_port)):
        if number and kind == "ClusterIP" and field != "spec.healthCheckNodePort":
            yield ConfigError("a ClusterIP Service has no node ports", field=field, mend="write 'type: NodePort'")
        if number and number not in NODE_PORTS:
            mend = f"write a number from {NODE_PORTS.start} to {NODE_PORTS.stop - 1}, or leave it out"
            yield ConfigError(f"{number} is out of range", field=field, mend=mend)
    for field, given in (
        ("spec.loadBalancerSourceRanges", spec.load_balancer_source_ranges),
        ("spec.loadBalancerIP", spec.load_balancer_ip),
        ("spec.healthCheckNodePort", spec.health_check_node_port),
    ):
        if given and kind != "LoadBalancer":
            said = f"it counts for nothing in a {kind} Service"
            yield ConfigError(said, field=field, mend="write 'type: LoadBalancer', or leave it out")
    if spec.load_balancer_ip:
        yield from decode.virtual_ip_errors(spec.load_balancer_ip, "spec.loadBalancerIP")
    if spec.health_check_node_port and kind == "LoadBalancer" and not decode.wants_health_check(spec):
        said = "load balancers are told of endpoints here only where these alone are used"
        mend = "write 'externalTrafficPolicy: Local', or leave it out"
        yield ConfigError(said, field="spec.healthCheckNodePort", mend=mend)
    if spec.external_traffic_policy and kind == "ClusterIP" and not spec.external_ips:
        said = "a ClusterIP Service without externalIPs has no clients from outside"
        yield ConfigError(said, field="spec.externalTrafficPolicy", mend="leave it out, or write 'type: NodePort'")
    for index, item in enumerate(decode.ingress(service)):
        if item.ip_mode not in (None, "", "VIP", "Proxy"):
            field = f"status.loadBalancer.ingress[{index}].ipMode"
            yield ConfigError(f"{item.ip_mode!r} is no mode of an IP", field=field, mend="write VIP or Proxy")
    for key in service.metadata.annotations or ():
        if key.startswith(decode.ANNOTATION_PREFIX) and key not in decode.ANNOTATIONS:
            close = get_close_matches(key, decode.ANNOTATIONS, n=1)
            mend = f"did you mean {close[0]!r}?" if close else f"ours are {', '.join(decode.ANNOTATIONS)}"
            field = api.below("metadata.annotations", key)
            yield ConfigError(f"there is no annotation {key!r}", field=field, mend=mend)


def _follows(error: ConfigError, unknown: Sequence[ConfigError]) -> bool:
    """Return whether *error*, a wrong type, follows from the *unknown* fields right below its own."""
    _, lacks, missing = error.reason.partition("lacks the field ")
    if lacks:  # what is missing stands there, misspelt
        return any(is_meant(field, missing) for field in unknown)
    return any(field.reason == error.reason for field in unknown)


def _target_port_errors(port: api.ServicePort, index: int, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield why the target of *port* is not to be found in any of *pods*."""
    wanted, field = port.target_port, f"spec.ports[{index}].targetPort"
    if not isinstance(wanted, str) or not wanted:
        yield from _unlisted_port_errors(port, index, pods)
        return
    if wanted.isdigit():
        said = f"{wanted!r} in quotes is a name, which needs a letter"
        yield ConfigError(said, field=field, mend=f"write it without quotes: {wanted}")
        return
    if not _PORT_NAME.fullmatch(wanted):
        mend = "use small letters, digits and '-', 15 at most, as the Pod's port has them"
        yield ConfigError(f"{wanted!r} is not a valid port name", field=field, mend=mend)
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


def _unlisted_port_errors(port: api.ServicePort, index: int, pods: Sequence[api.Pod]) -> Iterator[ConfigError]:
    """Yield that none of *pods* lists the number that is *port*'s target; only if each lists some of its protocol.

    The list binds nobody, a container may listen at other ports: but to mix up the two is everybody's mistake.
    """
    number, protocol = port.target_port, port.protocol or "TCP"
    if not isinstance(number, int) or any(decode.number_errors(number, "")):
        return
    listed = [
        {offer.container_port for offer in decode.offered_ports(pod) if (offer.protocol or "TCP") == protocol}
        for pod in pods
    ]
    if not listed or not all(listed) or any(number in ports for ports in listed):
        return
    shown = ", ".join(map(str, sorted(set[int]().union(*listed))[:_SHOWN_PORTS_MAX]))
    said = f"no Pod that the selector finds lists port {number} (they list {shown})"
    mend = "if nothing listens there, connections are refused"
    yield ConfigError(said, field=f"spec.ports[{index}].targetPort", mend=mend)


# ---- picking things out


def _objects(manifests: Sequence[Manifest], kind: type[_Object]) -> Iterator[tuple[Manifest, _Object]]:
    for manifest in manifests:
        if isinstance(manifest.object, kind):
            yield manifest, manifest.object


def _template(manifest: Manifest) -> api.Pod | None:
    """Return a Pod as the workload *manifest* would make it, named after that; None if it has no readable template."""
    plain: Any = manifest.plain
    for step in ("spec", "template"):
        plain = plain.get(step) if isinstance(plain, dict) else None
    if not isinstance(plain, dict):
        return None
    try:
        pod = api.convert("Pod", {**plain, "metadata": {**(plain.get("metadata") or {}), "name": str(manifest)}})
    except (ConfigError, TypeError):  # a cluster would refuse it; its own fault is no matter of a proxy
        return None
    return pod if isinstance(pod, api.Pod) else None


def _template_name(manifest: Manifest) -> NamespacedName:
    return NamespacedName(manifest.name.namespace, str(manifest))


def _tracking(pods: Mapping[NamespacedName, api.Pod]) -> Tracker:
    tracker = Tracker(Allotments([]))
    tracker.apply(ObjectEvent(EventType.SET, "Pod", name, pod) for name, pod in pods.items())
    return tracker


def _closest(word: str, names: Collection[str], cutoff: float = 0.6) -> str:
    """Return which of *names* may be meant by *word*; "" if none is like it, or there are too many to look at."""
    matches = get_close_matches(word, names, n=1, cutoff=cutoff) if len(names) <= _CANDIDATES_MAX else []
    return matches[0] if matches else ""


def _pod_ip_fields(pod: api.Pod) -> list[tuple[str, str]]:
    status = pod.status
    if status is None:
        return []
    single = [("status.podIP", status.pod_ip)] if status.pod_ip else []
    return single + [
        (f"status.podIPs[{index}].ip", item.ip) for index, item in enumerate(status.pod_ips or ()) if item.ip
    ]
