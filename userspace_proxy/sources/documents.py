"""Decodes YAML text into objects, each with its position. Reads no files.

A text is split at its ``---`` lines, and each document is parsed alone. A broken document therefore harms no other, and
an unchanged one is not parsed again (10,000 Services: 4 ms instead of seconds).
"""

import copy
import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from userspace_proxy import api
from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.lines import Document, Lines, Place
from userspace_proxy.sources.pasted import NUMBERED, certain_sign, lost_indentation, sign_in
from userspace_proxy.sources.yaml_faults import (
    TEMPLATE,
    describe,
    html_error,
    keys_that_stand_twice,
    template_note,
)
from userspace_proxy.sources.yaml_values import plain_value

_SEPARATOR = re.compile(r"^---(?=\s|$)", re.MULTILINE)
_CLUSTER_WIDE = {"Node"}
# At most this many wrong values of one object are set aside to find the next one.
_TYPE_ERRORS_MAX = 50
# A port pair as Docker writes it (80:8080); the first is the port for clients.
_PORT_PAIR = re.compile(r"(\d{1,5}):\d{1,5}")
# At most this many unreadable objects of one document are reported one by one.
_PROBLEMS_MAX = 100
# At most this many duplicates between two files are reported one by one; more mean a copy of the file.
_DUPLICATES_MAX = 10

log = logging.getLogger(__name__)


class _OtherToolNote(Note):
    """Says that a document is a file of another tool. Such a document hides no object."""


