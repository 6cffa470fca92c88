"""Finds the Pods that a Service may select, and the Services that may select a Pod. Pure."""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Generic, TypeVar

from userspace_proxy.model.names import NamespacedName

T = TypeVar("T")
# Namespace, label and value.
_LabelKey = tuple[str, str, str]


class LabelIndex(Generic[T]):
    """Indexes Pods by each of their labels, and Services by the first label of their selectors.

    The first label is the first by name. Every match has it, so a search looks at few Pods. Services are indexed from
    the first Pod on. *selectors* returns the selectors of each Service.
    """

    def __init__(self, selectors: Callable[[], Iterable[tuple[NamespacedName, Iterable[Mapping[str, str]]]]]) -> None:
        self._selectors = selectors
        self._has_had_pods = False
        self._pods: dict[_LabelKey, dict[Hashable, T]] = defaultdict(dict)
        self._selecting: dict[_LabelKey, set[NamespacedName]] = defaultdict(set)
        self._keys_of: dict[NamespacedName, tuple[_LabelKey, ...]] = {}

    def add(self, key: Hashable, namespace: str, labels: Mapping[str, str], pod: T) -> set[NamespacedName]:
        """Add *pod* under *key*; return the Services that may select it."""
        if not self._has_had_pods:
            self._has_had_pods = True
            for of_service in self._selectors():
                self.set_selectors(*of_service)
        keys = [(namespace, *label) for label in labels.items()]
        for label in keys:
            self._pods[label][key] = pod
        return set[NamespacedName]().union(*(self._selecting.get(label, ()) for label in keys))

    def remove(self, key: Hashable, namespace: str, labels: Mapping[str, str]) -> set[NamespacedName]:
        """Remove the Pod *key* with *labels*; return the Services that may have selected it."""
        keys = [(namespace, *label) for label in labels.items()]
        for label in keys:
            self._pods[label].pop(key, None)
            if not self._pods[label]:
                del self._pods[label]
        return set[NamespacedName]().union(*(self._selecting.get(label, ()) for label in keys))

    def set_selectors(self, name: NamespacedName, selectors: Iterable[Mapping[str, str]]) -> None:
        """Set the selectors of the Service *name*."""
        if not self._has_had_pods:
            return
        for key in self._keys_of.pop(name, ()):
            self._selecting[key].discard(name)
            if not self._selecting[key]:
                del self._selecting[key]
        if keys := tuple({_first_label(name.namespace, selector) for selector in selectors}):
            self._keys_of[name] = keys
        for key in keys:
            self._selecting[key].add(name)

    def candidates(self, namespace: str, selector: Mapping[str, str]) -> Mapping[Hashable, T]:
        """Return the Pods with the first label of *selector*, by key."""
        return self._pods.get(_first_label(namespace, selector), {})

    def is_selected(self, namespace: str, label: str, value: str) -> bool:
        """Return whether a Service in *namespace* has a selector with the first label *label*=*value*."""
        return (namespace, label, value) in self._selecting


def _first_label(namespace: str, selector: Mapping[str, str]) -> _LabelKey:
    label = min(selector)
    return namespace, label, selector[label]
