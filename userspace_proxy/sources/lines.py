"""Positions: documents in files, objects in documents, and the lines of an object's fields.

Lines within a document are computed only to report a problem, by parsing the document again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from itertools import accumulate

import yaml

from userspace_proxy import api
from userspace_proxy.sources.yaml_faults import describe
from userspace_proxy.sources.yaml_values import compose


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

    @property
    def has_content(self) -> bool:
        """Whether there is more than comments and directives."""
        rows = (row.removeprefix("---").strip() for row in self.text.splitlines())
        return any(row and row != "..." and not row.startswith(("#", "%")) for row in rows)

    def cut(self, lines: list[int]) -> list[Document]:
        """Return the document in pieces; each piece but the first begins at one of *lines*, counted from 0."""
        rows = self.text.splitlines(keepends=True)
        starts = [0, *lines]
        texts = ["".join(rows[a:b]) for a, b in zip(starts, [*lines, len(rows)], strict=True)]
        offsets = accumulate(map(len, texts[:-1]), initial=self.start)
        return [
            Document(self.path, self.line + start, text, offset)
            for start, text, offset in zip(starts, texts, offsets, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Place:
    """An object in a document: all of it, or an item of a List (``items[3].``)."""

    document: Document
    prefix: str = ""

    def where(self, field: str = "") -> str:
        """Return ``file:line`` of *field* (a path such as ``spec.ports[0].port``), or of its nearest parent."""
        return f"{self.document.path}:{Lines().line_of(self, field)}"


class Lines:
    """Finds the lines of fields. The trees of the last two documents are cached."""

    def __init__(self) -> None:
        self._tree = lru_cache(maxsize=2)(_tree)
        self._rows = lru_cache(maxsize=2)(_rows)

    def row(self, document: Document, line: int) -> str:
        """Return the text of *line* of *document*, counted as in the file."""
        rows = self._rows(document)
        return rows[line - document.line] if 0 <= line - document.line < len(rows) else ""

    def line_of(self, place: Place, field: str) -> int:
        document = place.document
        try:
            node = self._tree(document)
        except yaml.YAMLError as error:
            return document.line + describe(document.text, error)[0]
        line = node.start_mark.line if node is not None else 0
        for step in api.steps(place.prefix + field):
            found = _child(node, step)
            if found is None:
                break
            line, node = found
        return document.line + line


def _tree(document: Document) -> yaml.Node | None:
    return compose(document.text)


def _rows(document: Document) -> list[str]:
    return document.text.splitlines()


def _child(node: yaml.Node | None, step: int | str) -> tuple[int, yaml.Node] | None:
    """Return the line at which *step* below *node* starts, and its node."""
    if isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step].start_mark.line, node.value[step]
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next(((key.start_mark.line, value) for key, value in pairs if key.value == str(step)), None)
