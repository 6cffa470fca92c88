"""A Source that reads manifests from files, folders and stdin, and again when they change.

A file that cannot be read is reported, and its last good version stays in force. An object is deleted only if its file
was read without a fault and no longer contains it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.errors import Note, StartError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.sources.documents import Manifest, Problem, duplicates, parse, split
from userspace_proxy.sources.folder_watch import ChangedFile, FolderWatch
from userspace_proxy.sources.lines import Document
from userspace_proxy.sources.paths import (
    STDIN,
    UNREADABLE,
    begin_to_read_stream,
    check_path,
    expand,
    identity,
    is_manifest_name,
    is_regular,
    is_stream,
    manifests_in,
    read,
    read_stdin,
    read_stream,
    run_in_thread,
    shown,
    unreadable,
    watched_folders,
)

_LOOK_AGAIN_S = 1.0
# A file that lost all its content counts as empty after this time; its writer may truncate it first, and fill it then.
_EMPTY_S = 0.5
# A file that was read this soon after its last change is read again by the next look: another change within one tick of
# the kernel's clock, or within the coarser time stamps of some file systems, leaves its stat values the same.
_SAME_TIME_NS = 1_000_000_000
# The share of a core that is spent on looking at all files again.
_LOOK_AGAIN_SHARE = 0.004
_BATCH = 2_000
# At most this many new problems, and this many solved ones, are logged for one read.
_LOGGED_MAX = 100

ObjectKey = tuple[str, NamespacedName]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Part:
    """One document, its objects and its problems."""

    document: Document
    manifests: tuple[Manifest, ...]
    problems: tuple[Problem, ...] = ()

    def at(self, document: Document) -> _Part:
        """Return the same objects at the position of *document*.

        Only messages need the position; for the tracker nothing has changed.
        """
        return _Part(document, tuple(replace(m, place=replace(m.place, document=document)) for m in self.manifests))

    def moved(self, lines: int, offset: int) -> _Part:
        document = replace(self.document, line=self.document.line + lines, start=self.document.start + offset)
        return self.at(document) if lines else _Part(document, self.manifests)


@dataclass(slots=True)
class _File:
    """One file as last read: its stat values, and its documents in order, which are the whole text."""

    seen: tuple[int, ...] = ()
    parts: list[_Part] = field(default_factory=list)
    emptied_at: float | None = None  # when it was found empty that had content

    @property
    def text(self) -> str:
        return "".join(part.document.text for part in self.parts)

    @property
    def problems(self) -> list[Problem]:
        return [problem for part in self.parts for problem in part.problems]


@dataclass(slots=True)
class _Change:
    """Documents that disappeared from the files, and new ones."""

    gone: list[_Part] = field(default_factory=list)
    came: list[_Part] = field(default_factory=list)
    is_empty: bool = True  # no file was read or removed


class Observer(Protocol):
    """Sees the documents that a source reads. Its methods are called in the reading thread."""

    def examine(self, document: Document, manifests: Sequence[Manifest]) -> None:
        """Look at the *manifests* of a *document* without problems. Their plain values are dropped afterwards."""
        ...

    def note(self, gone: Sequence[Document], came: Sequence[Document]) -> None:
        """Take note of documents that disappeared and of new ones."""
        ...


class FileSource:
    """Reads *paths* (manifest files, folders of them, ``-`` for stdin, pipes) and watches them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(dict.fromkeys(path if path == STDIN else str(Path(path)) for path in paths))
        self._files: dict[str, _File] = {}
        self._holders: dict[ObjectKey, tuple[Manifest, ...]] = {}  # several manifests: duplicates
        self._duplicated: set[ObjectKey] = set()
        self._reported: dict[ObjectKey, Manifest] = {}
        self._possibly_hidden: set[ObjectKey] = set()  # reported, no longer found, but a fault may hide them
        self.observer: Observer | None = None
        self._problems: dict[str, str] = {}
        self._notes: set[str] = set()  # problems that are only notes: files of other tools
        self._faults: dict[str, Problem] = {}  # of files and folders that cannot be read
        self._faulty: set[str] = set()  # files with problems in their documents
        self._touched: set[str] = set()  # files that the next read looks at
        self._looks_at_all = True  # the next read looks at every file
        self._look_again_s = _LOOK_AGAIN_S
        self._emptied: set[str] = set()  # files that are read again, because a writer may have truncated them
        self._with_links: set[str] = set()  # folders in which a change may concern files of other names
        self._named: dict[str, str] = {}  # folders that are read -> as the user named them
        self._names: dict[str, set[str] | None] = {}  # watched folders -> files there that matter; None: all
        self._folder_watch: FolderWatch | None = None
        self._skipped_kinds: set[str] = set()
        self._reading: asyncio.Future[list[ObjectEvent]] | None = None
        self._streams: dict[str, asyncio.Future[str]] = {}
        for path in self._paths:
            check_path(path)
        self._stream_paths = frozenset(path for path in self._paths if is_stream(path))

    @property
    def problems(self) -> Mapping[str, str]:
        return {where: message for where, message in self._problems.items() if where not in self._notes}

    @property
    def watches(self) -> Sequence[WatchStats]:
        return ()

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        changed = asyncio.Event()
        watch = asyncio.create_task(self._watch(changed), name="watch files")
        watch.add_done_callback(lambda _: changed.set())
        try:
            await asyncio.sleep(0)  # start the watch before the first read, so that no change is missed
            self._looks_at_all = True
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
        """Set *changed* on each change in the watched folders, and periodically.

        The periodic read finds changes without a notification: a link's target elsewhere, a folder created again, a
        file on a network share. It continues if the watch fails.
        """
        try:
            watched = [path for path in self._paths if path not in self._stream_paths]
            self._names = watched_folders(watched)
            folders = [path for path in map(Path, watched) if path.is_dir() and not path.is_symlink()]
            self._named = {str(folder.resolve()): str(folder) for folder in folders}
            while self._names:
                await self._watch_folders(changed)
        except (OSError, RuntimeError) as error:
            self._folder_watch = None
            reason = error.strerror if isinstance(error, OSError) else error
            log.warning("files cannot be watched (%s), they are looked at once a second", reason)
        while True:
            await asyncio.sleep(_LOOK_AGAIN_S)
            self._looks_at_all = True
            changed.set()

    async def _watch_folders(self, changed: asyncio.Event) -> None:
        """Watch the folders until one of them is created again. Folders, not files: editors replace the file."""
        identities = set(map(identity, self._names))
        looked_at = time.monotonic()
        is_created_again = False
        with FolderWatch(self._names, self._concerns, self._folder_watch) as watch:
            self._folder_watch = watch
            while not is_created_again:
                for file in await watch.changes(_LOOK_AGAIN_S):
                    self._touch(file)
                self._touched |= self._emptied
                latest = set(map(identity, self._names))
                is_created_again = (latest != identities or watch.has_lost_folder) and None not in latest
                if is_created_again or time.monotonic() - looked_at >= self._look_again_s:
                    looked_at, self._looks_at_all = time.monotonic(), True
                if self._looks_at_all or self._touched:
                    changed.set()

    def _concerns(self, file: ChangedFile) -> bool:
        """Return whether a change of *file* may change what is read."""
        names = self._names[file.folder]
        folder = self._named.get(file.folder)
        return (
            names is None
            or file.name in names
            or (folder is not None and (folder in self._with_links or is_manifest_name(file.name)))
        )

    def _touch(self, file: ChangedFile) -> None:
        """Let the next read look at *file*, or at all files if it may concern others."""
        folder = self._named.get(file.folder)
        if folder is None or folder in self._with_links or not is_manifest_name(file.name):
            self._looks_at_all = True
        else:
            self._touched.add(str(Path(folder, file.name)))

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
            touched, self._touched = self._touched, set()
            looks_at_all, self._looks_at_all = self._looks_at_all, False
            self._reading = run_in_thread(
                "read files", functools.partial(self._read, None if looks_at_all else sorted(touched))
            )
        await asyncio.wait([self._reading])  # if cancelled here, the next call takes the result
        reading, self._reading = self._reading, None
        events = reading.result()
        for start in range(0, len(events), _BATCH):
            yield events[start : start + _BATCH]
            await asyncio.sleep(0)

    def _read(self, touched: Sequence[str] | None = None) -> list[ObjectEvent]:
        """Read changed files; return the resulting events. *touched*: look at these alone, if all are regular files."""
        change = _Change()
        faults: dict[str, Problem] = {}
        gone: set[str] = set()
        began = time.thread_time()
        looks_at_all = touched is None or not all(map(is_regular, touched))
        if touched is None or looks_at_all:
            present: Iterable[str] = (found := self._present(faults))
            gone = self._files.keys() - found
        else:
            present = touched
            faults = {path: fault for path, fault in self._faults.items() if path not in touched}
        for path in present:
            try:
                self._look_at(path, change)
            except UNREADABLE as error:
                faults[path] = unreadable(path, error)
        for path in gone:
            change.is_empty = False
            change.gone += self._files.pop(path).parts
            self._faulty.discard(path)
            self._emptied.discard(path)
        if looks_at_all and change.is_empty:
            self._look_again_s = max(_LOOK_AGAIN_S, (time.thread_time() - began) / _LOOK_AGAIN_SHARE)
        if change.is_empty and list(map(str, faults.values())) == list(map(str, self._faults.values())):
            return []
        self._faults = faults
        return self._events_of(change)

    def _look_at(self, path: str, change: _Change) -> None:
        """Take over the file *path* if it has changed."""
        text = self._text_if_changed(path)
        if text is not None:
            change.is_empty = False
            file = self._files[path]
            self._take(file, shown(path), text, change)
            (self._faulty.add if file.problems else self._faulty.discard)(path)

    def _present(self, faults: dict[str, Problem]) -> dict[str, None]:
        """Return the files that exist now; files of a folder that cannot be read count as existing."""
        present: dict[str, None] = {}
        with_links = set()
        for path in self._paths:
            try:
                if path in self._stream_paths:
                    present[path] = None
                elif Path(path).is_dir():
                    entries = manifests_in(path)
                    present |= dict.fromkeys(entries)
                    if any(entry.is_symlink() for entry in entries.values()):
                        with_links.add(path)
                else:
                    present |= dict.fromkeys(expand(path))
            except OSError as error:
                faults[path] = unreadable(path, error)
                present |= dict.fromkeys(held for held in self._files if Path(held).is_relative_to(path))
        self._with_links = with_links
        return present

    def _text_if_changed(self, path: str) -> str | None:
        """Return the text of *path* if it has changed since the last read, else None."""
        held = self._files.get(path)
        if path in self._stream_paths:
            streamed = self._streams[path].result()
            self._files.setdefault(path, _File())
            return streamed if held is None else None
        stat = os.stat(path)  # noqa: PTH116 - a Path for each of 10,000 files takes longer than the call
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        if held is not None and held.seen == seen:
            return None
        may_change_unseen = abs(time.time_ns() - stat.st_mtime_ns) < _SAME_TIME_NS
        watch = self._folder_watch
        text = read(path) if watch is None else watch.read(path, (stat.st_dev, stat.st_ino))
        if text is None:
            return None
        file = self._files.setdefault(path, _File())
        if file.parts and not text:
            file.emptied_at = file.emptied_at or time.monotonic()  # a writer may fill it soon
            if time.monotonic() - file.emptied_at < _EMPTY_S:
                self._emptied.add(path)
                return None
        file.seen, file.emptied_at = () if may_change_unseen else seen, None
        self._emptied.discard(path)
        return None if file.parts and text == file.text else text

    def _take(self, file: _File, path: str, text: str, change: _Change) -> None:
        """Parse the changed part of *text*; unchanged documents at the start and the end are kept."""
        old, old_text = file.parts, file.text
        # A document is unchanged only if the separator after it is, too. A document with problems is parsed again.
        same = _common_start(old_text, text) - len("--- ")
        head = 0
        while head < len(old) and old[head].document.end <= same and not old[head].problems:
            head += 1
        first = old[head - 1].document.end if head else 0
        same = len(old_text) - _common_start(old_text[first:][::-1], text[first:][::-1])
        tail = len(old)
        while tail > head and old[tail - 1].document.start > same and not old[tail - 1].problems:
            tail -= 1
        last = old[tail].document.start if tail < len(old) else len(old_text)

        offset = len(text) - len(old_text)
        line = 1 + text.count("\n", 0, first)
        by_text = {part.document.text: part for part in old[head:tail] if not part.problems}
        middle = [
            held.at(document) if (held := by_text.get(document.text)) else self._parsed(document)
            for document in split(path, text[first : last + offset], line, first, all_text=True)
        ]
        lines = text.count("\n", first, last + offset) - old_text.count("\n", first, last)
        moved = [part.moved(lines, offset) for part in old[tail:]]
        change.gone += old[head:] if lines else old[head:tail]
        change.came += [*middle, *moved] if lines else middle
        file.parts = [*old[:head], *middle, *moved]

    def _parsed(self, document: Document) -> _Part:
        manifests, problems = parse(document) if document.has_content else ([], [])
        if self.observer is not None and not problems:
            self.observer.examine(document, manifests)
        for manifest in manifests:
            manifest.plain = None
        return _Part(document, tuple(manifests), tuple(problems))

    # ---- events

    def _events_of(self, change: _Change) -> list[ObjectEvent]:
        if self.observer is not None and (change.gone or change.came):
            self.observer.note([part.document for part in change.gone], [part.document for part in change.came])
        touched = self._update_holders(change) | dict.fromkeys(self._possibly_hidden)
        problems = list(self._faults.values())
        if self._faulty:
            problems += (p for path, file in self._files.items() if path in self._faulty for p in file.problems)
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
        gone = (manifest for part in change.gone for manifest in part.manifests if manifest.object is not None)
        for manifest in gone:
            key = (manifest.kind, manifest.name)
            touched[key] = None
            self._holders[key] = tuple(held for held in self._holders[key] if held is not manifest)
        for manifest in (manifest for part in change.came for manifest in part.manifests):
            if manifest.object is None:
                self._skip(manifest)
            else:
                key = (manifest.kind, manifest.name)
                touched[key] = None
                self._holders[key] = (*self._holders.get(key, ()), manifest)
        self._duplicated -= touched.keys()
        repeated = {key for key in touched if len(self._holders[key]) > 1}
        # As a fresh start reads them, so that it serves the same.
        order = {shown(path): index for index, path in enumerate(self._present({}))} if repeated else {}
        for key in touched:
            if key in repeated:
                places = {m: (order.get(m.place.document.path, -1), m.place.document.line) for m in self._holders[key]}
                self._holders[key] = tuple(sorted(places, key=places.__getitem__))
            elif not self._holders[key]:
                del self._holders[key]
        self._duplicated |= repeated
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
        _log_new([problem for where, problem in latest.items() if self._problems.get(where) != now[where]])
        for where in list(self._problems.keys() - now.keys())[:_LOGGED_MAX]:
            path = where.rpartition(":")[0] if where not in self._files else where
            log.info("%s: %s", where, "well again" if path in self._files else "no longer there")
        self._problems = now
        self._notes = {where for where, problem in latest.items() if isinstance(problem.error, Note)}


def _log_new(problems: Sequence[Problem]) -> None:
    for problem in problems[:_LOGGED_MAX]:
        if isinstance(problem.error, Note):
            log.info("%s", problem)
        else:
            kept = "; the last good version, if there was one, goes on serving" if problem.hides else ""
            log.error("%s%s", problem, kept)
    if (more := len(problems) - _LOGGED_MAX) > 0:
        log.error("%d more problems; 'check' shows all", more)


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
