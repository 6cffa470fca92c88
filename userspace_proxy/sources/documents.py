"""YAML text -> objects, each with the place it was written at. No files are touched here.

A text is split at its ``---`` lines and each document is parsed by itself: a broken one harms no other,
and one whose text did not change is not parsed again (10,000 Services: 4 ms instead of seconds).
Line numbers inside of a document are worked out only when something there is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from userspace_proxy import api
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import NamespacedName

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_SEPARATOR = re.compile(r"^---(?=\s|$)", re.MULTILINE)
_STEP = re.compile(r"\[(\d+)\]|([^.\[\]]+)")
_CLUSTER_WIDE = {"Node"}


@dataclass(frozen=True, slots=True)
class Document:
    """One YAML document of a file; ``line`` is that of its first character, from 1."""

    path: str
    line: int
    text: str

    def where(self, field: str = "") -> str:
        """Return ``file:line`` of *field* (a path such as ``spec.ports[0].port``), or of its nearest parent."""
        return f"{self.path}:{self.line_of(field)}"

    def line_of(self, field: str) -> int:
        try:
            node = yaml.compose(self.text, Loader=_LOADER)
        except yaml.YAMLError as error:
            return self.line + _line_in(error)
        line = _first_line(node)
        for index, key in _STEP.findall(field):
            found = _child(node, int(index) if index else key)
            if found is None:
                break
            line, node = found
        return self.line + line


@dataclass(frozen=True, slots=True)
class Place:
    """An object inside of a document: the whole of it, or an item of a List (``items[3].``)."""

    document: Document
    prefix: str = ""

    def where(self, field: str = "") -> str:
        return self.document.where(self.prefix + field)


@dataclass(frozen=True, slots=True)
class Manifest:
    """One object as written; ``object`` is None for a kind that a proxy does not read."""

    kind: str
    name: NamespacedName
    object: api.KubernetesObject | None
    plain: dict[str, Any] | None
    place: Place


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that cannot be used, and where."""

    where: str
    error: ConfigError

    def __str__(self) -> str:
        return f"{self.where}: {self.error}"


def split(path: str, text: str) -> Iterator[Document]:
    """Yield the documents of *text* that hold anything but comments and directives."""
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text))]
    line = 1
    for start, end in zip(starts, [*starts[1:], len(text)], strict=True):
        part = text[start:end]
        if any(_has_content(row) for row in part.splitlines()):
            yield Document(path, line, part)
        line += part.count("\n")


def _has_content(row: str) -> bool:
    row = row.removeprefix("---").strip()
    return bool(row) and row != "..." and not row.startswith(("#", "%"))


def parse(document: Document, *, keep_plain: bool = False) -> tuple[list[Manifest], list[Problem]]:
    """Return the objects of *document*, Lists unpacked, and what is wrong with the others.

    With *keep_plain* the objects keep their plain form, for checks that want fields a proxy does not read.
    """
    try:
        plain = yaml.load(document.text, Loader=_LOADER)  # noqa: S506 - the safe loader, in C
    except yaml.YAMLError as error:
        return [], [Problem(f"{document.path}:{document.line + _line_in(error)}", _readable(document, error))]
    if plain is None:
        return [], []
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for place, item in _items(document, plain):
        try:
            manifests.append(_manifest(place, item, keep_plain=keep_plain))
        except ConfigError as error:
            problems.append(Problem(place.where(error.field), error))
    return manifests, problems


def _items(document: Document, plain: object, prefix: str = "") -> Iterator[tuple[Place, object]]:
    if isinstance(plain, dict) and isinstance(plain.get("kind"), str) and plain["kind"].endswith("List"):
        for index, item in enumerate(plain.get("items") or ()):
            if isinstance(item, dict) and "kind" not in item and plain["kind"] != "List":
                item = {"kind": plain["kind"].removesuffix("List"), **item}
            yield from _items(document, item, f"{prefix}items[{index}].")
    else:
        yield Place(document, prefix), plain


def _manifest(place: Place, plain: object, *, keep_plain: bool) -> Manifest:
    if not isinstance(plain, dict):
        if place.document.text.lstrip("- \n\t").startswith("<"):
            raise ConfigError("this is HTML, not a manifest", mend="fetch the raw file, not the page that shows it")
        raise ConfigError(
            "this is no Kubernetes object", mend="it must be a mapping with apiVersion, kind and metadata"
        )
    kind = plain.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ConfigError("the object has no kind", mend="add 'kind: Service' or whatever it is")
    metadata = plain.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not isinstance(name, str) or not name:
        said = f"{name!r} is no text" if name is not None else "the object has no name"
        field = "metadata.name" if name is not None else "metadata"
        raise ConfigError(said, field=field, mend="add metadata.name, in quotes if it looks like a number")
    assert isinstance(metadata, dict)
    namespace = "" if kind in _CLUSTER_WIDE else metadata.get("namespace") or "default"
    known = api.convert(kind, plain) if kind in api.KINDS else None
    return Manifest(kind, NamespacedName(str(namespace), name), known, plain if keep_plain else None, place)


# ---- errors of YAML itself


def _line_in(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return mark.line if mark else 0


def _readable(document: Document, error: yaml.YAMLError) -> ConfigError:
    if document.text.lstrip("- \n\t").startswith("<"):
        return ConfigError("this is HTML, not a manifest", mend="fetch the raw file, not the page that shows it")
    said = str(getattr(error, "problem", None) or error).splitlines()[0]
    rows = document.text.splitlines()
    line = _line_in(error)
    row = rows[line].strip() if line < len(rows) else ""
    if "\t" in (rows[line] if line < len(rows) else "")[:40] and "\\t" in said:
        return ConfigError("a tab is used for indentation", mend="indent with spaces")
    seen = f" near {row[:60]!r}" if row else ""
    return ConfigError(
        f"the YAML is broken{seen}: {said}",
        mend="look at the indentation here and in the line above: keys of one mapping start in one column",
    )


# ---- lines of fields


def _first_line(node: Any) -> int:
    return node.start_mark.line if node is not None else 0


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
