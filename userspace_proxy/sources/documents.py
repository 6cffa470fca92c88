"""YAML text -> objects, each with the place it was written at. No files are touched here.

A text is split at its ``---`` lines and each document is parsed by itself: a broken one harms no other,
and one whose text did not change is not parsed again (10,000 Services: 4 ms instead of seconds).
Line numbers inside of a document are worked out only when something there is wrong.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import yaml

from userspace_proxy import api
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import NamespacedName


_TEXT, _MAPPING, _SEQUENCE = (f"tag:yaml.org,2002:{name}" for name in ("str", "map", "seq"))
_SCALARS = {f"tag:yaml.org,2002:{name}" for name in ("int", "float", "bool", "null")}
_MERGE = "tag:yaml.org,2002:merge"


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
    for tag, pattern in yaml.SafeLoader.yaml_implicit_resolvers.get(text[:1], ()):
        if (tag in _SCALARS or tag == _MERGE) and pattern.match(text):
            return str(tag)
    return _TEXT


_SEPARATOR = re.compile(r"^---(?=\s|$)", re.MULTILINE)
# What a page that shows code puts around and into it; a placeholder such as <name> is none of these.
_TAG = re.compile(r"</?(html|head|body|div|span|p|br|pre|code|a|table|t[rdh]|li|ul)(\s[^>]*)?/?>", re.IGNORECASE)
_KEY = re.compile(r"\s*(?:- +)*([\w./-]+):(\s|$)")
_CLUSTER_WIDE = {"Node"}
# No object of Kubernetes is nested half so deep.
_DEPTH_MAX = 100
_BRACKET = re.compile(r"[\[\]{}]")
# Wrong values that are set aside in one object so that the next one shows.
_TYPE_ERRORS_MAX = 50
# So many duplicates between two files are shown one by one; more are a copy of the file.
_DUPLICATES_MAX = 10


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file; ``line`` is that of its first character, from 1, ``start`` its offset."""

    path: str
    line: int
    text: str
    start: int = field(default=0, compare=False)

    @property
    def end(self) -> int:
        return self.start + len(self.text)


@dataclass(frozen=True, slots=True)
class Place:
    """An object inside of a document: the whole of it, or an item of a List (``items[3].``)."""

    document: Document
    prefix: str = ""

    def where(self, field: str = "") -> str:
        """Return ``file:line`` of *field* (a path such as ``spec.ports[0].port``), or of its nearest parent."""
        return f"{self.document.path}:{Lines().line_of(self, field)}"


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object as written; ``object`` is None for a kind that a proxy does not read.

    Read for checks, it has its plain form as well, and ``errors`` are the values of a wrong type: what is
    left without those is the ``object`` (None where that is too little).
    """

    kind: str
    name: NamespacedName
    object: api.KubernetesObject | None
    plain: dict[str, Any] | None
    place: Place
    errors: tuple[ConfigError, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" if self.name.namespace else f"{self.kind} {self.name.name}"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that cannot be used, and where; ``line`` is None where a whole file is meant.

    ``object`` is its kind and name, where these are known.
    """

    path: str
    line: int | None
    error: ConfigError
    object: str = ""

    @property
    def where(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.error}"


def split(path: str, text: str, line: int = 1, start: int = 0) -> Iterator[Document]:
    """Yield the documents of *text* that hold anything but comments and directives.

    *line* and *start* say where in its file *text* begins.
    """
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text))]
    for here, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[here:end]
        if any(_has_content(row) for row in part.splitlines()):
            yield Document(path, line, part, start + here)
        line += part.count("\n")


def _has_content(row: str) -> bool:
    row = row.removeprefix("---").strip()
    return bool(row) and row != "..." and not row.startswith(("#", "%"))


