"""Manifests in files, folders and stdin as a Source, read again when they change.

What cannot be read is reported and its last good version goes on: an object is deleted only when the place
that held it was read without a fault and does not hold it any more.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from userspace_proxy import api
from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.interfaces import EventType, ObjectEvent
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.sources.documents import Document, Manifest, Problem, duplicates, parse, split

STDIN = "-"
_ENDINGS = (".yaml", ".yml", ".json")
# An editor writes, renames and touches in one go; more than that is waited for only in `run`'s own pace.
_SETTLE_MS = 25
_LOOK_AGAIN_MS = 1_000
_BATCH = 2_000

ObjectKey = tuple[str, NamespacedName]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _File:
    """What is known of one file: how it looked, and what its documents held, by their text."""

    seen: tuple[int, ...] = ()
    documents: dict[tuple[int, str], tuple[list[Manifest], list[Problem]]] = field(default_factory=dict)
    manifests: list[Manifest] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


class FileSource:
    """Reads *paths* (manifest files, folders of them, ``-`` for stdin) and watches them."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = list(dict.fromkeys(path if path == STDIN else str(Path(path)) for path in paths))
        self._files: dict[str, _File] = {}
        self._told: dict[ObjectKey, Manifest] = {}
        self._problems: dict[str, str] = {}
        self._faults: list[str] = []
        self._skipped_kinds: set[str] = set()
        for path in self._paths:
            check_path(path)

    @property
    def problems(self) -> Mapping[str, str]:
        return self._problems

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        changed = asyncio.Event()
        watch = asyncio.create_task(self._watch(changed), name="watch files")
        try:
            await asyncio.sleep(0)  # the watch stands before the first look, so that nothing falls between
            first = self._read()
            for start in range(0, len(first), _BATCH):
                yield first[start : start + _BATCH]
                await asyncio.sleep(0)
            yield [ObjectEvent(EventType.SYNCED)]
            while True:
                await changed.wait()
                changed.clear()
                if events := self._read():
                    yield events
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, changed: asyncio.Event) -> None:
        """Set *changed* whenever something in the folders of our paths has changed, and once a second.

        The second look finds what no watch tells: the target of a link that lies elsewhere, a folder that was
        made anew, a file on a network share.
        """
        from watchfiles import awatch

        folders = {str(folder) for path in self._paths for folder in _watched_folders(path)}
        if not folders:
            return
        try:
            # Folders, not files: an editor puts a new file in place of the old one, and kubelet swaps a symlink.
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
        except (OSError, RuntimeError) as error:  # too many watches on this machine, say
            log.warning("files cannot be watched (%s), they are looked at once a second", error)
        while True:
            await asyncio.sleep(_LOOK_AGAIN_MS / 1000)
            changed.set()

    # ---- reading

    def _read(self) -> list[ObjectEvent]:
        """Read what has changed; return the events that follow from it."""
        faults: list[Problem] = []
        present: dict[str, None] = {}
        changed = False
        for path in self._paths:
            try:
                present.update(dict.fromkeys(expand(path)))
            except OSError as error:
                faults.append(_unreadable(path, error))
                present.update(dict.fromkeys(known for known in self._files if Path(known).is_relative_to(path)))
        for path in present:
            try:
                changed |= self._read_file(path)
            except (OSError, UnicodeDecodeError) as error:
                faults.append(_unreadable(path, error))
        for path in self._files.keys() - present.keys():
            del self._files[path]
            changed = True
        said = [str(fault) for fault in faults]
        if not changed and said == self._faults:
            return []
        self._faults = said
        return self._tell(faults)

    def _read_file(self, path: str) -> bool:
        """Read *path* if it looks different from before; return whether it does."""
        known = self._files.get(path)
        if path == STDIN:
            if known is None:
                self._files[path] = _File()
                self._take(path, "stdin", sys.stdin.read())
            return known is None
        stat = Path(path).stat()
        seen = (stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev)
        if known is not None and known.seen == seen:
            return False
        text = Path(path).read_text(encoding="utf-8-sig")
        self._files.setdefault(path, _File()).seen = seen
        self._take(path, path, text)
        return True

    def _take(self, path: str, shown_as: str, text: str) -> None:
        """Parse the documents of *text* that were not there before."""
        file = self._files[path]
        documents: dict[tuple[int, str], tuple[list[Manifest], list[Problem]]] = {}
        by_text = {key[1]: value for key, value in file.documents.items()}
        for document in split(shown_as, text):
            key = (document.line, document.text)
            known = by_text.get(document.text)
            if known is None or known[1]:
                documents[key] = parse(document)
            else:
                documents[key] = file.documents.get(key) or (_moved(known[0], document), [])
        file.documents = documents
        file.manifests = [manifest for manifests, _ in documents.values() for manifest in manifests]
        file.problems = [problem for _, problems in documents.values() for problem in problems]

    # ---- telling

    def _tell(self, faults: list[Problem]) -> list[ObjectEvent]:
        wanted: dict[ObjectKey, Manifest] = {}
        readable: list[Manifest] = []
        problems = list(faults)
        for file in self._files.values():
            problems += file.problems
            for manifest in file.manifests:
                if manifest.object is None:
                    self._skip(manifest)
                    continue
                readable.append(manifest)
                wanted.setdefault((manifest.kind, manifest.name), manifest)
        if len(wanted) < len(readable):
            problems += duplicates(readable)
        self._report(problems)
        events = [
            ObjectEvent(EventType.SET, manifest.kind, manifest.name, manifest.object, manifest.place)
            for key, manifest in wanted.items()
            if key not in self._told or self._told[key].object is not manifest.object
        ]
        gone = self._told.keys() - wanted.keys()
        kept = {key: self._told[key] for key in gone if self._may_still_be_there(self._told[key])}
        events += [ObjectEvent(EventType.DELETE, key[0], key[1]) for key in gone if key not in kept]
        self._told = {**kept, **wanted}
        return events

    def _may_still_be_there(self, manifest: Manifest) -> bool:
        """Return whether the file that held *manifest* has a fault now, which may hide it."""
        path = STDIN if manifest.place.document.path == "stdin" else manifest.place.document.path
        file = self._files.get(path)
        return file is not None and bool(file.problems)

    def _skip(self, manifest: Manifest) -> None:
        if manifest.kind not in self._skipped_kinds:
            self._skipped_kinds.add(manifest.kind)
            log.info(
                "%s: kind %s is skipped; a proxy reads %s",
                manifest.place.where("kind"),
                manifest.kind,
                ", ".join(api.KINDS),
            )

    def _report(self, problems: Iterable[Problem]) -> None:
        """Log what is newly wrong and what is well again; keep the rest for health and metrics."""
        now = {problem.where: str(problem) for problem in problems}
        for where, said in now.items():
            if self._problems.get(where) != said:
                log.error("%s; the last good version, if there was one, goes on serving", said)
        for where in self._problems.keys() - now.keys():
            log.info("%s: well again", where)
        self._problems = now


