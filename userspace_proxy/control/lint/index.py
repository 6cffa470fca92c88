"""Objects by what rules ask for, and which Services a change concerns. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.documents import Manifest

WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job")
_LabelKey = tuple[str, str, str]


class Index:
    """Holds manifests of which not all can be used: one with a fault still has a name that others mean."""

    def __init__(self) -> None:
        self.services: dict[NamespacedName, list[Manifest]] = {}
        self.namespaces_of: dict[str, set[str]] = defaultdict(set)  # a Service's name -> where there is one
        self.names_in: dict[str, set[str]] = defaultdict(set)  # a namespace -> the names of its Services
        self.pieces: dict[NamespacedName, list[Manifest]] = defaultdict(list)  # slices and Endpoints, by Service
        self.pieces_in: dict[str, dict[int, Manifest]] = defaultdict(dict)  # by namespace, also those of no Service
        self._pods: dict[_LabelKey, list[tuple[Manifest, api.Pod]]] = defaultdict(list)
        self._in_namespace: dict[str, dict[int, tuple[Manifest, api.Pod]]] = defaultdict(dict)
        self._selecting: dict[_LabelKey, set[NamespacedName]] = defaultdict(set)

    def add(self, manifest: Manifest) -> set[NamespacedName]:
        """Take *manifest* in; return the names of the Services that it concerns."""
        if manifest.kind == "Service":
            self.services.setdefault(manifest.name, []).append(manifest)
            self.namespaces_of[manifest.name.name].add(manifest.name.namespace)
            self.names_in[manifest.name.namespace].add(manifest.name.name)
            for key in _selector_keys(manifest):
                self._selecting[key].add(manifest.name)
            return {manifest.name}
        if is_piece(manifest):
            self.pieces_in[manifest.name.namespace][id(manifest)] = manifest
        if (name := service_of(manifest)) is not None:
            self.pieces[name].append(manifest)
            return {name}
        concerned: set[NamespacedName] = set()
        for key, pod in _labelled(manifest):
            self._pods[key].append((manifest, pod))
            self._in_namespace[manifest.name.namespace][id(manifest)] = manifest, pod
            concerned |= self._selecting.get(key, set())
        return concerned

    def remove(self, manifest: Manifest) -> set[NamespacedName]:
        """Let *manifest* go; return the names of the Services that it concerned."""
        name = manifest.name
        if manifest.kind == "Service":
            self.services[name].remove(manifest)
            if not self.services[name]:
                del self.services[name]
                self.namespaces_of[name.name].discard(name.namespace)
                self.names_in[name.namespace].discard(name.name)
            left = {key for other in self.services.get(name, ()) for key in _selector_keys(other)}
            for key in _selector_keys(manifest):
                if key not in left:
                    self._selecting[key].discard(name)
            return {name}
        self.pieces_in[name.namespace].pop(id(manifest), None)
        if (of := service_of(manifest)) is not None:
            self.pieces[of].remove(manifest)
            return {of}
        concerned: set[NamespacedName] = set()
        for key, _ in _labelled(manifest):
            self._pods[key] = [held for held in self._pods[key] if held[0] is not manifest]
            if not self._pods[key]:
                del self._pods[key]
            self._in_namespace[name.namespace].pop(id(manifest), None)
            concerned |= self._selecting.get(key, set())
        return concerned

    def selected(self, namespace: str, selector: Mapping[str, str], *, templates: bool = False) -> list[api.Pod]:
        """Return the Pods, or the templates of workloads, that *selector* finds in *namespace*."""
        key = _key(namespace, selector)
        return [
            pod
            for manifest, pod in self._pods.get(key, ())
            if (manifest.kind != "Pod") is templates and selector.items() <= (pod.metadata.labels or {}).items()
        ]

    def is_selected(self, namespace: str, label: str, value: str) -> bool:
        """Return whether the selector of a Service in *namespace* begins with this label, in order of names."""
        return bool(self._selecting.get((namespace, label, value)))

    def pods_in(self, namespace: str) -> Iterable[tuple[Manifest, api.Pod]]:
        """Return the Pods and templates with labels in *namespace*."""
        return self._in_namespace[namespace].values() if namespace in self._in_namespace else ()

    def namespaces(self) -> Iterable[str]:
        return (namespace for namespace, held in self._in_namespace.items() if held)


def _key(namespace: str, labels: Mapping[str, str]) -> _LabelKey:
    """Return one label that every match must have: the first in order of names."""
    label = min(labels)
    return namespace, label, labels[label]


def _selector_keys(manifest: Manifest) -> list[_LabelKey]:
    spec = manifest.object.spec if isinstance(manifest.object, api.Service) else None
    return [_key(manifest.name.namespace, spec.selector)] if spec is not None and spec.selector else []


def is_piece(manifest: Manifest) -> bool:
    """Return whether *manifest* is a slice or Endpoints, its kind misspelt or not."""
    return manifest.kind.lower().startswith("endpoint")


def service_of(manifest: Manifest) -> NamespacedName | None:
    """Return the Service that *manifest*, a slice or Endpoints, belongs to; None where it says none."""
    if isinstance(manifest.object, api.EndpointSlice):
        return decode.service_of(manifest.object, manifest.name.namespace)
    return manifest.name if isinstance(manifest.object, api.Endpoints) else None


def _labelled(manifest: Manifest) -> Iterator[tuple[_LabelKey, api.Pod]]:
    pod = manifest.object
    if isinstance(pod, api.Pod):
        for label, value in (pod.metadata.labels or {}).items():
            yield (manifest.name.namespace, label, value), pod


def with_template(manifest: Manifest) -> Manifest | None:
    """Return *manifest*, a workload, with a Pod as it would make it, named after it; None if it has no template."""
    plain: Any = manifest.plain
    for step in ("spec", "template"):
        plain = plain.get(step) if isinstance(plain, dict) else None
    if not isinstance(plain, dict):
        return None
    try:
        pod = api.convert("Pod", {**plain, "metadata": {**(plain.get("metadata") or {}), "name": str(manifest)}})
    except (ConfigError, TypeError):  # a cluster would refuse it; its own fault is no matter of a proxy
        return None
    return replace(manifest, object=pod)