@dataclass(slots=True, eq=False)
class Manifest:
    """One object of a document; ``object`` is None for a kind that the proxy does not read.

    ``plain``: the values as written; set it to None when they are no longer needed. With ``for_check``, ``errors`` are
    the values of a wrong type. Then ``object`` is built without these values, or None if that is not possible.
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
    """An unusable part of the input and its position; ``line`` is None for a whole file.

    ``object``: kind and name, if known. ``hides``: the fault may hide an object that still exists.
    """

    path: str
    line: int | None
    error: ConfigError
    object: str = ""
    hides: bool = True

    @property
    def where(self) -> str:
        return self.path if self.line is None else f"{self.path}:{self.line}"

    def __str__(self) -> str:
        return f"{self.where}: {self.error}"


def split(path: str, text: str, line: int = 1, start: int = 0, *, all_text: bool = False) -> Iterator[Document]:
    """Yield the documents of *text*; skip those without content, unless *all_text* is given.

    *line* and *start* are the position of *text* in its file.
    """
    starts = [0, *(match.start() for match in _SEPARATOR.finditer(text))]
    for here, end in zip(starts, [*starts[1:], len(text)], strict=True):
        document = Document(path, line, text[here:end], start + here)
        if document.text and (all_text or document.has_content):
            yield document
        line += document.text.count("\n")


def parse(document: Document, *, for_check: bool = False) -> tuple[list[Manifest], list[Problem]]:
    """Return the objects of *document* (Lists unpacked) and its problems.

    If a mapping repeats a key, YAML uses the last one; that is reported as a problem. *for_check* collects everything
    that can be reported (see Manifest), also for objects without a separator between them.
    """
    try:
        return _parse(document, for_check=for_check)
    except Exception as error:  # an unexpected document must not stop the others
        log.exception("a bug: %s:%d: the document cannot be read", document.path, document.line)
        bug = ConfigError(f"a bug: {error!r}", fix="please report it, with this document")
        return [], [Problem(document.path, document.line, bug)]


def _parse(document: Document, *, for_check: bool) -> tuple[list[Manifest], list[Problem]]:
    try:
        plain, keys_were_lost = plain_value(document.text)
        begins, twice = keys_that_stand_twice(document.text) if keys_were_lost else ([], [])
    except yaml.YAMLError as error:
        line, readable = describe(document.text, error)
        return [], [Problem(document.path, document.line + line, readable)]
    if isinstance(plain, dict) and plain.get("metadata") is None and (lost := lost_indentation(document.text)):
        return [], [Problem(document.path, document.line + lost[0], lost[1])]
    if begins and for_check:
        return _parse_pieces(document, begins)
    manifests, problems = _manifests(document, plain, for_check=for_check)
    owner = str(manifests[0]) if len(manifests) == 1 else ""
    problems += _missing_separators(document, begins)
    problems += [
        Problem(document.path, document.line + line, error, owner, hides=False) for line, error in twice[:_PROBLEMS_MAX]
    ]
    return manifests, problems


def _manifests(document: Document, plain: object, *, for_check: bool) -> tuple[list[Manifest], list[Problem]]:
    """Return the objects in *plain*, the value of *document*, and a problem for each that cannot be read."""
    manifests: list[Manifest] = []
    rejected: list[tuple[Place, ConfigError]] = []
    for place, item in _items(document, plain) if plain is not None else ():
        try:
            manifests.append(_manifest(place, item, for_check=for_check))
        except ConfigError as error:
            if len(rejected) <= _PROBLEMS_MAX:
                rejected.append((place, error))
    if not rejected:
        return manifests, []
    lines = Lines()
    problems = [_problem(place, error, lines) for place, error in rejected[:_PROBLEMS_MAX]]
    if len(rejected) > _PROBLEMS_MAX:
        rest = ConfigError(f"more than {_PROBLEMS_MAX} objects of this document cannot be read")
        problems.append(Problem(document.path, document.line, rest))
    return manifests, problems


def _problem(place: Place, error: ConfigError, lines: Lines) -> Problem:
    """Return *error* as a problem of the object at *place*, or the copying mistake that explains it."""
    document, line = place.document, lines.line_of(place, error.field)
    if not isinstance(error, Note):
        if error.field in ("", "metadata") and (found := certain_sign(document.text)):
            line, error = document.line + found[0], found[1]
        else:
            error = sign_in(lines.row(document, line), error.field) or error
    return Problem(document.path, line, error, hides=not isinstance(error, _OtherToolNote))


def _parse_pieces(document: Document, begins: list[int]) -> tuple[list[Manifest], list[Problem]]:
    """Parse *document* as if it had separators before the lines *begins*; report that they are missing."""
    pieces = [parse(piece, for_check=True) for piece in document.cut(begins)]
    manifests = [manifest for found, _ in pieces for manifest in found]
    return manifests, [*_missing_separators(document, begins), *(problem for _, wrong in pieces for problem in wrong)]


def _missing_separators(document: Document, begins: list[int]) -> list[Problem]:
    if not begins:
        return []
    error = ConfigError("a new object begins here", fix="put '---' on a line before it")
    return [Problem(document.path, document.line + line, error) for line in begins[:_PROBLEMS_MAX]]


def _is_list(plain: object) -> bool:
    kind = plain.get("kind") if isinstance(plain, dict) else None
    items = plain.get("items") if isinstance(plain, dict) else None
    return isinstance(kind, str) and kind.endswith("List") and (items is None or isinstance(items, list))


def _items(document: Document, plain: Any) -> Iterator[tuple[Place, object]]:
    if not _is_list(plain):
        yield Place(document), plain
        return
    # In a list of one kind, an API server omits apiVersion and kind of the items.
    head = {"apiVersion": plain.get("apiVersion"), "kind": plain["kind"].removesuffix("List")}
    for index, item in enumerate(plain.get("items") or ()):
        if isinstance(item, dict) and "kind" not in item and head["kind"]:
            item = {**head, **item}
        yield Place(document, f"items[{index}]."), item


def _manifest(place: Place, plain: object, *, for_check: bool) -> Manifest:
    """Return *plain*, the value at *place*, as a manifest.

    Raises:
        ConfigError: *plain* is no Kubernetes object, lacks a kind or a name, or has a value of a wrong type.
    """
    plain = _object(place, plain)
    kind = _kind(plain)
    is_read = kind in api.KINDS and not _is_foreign(plain.get("apiVersion"))
    metadata, name = _metadata_and_name(plain, is_read=is_read)
    namespace = "" if kind in _CLUSTER_WIDE else metadata.get("namespace") or "default"
    full_name = NamespacedName(str(namespace), name)
    if not is_read:
        return Manifest(kind, full_name, None, plain, place)
    if any(not isinstance(value, str) for value in _annotations(metadata).values()):
        texts = {key: _as_text(value) for key, value in _annotations(metadata).items()}
        plain = {**plain, "metadata": {**metadata, "annotations": texts}}
    if kind == "EndpointSlice" and plain.get("apiVersion") == "discovery.k8s.io/v1beta1":
        plain = _as_v1(plain)
    if for_check:
        converted, errors = _convert_what_can_be(kind, plain)
        return Manifest(kind, full_name, converted, plain, place, tuple(errors))
    return Manifest(kind, full_name, api.convert(kind, plain), plain, place)


def _object(place: Place, plain: object) -> dict[str, Any]:
    """Return *plain* if it may be a single Kubernetes object, else raise ConfigError."""
    if _is_of_another_tool(plain):
        raise _OtherToolNote("this is no Kubernetes object, but a file of another tool; it is skipped")
    if not isinstance(plain, dict):
        html = html_error(place.document.text) if not place.prefix else None
        fix = "it must be a mapping with apiVersion, kind and metadata"
        raise html or ConfigError("this is no Kubernetes object", fix=fix)
    if _is_list(plain):  # no known tool writes nested Lists
        fix = "write its items into the outer one"
        raise ConfigError("a List inside of a List is not read", field="kind", fix=fix)
    return plain


def _kind(plain: dict[str, Any]) -> str:
    kind = plain.get("kind")
    if not isinstance(kind, str) or not kind:
        raise ConfigError("the object has no kind", fix="add 'kind: Service' or whatever it is")
    if not kind.isalnum():
        raise ConfigError(f"{kind!r} is no kind", field="kind", fix="write one word, such as Service")
    return kind


def _metadata_and_name(plain: dict[str, Any], *, is_read: bool) -> tuple[dict[str, Any], str]:
    """Return the metadata of *plain* and the name in it; only objects of a kind that is read need a name."""
    metadata = plain.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not is_read and not isinstance(name, str):  # a Kustomization, a kubeconfig, kubeadm's configuration
        return metadata if isinstance(metadata, dict) else {}, ""
    if not isinstance(metadata, dict) or name is None or name == "":
        raise _missing_space(metadata) or _name_outside(plain)
    if not isinstance(name, str):
        raise ConfigError(f"{name!r} is no text", field="metadata.name", fix="put the name in quotes")
    if TEMPLATE.search(name):
        raise template_note()
    return metadata, name


def _is_of_another_tool(plain: object) -> bool:
    """Return whether *plain* is a file of another tool: Helm values, docker-compose, CI, Ansible.

    Such a file has no field of a Kubernetes object.
    """
    if isinstance(plain, list):
        return all(isinstance(item, dict) and _is_of_another_tool(item) for item in plain)
    if not isinstance(plain, dict) or "kind" in plain:
        return False
    names = {str(key).lower() for key in plain}
    if names & {"kind", "metadata", "spec"} or ("apiversion" in names and "version" not in names):
        return False
    return not any(api.key_space_error(key, "") or NUMBERED.match(str(key)) for key in plain)


def _as_v1(piece: dict[str, Any]) -> dict[str, Any]:
    """Return *piece*, a v1beta1 EndpointSlice, as v1, which has its own field for the node name."""
    endpoints = piece.get("endpoints")
    if not isinstance(endpoints, list) or not all(isinstance(endpoint, dict) for endpoint in endpoints):
        return piece
    return {**piece, "endpoints": [_endpoint_as_v1(**endpoint) for endpoint in endpoints]}


def _endpoint_as_v1(topology: object = None, **endpoint: object) -> dict[str, object]:
    node = topology.get("kubernetes.io/hostname") if isinstance(topology, dict) else None
    return {**({"nodeName": node} if node else {}), **endpoint}


def _annotations(metadata: dict[str, Any]) -> dict[str, Any]:
    given = metadata.get("annotations")
    return given if isinstance(given, dict) else {}


def _as_text(value: object) -> object:
    """Return an annotation's value as the API reads it: numbers, booleans and null become text."""
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value) if isinstance(value, int | float) else value


