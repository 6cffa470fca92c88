"""The contract: how the proxy treats each API field, for `check --contract` and docs/reference/contract.md.

Every statement is in contract.toml, and only there. `run` never reads it.
"""

from __future__ import annotations

import re
import sys
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.lint.api_rules import RULES
from userspace_proxy.control.lint.relations import CONTRADICTIONS, RELATIONS
from userspace_proxy.sources.documents import Manifest
from userspace_proxy.sources.lines import Lines

_TABLE = re.compile(r"(<!-- (fields|refusals) of (\w+) -->\n).*?(?=<!-- end -->)", re.DOTALL)
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
    """The clauses of one kind."""

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


def _ignored_is_shown_by() -> str:
    """Return the test that covers ignored fields without a test of their own."""
    return str(_given()["ignored_is_shown_by"])


@cache
def _read() -> Mapping[str, tuple[Clause, ...]]:
    return {
        section: tuple(
            Clause(field, treatment, how, tuple(tests) or (_ignored_is_shown_by(),))
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


def page(text: str) -> str:
    """Return *text*, the page docs/reference/contract.md, with its lists and tables generated anew."""
    return _TABLE.sub(
        lambda found: found[1] + (_items(contract()[found[3]]) if found[2] == "fields" else _refusals(found[3])), text
    )


def _refusals(kind: str) -> str:
    """Return a Markdown table of what the API server rejects in *kind*."""
    rows = [(rule.field, f"{rule.demand[0].upper()}{rule.demand[1:]}") for rule in RULES[kind]]
    rows += [(each.field, f"{each.demand[0].upper()}{each.demand[1:]}.") for each in RELATIONS if kind == "Service"]
    rows += [(field, f"{demand}.") for field, demand in CONTRADICTIONS.get(kind, ())]
    return "".join(f"{row}\n" for row in ["| field | |", "|---|---|", *(f"| `{a}` | {b} |" for a, b in rows)])


def _items(terms: Terms) -> str:
    """Return a Markdown list with one item for each field and the tests written for it."""
    items = []
    for clause in terms.clauses.values():
        tests = [f"`{test.removeprefix('tests/')}`" for test in clause.shown_by if test != _ignored_is_shown_by()]
        shown_by = f" Shown by {', '.join(tests)}." if tests else ""
        items.append(_wrap(f"- `{clause.field}`: *{clause.treatment}*. {clause.how}{shown_by}"))
    return "".join(f"{item}\n" for item in items)


def _wrap(item: str) -> str:
    """Return *item* wrapped at 118 characters; inline code is never broken."""
    whole = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), item)
    lines = textwrap.wrap(whole, 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    return "\n".join(lines).replace("\0", " ")


if __name__ == "__main__":
    _file = Path(sys.argv[1])
    _file.write_text(page(_file.read_text()))