def parse(document: Document, *, for_check: bool = False) -> tuple[list[Manifest], list[Problem]]:
    """Return the objects of *document*, Lists unpacked, and what is wrong with the others.

    *for_check* wants all that can be said: see Manifest; and keys that stand twice in a mapping, of which
    YAML takes the last.
    """
    try:
        _refuse_deep_nesting(document.text)
        loader = _Loader(document.text)
        try:
            root = loader.get_single_node()
            twice = list(_keys_that_stand_twice(root)) if for_check else []
            plain = _Plain(loader).value(root) if root is not None else None
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        line = _line_in(document, error)
        return [], [Problem(document.path, document.line + line, _readable(document, error, line))]
    except (ValueError, RecursionError) as error:
        return [], [Problem(document.path, document.line, ConfigError(f"cannot be read as YAML: {error}"))]
    manifests: list[Manifest] = []
    problems = []
    for place, item in _items(document, plain) if plain is not None else ():
        try:
            manifests.append(_manifest(place, item, for_check=for_check))
        except ConfigError as error:
            problems.append(Problem(document.path, Lines().line_of(place, error.field), error))
    owner = str(manifests[0]) if len(manifests) == 1 else ""
    problems += [Problem(document.path, document.line + line, error, owner) for line, error in twice]
    return manifests, problems


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

    def value(self, node: Any) -> object:
        if node.tag == _TEXT:
            return node.value
        if node.tag in _SCALARS and isinstance(node, yaml.ScalarNode):
            return _scalar(node.tag, node.value)
        if id(node) in self._made:
            return self._made[id(node)]
        if node.tag == _MAPPING and isinstance(node, yaml.MappingNode):
            for key, _ in node.value:
                if key.tag == _MERGE:
                    self._loader.flatten_mapping(node)
                    break
            mapping: dict[object, object] = {}
            self._made[id(node)] = mapping  # before it is filled: an anchor may contain itself
            for key, value in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.constructor.ConstructorError(None, None, "a key is no text", key.start_mark)
                mapping[self.value(key)] = value.value if value.tag == _TEXT else self.value(value)
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


def _items(document: Document, plain: object, prefix: str = "") -> Iterator[tuple[Place, object]]:
    kind = plain.get("kind") if isinstance(plain, dict) else None
    items = plain.get("items") if isinstance(plain, dict) else None
    if isinstance(kind, str) and kind.endswith("List") and (items is None or isinstance(items, list)):
        for index, item in enumerate(items or ()):
            if isinstance(item, dict) and "kind" not in item and kind != "List":
                item = {"kind": kind.removesuffix("List"), **item}
            yield from _items(document, item, f"{prefix}items[{index}].")
    else:
        yield Place(document, prefix), plain


def _manifest(place: Place, plain: object, *, for_check: bool) -> Manifest:
    if not isinstance(plain, dict):
        raise _html(place.document) or ConfigError(
            "this is no Kubernetes object", mend="it must be a mapping with apiVersion, kind and metadata"
        )
    kind = plain.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ConfigError("the object has no kind", mend="add 'kind: Service' or whatever it is")
    metadata = plain.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(metadata, dict) or not isinstance(name, str) or not name:
        said = f"{name!r} is no text" if name is not None else "the object has no name"
        field = "metadata.name" if name is not None else "metadata"
        raise ConfigError(said, field=field, mend="add metadata.name, in quotes if it looks like a number")
    namespace = "" if kind in _CLUSTER_WIDE else metadata.get("namespace") or "default"
    full_name = NamespacedName(str(namespace), name)
    if kind not in api.KINDS or _is_foreign(plain.get("apiVersion")):
        return Manifest(kind, full_name, None, plain if for_check else None, place)
    if for_check:
        known, errors = _convert_what_can_be(kind, plain)
        return Manifest(kind, full_name, known, plain, place, tuple(errors))
    return Manifest(kind, full_name, api.convert(kind, plain), None, place)


def _is_foreign(version: object) -> bool:
    """Return whether *version* is that of somebody's own resources, such as a Knative Service."""
    group = version.partition("/")[0] if isinstance(version, str) and "/" in version else ""
    return "." in group and not group.endswith(".k8s.io")


def _convert_what_can_be(kind: str, plain: dict[str, Any]) -> tuple[api.KubernetesObject | None, list[ConfigError]]:
    """Return *plain* as the struct of *kind* without the values of a wrong type, and these."""
    errors: list[ConfigError] = []
    while len(errors) < _TYPE_ERRORS_MAX:
        try:
            return api.convert(kind, plain), errors
        except ConfigError as error:
            if any(error.field == earlier.field.rpartition(".")[0] for earlier in errors):
                return None, errors  # it lacks what was set aside
            plain = plain if errors else copy.deepcopy(plain)
            errors.append(error)
            if not _set_aside(plain, error.field):
                break
    return None, errors


def _set_aside(plain: Any, field: str) -> bool:
    """Take the value of *field* out of *plain*, or mend it where it is clear what is meant; return whether it was."""
    *parents, last = api.steps(field) or [""]
    for step in parents:
        plain = plain[step]
    if not isinstance(plain, dict):
        return False
    # A key that YAML has made a number or a truth value is found by its text, too.
    key = next((key for key in plain if str(key) == last), None)
    if key is None:
        return False
    value = plain.pop(key)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        plain[key] = int(value)
    return True


