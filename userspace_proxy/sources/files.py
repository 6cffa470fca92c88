"""A Source that reads manifests from files, folders and stdin, and again when they change.

A file that cannot be read is reported, and its last good version stays in force. An object is deleted only if its file
was read without a fault and no longer contains it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.errors import Note, StartError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.documents import Manifest, Problem, duplicates, parse, split
from userspace_proxy.sources.lines import Document
from userspace_proxy.sources.paths import (
    STDIN,
    UNREADABLE,
    begin_to_read_stream,
    check_path,
    expand,
    is_stream,
    read,
    read_stdin,
    read_stream,
    run_in_thread,
    shown,
    unreadable,
    watched_folders,
)

# Changes within this time are read together: an editor writes, renames and touches in one go.
_SETTLE_MS = 25
_LOOK_AGAIN_MS = 1_000
_BATCH = 2_000
# At most this many new problems, and this many solved ones, are logged for one read.
_LOGGED_MAX = 100

ObjectKey = tuple[str, NamespacedName]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Part:
    """One document, its objects and its problems."""

    document: Document
    manifests: list[Manifest]
    problems: list[Problem]

    def at(self, document: Document) -> _Part:
        """Return the same objects at the position of *document*.

        Only messages need the position; for the tracker nothing has changed.
        """
        return _Part(document, [replace(m, place=replace(m.place, document=document)) for m in self.manifests], [])

    def moved(self, lines: int, offset: int) -> _Part:
        here = self.document
        document = replace(here, line=here.line + lines, start=here.start + offset)
        return self.at(document) if lines else _Part(document, self.manifests, [])


@dataclass(slots=True)
class _File:
    """One file as last read: its stat values, its text, and its documents in order."""

    seen: tuple[int, ...] = ()
    text: str = ""
    parts: list[_Part] = field(default_factory=list)
    emptied: bool = False

    @property
    def problems(self) -> list[Problem]:
        return [problem for part in self.parts for problem in part.problems]


@dataclass(slots=True)
class _Change:
    """Manifests and documents that disappeared from the files, and new ones."""

    gone: list[Manifest] = field(default_factory=list)
    came: list[Manifest] = field(default_factory=list)
    gone_documents: list[Document] = field(default_factory=list)
    came_documents: list[Document] = field(default_factory=list)
    is_empty: bool = True  # no file was read or removed

    def replace(self, old: Iterable[_Part], new: Iterable[_Part]) -> None:
        self.gone_documents += [part.document for part in old]
        self.came_documents += [part.document for part in new]
        self.gone += [manifest for part in old for manifest in part.manifests]
        self.came += [manifest for part in new for manifest in part.manifests]


class FileSource:
    """Reads *paths* (manifest files, folders of them, ``-`` for stdin, pipes) and watches them.

    ``observe`` is called in the reading thread with documents that disappeared and new ones.
    """

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(dict.fromkeys(path if path == STDIN else str(Path(path)) for path in paths))
        self._files: dict[str, _File] = {}
        self._holders: dict[ObjectKey, list[Manifest]] = {}  # several manifests: duplicates
        self._duplicated: set[ObjectKey] = set()
        self._reported: dict[ObjectKey, Manifest] = {}
        self._possibly_hidden: set[ObjectKey] = set()  # reported, no longer found, but a fault may hide them
        self.observe: Callable[[Sequence[Document], Sequence[Document]], None] = lambda gone, came: None
        self._problems: dict[str, str] = {}
        self._notes: set[str] = set()  # problems that are only notes: files of other tools
        self._faults: list[str] = []
        self._skipped_kinds: set[str] = set()
        self._reading: asyncio.Future[list[ObjectEvent]] | None = None
        self._streams: dict[str, asyncio.Future[str]] = {}
        for path in self._paths:
            check_path(path)
        self._stream_paths = frozenset(path for path in self._paths if is_stream(path))

    @property
    def problems(self) -> Mapping[str, str]:
        return {where: said for where, said in self._problems.items() if where not in self._notes}

    @property
    def watches(self) -> Sequence[WatchStats]:
        return ()

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        changed = asyncio.Event()
        watch = asyncio.create_task(self._watch(changed), name="watch files")
        watch.add_done_callback(lambda _: changed.set())
        try:
            await asyncio.sleep(0)  # start the watch before the first read, so that no change is missed
            await self._read_streams()
            async for batch in self._read_in_batches():
                yield batch
            yield [ObjectEvent(EventType.SYNCED)]
            while True:
                await changed.wait()
                changed.clear()
                if watch.done():
                    cause = None if watch.cancelled() else watch.exception()
                    raise RuntimeError("the files are watched no more") from cause
                async for batch in self._read_in_batches():
                    yield batch
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, changed: asyncio.Event) -> None:
        """Set *changed* on each change in the watched folders, and once a second.

        The periodic read finds changes without a notification: a link's target elsewhere, a folder made anew, a file on
        a network share. It continues if the watch fails.
        """
        try:
            await self._watch_folders(changed)
        except Exception as error:  # noqa: BLE001 - too many watches, or a file name that is not UTF-8
            log.warning("files cannot be watched (%s), they are looked at once a second", _innermost(error))
        while True:
            await asyncio.sleep(_LOOK_AGAIN_MS / 1000)
            changed.set()

    async def _watch_folders(self, changed: asyncio.Event) -> None:
        from watchfiles import awatch

        watched = [path for path in self._paths if path not in self._stream_paths]
        folders = {str(folder) for path in watched for folder in watched_folders(path)}
        if not folders:
            return
        # Watch folders, not files: an editor replaces the file, and kubelet swaps a symlink.
        async for _ in awatch(
            *folders,
            step=_SETTLE_MS,
            debounce=_SETTLE_MS * 4,
            recursive=False,
            rust_timeout=_LOOK_AGAIN_MS,
            yield_on_timeout=True,
            ignore_permission_denied=True,
        ):
            changed.set()

    async def _read_streams(self) -> None:
        """Wait until every stream ends. If cancelled, the next call continues."""
        for path in self._stream_paths - self._streams.keys():
            self._streams[path] = begin_to_read_stream(path)
        if self._streams:
            await asyncio.wait(self._streams.values())

    # ---- reading

    async def _read_in_batches(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        """Yield the events of changed files, in batches.

        Files are read in a thread: a large one takes seconds, and the event loop must answer signals and probes
        meanwhile.
        """
        if self._reading is None:
            self._reading = run_in_thread("read files", self._read)
        await asyncio.wait([self._reading])  # if cancelled here, the next call takes the result
        reading, self._reading = self._reading, None
        events = reading.result()
        for start in range(0, len(events), _BATCH):
            yield events[start : start + _BATCH]
            await asyncio.sleep(0)

    def _read(self) -> list[ObjectEvent]:
        """Read changed files; return the resulting events."""
        faults: list[Problem] = []
        change = _Change()
        present = self._present(faults)
        for path in present:
            try:
                text = self._text_if_changed(path)
            except UNREADABLE as error:
                faults.append(unreadable(path, error))
                continue
            if text is not None:
                change.is_empty = False
                self._take(self._files[path], shown(path), text, change)
        for path in self._files.keys() - present:
            change.is_empty = False
            change.replace(self._files.pop(path).parts, ())
        said = [str(fault) for fault in faults]
        if change.is_empty and said == self._faults:
            return []
        self._faults = said
        return self._events_of(change, faults)

    def _present(self, faults: list[Problem]) -> dict[str, None]:
        """Return the files that exist now; files of a folder that cannot be read count as existing."""
        present: dict[str, None] = {}
        for path in self._paths:
            try:
                present |= dict.fromkeys([path] if path in self._stream_paths else expand(path))
            except OSError as error:
                faults.append(unreadable(path, error))
                present |= dict.fromkeys(known for known in self._files if Path(known).is_relative_to(path))
        return present

    def _text_if_changed(self, path: str) -> str | None:
        """Return the text of *path* if it has changed since the last read, else None."""
        known = self._files.get(path)
        if path in self._stream_paths:
            text = self._streams[path].result()
            self._files.setdefault(path, _File())
            return text if known is None else None
        stat = Path(path).stat()
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        if known is not None and known.seen == seen:
            return None
        text = read(path)
        file = self._files.setdefault(path, _File())
        if file.text and not text and not file.emptied:
            file.emptied = True  # a writer may have truncated it; the next read accepts an empty file
            return None
        file.seen, file.emptied = seen, False
        return text

    def _take(self, file: _File, path: str, text: str, change: _Change) -> None:
        """Parse the changed part of *text*; unchanged documents at the start and the end are kept."""
        old = file.parts
        # A document is unchanged only if the separator after it is, too. A document with problems is parsed again.
        same = _common_start(file.text, text) - len("--- ")
        head = 0
        while head < len(old) and old[head].document.end <= same and not old[head].problems:
            head += 1
        first = old[head - 1].document.end if head else 0
        same = len(file.text) - _common_start(file.text[first:][::-1], text[first:][::-1])
        tail = len(old)
        while tail > head and old[tail - 1].document.start > same and not old[tail - 1].problems:
            tail -= 1
        last = old[tail].document.start if tail < len(old) else len(file.text)

        offset = len(text) - len(file.text)
        line = 1 + text.count("\n", 0, first)
        by_text = {part.document.text: part for part in old[head:tail] if not part.problems}
        middle = [
            known.at(document) if (known := by_text.get(document.text)) else _Part(document, *parse(document))
            for document in split(path, text[first : last + offset], line, first)
        ]
        lines = text.count("\n", first, last + offset) - file.text.count("\n", first, last)
        moved = [part.moved(lines, offset) for part in old[tail:]]
        change.replace(old[head:tail], middle)
        if lines:
            change.replace(old[tail:], moved)
        file.text, file.parts = text, [*old[:head], *middle, *moved]

    # ---- events

    def _events_of(self, change: _Change, faults: list[Problem]) -> list[ObjectEvent]:
        if change.gone_documents or change.came_documents:
            self.observe(change.gone_documents, change.came_documents)
        touched = self._update_holders(change) | dict.fromkeys(self._possibly_hidden)
        problems = [*faults, *(problem for file in self._files.values() for problem in file.problems)]
        if self._duplicated:
            problems += duplicates(m for key in sorted(self._duplicated) for m in self._holders[key])
        self._report(problems)
        return [event for key in touched if (event := self._event(key)) is not None]

    def _event(self, key: ObjectKey) -> ObjectEvent | None:
        """Return the event by which the tracker learns of the object *key*, or None if nothing has changed."""
        reported = self._reported.get(key)
        if key in self._holders:
            latest = self._reported[key] = self._holders[key][0]
            self._possibly_hidden.discard(key)
            if reported is None or reported.object is not latest.object:
                return ObjectEvent(EventType.SET, latest.kind, latest.name, latest.object, latest.place)
        elif reported is not None and self._may_still_be_there(reported):
            self._possibly_hidden.add(key)
        elif reported is not None:
            del self._reported[key]
            self._possibly_hidden.discard(key)
            return ObjectEvent(EventType.DELETE, *key)
        return None

    def _update_holders(self, change: _Change) -> dict[ObjectKey, None]:
        """Update which manifests define each object; return the objects in *change*, in the order written."""
        touched: dict[ObjectKey, None] = {}
        gone = [manifest for manifest in change.gone if manifest.object is not None]
        for manifest in gone:
            key = (manifest.kind, manifest.name)
            touched[key] = None
            self._holders[key] = [held for held in self._holders[key] if held is not manifest]
        for manifest in change.came:
            if manifest.object is None:
                self._skip(manifest)
            else:
                key = (manifest.kind, manifest.name)
                touched[key] = None
                self._holders.setdefault(key, []).append(manifest)
        order = {path: index for index, path in enumerate(self._files)}
        for key in touched:
            self._duplicated.discard(key)
            if len(holders := self._holders[key]) > 1:
                self._duplicated.add(key)
                holders.sort(key=lambda m: (order.get(m.place.document.path, -1), m.place.document.line))
            elif not holders:
                del self._holders[key]
        return touched

    def _may_still_be_there(self, manifest: Manifest) -> bool:
        """Return whether a fault in the file of *manifest* may hide it."""
        path = STDIN if manifest.place.document.path == "stdin" else manifest.place.document.path
        file = self._files.get(path)
        return file is not None and any(problem.hides for problem in file.problems)

    def _skip(self, manifest: Manifest) -> None:
        if manifest.kind not in self._skipped_kinds:
            self._skipped_kinds.add(manifest.kind)
            where, kinds = manifest.place.where("kind"), ", ".join(api.KINDS)
            log.info("%s: kind %s is skipped; a proxy reads %s", where, manifest.kind, kinds)

    def _report(self, problems: Iterable[Problem]) -> None:
        """Log new and solved problems; keep the current ones for health and metrics."""
        latest = {problem.where: problem for problem in problems}
        now = {where: str(problem) for where, problem in latest.items()}
        news = [where for where, said in now.items() if self._problems.get(where) != said]
        for where in news[:_LOGGED_MAX]:
            kept = "; the last good version, if there was one, goes on serving" if latest[where].hides else ""
            if isinstance(latest[where].error, Note):
                log.info("%s", now[where])
            else:
                log.error("%s%s", now[where], kept)
        if (more := len(news) - _LOGGED_MAX) > 0:
            log.error("%d more problems; 'check' shows all", more)
        for where in list(self._problems.keys() - now.keys())[:_LOGGED_MAX]:
            path = where.rpartition(":")[0] if where not in self._files else where
            log.info("%s: %s", where, "well again" if path in self._files else "no longer there")
        self._problems = now
        self._notes = {where for where, problem in latest.items() if isinstance(problem.error, Note)}


def _common_start(left: str, right: str) -> int:
    """Return the length of the common prefix of *left* and *right*."""
    low, high = 0, min(len(left), len(right))
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _innermost(error: Exception) -> BaseException:
    """Return the first single exception in *error*: watchfiles raises exception groups."""
    inner: BaseException = error
    while isinstance(inner, BaseExceptionGroup):
        inner = inner.exceptions[0]
    return inner


def read_once(paths: Sequence[str], *, for_check: bool = True) -> tuple[list[Manifest], list[Problem]]:
    """Read *paths* once, and return all that `check` needs, or without *for_check* what `run` would serve.

    `run` uses only valid objects, and the first of each set of duplicates.

    Raises:
        StartError: a path does not exist or cannot be read.
    """
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for name in _all_files(paths):
        try:
            text = _text(name)
        except UNREADABLE as error:
            problems.append(unreadable(name, error))
            continue
        for document in split(shown(name), text):
            found, wrong = parse(document, for_check=for_check)
            manifests += found
            problems += wrong
    if not for_check:
        problems += duplicates(manifest for manifest in manifests if manifest.object is not None)
        manifests = list({(manifest.kind, manifest.name): manifest for manifest in reversed(manifests)}.values())[::-1]
    return manifests, problems


def _text(name: str) -> str:
    if name == STDIN:
        return read_stdin()
    return read_stream(name) if is_stream(name) else read(name)


def nothing_found(paths: Sequence[str]) -> str:
    """Return the message for *paths* that contain no object and no fault."""
    return f"no object found in {', '.join('stdin' if path == STDIN else path for path in paths)}"


def _all_files(paths: Sequence[str]) -> Iterable[str]:
    """Return the files that *paths* stand for, without duplicates."""
    for path in paths:
        check_path(path)
    try:
        return dict.fromkeys(name for path in paths for name in expand(path))
    except OSError as error:
        raise StartError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from None
