"""Objects in few words, a tracker with shorthands, and the findings of `check` on a text."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.decode import ANNOTATION_PREFIX, Allocation
from userspace_proxy.control.lint import Finding, LintOptions, lint
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.modes import annotation_modes
from userspace_proxy.sources.documents import parse, split

SYNCED = ObjectEvent(EventType.SYNCED)
HTTP = [{"port": 80}]


OPTIONS = LintOptions(Settings().service_ranges, annotation_modes=annotation_modes(ANNOTATION_PREFIX))


def named(name: str) -> NamespacedName:
    return NamespacedName("default", name)


def port_named(service: str, port: str = "", protocol: L4Protocol = L4Protocol.TCP) -> ServicePortName:
    return ServicePortName(named(service), port, protocol)


def service(
    name: str = "web",
    *,
    labels: Mapping[str, str] | None = None,
    annotations: Mapping[str, str] | None = None,
    namespace: str | None = None,
    created: str | None = None,
    ingress: Iterable[Mapping[str, Any]] | None = None,
    **spec: Any,
) -> api.Service:
    """Return a Service with one port 80, unless *spec* says otherwise; *ingress*: its ingress status."""
    plain = {
        "metadata": {
            "name": name,
            "namespace": namespace,
            "labels": labels,
            "annotations": annotations,
            "creationTimestamp": created,
        },
        "spec": {"ports": HTTP, **spec},
        "status": None if ingress is None else {"loadBalancer": {"ingress": list(ingress)}},
    }
    made = api.convert("Service", plain)
    assert isinstance(made, api.Service)
    return made


def pod(
    name: str = "pod",
    ip: str | None = "10.244.0.1",
    *,
    labels: Mapping[str, str] | None = None,
    ports: Iterable[Mapping[str, Any]] = (),
    ready: bool | None = True,
    ending: bool = False,
    **status: Any,
) -> api.Pod:
    """Return a Pod with the label app=web; without conditions if *ready* is None."""
    conditions = None if ready is None else [{"type": "Ready", "status": str(ready)}]
    plain = {
        "metadata": {
            "name": name,
            "labels": {"app": "web"} if labels is None else labels,
            "deletionTimestamp": "2026-01-01T00:00:00Z" if ending else None,
        },
        "spec": {"nodeName": "node1", "containers": [{"ports": list(ports)}]},
        "status": {"podIP": ip, "conditions": conditions, **status},
    }
    made = api.convert("Pod", plain)
    assert isinstance(made, api.Pod)
    return made


def endpoint_slice(
    *endpoints: str | Mapping[str, Any],
    of: str | None = "web",
    name: str = "web-1",
    ports: Iterable[Mapping[str, Any]] = ({"port": 8080},),
    labels: Mapping[str, str] | None = None,
    address_type: str = "IPv4",
) -> api.EndpointSlice:
    """Return a slice; each endpoint is an address or a mapping."""
    known = {} if of is None else {"kubernetes.io/service-name": of}
    plain = {
        "metadata": {"name": name, "labels": {**known, **(labels or {})}},
        "addressType": address_type,
        "ports": list(ports),
        "endpoints": [{"addresses": [e]} if isinstance(e, str) else e for e in endpoints],
    }
    made = api.convert("EndpointSlice", plain)
    assert isinstance(made, api.EndpointSlice)
    return made


def endpoints(*subsets: Mapping[str, Any], name: str = "web") -> api.Endpoints:
    made = api.convert("Endpoints", {"metadata": {"name": name}, "subsets": list(subsets)})
    assert isinstance(made, api.Endpoints)
    return made


def node(
    name: str = "here",
    *addresses: tuple[str, str],
    zone: str | None = None,
    pod_cidrs: Iterable[str] | None = None,
) -> api.Node:
    """Return a Node; each address is a pair of type and IP."""
    plain = {
        "metadata": {"name": name, "labels": {} if zone is None else {"topology.kubernetes.io/zone": zone}},
        "spec": {"podCIDRs": None if pod_cidrs is None else list(pod_cidrs)},
        "status": {"addresses": [{"type": kind, "address": address} for kind, address in addresses]},
    }
    made = api.convert("Node", plain)
    assert isinstance(made, api.Node)
    return made


def put(thing: api.KubernetesObject) -> ObjectEvent:
    """Return the SET event of *thing*."""
    name = NamespacedName(thing.metadata.namespace or "default", thing.metadata.name)
    return ObjectEvent(EventType.SET, type(thing).__name__, name, thing)


def gone(kind: str, name: str) -> ObjectEvent:
    return ObjectEvent(EventType.DELETE, kind, named(name))


class WatchedAllocations(ManifestAllocations):
    """Records which Services were assigned values."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.worked_out: list[str] = []

    def assign(self, name: NamespacedName, service: api.Service) -> tuple[Allocation, list[ConfigError]]:
        self.worked_out.append(name.name)
        return super().assign(name, service)


class World:
    """A tracker, with short methods to apply objects and to read its state."""

    def __init__(
        self,
        *ranges: str,
        remembered: Mapping[str, str] | None = None,
        load_balancer_pool: Iterable[str] = (),
        here: Node | None = None,
    ) -> None:
        networks = [ipaddress.ip_network(text) for text in ranges or ("10.96.0.0/16",)]
        pool = [ipaddress.ip_network(text) for text in load_balancer_pool]
        self.allocations = WatchedAllocations(networks, SavedAllocations(cluster_ips=remembered or {}), pool)
        self.tracker = Tracker(self.allocations, here=here)
        self.state = ProxyState()

    def tell(self, *things: api.KubernetesObject | ObjectEvent) -> ProxyState:
        """Apply *things* as one batch and return the state after it."""
        self.tracker.apply([thing if isinstance(thing, ObjectEvent) else put(thing) for thing in things])
        self.state = self.tracker.state()
        return self.state

    def worked_out_for(self, *things: api.KubernetesObject | ObjectEvent) -> set[str]:
        """Apply *things* and return the Services that were computed again."""
        self.allocations.worked_out.clear()
        self.tell(*things)
        return set(self.allocations.worked_out)

    def port(self, name: str = "web", port: str = "", protocol: L4Protocol = L4Protocol.TCP) -> ServicePort:
        return self.state.service_ports[port_named(name, port, protocol)]

    @property
    def problems(self) -> list[str]:
        return list(self.tracker.problems.values())

    def ips(self, name: str, port: str = "") -> tuple[str, ...]:
        """Return the cluster IPs of a Service; none if it is not served."""
        found = self.state.service_ports.get(port_named(name, port))
        return found.cluster_ips if found else ()

    def endpoints(self, name: str = "web", port: str = "") -> tuple[Endpoint, ...]:
        return self.state.endpoints[port_named(name, port)]

    def addresses(self, name: str = "web", port: str = "") -> list[str]:
        return [str(endpoint) for endpoint in self.endpoints(name, port)]


def findings(text: str, options: LintOptions = OPTIONS) -> list[Finding]:
    manifests, problems = [], []
    for document in split("f", text):
        found, wrong = parse(document, for_check=True)
        manifests += found
        problems += wrong
    return lint(manifests, problems, options)


def faults(text: str, options: LintOptions = OPTIONS) -> list[Finding]:
    return [finding for finding in findings(text, options) if finding.severity == "fault"]
