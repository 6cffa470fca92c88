"""YAML text -> plain values, as Kubernetes reads it. Nothing here knows of files or of objects.

A document is read event by event: libyaml's own way to make a tree recurses in C, where deep nesting ends the process.
What one document may cost is bounded by `Budget`, whatever it holds.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import yaml
from yaml.events import AliasEvent, CollectionStartEvent, MappingStartEvent, ScalarEvent, SequenceStartEvent

_TEXT, _MAPPING, _SEQUENCE = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "null": "null",
    "timestamp": "a date such as 2024-12-31",
    "binary": "Base64",
}
_SCALARS = {f"tag:yaml.org,2002:{name}": words for name, words in _WORDS.items()}
_IMPLICIT = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
_MERGE = "tag:yaml.org,2002:merge"
# No object of Kubernetes is nested half so deep.
DEPTH_MAX = 100
# Of a document's characters, with so many more for each value. 10,000 Services with their slices in one List: 20 MiB.
_SIZE_MAX = 64 * 1024 * 1024
_VALUE_SIZE = 32
# What aliases repeat, counted in the same way: for each character of the document, and in all.
_REPEATED_RATIO = 200
_REPEATED_MAX = 16 * 1024 * 1024
# A number of more characters than this fits nowhere.
_NUMBER_MAX = 128
# libyaml compares each directive with all before it.
_DIRECTIVES_MAX = 100
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_NO_KEY, _MERGED = object(), object()

_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's, where it is built in


class UnreadableValue(yaml.error.MarkedYAMLError):
    """The YAML is well formed, but cannot be read: it is over a bound, or a value is not what its tag says."""

    def __init__(self, problem: str, mark: Any, mend: str = "") -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.mend = mend


def plain_value(text: str) -> tuple[object, bool]:
    """Return what *text*, one YAML document, says (None: nothing), and whether a key stands twice in a mapping.

    Raises:
        yaml.YAMLError: it is broken, or over a bound; `yaml_faults.describe` has the words.
    """
    _refuse_size(text)
    loader = _Loader(text)
    try:
        builder = _Builder(loader, Budget(min(_REPEATED_MAX, _REPEATED_RATIO * len(text))))
        return builder.document(), builder.keys_were_lost
    finally:
        loader.dispose()


def _refuse_size(text: str) -> None:
    if len(text) > _SIZE_MAX:
        raise UnreadableValue(f"one document is larger than {_SIZE_MAX // 1024**2} MB", None, "split it with '---'")
    if "%" in text and len(_DIRECTIVE.findall(text)) > _DIRECTIVES_MAX:
        raise UnreadableValue(f"it has more than {_DIRECTIVES_MAX} lines that begin with '%'", None)


@lru_cache(maxsize=8192)
def _short_plain_tag(text: str) -> str:
    if ":" in text:  # YAML 1.1 has numbers to the base 60, so that 53:53 were 3233; Kubernetes has none
        return _TEXT
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if (tag in _IMPLICIT or tag == _MERGE) and pattern.match(text):
            return str(tag)
    return _TEXT


def _plain_tag(text: str) -> str:
    """Return the tag of *text* written without quotes. Manifests say the same few words again and again."""
    return _short_plain_tag(text) if len(text) <= _NUMBER_MAX else _short_plain_tag.__wrapped__(text)


@dataclass(slots=True)
class Budget:
    """What one document may still cost: ``repeated`` by aliases, ``size`` by what is written."""

    repeated: int
    size: int = _SIZE_MAX


class _Anchored(NamedTuple):
    value: object
    size: int


@dataclass(slots=True)
class _Collection:
    """A mapping or a sequence that is being read."""

    values: dict[object, object] | list[object]
    event: Any
    size_before: int
    key: object = _NO_KEY
    merged: list[dict[object, object]] = field(default_factory=list)


class _Builder:
    """Makes plain values of a loader's events."""

    def __init__(self, loader: Any, budget: Budget) -> None:
        self._next = loader.get_event
        self._budget = budget
        self._size = 0  # of all values until here, those that aliases repeat included
        self._anchors: dict[str, _Anchored | None] = {}  # None: what it stands for has not ended
        self.keys_were_lost = False  # to others of their mapping

    def document(self) -> object:
        self._next()  # the stream's start
        if isinstance(self._next(), yaml.StreamEndEvent):
            return None
        value = self._value()
        self._next()  # the document's end
        if not isinstance(event := self._next(), yaml.StreamEndEvent):
            raise yaml.composer.ComposerError(
                "expected a single document in the stream", None, "but found another document", event.start_mark
            )
        return value

    def _value(self) -> object:
        """Return the next value with all that is in it.

        Half of the time that reading manifests takes is spent here.
        """
        here: Any = None  # the _Collection, if any
        values: Any = None  # those of `here`
        above: list[_Collection] = []
        next_event, size_max = self._next, self._budget.size + self._budget.repeated
        value: object
        while True:
            event = next_event()
            kind = type(event)
            if kind is ScalarEvent:
                text = value = event.value
                self._size += _VALUE_SIZE + len(text)
                if (tag := event.tag or (event.implicit[0] and _plain_tag(text))) and tag != _TEXT and tag[0] != "!":
                    if tag == _MERGE and type(values) is dict and here.key is _NO_KEY:
                        here.key = _MERGED
                        continue
                    if event.tag or tag != _MERGE:
                        value = _scalar(tag, event)
                if event.anchor:
                    self._anchors[event.anchor] = _Anchored(value, _VALUE_SIZE + len(text))
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                if here is not None:
                    above.append(here)
                here = self._begin(event, here, len(above))
                values = here.values
                continue
            elif kind is AliasEvent:
                value = self._repeated(event)
            else:  # a collection's end
                value = self._end(here)
                here = above.pop() if above else None
                values = here.values if here is not None else None
            if self._size > size_max:
                raise UnreadableValue("one document holds too many values", event.start_mark, "split it with '---'")
            if type(values) is dict:
                if here.key is _NO_KEY:
                    if type(value) in (dict, list):
                        raise _no_text_as_key(event)
                    here.key = value if type(value) is str else _key(value)
                elif here.key is _MERGED:
                    self._merge(here, value, event)
                else:
                    key, here.key = here.key, _NO_KEY
                    if key in values:
                        self.keys_were_lost = True
                    values[key] = value
            elif values is not None:
                values.append(value)
            else:
                return value

    def _begin(self, event: Any, here: _Collection | None, depth: int) -> _Collection:
        """Return the collection that begins with *event* in *here*, at *depth*."""
        if depth >= DEPTH_MAX:
            raise UnreadableValue(f"it is nested more than {DEPTH_MAX} deep", event.start_mark, "nest it less")
        is_mapping = type(event) is MappingStartEvent
        if event.tag not in (None, _MAPPING if is_mapping else _SEQUENCE) and not _is_of_another_tool(event.tag):
            raise _unknown_tag(event)
        if here is not None and type(here.values) is dict and here.key is _NO_KEY:
            raise _no_text_as_key(event)
        if event.anchor:
            self._anchors[event.anchor] = None
        size_before = self._size
        self._size += _VALUE_SIZE
        return _Collection({} if is_mapping else [], event, size_before)

    def _end(self, here: _Collection) -> object:
        value = here.values
        if here.merged:
            value = {key: item for mapping in [*here.merged, value] for key, item in mapping.items()}  # type: ignore[union-attr]
        if here.event.anchor:
            self._anchors[here.event.anchor] = _Anchored(value, self._size - here.size_before)
        return value

    def _repeated(self, alias: Any) -> object:
        """Return what *alias* stands for."""
        if alias.anchor not in self._anchors:
            raise _undefined(alias)
        anchored = self._anchors[alias.anchor]
        if anchored is None:
            raise UnreadableValue(f"what the anchor {alias.anchor[:60]!r} stands for contains itself", alias.start_mark)
        self._budget.repeated -= anchored.size
        if self._budget.repeated < 0:
            said = "aliases and merge keys make the document far larger than it is written"
            raise UnreadableValue(said, alias.start_mark, "write out what they stand for")
        self._size += anchored.size
        return anchored.value

    def _merge(self, here: _Collection, value: object, event: Any) -> None:
        """Note that *value* is merged into *here*: of several the first counts; what *here* has itself, before any."""
        here.key = _NO_KEY
        for mapping in value[::-1] if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                said = f"a merge key needs a mapping or a list of mappings, not {_kind(mapping)}"
                raise UnreadableValue(said, event.start_mark, "write '<<: *anchor', or put '<<' in quotes")
            here.merged.append(mapping)


