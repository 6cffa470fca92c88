"""Keeps the latest version of every object and computes ProxyState. Pure.

An event marks the Services it concerns. `state` recomputes those and shares everything else with the previous state, so
the cost depends on the change only. model/topology.py decides which endpoints this node may use; a changed Node
therefore costs nothing here.
"""

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, islice
from types import MappingProxyType

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent, Origin
from userspace_proxy.control import decode
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.label_index import LabelIndex
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort, SourceIP
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node

log = logging.getLogger(__name__)


class Tracker:
    """Turns events of API objects into desired states.

    An invalid object never stops the others: it is reported, and its last good version stays in force. *here*: this
    node, used as far as there is no Node object. *source_ip*: default for Services without that annotation.
    *transparent_obstacle*: why Services here cannot be transparent, or "". *has_names*: states have what DNS says, too.
    """

    def __init__(
        self,
        allocations: Allocations,
        proxy_name: str = "",
        here: Node | None = None,
        source_ip: SourceIP = SourceIP.NODE,
        transparent_obstacle: str = "",
        *,
        has_names: bool = False,
    ) -> None:
        self._allocations = allocations
        self._proxy_name = proxy_name
        self._here = here or Node()
        self._source_ip = source_ip
        self._transparent_obstacle = transparent_obstacle
        self._has_names = has_names
        self._names: dict[NamespacedName, ServiceNames] = {}
        self.node: api.Node | None = None  # the latest Node object of this node
        self.knows_other_nodes = False
        self._services: dict[NamespacedName, api.Service] = {}  # the latest version that is valid by itself
        self._served: dict[NamespacedName, api.Service] = {}  # the latest version without conflicts with others
        self._origins: dict[NamespacedName, Origin] = {}
        self._since: dict[NamespacedName, float] = {}  # wall-clock second of the first good version
        self._slices: dict[NamespacedName, tuple[api.EndpointSlice, ...]] = {}  # by Service; most have one
        self._service_of_slice: dict[NamespacedName, NamespacedName] = {}
        self._endpoints: dict[NamespacedName, api.Endpoints] = {}
        self._pods: dict[NamespacedName, api.Pod] = {}
        self._pods_by_label = LabelIndex[api.Pod](
            lambda: ((name, self._selectors(name)) for name in self._services.keys() | self._served.keys())
        )
        self._changed: set[NamespacedName] = set()
        self._ports_of: dict[NamespacedName, tuple[ServicePortName, ...]] = {}
        self._service_ports: dict[ServicePortName, ServicePort] = {}
        self._ports_have_changed = False
        self._endpoints_of: dict[ServicePortName, tuple[Endpoint, ...]] = {}
        self._endpoint_changes: dict[ServicePortName, tuple[Endpoint, ...]] = {}
        self._service_cidrs: dict[NamespacedName, tuple[str, ...]] = {}
        self._state = ProxyState(node=self._here)
        self._faults: dict[NamespacedName, str] = {}  # until the Service object changes
        self._partial_problems: dict[NamespacedName, str] = {}  # problems in a part of a Service that is served
        self._conflicts: dict[NamespacedName, str] = {}  # checked again with every change

    @property
    def problems(self) -> Mapping[NamespacedName, str]:
        """Service -> location and reason, for Services that are not served exactly as written."""
        return {**self._partial_problems, **self._conflicts, **self._faults}

    @property
    def here(self) -> Node:
        """This node in the latest state."""
        return self._state.node

    @property
    def services(self) -> Mapping[NamespacedName, api.Service]:
        """The latest valid version of every Service, also of those that no proxy serves."""
        return self._services

    def endpoints_of(self, name: ServicePortName) -> tuple[Endpoint, ...]:
        """Return the endpoints of *name*, healthy or not."""
        return self._endpoints_of.get(name, ())

    def since(self, name: NamespacedName) -> float:
        """Return the wall-clock second since which the Service *name* is known here."""
        return self._since.get(name, 0.0)

    def related(self, name: NamespacedName, most: int) -> Iterator[api.KubernetesObject]:
        """Yield the slices and Endpoints of the Service *name*, and at most *most* Pods, first of its namespace."""
        yield from self._slices.get(name, ())
        if name in self._endpoints:
            yield self._endpoints[name]
        own = (pod for of, pod in self._pods.items() if of.namespace == name.namespace)
        others = (pod for of, pod in self._pods.items() if of.namespace != name.namespace)
        yield from islice(chain(own, others), most)

    def update_addresses(self, addresses: tuple[str, ...]) -> bool:
        """Use *addresses* as this host's own from now on; return whether they have changed."""
        has_changed = addresses != self._here.addresses
        self._here = replace(self._here, addresses=addresses)
        return has_changed

    def apply(self, events: Iterable[ObjectEvent]) -> None:
        """Record *events*. `state` then returns their effect. The name of an event is that in its object's metadata."""
        for event in events:
            if event.type is EventType.SYNCED:
                continue
            assert event.name is not None
            given = event.object if event.type is EventType.SET else None
            match event.kind:
                case "Service":
                    self._set_service(event.name, given, event.origin)
                case "EndpointSlice":
                    self._set_slice(event.name, given)
                case "Endpoints":
                    self._set_endpoints(event.name, given)
                case "Pod":
                    self._set_pod(event.name, given)
                case "Node":
                    self._set_node(event.name, given)
                case "ServiceCIDR":
                    self._set_service_cidr(event.name, given)

    # ---- one method for each kind; None is a deletion

    def _set_service(self, name: NamespacedName, given: object, origin: Origin | None) -> None:
        if isinstance(given, api.Service):
            try:
                decode.check_service(given, self._proxy_name)
            except ConfigError as error:
                self._report(self._faults, name, [error], origin, kept=name in self._services)
                return
            self._services[name] = given
            self._since.setdefault(name, time.time())
            if origin is not None:
                self._origins[name] = origin
        else:
            self._services.pop(name, None)
            self._since.pop(name, None)
            self._origins.pop(name, None)
        self._faults.pop(name, None)
        self._pods_by_label.set_selectors(name, self._selectors(name))
        self._changed.add(name)

    def _report(
        self,
        problems: dict[NamespacedName, str],
        name: NamespacedName,
        errors: Iterable[ConfigError],
        origin: Origin | None,
        *,
        kept: bool,
    ) -> None:
        reason = "; also ".join(
            f"{origin.where(error.field) if origin else name}: Service {name}: {error}" for error in errors
        )
        if problems.get(name) != reason:
            log.error("%s%s", reason, "; its last good version goes on serving" if kept else "")
        problems[name] = reason

    def _selectors(self, name: NamespacedName) -> Iterator[Mapping[str, str]]:
        """Yield the selectors of the latest version of *name* and of the served one."""
        for version in (self._services.get(name), self._served.get(name)):
            if version is not None and version.spec is not None and version.spec.selector:
                yield version.spec.selector

    def _set_slice(self, name: NamespacedName, given: object) -> None:
        before = self._service_of_slice.pop(name, None)
        if before is not None:
            pieces = self._slices.pop(before)
            if others := tuple(piece for piece in pieces if piece.metadata.name != name.name):
                self._slices[before] = others
            self._changed.add(before)
        if isinstance(given, api.EndpointSlice):
            service = decode.service_of(given, name.namespace)
            if service is not None:
                self._slices[service] = (*self._slices.get(service, ()), given)
                self._service_of_slice[name] = service
                self._changed.add(service)

    def _set_endpoints(self, name: NamespacedName, given: object) -> None:
        if isinstance(given, api.Endpoints):
            self._endpoints[name] = given
        else:
            self._endpoints.pop(name, None)
        self._changed.add(name)

    def _set_pod(self, name: NamespacedName, given: object) -> None:
        if (before := self._pods.pop(name, None)) is not None:
            self._changed |= self._pods_by_label.remove(name, name.namespace, before.metadata.labels or {})
        if isinstance(given, api.Pod):
            self._pods[name] = given
            self._changed |= self._pods_by_label.add(name, name.namespace, given.metadata.labels or {}, given)

    def _set_node(self, name: NamespacedName, given: object) -> None:
        if name.name != self._here.name:
            self.knows_other_nodes = True
            return
        if isinstance(given, api.Node):
            self.node = given
        else:
            log.warning("the Node %s was deleted; its last version stays in use", name.name)  # behaviours Z2

    def _set_service_cidr(self, name: NamespacedName, given: object) -> None:
        self._service_cidrs.pop(name, None)
        if isinstance(given, api.ServiceCIDR) and given.spec is not None:
            self._service_cidrs[name] = tuple(given.spec.cidrs or ())

    # ---- state

    def take_endpoint_changes(self) -> Mapping[ServicePortName, tuple[Endpoint, ...]]:
        """Return the previous endpoints of each service port whose endpoints changed since the last call."""
        changes, self._endpoint_changes = self._endpoint_changes, {}
        return changes

    def state(self) -> ProxyState:
        """Return the desired state; the same object as before if nothing has changed."""
        node = decode.node_of(self.node, self._here)
        if node != self._state.node:
            self._state = replace(self._state, node=node)
        service_cidrs = tuple(sorted({cidr for cidrs in self._service_cidrs.values() for cidr in cidrs}))
        if service_cidrs != self._state.service_cidrs:
            self._state = replace(self._state, service_cidrs=service_cidrs)
        if not self._changed:
            return self._state
        changed = self._update_changed()
        self._state = replace(
            self._state,
            service_ports=(
                MappingProxyType(self._service_ports.copy()) if self._ports_have_changed else self._state.service_ports
            ),
            endpoints=MappingProxyType(self._endpoints_of.copy()),
        )
        self._ports_have_changed = False
        if self._has_names:
            for name in changed:
                self._update_names(name)
            self._state = replace(self._state, names=MappingProxyType(dict(self._names)))
        return self._state

    def _update_changed(self) -> set[NamespacedName]:
        """Compute again the Services that changes concern; return their names."""
        changed, self._changed = self._changed, set()
        changed |= self._conflicts.keys()  # the cause of a conflict may be gone
        present: dict[NamespacedName, api.Service] = {}
        for name in changed:  # removed Services first, so that their addresses are free
            service = self._services.get(name)
            if service is None or not decode.is_proxied(service, self._proxy_name):
                self._remove_service(name)
            else:
                present[name] = service
        while present:
            changed |= present.keys()
            for name in self._allocations.in_order(dict(sorted(present.items()))):
                try:
                    self._update_service(name, present[name])
                except Exception as error:
                    log.exception("a bug: Service %s cannot be worked out; what it had stays", name)
                    self._conflicts[name] = f"{name}: {error!r}"
            present = {
                name: self._services[name] for name in self._allocations.take_evicted() if name in self._services
            }
        return changed

    def _update_names(self, name: NamespacedName) -> None:
        """Work out what DNS says of *name*; an equal value stays the same object."""
        names = None
        if (service := self._services.get(name)) is not None:
            names = self.names_of(name, service)
        if names is None:
            self._names.pop(name, None)
        elif names != self._names.get(name):
            self._names[name] = names

    def names_of(self, name: NamespacedName, service: api.Service) -> ServiceNames | None:
        """Return what cluster DNS publishes for *service*; None if it has no address."""
        if target := decode.external_name(service):
            return ServiceNames(external_name=target)
        if decode.is_headless(service):
            pods = self.selected_pods(name, service)
            return decode.headless_names(service, pods, self._sorted_slices(name), self._endpoints.get(name))
        if decode.is_proxied(service, self._proxy_name):
            served = self._served.get(name, service)
            ips = next((self._service_ports[port].cluster_ips for port in self._ports_of.get(name, ())), ())
            if not ips and name in self._served:  # it has SCTP ports alone
                ips = decode.valid_cluster_ips(served)
        else:
            served, ips = service, decode.valid_cluster_ips(service)  # another proxy serves it
        return decode.cluster_ip_names(served, ips) if ips else None

    def _remove_service(self, name: NamespacedName) -> None:
        self._allocations.release(name)
        self._conflicts.pop(name, None)
        self._partial_problems.pop(name, None)
        if self._served.pop(name, None) is not None:
            self._pods_by_label.set_selectors(name, self._selectors(name))
        self._replace(name, {}, {})

    def _update_service(self, name: NamespacedName, service: api.Service) -> None:
        try:
            allocation, missing = self._allocations.assign(name, service)
        except ConfigError as error:
            good = self._served.get(name)
            self._report(self._conflicts, name, [error], self._origins.get(name), kept=good is not None)
            if good is not None:  # the last good version stays, with current endpoints
                self._serve(name, good, self._allocations.held(name))
            return
        if missing:
            self._report(self._conflicts, name, missing, self._origins.get(name), kept=False)
        else:
            self._conflicts.pop(name, None)
        if problems := self._serve(name, service, allocation):
            self._report(self._partial_problems, name, problems, self._origins.get(name), kept=False)
        else:
            self._partial_problems.pop(name, None)
        if self._served.get(name) is not service:
            self._served[name] = service
            self._pods_by_label.set_selectors(name, self._selectors(name))

    def _serve(self, name: NamespacedName, service: api.Service, allocation: decode.Allocation) -> list[ConfigError]:
        """Compute the ports of *service* and their endpoints; return the problems of its parts."""
        ports, problems = decode.service_ports(name, service, allocation, self._source_ip, self._transparent_obstacle)
        sources = self._endpoint_sources(name, service)
        service_ports = {port.name: port for port in ports.values() if port.cluster_ips}  # S1
        self._replace(name, service_ports, {n: decode.endpoints_of(p, sources) for n, p in service_ports.items()})
        return problems

    def _endpoint_sources(self, name: NamespacedName, service: api.Service) -> list[decode.EndpointsByPort]:
        """Return the endpoints of *service* from the Pods it selects, or else from its slices and Endpoints.

        A dump of a cluster may hold a Service with a selector and its slices, but no Pods. The controller made those
        slices from the Pods, so they are used.
        """
        pods = self.selected_pods(name, service)
        if pods:
            return [decode.from_pods(service, pods)]
        pieces = self._sorted_slices(name)
        sources = [decode.from_slices(pieces)] if pieces else []
        if name in self._endpoints:
            sources.append(decode.from_endpoints(self._endpoints[name]))
        return sources

    def _sorted_slices(self, name: NamespacedName) -> list[api.EndpointSlice]:
        """Return the slices of the Service *name*, sorted by name so that the order of events has no effect."""
        return sorted(self._slices.get(name, ()), key=lambda piece: piece.metadata.name)

    def selected_pods(self, name: NamespacedName, service: api.Service) -> list[api.Pod]:
        """Return the Pods that *service* selects, sorted by name; none if it has no selector."""
        selector = service.spec.selector if service.spec else None
        if not selector:
            return []
        candidates = self._pods_by_label.candidates(name.namespace, selector).values()
        selected = [pod for pod in candidates if selector.items() <= (pod.metadata.labels or {}).items()]
        return sorted(selected, key=lambda pod: pod.metadata.name)

    def _replace(
        self,
        name: NamespacedName,
        service_ports: Mapping[ServicePortName, ServicePort],
        endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]],
    ) -> None:
        """Replace changed ports and endpoints and remove old ones; equal values stay the same objects."""
        for port_name in self._ports_of.pop(name, ()):
            if port_name not in service_ports:
                del self._service_ports[port_name]
                self._ports_have_changed = True
                self._endpoint_changes.setdefault(port_name, self._endpoints_of.pop(port_name))
        if service_ports:
            self._ports_of[name] = tuple(service_ports)
        for port_name, service_port in service_ports.items():
            if self._service_ports.get(port_name) != service_port:
                self._service_ports[port_name] = service_port
                self._ports_have_changed = True
            if self._endpoints_of.get(port_name) != endpoints[port_name]:
                self._endpoint_changes.setdefault(port_name, self._endpoints_of.get(port_name, ()))
                self._endpoints_of[port_name] = endpoints[port_name]
