"""Logs the findings of `check` during `run`: each one once, when a file is read and after each edit.

Checks run in a thread beside the traffic, and only for documents that an edit concerns. A check is made in slices. Each
one waits for a turn of the event loop, so a large file is served first and checked meanwhile and afterwards.
"""

import asyncio
import contextlib
import ctypes
import logging
import time
from collections import deque
from collections.abc import Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import msgspec

from userspace_proxy.control.lint import Diagnostic, Finding, Linter, LintOptions, as_findings
from userspace_proxy.sources.documents import Manifest, parse
from userspace_proxy.sources.lines import Document
from userspace_proxy.sources.paths import run_in_thread

# At most this many findings are logged for one change of the files; `check` shows all.
_LOGGED_MAX = 20
# At most this many faults are listed by /healthz.
_LISTED_MAX = 100

# The thread of a check and the event loop share one interpreter lock, and each slows the other.
_SLICE_S = 0.02
_PAUSE_S = 2 * _SLICE_S

# Path and text identify a document. Its line may change with each edit above it.
_Text = tuple[str, str]
# Each object in the form for the linter, with the diagnostics on it alone.
_Examined = Sequence[tuple[Manifest, Sequence[Diagnostic]]]
# New findings, and faults that are fixed.
_Outcome = tuple[list[Finding], list[Finding]]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Entry:
    """One document: how often it stands in its file, the line of the last one, and its objects in the linter."""

    count: int = 0
    line: int = 1
    manifests: Sequence[Manifest] | None = None


class Advisor:
    """Checks the documents that a source reads; an Observer of it."""

    def __init__(self, options: LintOptions) -> None:
        self._linter = Linter(options)
        self._examined: dict[_Text, _Examined] = {}
        self._changes: deque[tuple[Sequence[Document], Sequence[Document]]] = deque()
        self._changed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._entries: dict[_Text, _Entry] = {}
        self._reported: dict[Hashable, dict[tuple[str, str, str], tuple[Finding, Document]]] = {}

    @property
    def faults(self) -> list[str]:
        """The current faults that `run` does not report elsewhere; at most a hundred."""
        reported = (pair for pairs in list(self._reported.values()) for pair in pairs.values())
        faults = (pair for pair in reported if _is_fault(pair[0]))
        return [_text(self._placed(*pair)) for pair in islice(faults, _LISTED_MAX)]

    def examine(self, document: Document, manifests: Sequence[Manifest]) -> None:
        """Check each of the *manifests* in *document* by itself, and keep the results for `run`. Thread-safe."""
        self._examined[document.path, document.text] = tuple(map(self._linter.examine, manifests))

    def note(self, gone: Sequence[Document], came: Sequence[Document]) -> None:
        """Queue a check of documents that disappeared and of new ones. Thread-safe."""
        self._changes.append((gone, came))
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._changed.set)

    async def run(self) -> None:
        """Check changed documents until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                news, ended = await self._look()
            except Exception:
                log.exception("a bug: manifests cannot be checked; what they say is served all the same")
            else:
                _log(news, ended)
            with contextlib.suppress(AttributeError):  # glibc alone keeps what was freed, and has this call
                await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)

    async def _look(self) -> _Outcome:
        """Check the queued documents; return the new findings, and the faults that are fixed."""
        steps = self._steps()
        while True:
            await asyncio.sleep(_PAUSE_S)  # the change is served first
            if (outcome := await run_in_thread("lint", lambda: _take_slice(steps))) is not None:
                return outcome

    def _steps(self) -> Generator[None, None, _Outcome]:
        """Check the queued documents, one after another."""
        for text in self._take_changes():
            entry, examined = self._entries[text], self._examined.pop(text, None)
            if entry.count <= 0:
                del self._entries[text]
                for manifest in entry.manifests or ():
                    self._linter.remove(manifest)
            elif entry.manifests is None:
                entry.manifests = self._add(text, examined)
            yield
        yield from self._linter.work()
        return self._compare(self._linter.take_changed())

    def _add(self, text: _Text, examined: _Examined | None) -> tuple[Manifest, ...]:
        """Add the objects of a document to the linter; *examined* is None for a document with problems."""
        if examined is None:
            examined = tuple(map(self._linter.examine, parse(Document(text[0], 1, text[1]), for_check=True)[0]))
        for held, own in examined:
            held.plain = None
            self._linter.add(held, own)
        return tuple(held for held, _ in examined)

    def _take_changes(self) -> list[_Text]:
        """Count the queued documents; return those that changed, disappeared ones first."""
        touched: dict[_Text, _Entry] = {}
        while self._changes:
            gone, came = self._changes.popleft()
            for document, step in (*((each, -1) for each in gone), *((each, 1) for each in came)):
                text = document.path, document.text
                touched[text] = entry = self._entries.setdefault(text, _Entry())
                entry.count += step
                if step > 0:
                    entry.line = document.line
        return sorted(touched, key=lambda text: touched[text].count > 0)

    def _compare(self, changed: Mapping[Hashable, Sequence[Diagnostic]]) -> _Outcome:
        news, ended = [], []
        for key, diagnostics in changed.items():
            now = {
                (finding.object, finding.field, finding.problem): (finding, each.manifest.place.document)
                for each in diagnostics
                if not each.is_reported
                for finding in as_findings([each])
            }
            before = self._reported.pop(key, {})
            news += [self._placed(*found) for what, found in now.items() if what not in before]
            ended += [found[0] for what, found in before.items() if what not in now and _is_fault(found[0])]
            if now:
                self._reported[key] = now
        return news, ended

    def _placed(self, finding: Finding, document: Document) -> Finding:
        """Return *finding* with the line where it is now; *document* has moved if lines above it were edited."""
        entry = self._entries.get((document.path, document.text))
        if finding.line is None or entry is None:
            return finding
        return msgspec.structs.replace(finding, line=finding.line + entry.line - document.line)


def _log(news: Sequence[Finding], ended: Sequence[Finding]) -> None:
    for finding in news[:_LOGGED_MAX]:
        log.log(logging.WARNING if _is_fault(finding) else logging.INFO, "%s", _text(finding))
    if (more := len(news) - _LOGGED_MAX) > 0:
        log.warning("%d more findings; 'userspace-proxy check' shows all", more)
    for finding in ended[:_LOGGED_MAX]:
        log.info("%s: %s: no longer so: %s", finding.object, finding.field, finding.problem)


def _take_slice(steps: Generator[None, None, _Outcome]) -> _Outcome | None:
    """Run *steps* for the time of a slice. Return their outcome, or None if there are more."""
    end_at = time.monotonic() + _SLICE_S
    while time.monotonic() < end_at:
        try:
            next(steps)
        except StopIteration as end:
            outcome: _Outcome = end.value
            return outcome
    return None


def _text(finding: Finding) -> str:
    problem = "; ".join(filter(None, (finding.problem, finding.fix)))
    return ": ".join(filter(None, (finding.where, finding.object, finding.field, problem)))


def _is_fault(finding: Finding) -> bool:
    return finding.severity == "fault"
