"""Indexes manifests for the checks, and finds the Services that a change may affect. Pure."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.label_index import LabelIndex
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.documents import Manifest

WORKLOADS = ("Deployment", "ReplicaSet", "StatefulSet", "DaemonSet", "ReplicationController", "Job")


class Index:
    """Manifests by name, namespace and label; also faulty ones, because others refer to their names."""

    def __init__(self) -> None:
        self.services: dict[NamespacedName, list[Manifest]] = {}
        self.names_in: dict[str, set[str]] = defaultdict(set)  # a namespace -> the names of its Services
        self.pieces: dict[NamespacedName, list[Manifest]] = defaultdict(list)  # slices and Endpoints, by Service
        self.pieces_in: dict[str, dict[Manifest, None]] = defaultdict(dict)  # by namespace, also those of no Service
        self.pods = LabelIndex[tuple[Manifest, api.Pod]](
            lambda: ((name, self._selectors(name)) for name in self.services)
        )
        self._in_namespace: dict[str, dict[Manifest, api.Pod]] = defaultdict(dict)

    def add(self, manifest: Manifest) -> set[NamespacedName]:
        """Add *manifest*; return the Services to check again."""
        if manifest.kind == "Service":
            self.services.setdefault(manifest.name, []).append(manifest)
            self.names_in[manifest.name.namespace].add(manifest.name.name)
            self.pods.set_selectors(manifest.name, self._selectors(manifest.name))
            return {manifest.name}
        if is_piece(manifest):
            self.pieces_in[manifest.name.namespace][manifest] = None
        if (name := service_of(manifest)) is not None:
            self.pieces[name].append(manifest)
            return {name}
        pod = manifest.object
        if not (isinstance(pod, api.Pod) and pod.metadata.labels):
            return set()
        self._in_namespace[manifest.name.namespace][manifest] = pod
        return self.pods.add(manifest, manifest.name.namespace, pod.metadata.labels, (manifest, pod))

    def remove(self, manifest: Manifest) -> set[NamespacedName]:
        """Remove *manifest*; return the Services to check again."""
        name = manifest.name
        if manifest.kind == "Service":
            self.services[name].remove(manifest)
            if not self.services[name]:
                del self.services[name]
                self.names_in[name.namespace].discard(name.name)
            self.pods.set_selectors(name, self._selectors(name))
            return {name}
        self.pieces_in[name.namespace].pop(manifest, None)
        if (of := service_of(manifest)) is not None:
            self.pieces[of].remove(manifest)
            return {of}
        self._in_namespace[name.namespace].pop(manifest, None)
        labels = manifest.object.metadata.labels if isinstance(manifest.object, api.Pod) else None
        return self.pods.remove(manifest, name.namespace, labels or {})

    def _selectors(self, name: NamespacedName) -> Iterator[Mapping[str, str]]:
        for held in self.services.get(name, ()):
            if isinstance(held.object, api.Service) and held.object.spec is not None and held.object.spec.selector:
                yield held.object.spec.selector

    def selected(self, namespace: str, selector: Mapping[str, str], *, templates: bool = False) -> list[api.Pod]:
        """Return the Pods in *namespace*, or the templates of workloads, that *selector* matches."""
        return [
            pod
            for manifest, pod in self.pods.candidates(namespace, selector).values()
            if (manifest.kind != "Pod") is templates and selector.items() <= (pod.metadata.labels or {}).items()
        ]

    def pods_in(self, namespace: str) -> Iterable[tuple[Manifest, api.Pod]]:
        """Return the Pods and templates with labels in *namespace*."""
        return self._in_namespace[namespace].items() if namespace in self._in_namespace else ()

    def namespaces(self) -> Iterable[str]:
        return (namespace for namespace, held in self._in_namespace.items() if held)


def is_piece(manifest: Manifest) -> bool:
    """Return whether *manifest* is a slice or Endpoints, its kind misspelt or not."""
    return manifest.kind.lower().startswith("endpoint")


def service_of(manifest: Manifest) -> NamespacedName | None:
    """Return the Service that *manifest*, a slice or Endpoints, belongs to; None where it says none."""
    if isinstance(manifest.object, api.EndpointSlice):
        return decode.service_of(manifest.object, manifest.name.namespace)
    return manifest.name if isinstance(manifest.object, api.Endpoints) else None


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
    return replace(manifest, object=pod, plain=None)