def _name_outside(plain: dict[str, Any]) -> ConfigError:
    if isinstance(plain.get("metadata"), list):
        return ConfigError("must be a mapping, not a list", field="metadata", fix="remove the '-'")
    if "name" not in plain:
        return ConfigError("the object has no name", field="metadata", fix="add metadata.name")
    reason = "'name' stands at the top level, but belongs under 'metadata'"
    return ConfigError(reason, field="name", fix="move it there: it begins two columns to the right of 'metadata'")


def _missing_space(metadata: object) -> ConfigError | None:
    keys = metadata if isinstance(metadata, dict) else [metadata]
    return next((error for key in keys if (error := api.key_space_error(key, "metadata"))), None)


def _is_foreign(version: object) -> bool:
    """Return whether *version* belongs to a custom resource, such as a Knative Service."""
    group = version.partition("/")[0] if isinstance(version, str) and "/" in version else ""
    return "." in group and not group.endswith(".k8s.io")


def _convert_what_can_be(kind: str, plain: dict[str, Any]) -> tuple[api.KubernetesObject | None, list[ConfigError]]:
    """Return *plain* converted to *kind* without its values of a wrong type, and an error for each of those."""
    errors: list[ConfigError] = []
    while len(errors) < _TYPE_ERRORS_MAX:
        try:
            return api.convert(kind, plain), errors
        except ConfigError as error:
            if any(error.field == earlier.field.rpartition(".")[0] for earlier in errors):
                return None, errors  # a required value was set aside
            plain = plain if errors else copy.deepcopy(plain)
            errors.append(error)
            if not _set_aside(plain, error.field):
                break
    return None, errors


