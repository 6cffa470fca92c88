"""What manifests ask the lab to simulate: Pods, workloads with replicas, and addresses written by hand. Pure.

Pods and workloads are read as plain values, because the proxy's own objects hold only what a proxy needs.
"""

import hashlib
import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from userspace_proxy import api
from userspace_proxy.api.objects import ServiceSpec
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.documents import Manifest, parse, split

WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController")
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # of generated names in Kubernetes
NODE_NAME = "node"


class Port(NamedTuple):
    """A port at which a pod answers."""

    number: int
    protocol: str  # TCP or UDP


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment, or another object that has Pods made from a template."""

    kind: str
    key: NamespacedName
    replicas: int
    template: Mapping[str, Any]
    subdomain: str = ""

    def revision(self, restarts: int) -> str:
        """Return a short hash of the template and of how often it was restarted."""
        return _word(f"{json.dumps(self.template, sort_keys=True, default=str)}{restarts or ''}", 9)

    def pod(self, revision: str, number: int) -> dict[str, Any]:
        """Return the manifest of the Pod *number* of this workload, without a status."""
        is_numbered = self.kind == "StatefulSet"
        middle = f"-{revision}" if self.kind == "Deployment" else ""
        end = str(number) if is_numbered else _word(f"{self.key}{revision}{number}", 5)
        name = f"{self.key.name}{middle}-{end}"
        spec = dict(mapping_of(self.template, "spec"))
        if is_numbered:
            spec |= {"hostname": name, "subdomain": self.subdomain}
        labels = mapping_of(self.template, "metadata").get("labels") or {}
        metadata = {"name": name, "namespace": self.key.namespace, "labels": labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@dataclass(frozen=True, slots=True)
class Declared:
    """The objects that manifests declare. ``addresses``: endpoints that are written by hand, with their ports."""

    pods: Mapping[NamespacedName, Mapping[str, Any]]
    workloads: Mapping[NamespacedName, Workload]
    services: Mapping[NamespacedName, ServiceSpec]
    addresses: Mapping[str, frozenset[Port]]

    def ports(self, pod: Mapping[str, Any]) -> frozenset[Port]:
        """Return the ports that containers of *pod* declare; if they declare none, those that Services target."""
        containers = mapping_of(pod, "spec").get("containers") or ()
        declared = [port for container in containers for port in container.get("ports") or ()]
        if declared:
            return frozenset(Port(int(port["containerPort"]), port.get("protocol") or "TCP") for port in declared)
        metadata = pod["metadata"]
        namespace, labels = metadata.get("namespace", "default"), metadata.get("labels") or {}
        return frozenset(
            Port(int(number), port.protocol or "TCP")
            for key, spec in self.services.items()
            if key.namespace == namespace and spec.selector and spec.selector.items() <= labels.items()
            for port in spec.ports or ()
            if str(number := port.target_port or port.port).isdigit()
        )


def read(path: str, text: str) -> tuple[list[Manifest], str, str]:
    """Return the objects in *text*, what the proxy gets of it, and the first fault that may hide an object, or "".

    The proxy gets all but Pods and workloads, at the same lines.
    """
    manifests, rest, fault = [], "", ""
    for document in split(path, text):
        found, problems = parse(document, for_check=True)
        fault = fault or next((str(problem) for problem in problems if problem.hides), "")
        manifests += found
        is_simulated = [manifest.kind == "Pod" or manifest.kind in WORKLOADS for manifest in found]
        if not any(is_simulated):
            rest += "\n" * (document.line - 1 - rest.count("\n")) + document.text
        elif not all(is_simulated):
            others = [one.plain for one, simulated in zip(found, is_simulated, strict=True) if not simulated]
            rest += "".join(f"\n---\n{json.dumps(other, default=str)}\n" for other in others)
    return manifests, rest, fault


def declared(manifests: Iterable[Manifest]) -> Declared:
    """Return the objects that *manifests* declare. Of two objects with the same name, the first one counts."""
    pods: dict[NamespacedName, Mapping[str, Any]] = {}
    workloads: dict[NamespacedName, Workload] = {}
    services: dict[NamespacedName, ServiceSpec] = {}
    addresses: dict[str, frozenset[Port]] = {}
    for manifest in manifests:
        key, plain, found = manifest.name, manifest.plain or {}, manifest.object
        if manifest.kind == "Pod":
            pods.setdefault(key, {**plain, "metadata": {**plain["metadata"], "namespace": key.namespace}})
        elif manifest.kind in WORKLOADS:
            workloads.setdefault(key, _workload(manifest.kind, key, mapping_of(plain, "spec")))
        elif isinstance(found, api.Service):
            services.setdefault(key, found.spec or ServiceSpec())
        elif isinstance(found, api.EndpointSlice | api.Endpoints):
            for address, ports in _addresses(found):
                addresses[address] = addresses.get(address, frozenset()) | ports
    return Declared(pods, workloads, services, addresses)


def _workload(kind: str, key: NamespacedName, spec: Mapping[str, Any]) -> Workload:
    replicas = spec.get("replicas", 1) if kind != "DaemonSet" else 1
    template = mapping_of(spec, "template")
    return Workload(kind, key, replicas if isinstance(replicas, int) else 1, template, spec.get("serviceName") or "")


def _addresses(found: api.EndpointSlice | api.Endpoints) -> Iterator[tuple[str, frozenset[Port]]]:
    """Yield the private IPv4 addresses of *found*, with their ports."""
    if isinstance(found, api.EndpointSlice):
        subsets = [([ip for one in found.endpoints or () for ip in one.addresses or ()], found.ports)]
    else:
        subsets = [([one.ip for one in subset.addresses or ()], subset.ports) for subset in found.subsets or ()]
    for ips, ports in subsets:
        numbers = frozenset(Port(port.port, port.protocol or "TCP") for port in ports or () if port.port)
        yield from ((ip, numbers) for ip in ips if _is_private(ip))


def _is_private(ip: str) -> bool:
    address = ipaddress.ip_address(ip)
    return address.version == 4 and address.is_private


def mapping_of(plain: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """Return *field* of *plain*; empty if it is no mapping."""
    value = plain.get(field)
    return value if isinstance(value, dict) else {}


def _word(text: str, length: int) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:length])
