"""Checks each object by itself, and each Service with the objects that belong to it. Pure.

Objects come and go one by one. After a change only the Services that it may affect are checked again. So `run` can
report after each edit what `check` would.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import chain, islice

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.lint.findings import Diagnostic, Finding, as_findings
from userspace_proxy.control.lint.index import WORKLOADS, Index, is_piece, service_of, with_template
from userspace_proxy.control.lint.no_endpoints import PortEndpoints, endpoints_of, orphan_error, refusals
from userspace_proxy.control.lint.options import LintOptions
from userspace_proxy.control.lint.single import object_errors
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import usable_endpoints
from userspace_proxy.sources.documents import Manifest, Problem, duplicates

# At most this many slices and Endpoints of a namespace are searched for one that may be meant for a Service.
_STRAYS_MAX = 20


class Linter:
    """Holds manifests and the diagnostics on them."""

    def __init__(self, options: LintOptions) -> None:
        self._options = options
        self._allocations = ManifestAllocations(options.cluster_ips, None, options.load_balancer_pool)
        self._index = Index()
        self._own: dict[Hashable, Sequence[Diagnostic]] = {}
        self._shared: dict[Hashable, Sequence[Diagnostic]] = {}
        self._concerned: dict[NamespacedName, None] = {}
        self._changed: dict[Hashable, None] = {}
        # Services without endpoints on which nothing is reported, because a faulty slice or Endpoints may be theirs.
        self._excused: dict[str, dict[NamespacedName, None]] = {}

    def examine(self, manifest: Manifest) -> tuple[Manifest, Sequence[Diagnostic]]:
        """Return *manifest* in the form to `add`, and the diagnostics on it alone. Changes nothing."""
        held = (with_template(manifest) if manifest.kind in WORKLOADS else None) or manifest
        errors: Iterable[tuple[ConfigError, bool]] = object_errors(manifest, self._options)
        if self._options.names_unserved and isinstance(manifest.object, api.Service):
            errors = chain(errors, ((note, False) for note in self._unserved(manifest.object)))
        return held, tuple(Diagnostic(held, *found) for found in errors)

    def add(self, held: Manifest, own: Sequence[Diagnostic]) -> None:
        """Add *held* with its *own* diagnostics, and mark the Services to check again."""
        if own:
            self._own[held] = own
        self._changed[held] = None
        self._concerned |= dict.fromkeys(self._index.add(held))

    def remove(self, held: Manifest) -> None:
        """Remove *held*, and mark the Services to check again."""
        self._own.pop(held, None)
        self._changed[held] = None
        self._concerned |= dict.fromkeys(self._index.remove(held))
        if is_piece(held):
            self._concerned |= self._excused.pop(held.name.namespace, {})

    def work(self) -> Iterator[None]:
        """Check the Services that changes may affect, one in each step.

        As in `run`, Services that state addresses and ports come before those that are allocated some. Services that
        lost a value to another one come last.
        """
        while self._concerned:
            names, self._concerned = self._concerned, {}
            present: dict[NamespacedName, api.Service] = {}
            for name in names:
                service = next((manifest.object for manifest in self._index.services.get(name, ())), None)
                if isinstance(service, api.Service) and decode.is_proxied(service, self._options.proxy_name):
                    present[name] = service
                else:  # removed Services first, so that their addresses are free
                    self._check(name)
                    yield
            for name in self._allocations.in_order(present):
                self._check(name)
                yield
            self._concerned |= dict.fromkeys(self._allocations.take_evicted())

    def _check(self, name: NamespacedName) -> None:
        self._changed[name] = None
        if found := list(self._service_diagnostics(name)):
            self._shared[name] = found
        else:
            self._shared.pop(name, None)

    def diagnostics(self) -> Iterator[Diagnostic]:
        """Yield all diagnostics."""
        for diagnostics in (self._own, self._shared):
            for found in diagnostics.values():
                yield from found

    def take_changed(self) -> dict[Hashable, Sequence[Diagnostic]]:
        """Return the diagnostics of each object and Service that was checked since the last call."""
        changed, self._changed = self._changed, {}
        return {key: self._own.get(key) or self._shared.get(key) or () for key in changed}

    # ---- one Service

    def _unserved(self, service: api.Service) -> Iterator[Note]:
        """Yield why no proxy serves *service*, or not as a load balancer."""
        spec = service.spec
        if spec is None:
            return
        if spec.type == "ExternalName":
            yield Note("an ExternalName Service is left to DNS; no proxy serves it", field="spec.type")
        elif decode.is_headless(service):
            yield Note("a headless Service is left to DNS; no proxy serves it", field="spec.clusterIP")
        elif decode.wants_load_balancer_ips(service) and not self._options.load_balancer_pool:
            fix = "give --load-balancer-pool, or status.loadBalancer.ingress"
            yield Note("it waits for a load balancer's address; the rest of it is served", field="spec.type", fix=fix)

    def _service_diagnostics(self, name: NamespacedName) -> Iterator[Diagnostic]:
        if not (manifests := self._index.services.get(name)):
            self._allocations.release(name)
            for piece in self._index.pieces.get(name, ()):
                if error := orphan_error(self._index, name, piece):
                    yield Diagnostic(piece, error)
            return
        manifest, service = manifests[0], manifests[0].object
        if not isinstance(service, api.Service) or service.spec is None:
            return
        if decode.is_proxied(service, self._options.proxy_name):
            yield from self._proxied_diagnostics(manifest, service, service.spec)
        else:
            self._allocations.release(name)

    def _proxied_diagnostics(
        self, manifest: Manifest, service: api.Service, spec: api.objects.ServiceSpec
    ) -> Iterator[Diagnostic]:
        name = manifest.name
        faults = [found.error for found in self._own.get(manifest, ()) if found.is_fault]
        fields = {error.field for error in faults}
        ports, conflicts = self._allocated_ports(name, service)
        for conflict in conflicts:
            if conflict.field not in fields:
                fields.add(conflict.field)
                yield Diagnostic(manifest, conflict, is_reported=True)
        # Consequences of a fault are not named: nothing after a wrong selector, only faults of Pods after others.
        if any(field.startswith("spec.selector") for field in fields):
            return
        if faults:
            ports = None
        if ports is not None or spec.selector:
            endpoints = endpoints_of(self._index, name, service, ports or {})
            if not faults:
                notes = chain(_family_notes(spec, endpoints), self._local_notes(spec, endpoints))
                yield from (Diagnostic(manifest, note) for note in notes)
            yield from self._endpoint_diagnostics(manifest, service, endpoints, fields)

    def _allocated_ports(
        self, name: NamespacedName, service: api.Service
    ) -> tuple[dict[int, ServicePort] | None, list[ConfigError]]:
        """Return the ports of *service*, or None if it has no cluster IP, and its conflicts with other Services."""
        allocation, conflicts = decode.Allocation(), list[ConfigError]()
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
        return ports if allocation.cluster_ips else None, conflicts

    def _endpoint_diagnostics(
        self, manifest: Manifest, service: api.Service, endpoints: PortEndpoints, fields: set[str]
    ) -> Iterator[Diagnostic]:
        """Yield why clients of *service* would be refused, unless a fault that was named explains it."""
        name, pieces = manifest.name, self._index.pieces.get(manifest.name, ())
        # A slice or Endpoints with a fault of its own explains by that why it has no endpoints.
        has_faulty_piece = any(map(self._has_fault, pieces))
        if not ((service.spec and service.spec.selector) or pieces) and self._has_faulty_stray(name.namespace):
            self._excused.setdefault(name.namespace, {})[name] = None
            return
        for where, why in refusals(self._index, manifest, service, endpoints):
            if why.field not in fields and not (where is not manifest and has_faulty_piece):
                yield Diagnostic(where, why)

    def _local_notes(self, spec: api.objects.ServiceSpec, ports: PortEndpoints) -> Iterator[Note]:
        """Yield that a Service of *spec* is served by no endpoint of this node, where its policy is Local."""
        node = self._options.node
        usable = [endpoint for _, endpoints in ports.values() for endpoint in usable_endpoints(endpoints)]
        if not (node and usable) or any(endpoint.node_name == node for endpoint in usable):
            return
        reason = f"no endpoint has 'nodeName: {node}': clients to whom this applies get no answer on this node"
        fix = "state the node of the endpoints, or see --hostname-override"
        if spec.internal_traffic_policy == "Local":
            yield Note(reason, field="spec.internalTrafficPolicy", fix=fix)
        if spec.external_traffic_policy == "Local":
            yield Note(reason, field="spec.externalTrafficPolicy", fix=fix)

    def _has_fault(self, manifest: Manifest) -> bool:
        return any(found.is_fault for found in self._own.get(manifest, ()))

    def _has_faulty_stray(self, namespace: str) -> bool:
        """Return whether a slice or Endpoints in *namespace* has a fault and belongs to no Service."""
        some = islice(self._index.pieces_in[namespace], _STRAYS_MAX)
        strays = ((piece, of) for piece in some if (of := service_of(piece)) not in self._index.services)
        return any(self._has_fault(piece) or self._has_wrong_name(piece, of) for piece, of in strays)

    def _has_wrong_name(self, piece: Manifest, of: NamespacedName | None) -> bool:
        orphan = orphan_error(self._index, of, piece) if of is not None else None
        return orphan is not None and not isinstance(orphan, Note)


def _family_notes(spec: api.objects.ServiceSpec, ports: PortEndpoints) -> Iterator[Note]:
    """Yield that a Service of *spec* is served by one IP family only, though it requires both."""
    families = {family for port, _ in ports.values() for family in port.families}
    if spec.ip_family_policy == "RequireDualStack" and len(families) == 1:
        fix = "give --service-cluster-ip-range a range of each family, or state both addresses"
        yield Note(f"it has IPv{families.pop()} alone", field="spec.ipFamilyPolicy", fix=fix)


def lint(manifests: Sequence[Manifest], problems: Iterable[Problem], options: LintOptions) -> list[Finding]:
    """Return the findings on *manifests*, read for a check, and on the *problems* of reading them."""
    linter = Linter(options)
    for manifest in manifests:
        linter.add(*linter.examine(manifest))
    for _ in linter.work():
        pass
    held = (manifest for manifest in manifests if manifest.object)
    return as_findings(linter.diagnostics(), [*problems, *duplicates(held, may_be_alternatives=True)])