def _undefined(alias: Any) -> yaml.YAMLError:
    said = f"found undefined alias {alias.anchor[:60]!r}"
    return yaml.composer.ComposerError(None, None, said, alias.start_mark)


def _is_of_another_tool(tag: str) -> bool:
    """Return whether *tag* is one such as !vault or !Ref: Kubernetes reads the value without it."""
    return tag.startswith("!")


def _key(key: object) -> str:
    """Return *key* as text: in JSON, which the API server reads, every key is text."""
    return str(key).lower() if isinstance(key, bool) else "null" if key is None else str(key)


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else repr(value)[:60]


def _no_text_as_key(event: Any) -> yaml.YAMLError:
    return UnreadableValue("a key is no text", event.start_mark, "write a text before ':'")


def _unknown_tag(event: Any) -> yaml.YAMLError:
    tag = event.tag.replace("tag:yaml.org,2002:", "!!")
    return UnreadableValue(f"the tag {tag[:60]!r} has no meaning here", event.start_mark, "remove it")


def _scalar(tag: str, event: Any) -> object:
    """Return the value of a scalar that is no text."""
    if tag not in _SCALARS:
        raise _unknown_tag(event)
    text = event.value
    # The library's own constructors fail in every way: ValueError, KeyError, AttributeError.
    with contextlib.suppress(Exception):
        if len(text) <= _NUMBER_MAX:
            return _short_scalar(tag, text)
        if tag.endswith((":binary", ":null")):
            return _short_scalar.__wrapped__(tag, text)
    shown = text if len(text) <= _NUMBER_MAX else f"{text[:20]}... ({len(text)} characters)"
    said = f"{shown!r} cannot be read as {_SCALARS[tag]}"
    raise UnreadableValue(said, event.start_mark, "put it in quotes, without a tag, if a text is meant")


