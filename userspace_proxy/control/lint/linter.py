"""Findings: of each object by itself, and of each Service with what belongs to it. Pure.

Objects come and go one by one. What a change concerns is looked at anew and nothing else, so that `run` can say after
each edit what `check` would.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import NamedTuple

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.lint.behind import endpoints_of, orphan_error, refusals
from userspace_proxy.control.lint.index import WORKLOADS, Index, is_piece, service_of, with_template
from userspace_proxy.control.lint.single import object_errors
from userspace_proxy.control.pools import Network
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.service import ServicePort, SourceIP
from userspace_proxy.model.topology import usable_endpoints
from userspace_proxy.sources.documents import Manifest, Problem, duplicates
from userspace_proxy.sources.lines import Lines
from userspace_proxy.sources.pasted import FENCE, sign_in
from userspace_proxy.sources.yaml_faults import TEMPLATE, template_note

# So many slices and Endpoints of a namespace are looked at for one that may be meant for a Service without any.
_STRAYS_MAX = 20


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to say of a manifest.

    ``line`` is None where the whole file is meant, ``object`` "" where none is known. ``severity``: ``fault``, or
    ``note`` where nothing is wrong but something is incomplete here or has no effect.
    """

    file: str
    line: int | None
    field: str
    problem: str
    mend: str
    object: str
    severity: str = "fault"

    @property
    def where(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        said = "; ".join(filter(None, (self.problem, self.mend)))
        note = "note" if self.severity == "note" else ""
        return ": ".join(filter(None, (self.where, note, self.field, said)))


@dataclass(frozen=True, slots=True)
class LintOptions:
    """What `run` is told that decides what is wrong.

    ``mode`` and ``node`` are "" where none is known. ``names_unserved``: note which Services no proxy serves.
    """

    cluster_ips: Sequence[Network]
    load_balancer_pool: Sequence[Network] = ()
    proxy_name: str = ""
    source_ip: SourceIP = SourceIP.NODE
    mode: str = ""
    node: str = ""
    names_unserved: bool = False


class Found(NamedTuple):
    """``is_told``: `run` refuses by it, and says so by itself."""

    manifest: Manifest
    error: ConfigError
    is_told: bool = False


class Linter:
    """Knows what is wrong with the manifests that it was given, and looks again at what changes concern."""

    def __init__(self, options: LintOptions) -> None:
        self._options = options
        self._allocations = ManifestAllocations(options.cluster_ips, None, options.load_balancer_pool)
        self._index = Index()
        self._held: dict[Hashable, Manifest] = {}
        self._own: dict[Hashable, list[Found]] = {}
        self._shared: dict[Hashable, list[Found]] = {}
        self._concerned: dict[NamespacedName, None] = {}
        self._changed: dict[Hashable, None] = {}
        # Services without endpoints of which nothing is said, as a faulty slice or Endpoints may be theirs.
        self._excused: dict[str, dict[NamespacedName, None]] = {}

    def add(self, manifest: Manifest) -> None:
        """Take in *manifest*, which was read for a check."""
        key, held = _key(manifest), replace(manifest, plain=None, errors=())
        if key in self._held:
            self.remove(manifest)
        errors = object_errors(manifest, self._options.mode, self._options.cluster_ips)
        self._own[key] = [Found(held, error, is_told) for error, is_told in errors]
        if self._options.names_unserved and isinstance(manifest.object, api.Service):
            self._own[key] += [Found(held, note) for note in self._unserved(manifest.object)]
        if manifest.kind in WORKLOADS:
            held = with_template(manifest) or held
        self._held[key] = held = replace(held, plain=None)
        self._changed[key] = None
        self._concerned |= dict.fromkeys(self._index.add(held))

    def remove(self, manifest: Manifest) -> None:
        key = _key(manifest)
        self._own.pop(key, None)
        self._changed[key] = None
        if (held := self._held.pop(key, None)) is not None:  # else the same object stood twice in one file
            self._concerned |= dict.fromkeys(self._index.remove(held))
            if is_piece(held):
                self._concerned |= self._excused.pop(held.name.namespace, {})

    def work(self) -> bool:
        """Look at the Services that changes concern; return whether there were any.

        As for `run`, those that state addresses and ports go before those that are given some. Services that lost
        something to another one are left for the next call.
        """
        names, self._concerned = self._concerned, {}
        present: dict[NamespacedName, api.Service] = {}
        for name in names:
            service = next((manifest.object for manifest in self._index.services.get(name, ())), None)
            if isinstance(service, api.Service) and decode.is_proxied(service, self._options.proxy_name):
                present[name] = service
            else:  # what leaves goes first, so that addresses are free
                self._look_at(name)
        self._allocations.apply_moves(present)
        for name, _ in sorted(present.items(), key=lambda item: self._allocations.first(*item)):
            self._look_at(name)
        self._concerned |= dict.fromkeys(self._allocations.take_evicted())
        return bool(names)

    def _look_at(self, name: NamespacedName) -> None:
        self._changed[name] = None
        if found := list(self._of_service(name)):
            self._shared[name] = found
        else:
            self._shared.pop(name, None)

    def found(self) -> Iterator[Found]:
        """Yield all that is known."""
        for known in (self._own, self._shared):
            for found in known.values():
                yield from found

    def _partial(
        self, spec: api.objects.ServiceSpec, ports: Mapping[int, tuple[ServicePort, tuple[Endpoint, ...]]]
    ) -> Iterator[Note]:
        """Yield why a Service of *spec* is served by one family alone, or by no endpoint of this node."""
        families = {":" in ip for port, _ in ports.values() for ip in port.cluster_ips}
        if spec.ip_family_policy == "RequireDualStack" and len(families) == 1:
            said = f"it has {'IPv6' if True in families else 'IPv4'} alone"
            mend = "give --service-cluster-ip-range a range of each family, or state both addresses"
            yield Note(said, field="spec.ipFamilyPolicy", mend=mend)
        node = self._options.node
        for field, policy in (
            ("spec.internalTrafficPolicy", spec.internal_traffic_policy),
            ("spec.externalTrafficPolicy", spec.external_traffic_policy),
        ):
            known = [endpoint for _, endpoints in ports.values() for endpoint in usable_endpoints(endpoints)]
            if node and policy == "Local" and known and all(endpoint.node_name != node for endpoint in known):
                said = f"no endpoint has 'nodeName: {node}': clients to whom this applies get no answer on this node"
                yield Note(said, field=field, mend="state the node of the endpoints, or see --hostname-override")

    def take_changed(self) -> dict[Hashable, list[Found]]:
        """Return what is known of the objects and Services that were looked at since the last call."""
        changed, self._changed = self._changed, {}
        return {key: self._own.get(key) or self._shared.get(key) or [] for key in changed}

    def _unserved(self, service: api.Service) -> Iterator[Note]:
        """Yield why a proxy does not serve *service*, or not as a load balancer."""
        spec = service.spec
        if spec is None:
            return
        if spec.type == "ExternalName":
            yield Note("an ExternalName Service is left to DNS; no proxy serves it", field="spec.type")
        elif "None" in (spec.cluster_ip, *(spec.cluster_ips or ())[:1]):
            yield Note("a headless Service is left to DNS; no proxy serves it", field="spec.clusterIP")
        elif decode.wants_load_balancer_ips(service) and not self._options.load_balancer_pool:
            mend = "give --load-balancer-pool, or status.loadBalancer.ingress"
            yield Note("it waits for a load balancer's address; the rest of it is served", field="spec.type", mend=mend)

    def _of_service(self, name: NamespacedName) -> Iterator[Found]:
        services, pieces = self._index.services.get(name), self._index.pieces.get(name, ())
        if not services:
            self._allocations.release(name)
            for piece in pieces:
                if error := orphan_error(self._index, name, piece):
                    yield Found(piece, error)
            return
        manifest = services[0]
        service = manifest.object
        if not isinstance(service, api.Service) or service.spec is None:
            return
        if not decode.is_proxied(service, self._options.proxy_name):
            self._allocations.release(name)
            return
        faults = [found.error for found in self._own[_key(manifest)] if not isinstance(found.error, Note)]
        fields = {error.field for error in faults}
        allocation = decode.Allocation()
        conflicts: list[ConfigError] = []
        ports: dict[int, ServicePort] = {}
        try:
            allocation, conflicts = self._allocations.assign(name, service)
        except ConfigError as error:
            conflicts = [error]
        try:
            ports, problems = decode.service_ports(name, service, allocation, self._options.source_ip)
            conflicts += problems
        except ConfigError as error:
            conflicts.append(error)
        for conflict in conflicts:
            if conflict.field not in fields:
                fields.add(conflict.field)
                yield Found(manifest, conflict, is_told=True)
        # What follows from a fault is not said: of a selector that is wrong nothing, of other faults what Pods show.
        if any(field.startswith("spec.selector") for field in fields):
            return
        if (faults or not allocation.cluster_ips) and not service.spec.selector:
            return
        known = endpoints_of(self._index, name, service, {} if faults or not allocation.cluster_ips else ports)
        # A slice or Endpoints with a fault of its own says by that why it gives nothing.
        has_faulty_piece = any(
            not isinstance(found.error, Note) for piece in pieces for found in self._own.get(_key(piece), ())
        )
        if not faults:
            yield from (Found(manifest, note) for note in self._partial(service.spec, known))
        if not (service.spec.selector or pieces) and self._has_faulty_stray(name.namespace):
            self._excused.setdefault(name.namespace, {})[name] = None
            return
        for where, why in refusals(self._index, manifest, service, known):
            if why.field not in fields and not (where is not manifest and has_faulty_piece):
                yield Found(where, why)

    def _has_faulty_stray(self, namespace: str) -> bool:
        """Return whether a slice or Endpoints of *namespace* belongs to no Service by a fault that is named there."""
        for piece in islice(self._index.pieces_in[namespace].values(), _STRAYS_MAX):
            of = service_of(piece)
            if of in self._index.services:
                continue
            errors = [found.error for found in self._own.get(_key(piece), ())]
            if of is not None and (error := orphan_error(self._index, of, piece)):
                errors.append(error)
            if any(not isinstance(error, Note) for error in errors):
                return True
        return False


def _key(manifest: Manifest) -> Hashable:
    place = manifest.place
    return place.document.path, place.document.line, place.prefix, manifest.kind, manifest.name


def lint(manifests: Sequence[Manifest], problems: Iterable[Problem], options: LintOptions) -> list[Finding]:
    """Return what to say of *manifests*, read for a check, and the *problems* of reading them, by file and line."""
    linter = Linter(options)
    for manifest in manifests:
        linter.add(manifest)
    while linter.work():
        pass
    held = (manifest for manifest in manifests if manifest.object)
    found = [_of_problem(problem) for problem in [*problems, *duplicates(held, may_be_alternatives=True)]]
    return as_findings(linter.found(), found)


def as_findings(found: Iterable[Found], others: Iterable[Finding] = ()) -> list[Finding]:
    """Return *found* with the lines, and *others*, by file and line."""
    lines = Lines()
    unique: dict[Hashable, Finding] = {}
    for finding in others:  # of fences, which come in pairs, the first is named
        line = 0 if finding.problem == FENCE else finding.line
        unique.setdefault((finding.file, line, finding.field, finding.problem), finding)
    for each in found:
        finding, is_of_line = _finding(each, lines)
        unique.setdefault((finding.file, finding.line, "" if is_of_line else finding.field, finding.problem), finding)
    at_fault = {(f.file, f.line, f.field) for f in unique.values() if f.severity == "fault"}
    told = [f for f in unique.values() if f.severity == "fault" or (f.file, f.line, f.field) not in at_fault]
    return sorted(told, key=lambda finding: (finding.file, finding.line or 0))


def _finding(found: Found, lines: Lines) -> tuple[Finding, bool]:
    """Return *found* with its line, and whether the line itself explains it: it was copied, or is of a template."""
    manifest, error = found.manifest, found.error
    document = manifest.place.document
    line = lines.line_of(manifest.place, error.field)
    row = lines.row(document, line)
    if not isinstance(error, Note):
        error = template_note(error.field) if TEMPLATE.search(row) else sign_in(row, error.field) or error
    said = Finding(document.path, line, error.field, error.reason, error.mend, str(manifest), _severity(error))
    return said, error is not found.error


def _of_problem(problem: Problem) -> Finding:
    error = problem.error
    return Finding(problem.path, problem.line, error.field, error.reason, error.mend, problem.object, _severity(error))


def _severity(error: ConfigError) -> str:
    return "note" if isinstance(error, Note) else "fault"
