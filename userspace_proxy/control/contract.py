"""The contract: how the proxy treats each API field, for `check --contract` and docs/reference/contract.md.

Every statement is in contract.toml, and only there. `run` never reads it.
"""

import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.sources.documents import Manifest
from userspace_proxy.sources.lines import Lines

# Fields that identify an object, or decide whether this proxy serves it.
_IDENTITY = re.compile(r"apiVersion$|kind$|metadata\.|spec\.(type|clusterIPs?)$")


@dataclass(frozen=True, slots=True)
class Clause:
    """How one field is treated: honoured, approximated, ignored, or unknown if the API has no such field.

    ``field`` has the form ``spec.ports[].port``. ``*`` stands for any other key. A clause about one value names it:
    ``field: value``. ``shown_by``: the tests that prove it.
    """

    field: str
    treatment: str
    how: str
    shown_by: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class FieldTreatment:
    """How a field that a manifest sets is treated, and where it is set."""

    file: str
    line: int
    object: str
    field: str
    treatment: str
    how: str
    shown_by: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.object}: {self.field}: {self.treatment}: {self.how}"


class Terms:
    """The clauses of the contract for one kind of object."""

    def __init__(self, clauses: Iterable[Clause]) -> None:
        self.clauses = {clause.field: clause for clause in clauses}

    def of(self, plain: Mapping[str, object]) -> Iterator[tuple[str, Clause]]:
        """Yield (field, clause) for each field that *plain* sets; skip null and empty values."""
        yield from self._below("", "", plain)

    def _below(self, general: str, field: str, value: object) -> Iterator[tuple[str, Clause]]:
        """Yield the clauses for *value* and the values inside it.

        *field* is its path with indexes (``spec.ports[0]``), *general* the same path as clauses write it
        (``spec.ports[]``).
        """
        if value is None:
            return
        if clause := self.clauses.get(f"{general}: {value}") or self.clauses.get(general):
            yield field, clause
        elif general and not self._has_any_below(general):
            yield field, Clause(general, "unknown", "There is no such field.", ())
        elif isinstance(value, dict):
            for key, item in value.items():
                yield from self._below(self._general(general, key), api.below(field, key), item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from self._below(f"{general}[]", f"{field}[{index}]", item)

    def _general(self, parent: str, key: object) -> str:
        named, other = api.below(parent, key), api.below(parent, "*")
        is_named = named in self.clauses or self._has_any_below(named) or other not in self.clauses
        return named if is_named else other

    def _has_any_below(self, general: str) -> bool:
        return any(field.startswith((f"{general}.", f"{general}[")) for field in self.clauses)


@cache
def contract() -> Mapping[str, Terms]:
    """Return the whole contract, by kind."""
    return {kind: Terms(clauses) for kind, clauses in _read().items() if kind in api.KINDS}


@cache
def left_alone() -> Mapping[str, Clause]:
    """Return, by kind, the clause for the fields of objects that this proxy does not serve."""
    return {clause.field: clause for clause in _read()["left_alone"]}


@cache
def _given() -> Mapping[str, Any]:
    """Return the content of contract.toml."""
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text())


def ignored_is_shown_by() -> str:
    """Return the test that covers ignored fields without a test of their own."""
    return str(_given()["ignored_is_shown_by"])


@cache
def _read() -> Mapping[str, tuple[Clause, ...]]:
    return {
        section: tuple(
            Clause(field, treatment, how, tuple(tests) or (ignored_is_shown_by(),))
            for field, (treatment, how, *tests) in fields.items()
        )
        for section, fields in _given().items()
        if isinstance(fields, dict)
    }


def field_treatments(manifests: Sequence[Manifest]) -> list[FieldTreatment]:
    """Return how each field of *manifests* is treated, in the order written. They must be read with ``for_check``."""
    lines = Lines()
    return [
        FieldTreatment(
            manifest.place.document.path,
            lines.line_of(manifest.place, field),
            str(manifest),
            field,
            clause.treatment,
            clause.how,
            clause.shown_by,
        )
        for manifest in manifests
        for field, clause in _clauses(manifest)
    ]


def _clauses(manifest: Manifest) -> Iterator[tuple[str, Clause]]:
    """Yield (field, clause) for each field of *manifest*; nothing for a kind that the proxy does not read."""
    if manifest.kind not in contract():
        return
    for field, clause in contract()[manifest.kind].of(manifest.plain or {}):
        is_moot = _is_left_alone(manifest) and clause.treatment == "honoured" and not _IDENTITY.match(field)
        yield field, left_alone()[manifest.kind] if is_moot else clause


def _is_left_alone(manifest: Manifest) -> bool:
    match manifest.object:
        case api.Service() as service:
            return service.spec is not None and not decode.is_proxied(service)
        case api.EndpointSlice() as piece:
            return decode.service_of(piece, manifest.name.namespace) is None
    return False
