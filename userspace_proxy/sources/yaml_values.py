"""Parses YAML text into plain values as Kubernetes does. Independent of files and objects.

Documents are read event by event, because libyaml's tree builder recurses in C and deep nesting would crash the
process. `Budget` bounds the cost of any document.
"""

import contextlib
import re
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import yaml
from yaml.composer import Composer, ComposerError
from yaml.events import AliasEvent, MappingStartEvent, ScalarEvent, SequenceStartEvent
from yaml.resolver import BaseResolver

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
# More than twice the depth of any Kubernetes object.
DEPTH_MAX = 100
# Maximum size of a document: its characters, plus a constant for each value. 10,000 Services with their slices in one
# List take 20 MiB.
_SIZE_MAX = 64 * 1024 * 1024
_VALUE_SIZE = 32
# Maximum size repeated by aliases: for each character of the document, and in total.
_REPEATED_RATIO = 200
_REPEATED_MAX = 16 * 1024 * 1024
# No number has more characters.
_NUMBER_MAX = 128
# libyaml compares each directive with all earlier ones.
_DIRECTIVES_MAX = 100
_DIRECTIVE = re.compile(r"^%", re.MULTILINE)
_NO_KEY, _MERGED = object(), object()

# The C loaders, if they are available.
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TreeLoader = getattr(yaml, "CBaseLoader", yaml.BaseLoader)


class UnreadableValue(yaml.error.MarkedYAMLError):
    """Well-formed YAML that is rejected: it exceeds a limit, or a value does not match its tag."""

    def __init__(self, problem: str, mark: Any, fix: str = "") -> None:
        super().__init__(problem=problem, problem_mark=mark)
        self.fix = fix


def plain_value(text: str) -> tuple[object, bool]:
    """Return the value of *text*, one YAML document (None if empty), and whether a mapping has a duplicate key.

    Raises:
        yaml.YAMLError: *text* is not valid YAML or exceeds a limit; `yaml_faults.describe` explains the error.
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
def _short_plain(text: str) -> tuple[str, str]:
    if ":" in text:  # YAML 1.1 reads 53:53 as a base-60 number (3233); Kubernetes does not
        return text, _TEXT
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if (tag in _IMPLICIT or tag == _MERGE) and pattern.match(text):
            return text, str(tag)
    return text, _TEXT


def _plain(text: str) -> tuple[str, str]:
    """Return the unquoted *text* and its tag. Short texts are cached: manifests repeat words, which are kept once."""
    return _short_plain(text) if len(text) <= _NUMBER_MAX else _short_plain.__wrapped__(text)


@dataclass(slots=True)
class Budget:
    """The remaining cost allowed for one document: ``repeated`` by aliases, ``size`` in all."""

    repeated: int
    size: int = _SIZE_MAX


class _Anchored(NamedTuple):
    value: object
    size: int


@dataclass(slots=True)
class _Collection:
    """A mapping or sequence while it is read."""

    values: dict[object, object] | list[object]
    event: Any
    size_before: int
    is_mapping: bool
    key: object = _NO_KEY
    merged: list[dict[object, object]] = field(default_factory=list)


class _Builder:
    """Builds plain values from a loader's events."""

    def __init__(self, loader: Any, budget: Budget) -> None:
        self._next = loader.get_event
        self._budget = budget
        self._size = 0  # of all values so far, including repetitions by aliases
        self._anchors: dict[str, _Anchored | None] = {}  # None: its value is still being read
        self.keys_were_lost = False  # a duplicate key replaced an earlier one

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
        """Return the next value, with everything nested in it.

        The hot loop: half of the time for reading manifests is spent here.
        """
        here: _Collection | None = None  # the innermost collection that is being read
        above: list[_Collection] = []
        next_event, size_max = self._next, self._budget.size + self._budget.repeated
        while True:
            event = next_event()
            kind = type(event)
            if kind is ScalarEvent:
                value = self._read_scalar(event, here)
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                if here is not None:
                    above.append(here)
                here = self._begin(event, here, len(above))
                continue
            elif kind is AliasEvent:
                value = self._repeated(event)
            else:  # a collection's end
                assert here is not None
                value = self._end(here)
                here = above.pop() if above else None
            if self._size > size_max:
                raise UnreadableValue("one document holds too many values", event.start_mark, "split it with '---'")
            if here is None:
                return value
            if here.is_mapping:
                self._put(here, value, event)
            else:
                here.values.append(value)  # type: ignore[union-attr]

    def _read_scalar(self, event: Any, here: _Collection | None) -> object:
        """Return the value of a scalar, or _MERGED for a merge key of the mapping *here*."""
        text = event.value
        size = _VALUE_SIZE + len(text)
        self._size += size
        tag = event.tag
        if not tag and event.implicit[0]:
            text, tag = _plain(text)
        value: object = text
        if tag and tag != _TEXT and tag[0] != "!":
            if tag == _MERGE and here is not None and here.is_mapping and here.key is _NO_KEY:
                return _MERGED
            if event.tag or tag != _MERGE:
                value = _scalar(tag, event)
        if event.anchor:
            self._anchors[event.anchor] = _Anchored(value, size)
        return value

    def _put(self, here: _Collection, value: object, event: Any) -> None:
        """Take *value* as the next key of the mapping *here*, or as the value of its last key."""
        if here.key is _NO_KEY:
            if type(value) in (dict, list):
                raise _no_text_as_key(event)
            here.key = value if type(value) is str or value is _MERGED else _key(value)
        elif here.key is _MERGED:
            self._merge(here, value, event)
        else:
            key, here.key = here.key, _NO_KEY
            if key in here.values:
                self.keys_were_lost = True
            here.values[key] = value  # type: ignore[call-overload]

    def _begin(self, event: Any, here: _Collection | None, depth: int) -> _Collection:
        """Return the new collection that *event* begins inside *here*, at *depth*."""
        if depth >= DEPTH_MAX:
            raise UnreadableValue(f"it is nested more than {DEPTH_MAX} deep", event.start_mark, "nest it less")
        is_mapping = type(event) is MappingStartEvent
        if event.tag not in (None, _MAPPING if is_mapping else _SEQUENCE) and not _is_of_another_tool(event.tag):
            raise _unknown_tag(event)
        if here is not None and here.is_mapping and here.key is _NO_KEY:
            raise _no_text_as_key(event)
        if event.anchor:
            self._anchors[event.anchor] = None
        size_before = self._size
        self._size += _VALUE_SIZE
        return _Collection({} if is_mapping else [], event, size_before, is_mapping)

    def _end(self, here: _Collection) -> object:
        value = here.values
        if here.merged:
            value = {key: item for mapping in [*here.merged, value] for key, item in mapping.items()}  # type: ignore[union-attr]
        if here.event.anchor:
            self._anchors[here.event.anchor] = _Anchored(value, self._size - here.size_before)
        return value

    def _repeated(self, alias: Any) -> object:
        """Return the value of *alias*, and charge its size to the budget."""
        if alias.anchor not in self._anchors:
            raise _undefined(alias)
        anchored = self._anchors[alias.anchor]
        if anchored is None:
            raise UnreadableValue(f"what the anchor {alias.anchor[:60]!r} stands for contains itself", alias.start_mark)
        self._budget.repeated -= anchored.size
        if self._budget.repeated < 0:
            reason = "aliases and merge keys make the document far larger than it is written"
            raise UnreadableValue(reason, alias.start_mark, "write out what they stand for")
        self._size += anchored.size
        return anchored.value

    def _merge(self, here: _Collection, value: object, event: Any) -> None:
        """Record that *value* is merged into *here*.

        The first of several mappings takes precedence. Keys of *here* itself take precedence over all.
        """
        here.key = _NO_KEY
        for mapping in value[::-1] if isinstance(value, list) else [value]:
            if not isinstance(mapping, dict):
                reason = f"a merge key needs a mapping or a list of mappings, not {_kind(mapping)}"
                raise UnreadableValue(reason, event.start_mark, "write '<<: *anchor', or put '<<' in quotes")
            here.merged.append(mapping)