def duplicates(manifests: Iterable[Manifest]) -> list[Problem]:
    """Return the objects, of kinds a proxy reads, that stand again after *manifests* has had them."""
    first_of: dict[tuple[str, NamespacedName], Manifest] = {}
    pairs: dict[tuple[str, str], list[tuple[Manifest, Manifest]]] = {}
    for manifest in manifests:
        first = first_of.setdefault((manifest.kind, manifest.name), manifest)
        if first is not manifest:
            files = first.place.document.path, manifest.place.document.path
            pairs.setdefault(files, []).append((first, manifest))
    lines = Lines()
    problems = []
    for (first_path, path), found in pairs.items():
        for first, second in found[:_DUPLICATES_MAX]:
            where = f"{first_path}:{lines.line_of(first.place, 'metadata.name')}"
            error = ConfigError(f"{second} is already at {where}", field="metadata.name", mend="remove one of them")
            problems.append(Problem(path, lines.line_of(second.place, "metadata.name"), error, str(second)))
        if (more := len(found) - _DUPLICATES_MAX) > 0:
            problems.append(
                Problem(path, None, ConfigError(f"{more} more objects are already in {first_path}", mend="remove one"))
            )
    return problems


# ---- errors of YAML itself


def _line_in(document: Document, error: yaml.YAMLError) -> int:
    if isinstance(error, yaml.reader.ReaderError):
        return document.text.count("\n", 0, error.position)
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    last = max(len(document.text.splitlines()) - 1, 0)
    return min(mark.line, last) if mark else 0


def _readable(document: Document, error: yaml.YAMLError, line: int) -> ConfigError:
    said = str(getattr(error, "problem", None) or getattr(error, "reason", None) or error).splitlines()[0]
    rows = document.text.splitlines()
    row = rows[line] if line < len(rows) else ""
    if html := _html(document, row):
        return html
    key = _KEY.match(row)
    field = key[1] if key else ""
    if "\t" in row[: len(row) - len(row.lstrip())]:
        return ConfigError("a tab is used for indentation", field=field, mend="indent with spaces")
    if "\u00a0" in row:
        said = "there is a non-breaking space in the line, as web pages have them"
        return ConfigError(said, field=field, mend="type its indentation and spaces anew")
    if "{{" in row:
        return ConfigError(
            "this is a template, not a manifest", field=field, mend="render it first, with 'helm template' for a chart"
        )
    seen = f" near {row.strip()[:60]!r}" if row.strip() else ""
    mend = "look at the indentation here and in the line above: keys of one mapping start in one column"
    return ConfigError(f"the YAML is broken{seen}: {said}", field=field, mend=mend)


def _html(document: Document, row: str = "") -> ConfigError | None:
    start = document.text.lstrip("- \n\t")
    if (start.startswith("<") and not start.startswith("<<")) or _TAG.search(row):
        return ConfigError("this is HTML, not a manifest", mend="fetch the raw file, not the page that shows it")
    return None


def _keys_that_stand_twice(root: Any) -> Iterator[tuple[int, ConfigError]]:
    """Yield the line of each key that its mapping already has, and what to say."""
    seen: set[int] = set()  # an alias stands for a node that was looked at
    waiting = [(root, "")]
    while waiting:
        node, field = waiting.pop()
        if not isinstance(node, yaml.CollectionNode) or id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, f"{field}[{index}]") for index, item in enumerate(node.value)]
            continue
        firsts: dict[str, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            here = api.below(field, key.value)
            first = firsts.setdefault(key.value, key)
            if first is not key:
                above = key.start_mark.line - first.start_mark.line
                said = f"{key.value!r} stands twice, {above} lines apart, and only this one counts"
                mend = "join the two" if isinstance(value, yaml.CollectionNode) else "remove one of them"
                yield key.start_mark.line, ConfigError(said, field=here, mend=mend)
            waiting.append((value, here))


# ---- lines of fields


class Lines:
    """Finds the lines of fields; keeps the last few documents, which are read anew for it, as trees."""

    def __init__(self) -> None:
        self._tree = lru_cache(maxsize=2)(_tree)

    def line_of(self, place: Place, field: str) -> int:
        document = place.document
        try:
            node = self._tree(document)
        except yaml.YAMLError as error:
            return document.line + _line_in(document, error)
        line = node.start_mark.line if node is not None else 0
        for step in api.steps(place.prefix + field):
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        return document.line + line


def _tree(document: Document) -> Any:
    return yaml.compose(document.text, Loader=_Loader)


def _child(node: Any, step: int | str) -> tuple[int, Any] | None:
    """Return the line at which *step* below *node* starts, and its node."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        item = node.value[step]
        return item.start_mark.line, item
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key.start_mark.line, value
    return None