def _set_aside(plain: Any, field: str) -> bool:
    """Remove the value of *field* from *plain*, or correct it if its meaning is clear; return whether it was found."""
    *parents, last = api.steps(field) or [""]
    for step in parents:
        plain = plain[step]
    if not isinstance(plain, dict):
        return False
    # YAML may have read the key as a number or a boolean; compare its text.
    key = next((key for key in plain if str(key) == last), None)
    if key is None:
        return False
    value = plain.pop(key)
    if isinstance(value, str) and value.isascii() and value.isdigit():
        plain[key] = int(value)
    elif last == "port" and isinstance(value, str) and (pair := _PORT_PAIR.fullmatch(value)):
        plain[key] = int(pair[1])
    return True


def duplicates(manifests: Iterable[Manifest], *, may_be_alternatives: bool = False) -> list[Problem]:
    """Return a problem for each object that *manifests* contains a second time.

    *may_be_alternatives*: duplicates in different files are only a note, because a user may apply either file.
    """
    first_of: dict[tuple[str, NamespacedName], Manifest] = {}
    pairs: dict[tuple[str, str], list[tuple[Manifest, Manifest]]] = {}
    for manifest in manifests:
        first = first_of.setdefault((manifest.kind, manifest.name), manifest)
        if first is not manifest:
            files = first.place.document.path, manifest.place.document.path
            pairs.setdefault(files, []).append((first, manifest))
    return [
        problem
        for (first_path, path), found in pairs.items()
        for problem in _duplicates_of(found, is_note=may_be_alternatives and path != first_path)
    ]


def _duplicates_of(pairs: Sequence[tuple[Manifest, Manifest]], *, is_note: bool) -> Iterator[Problem]:
    """Yield a problem for each of *pairs*, which are of the same two files, or of one."""
    lines = Lines()
    kind, note = (Note, "'run' serves the first; ") if is_note else (ConfigError, "")
    first_path, path = (manifest.place.document.path for manifest in pairs[0])
    for first, second in pairs[:_DUPLICATES_MAX]:
        where = f"{first_path}:{lines.line_of(first.place, 'metadata.name')}"
        error = kind(f"{second} is already at {where}", field="metadata.name", fix=f"{note}remove one of them")
        yield Problem(path, lines.line_of(second.place, "metadata.name"), error, str(second), hides=False)
    if (more := len(pairs) - _DUPLICATES_MAX) > 0:
        error = kind(f"{more} more objects are already in {first_path}", fix=f"{note}remove one")
        yield Problem(path, None, error, hides=False)
