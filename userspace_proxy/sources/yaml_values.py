"""Parses YAML text into plain values as Kubernetes does. Independent of files and objects.

Documents are read event by event, because libyaml's tree builder recurses in C and deep nesting would crash the
process. Limits bound the cost of any document.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
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
# JSON escapes a character beyond U+FFFF as two halves (RFC 8259, 7), which libyaml refuses.
_HALVES = re.compile(r"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})")
_SPECIAL = object()
_TEXT_ALONE = {str}

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
    loader = _Loader(_with_whole_characters(text))
    try:
        builder = _Builder(loader, min(_REPEATED_MAX, _REPEATED_RATIO * len(text)))
        return builder.document(), builder.keys_were_lost
    finally:
        loader.dispose()


def _refuse_size(text: str) -> None:
    if len(text) > _SIZE_MAX:
        raise UnreadableValue(f"one document is larger than {_SIZE_MAX // 1024**2} MB", None, "split it with '---'")
    if "%" in text and len(_DIRECTIVE.findall(text)) > _DIRECTIVES_MAX:
        raise UnreadableValue(f"it has more than {_DIRECTIVES_MAX} lines that begin with '%'", None)


def _with_whole_characters(text: str) -> str:
    """Return *text* with a character in place of each escape of two halves, if *text* is JSON."""
    if "\\u" not in text or not text.removeprefix("---").lstrip().startswith("{"):
        return text
    return _HALVES.sub(lambda found: found[1] + json.loads(f'"{found[2]}"'), text)


def _tag(text: str) -> str:
    """Return the tag of the unquoted *text*."""
    if ":" in text:  # YAML 1.1 reads 53:53 as a base-60 number (3233); Kubernetes does not
        return _TEXT
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if (tag in _IMPLICIT or tag == _MERGE) and pattern.match(text):
            return str(tag)
    return _TEXT


@lru_cache(maxsize=8192)
def _plain(text: str) -> object:
    """Return the value of the unquoted, short *text*, or _SPECIAL if it is a merge key or unreadable.

    Manifests repeat words, which the cache keeps once.
    """
    tag = _tag(text)
    if tag == _TEXT:
        return text
    with contextlib.suppress(Exception):
        return _SPECIAL if tag == _MERGE else _short_scalar(tag, text)
    return _SPECIAL


class _Anchored(NamedTuple):
    value: object
    size: int


class _MergeKey(NamedTuple):
    event: Any


@dataclass(slots=True)
class _Collection:
    """A mapping or sequence while it is read. The items of a mapping are its keys and values in turn."""

    items: list[object]
    event: Any
    size_before: int
    is_mapping: bool

    @property
    def awaits_key(self) -> bool:
        return self.is_mapping and not len(self.items) % 2


class _Builder:
    """Builds plain values from a loader's events. *repeated_max*: the size that aliases may repeat."""

    def __init__(self, loader: Any, repeated_max: int) -> None:
        self._next = loader.get_event
        self._size_max = _SIZE_MAX + repeated_max
        self._repeatable = repeated_max  # what is left of it
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

        The hot loop: a third of the time for reading manifests is spent here.
        """
        here: _Collection | None = None  # the innermost collection that is being read
        above: list[_Collection | None] = []
        size = 0  # of all values so far, including repetitions by aliases
        next_event, size_max, plain = self._next, self._size_max, _plain
        while True:
            event = next_event()
            kind = type(event)
            if kind is ScalarEvent:
                value = event.value
                size += _VALUE_SIZE + len(value)
                if event.tag or event.anchor or len(value) > _NUMBER_MAX:
                    value = self._special_scalar(event, here)
                elif event.implicit[0]:
                    value = plain(value)
                    if value is _SPECIAL:
                        value = self._special_scalar(event, here)
            elif kind is MappingStartEvent or kind is SequenceStartEvent:
                above.append(here)
                here = self._begin(event, here, len(above), size)
                size += _VALUE_SIZE
                continue
            elif kind is AliasEvent:
                value, its_size = self._repeated(event, here)
                size += its_size
            else:  # a collection's end
                assert here is not None
                value = self._end(here, size)
                here = above.pop()
            if size > size_max:
                raise UnreadableValue("one document holds too many values", event.start_mark, "split it with '---'")
            if here is None:
                return value
            here.items.append(value)

    def _special_scalar(self, event: Any, here: _Collection | None) -> object:
        """Return the value of any scalar, or a _MergeKey for a merge key of the mapping *here*."""
        value: object = event.value
        tag = event.tag or (_tag(event.value) if event.implicit[0] else _TEXT)
        if tag == _MERGE and here is not None and here.awaits_key:
            return _MergeKey(event)
        if tag != _TEXT and tag[0] != "!" and (event.tag or tag != _MERGE):
            value = _scalar(tag, event)
        if event.anchor:
            self._anchors[event.anchor] = _Anchored(value, _VALUE_SIZE + len(event.value))
        return value

    def _begin(self, event: Any, here: _Collection | None, depth: int, size: int) -> _Collection:
        """Return the new collection that *event* begins inside *here*, at *depth*, after values of *size*."""
        if depth > DEPTH_MAX:
            raise UnreadableValue(f"it is nested more than {DEPTH_MAX} deep", event.start_mark, "nest it less")
        is_mapping = type(event) is MappingStartEvent
        if event.tag not in (None, _MAPPING if is_mapping else _SEQUENCE) and not _is_of_another_tool(event.tag):
            raise _unknown_tag(event)
        if here is not None and here.awaits_key:
            raise _no_text_as_key(event)
        if event.anchor:
            self._anchors[event.anchor] = None
        return _Collection([], event, size, is_mapping)

    def _end(self, here: _Collection, size: int) -> object:
        value = self._mapping(here.items) if here.is_mapping else here.items
        if here.event.anchor:
            self._anchors[here.event.anchor] = _Anchored(value, size - here.size_before)
        return value

    def _mapping(self, items: list[object]) -> dict[object, object]:
        """Return the mapping with the keys and values *items*.

        The first of several mappings that are merged into it takes precedence. Its own keys take precedence over all.
        """
        keys, values, merged = items[::2], items[1::2], dict[object, object]()
        if set(map(type, keys)) != _TEXT_ALONE:
            pairs = list(zip(keys, values, strict=True))
            merged = dict(
                pair for key, value in pairs if isinstance(key, _MergeKey) for pair in _merged(key.event, value)
            )
            own = [(_key(key), value) for key, value in pairs if not isinstance(key, _MergeKey)]
            keys, values = [key for key, _ in own], [value for _, value in own]
        mapping = dict(zip(keys, values, strict=True))
        if len(mapping) < len(keys):
            self.keys_were_lost = True
        return merged | mapping if merged else mapping

    def _repeated(self, alias: Any, here: _Collection | None) -> _Anchored:
        """Return the value of *alias* inside *here*, and its size, which was charged to the budget."""
        if alias.anchor not in self._anchors:
            raise _undefined(alias)
        anchored = self._anchors[alias.anchor]
        if anchored is None:
            raise UnreadableValue(f"what the anchor {alias.anchor[:60]!r} stands for contains itself", alias.start_mark)
        if here is not None and here.awaits_key and type(anchored.value) in (dict, list):
            raise _no_text_as_key(alias)
        self._repeatable -= anchored.size
        if self._repeatable < 0:
            reason = "aliases and merge keys make the document far larger than it is written"
            raise UnreadableValue(reason, alias.start_mark, "write out what they stand for")
        return anchored


def _merged(event: Any, value: object) -> Iterator[tuple[object, object]]:
    """Yield the keys and values that the merge key *event* takes from *value*; later ones take precedence."""
    for mapping in value[::-1] if isinstance(value, list) else [value]:
        if not isinstance(mapping, dict):
            reason = f"a merge key needs a mapping or a list of mappings, not {_kind(mapping)}"
            raise UnreadableValue(reason, event.start_mark, "write '<<: *anchor', or put '<<' in quotes")
        yield from mapping.items()


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
    text = _with_whole_characters(text)
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