def _undefined(alias: Any) -> yaml.YAMLError:
    reason = f"found undefined alias {alias.anchor[:60]!r}"
    return yaml.composer.ComposerError(None, None, reason, alias.start_mark)


def _is_of_another_tool(tag: str) -> bool:
    """Return whether *tag* is a local one such as !vault or !Ref; Kubernetes ignores those."""
    return tag.startswith("!")


def _key(key: object) -> str:
    """Return *key* as text, because the API server reads JSON, where every key is text."""
    return str(key).lower() if isinstance(key, bool) else "null" if key is None else str(key)


def _kind(value: object) -> str:
    return "a list" if isinstance(value, list) else repr(value)[:60]


def _no_text_as_key(event: Any) -> yaml.YAMLError:
    return UnreadableValue("a key is no text", event.start_mark, "write a text before ':'")


def _unknown_tag(event: Any) -> yaml.YAMLError:
    tag = event.tag.replace("tag:yaml.org,2002:", "!!")
    return UnreadableValue(f"the tag {tag[:60]!r} has no meaning here", event.start_mark, "remove it")


def _scalar(tag: str, event: Any) -> object:
    """Return the value of a scalar with a tag other than text."""
    if tag not in _SCALARS:
        raise _unknown_tag(event)
    text = event.value
    # PyYAML's constructors raise anything: ValueError, KeyError, AttributeError.
    with contextlib.suppress(Exception):
        if len(text) <= _NUMBER_MAX:
            return _short_scalar(tag, text)
        if tag.endswith((":binary", ":null")):
            return _short_scalar.__wrapped__(tag, text)
    shown = text if len(text) <= _NUMBER_MAX else f"{text[:20]}... ({len(text)} characters)"
    reason = f"{shown!r} cannot be read as {_SCALARS[tag]}"
    raise UnreadableValue(reason, event.start_mark, "put it in quotes, without a tag, if a text is meant")


@lru_cache(maxsize=4096)
def _short_scalar(tag: str, text: str) -> object:
    return yaml.constructor.SafeConstructor().construct_object(yaml.ScalarNode(tag, text))


# ---- positions


def compose(text: str) -> yaml.Node | None:
    """Return *text*, one YAML document that `plain_value` can read, as a tree; None if it is empty.

    An alias yields its anchor's node. Tags are not resolved.
    """
    node: yaml.Node | None
    try:
        node = yaml.compose(text, Loader=_TreeLoader)
    except ComposerError:  # an anchor stands twice
        node = _Composer(text).get_single_node()
    return node


class _Composer(Composer, BaseResolver):
    """Makes the tree of a document in which an anchor stands twice. YAML 1.2 allows that; PyYAML refuses it."""

    def __init__(self, text: str) -> None:
        Composer.__init__(self)
        BaseResolver.__init__(self)
        loader = _Loader(text)
        self.check_event, self.peek_event, self.get_event = loader.check_event, loader.peek_event, loader.get_event

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if not self.check_event(AliasEvent):
            self.anchors.pop(self.peek_event().anchor, None)  # from here on, the new one counts
        return super().compose_node(parent, index)