@lru_cache(maxsize=4096)
def _short_scalar(tag: str, text: str) -> object:
    return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))


# ---- where things are written


@dataclass(slots=True)
class Node:
    """A value and the line at which it begins, from 0.

    ``text``: of a scalar; ``items``: of a sequence; ``pairs``: of a mapping. ``is_flow``: it is written in brackets.
    ``first``: the first pair of each key, made at the first look-up.
    """

    line: int
    text: str | None = None
    items: list[Node] | None = None
    pairs: list[tuple[Node, Node]] | None = None
    is_merge: bool = False
    is_flow: bool = False
    first: dict[str | None, tuple[Node, Node]] | None = None

    def pair(self, key: str) -> tuple[Node, Node] | None:
        """Return *key* and its value, if this is a mapping that has it."""
        if self.first is None:
            self.first = {pair[0].text: pair for pair in reversed(self.pairs or ())}
        return self.first.get(key)


def compose(text: str) -> Node | None:
    """Return *text*, one YAML document, as a tree of nodes; None for an empty one. An alias is its anchor's node.

    Raises:
        yaml.YAMLError: it is broken.
    """
    _refuse_size(text)
    loader = _Loader(text)
    try:
        loader.get_event()
        if isinstance(loader.get_event(), yaml.StreamEndEvent):
            return None
        return _node(loader, loader.get_event(), {}, 0)
    finally:
        loader.dispose()


def _node(loader: Any, event: Any, anchors: dict[str, Node], depth: int) -> Node:
    line = event.start_mark.line
    if isinstance(event, AliasEvent):
        if event.anchor not in anchors:
            raise _undefined(event)
        return anchors[event.anchor]
    node = Node(line)
    if event.anchor:
        anchors[event.anchor] = node
    if isinstance(event, ScalarEvent):
        node.text = event.value
        node.is_merge = event.tag == _MERGE or (not event.tag and event.implicit[0] and event.value == "<<")
        return node
    assert isinstance(event, CollectionStartEvent)
    if depth >= DEPTH_MAX:
        raise UnreadableValue(f"it is nested more than {DEPTH_MAX} deep", event.start_mark)
    node.is_flow = bool(event.flow_style)
    inside = []
    while not isinstance(following := loader.get_event(), yaml.CollectionEndEvent):
        inside.append(_node(loader, following, anchors, depth + 1))
    if isinstance(event, MappingStartEvent):
        node.pairs = list(zip(inside[::2], inside[1::2], strict=True))
    else:
        node.items = inside
    return node
