"""YAML text -> plain values, as Kubernetes reads it. Nothing here knows of files or of objects."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import yaml

_TEXT, _MAPPING, _SEQUENCE = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
MERGE = "tag:yaml.org,2002:merge"
# No object of Kubernetes is nested half so deep.
_DEPTH_MAX = 100
_BRACKET = re.compile(r"[\[\]{}]")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's, where it is built in
    """Reads what Kubernetes reads: a date is text there, and an impossible one (2024-13-45) is no error.

    Resolving tags is half the work of libyaml's binding, so it is done here without what nobody uses (tags by
    path) and remembered: manifests say the same few words again and again.
    """

    def resolve(self, kind: type, value: str, implicit: tuple[bool, bool]) -> str:
        if kind is yaml.ScalarNode:
            return _plain_tag(value) if implicit[0] else _TEXT
        return _SEQUENCE if kind is yaml.SequenceNode else _MAPPING

    def descend_resolver(self, parent: object, index: object) -> None:
        pass

    def ascend_resolver(self) -> None:
        pass


@lru_cache(maxsize=8192)
def _plain_tag(text: str) -> str:
    """Return the tag of *text* written without quotes."""
    if ":" in text:  # YAML 1.1 has numbers to the base 60, so that 53:53 were 3233; Kubernetes has none
        return _TEXT
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if (tag in _SCALARS or tag == MERGE) and pattern.match(text):
            return str(tag)
    return _TEXT


def plain_value(text: str) -> tuple[object, bool]:
    """Return what *text*, one YAML document, says (None: nothing), and whether keys may stand twice in a mapping.

    Raises:
        yaml.YAMLError: it is broken.
        ValueError: it cannot be read for another reason.
        RecursionError: the same, where brackets nest without end.
    """
    _refuse_deep_nesting(text)
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        plain = _Plain(loader)
        return (plain.value(root) if root is not None else None), plain.keys_were_lost
    finally:
        loader.dispose()


def compose(text: str) -> Any:
    """Return *text*, one YAML document, as a tree of nodes, which know their lines; None for an empty one.

    Raises:
        yaml.YAMLError: it is broken.
    """
    return yaml.compose(text, Loader=_Loader)


def _refuse_deep_nesting(text: str) -> None:
    """Raise ValueError for brackets nested so deep that libyaml, which recurses in C, would end the process."""
    depth = 0
    for bracket in _BRACKET.findall(text):
        depth += 1 if bracket in "[{" else -1
        if depth > _DEPTH_MAX:
            break
    else:
        return
    depth = 0  # some may have stood in texts: libyaml's own events tell
    for event in yaml.parse(text, Loader=_Loader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEPTH_MAX:
            raise ValueError(f"it is nested more than {_DEPTH_MAX} deep")


class _Plain:
    """Makes plain values of a tree of nodes; twice as fast as the library's own, which can do much more."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._made: dict[int, object] = {}  # what anchors share is made once
        self.keys_were_lost = False  # to others of their mapping, or to what is merged into it

    def value(self, node: Any) -> object:
        if node.tag == _TEXT:
            return node.value
        if node.tag in _SCALARS and isinstance(node, yaml.ScalarNode):
            return _scalar(node.tag, node.value)
        if id(node) in self._made:
            return self._made[id(node)]
        if node.tag == _MAPPING and isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if key.tag == MERGE:
                    self._loader.flatten_mapping(node)
                    break
            mapping: dict[object, object] = {}
            self._made[id(node)] = mapping  # before it is filled: an anchor may contain itself
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
                mapping[self.value(key)] = value.value if value.tag == _TEXT else self.value(value)
            if len(mapping) < len(node.value):
                self.keys_were_lost = True
            return mapping
        if node.tag == _SEQUENCE and isinstance(node, yaml.SequenceNode):
            sequence: list[object] = []
            self._made[id(node)] = sequence
            sequence += map(self.value, node.value)
            return sequence
        return self._loader.construct_object(node, deep=True)


@lru_cache(maxsize=4096)
def _scalar(tag: str, text: str) -> object:
    """Return the number, truth value or nothing that *text* stands for."""
    return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))