# ---- paths


def check_path(path: str) -> None:
    """Raise StartError when *path* names nothing that could be read."""
    if path == STDIN:
        return
    if not Path(path).exists():
        raise StartError(f"{path}: no such file or folder")
    if not os.access(path, os.R_OK):
        raise StartError(f"{path}: permission denied")
    if Path(path).is_dir() and not any(True for _ in expand(path)):
        nested = sorted({str(p.parent) for p in Path(path).glob("*/*") if p.suffix in _ENDINGS})
        hint = f"; folders below it are not searched, name them: {' '.join(nested[:3])}" if nested else ""
        log.warning("%s holds no file that ends in %s yet%s", path, ", ".join(_ENDINGS), hint)


def expand(path: str) -> Iterator[str]:
    """Yield the manifest files that *path* stands for: itself, or the files right in a folder, by name.

    Raises:
        OSError: it cannot be read.
    """
    if path == STDIN:
        yield path
        return
    if not Path(path).is_dir():
        Path(path).stat()
        yield str(Path(path))
        return
    for entry in sorted(Path(path).iterdir()):
        if entry.suffix in _ENDINGS and not entry.name.startswith(".") and entry.is_file():
            yield str(entry)


def _watched_folders(path: str) -> list[Path]:
    """Return the folders in which a change of *path* shows: its own, and that of what a link leads to."""
    if path == STDIN:
        return []
    given, real = Path(path), Path(path).resolve()
    if real.is_dir():
        return list({given.absolute(), real, given.absolute().parent} if given.is_symlink() else {real})
    return list({given.absolute().parent, real.parent})


def _moved(manifests: list[Manifest], document: Document) -> list[Manifest]:
    """Return the same objects at their new lines: for messages, not for the tracker, which sees no change."""
    return [replace(manifest, place=replace(manifest.place, document=document)) for manifest in manifests]


def _unreadable(path: str, error: OSError | UnicodeDecodeError) -> Problem:
    reason = (error.strerror or str(error)).lower() if isinstance(error, OSError) else "it is not UTF-8 text"
    return Problem(path, None, ConfigError(f"cannot be read: {reason}"))


def read_once(paths: Sequence[str]) -> tuple[list[Manifest], list[Problem]]:
    """Read *paths* once, with all that `check` wants to know.

    Raises:
        StartError: a path names nothing that could be read.
    """
    manifests: list[Manifest] = []
    problems: list[Problem] = []
    for name in _all_files(paths):
        try:
            text = sys.stdin.read() if name == STDIN else Path(name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            problems.append(_unreadable(name, error))
            continue
        for document in split("stdin" if name == STDIN else name, text):
            found, wrong = parse(document, for_check=True)
            manifests += found
            problems += wrong
    return manifests, problems


def _all_files(paths: Sequence[str]) -> Iterable[str]:
    """Return the files that *paths* stand for, each once."""
    for path in paths:
        check_path(path)
    try:
        return dict.fromkeys(name for path in paths for name in expand(path))
    except OSError as error:
        raise StartError(f"{error.filename}: {(error.strerror or str(error)).lower()}") from None
