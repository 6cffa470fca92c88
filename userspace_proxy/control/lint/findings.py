"""Findings as `check` shows them: sorted by file and line, each once. Pure."""

from collections.abc import Hashable, Iterable
from typing import NamedTuple

import msgspec

from userspace_proxy.errors import ConfigError, Note
from userspace_proxy.sources.documents import Manifest, Problem
from userspace_proxy.sources.lines import Lines
from userspace_proxy.sources.pasted import FENCE, sign_in
from userspace_proxy.sources.yaml_faults import TEMPLATE, template_note


class Finding(msgspec.Struct, frozen=True, rename={"fix": "mend"}):
    """One line of `check`. In JSON, ``fix`` is called "mend".

    ``line`` is None if the whole file is wrong, ``object`` "" if none is known. ``severity``: ``fault``, or ``note``
    if something is incomplete here or has no effect.
    """

    file: str
    line: int | None
    field: str
    problem: str
    fix: str
    object: str
    severity: str = "fault"

    @property
    def where(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"

    def __str__(self) -> str:
        text = "; ".join(filter(None, (self.problem, self.fix)))
        note = "note" if self.severity == "note" else ""
        return ": ".join(filter(None, (self.where, note, self.field, text)))


class Diagnostic(NamedTuple):
    """An error or note on *manifest*, before its line is known.

    ``is_reported``: `run` rejects the object, or a part of it, because of this error, and reports the error, too.
    """

    manifest: Manifest
    error: ConfigError
    is_reported: bool = False

    @property
    def is_fault(self) -> bool:
        return not isinstance(self.error, Note)


def as_findings(diagnostics: Iterable[Diagnostic], problems: Iterable[Problem] = ()) -> list[Finding]:
    """Return *problems* and *diagnostics*, with their lines, as findings sorted by file and line."""
    lines = Lines()
    unique: dict[Hashable, Finding] = {}
    for problem in problems:
        finding = _finding(problem.path, problem.line, problem.error, problem.object)
        line = 0 if finding.problem == FENCE else finding.line  # fences come in pairs; the first is named
        unique.setdefault((finding.file, line, finding.field, finding.problem), finding)
    for diagnostic in diagnostics:
        place = diagnostic.manifest.place
        line = lines.line_of(place, diagnostic.error.field)
        error = _cause(lines.row(place.document, line), diagnostic)
        field = error.field if error is diagnostic.error else ""  # the line itself is wrong: named once
        finding = _finding(place.document.path, line, error, str(diagnostic.manifest))
        unique.setdefault((finding.file, line, field, finding.problem), finding)
    at_fault = {(f.file, f.line, f.field) for f in unique.values() if f.severity == "fault"}
    kept = [f for f in unique.values() if f.severity == "fault" or (f.file, f.line, f.field) not in at_fault]
    return sorted(kept, key=lambda finding: (finding.file, finding.line or 0))


def _cause(row: str, diagnostic: Diagnostic) -> ConfigError:
    """Return the error, or what explains it in its line *row*: a copying mistake, or a template."""
    error = diagnostic.error
    if not diagnostic.is_fault:
        return error
    return template_note(error.field) if TEMPLATE.search(row) else sign_in(row, error.field) or error


def _finding(path: str, line: int | None, error: ConfigError, name: str) -> Finding:
    severity = "note" if isinstance(error, Note) else "fault"
    return Finding(path, line, error.field, error.reason, error.fix, name, severity)
