"""What manifests ask the lab to simulate: Pods, workloads with replicas, and addresses written by hand. Pure.

Manifests are read as plain values, because the proxy's own objects hold only what a proxy needs.
"""

from __future__ import annotations

import hashlib
import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from userspace_proxy.sources.documents import Manifest, parse, split

WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController")
_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"  # of generated names in Kubernetes
NODE_NAME = "node"


class Key(NamedTuple):
    """A namespace and a name."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class Port(NamedTuple):
    """A port at which a pod answers."""

    number: int
    protocol: str  # TCP or UDP


@dataclass(frozen=True, slots=True)
class Workload:
    """A Deployment, or another object that has Pods made from a template."""

    kind: str
    key: Key
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
        spec = dict(self.template.get("spec") or {})
        if is_numbered:
            spec |= {"hostname": name, "subdomain": self.subdomain}
        labels = _mapping(self.template, "metadata").get("labels") or {}
        metadata = {"name": name, "namespace": self.key.namespace, "labels": labels}
        return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What manifests ask for. ``addresses``: endpoints that are written by hand, with their ports."""

    pods: Mapping[Key, Mapping[str, Any]]
    workloads: Mapping[Key, Workload]
    services: Mapping[Key, Mapping[str, Any]]
    addresses: Mapping[str, frozenset[Port]]

    def ports(self, pod: Mapping[str, Any]) -> frozenset[Port]:
        """Return the ports that containers of *pod* declare; if they declare none, those that Services ask for."""
        containers = _mapping(pod, "spec").get("containers") or ()
        declared = [port for container in containers for port in container.get("ports") or ()]
        if declared:
            return frozenset(_port(port["containerPort"], port) for port in declared)
        metadata = pod["metadata"]
        return frozenset(
            _port(number, port)
            for key, spec in self.services.items()
            if key.namespace == metadata.get("namespace", "default") and _selects(spec, metadata.get("labels") or {})
            for port in spec.get("ports") or ()
            if str(number := port.get("targetPort") or port["port"]).isdigit()
        )


def read(path: str, text: str) -> tuple[list[Manifest], str]:
    """Return the objects in *text*, and what the proxy gets of it: all but Pods and workloads, at the same lines."""
    manifests, rest = [], ""
    for document in split(path, text):
        found, _ = parse(document, for_check=True)
        manifests += found
        is_simulated = [manifest.kind == "Pod" or manifest.kind in WORKLOADS for manifest in found]
        if not any(is_simulated):
            rest += "\n" * (document.line - 1 - rest.count("\n")) + document.text
        elif not all(is_simulated):
            others = [one.plain for one, simulated in zip(found, is_simulated, strict=True) if not simulated]
            rest += "".join(f"\n---\n{json.dumps(other, default=str)}\n" for other in others)
    return manifests, rest


def wanted(manifests: Iterable[Manifest]) -> Wanted:
    """Return what *manifests* ask for; of two objects with one name, the first."""
    pods: dict[Key, Mapping[str, Any]] = {}
    workloads: dict[Key, Workload] = {}
    services: dict[Key, Mapping[str, Any]] = {}
    addresses: dict[str, frozenset[Port]] = {}
    for manifest in manifests:
        key, plain = Key(manifest.name.namespace, manifest.name.name), manifest.plain or {}
        if manifest.kind == "Pod":
            pods.setdefault(key, {**plain, "metadata": {**plain["metadata"], "namespace": key.namespace}})
        elif manifest.kind == "Service":
            services.setdefault(key, _mapping(plain, "spec"))
        elif manifest.kind in WORKLOADS:
            workloads.setdefault(key, _workload(manifest.kind, key, _mapping(plain, "spec")))
        else:
            for address, ports in _addresses(manifest.kind, plain):
                addresses[address] = addresses.get(address, frozenset()) | ports
    return Wanted(pods, workloads, services, addresses)


def _workload(kind: str, key: Key, spec: Mapping[str, Any]) -> Workload:
    replicas = spec.get("replicas", 1) if kind != "DaemonSet" else 1
    template = _mapping(spec, "template")
    return Workload(kind, key, replicas if isinstance(replicas, int) else 1, template, spec.get("serviceName") or "")


def _addresses(kind: str, plain: Mapping[str, Any]) -> Iterator[tuple[str, frozenset[Port]]]:
    """Yield the private IPv4 addresses of an EndpointSlice or Endpoints, with their ports."""
    if kind == "EndpointSlice":
        subsets = [([ip for one in plain.get("endpoints") or () for ip in one.get("addresses") or ()], plain)]
    elif kind == "Endpoints":
        subsets = [([one["ip"] for one in subset.get("addresses") or ()], subset) for subset in plain["subsets"] or ()]
    else:
        return
    for ips, subset in subsets:
        ports = frozenset(_port(port["port"], port) for port in subset.get("ports") or () if port.get("port"))
        for ip in ips:
            if ipaddress.ip_address(ip).version == 4 and ipaddress.ip_address(ip).is_private:
                yield ip, ports


def _port(number: object, port: Mapping[str, Any]) -> Port:
    return Port(int(str(number)), port.get("protocol") or "TCP")


def _selects(spec: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    selector = _mapping(spec, "selector")
    return bool(selector) and selector.items() <= labels.items()


def _mapping(plain: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = plain.get(field)
    return value if isinstance(value, dict) else {}


def _word(text: str, length: int) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return "".join(_ALPHABET[byte % len(_ALPHABET)] for byte in digest[:length])
