"""Watches folders by inotify, and tells which files have changed, once their writers have closed them.

A file that is being written is neither reported nor read. write(2) queues its event before it returns, so a text is
whole if no event of its file came while it was read.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from inotify_simple import Event, INotify, flags

from userspace_proxy.sources import paths
from userspace_proxy.sources.paths import read

# A change waits this long for more of its writer: a new name, other permissions.
_GATHER_S = 0.002
# If several files have changed, they wait this long for the next one: a checkout writes hundreds in one go.
_NEXT_FILE_S = 0.010
# An editor may move a file away before it writes the new one.
_GONE_S = 0.025
_GATHER_MAX_S = 0.1
# The pause after events that concern no file: others may write to the same folder without pause.
_REST_S = 0.008
# A writer that keeps its file open counts as done if it does not write for the first time, or after the second one.
_UNCLOSED_S, _UNCLOSED_MAX_S = 5.0, 60.0
# A new file that has content, but was not written for this time, is a link to a whole one: nothing will be closed.
_LINKED_S = 1.0

_GONE = flags.DELETE | flags.MOVED_FROM
_ENDED = flags.CLOSE_WRITE | flags.MOVED_TO | flags.ATTRIB
_OF_FOLDER = flags.DELETE_SELF | flags.MOVE_SELF
_WATCHED = _GONE | _ENDED | _OF_FOLDER | flags.CREATE | flags.MODIFY | flags.ONLYDIR | flags.EXCL_UNLINK
_LIMITS = {
    errno.ENOSPC: "fs.inotify.max_user_watches is reached",
    errno.EMFILE: "fs.inotify.max_user_instances, or the limit of open files, is reached",
}

Identity = tuple[int, int]


class ChangedFile(NamedTuple):
    """A file that may have changed. Without a name: the folder itself has, or events were lost."""

    folder: str
    name: str


class _Writer(NamedTuple):
    """A writer that has not closed its *file*: when its first and its latest write were seen.

    Without *has_written*, the file was created only.
    """

    file: ChangedFile
    since: float
    latest: float
    has_written: bool


class FolderWatch:
    """Watches *folders* for changes of files that *concerns* returns true for.

    `read` may be called in another thread, one call at a time; the rest in that of the event loop. *before*: an earlier
    watch, whose writers may still be at work. ``has_lost_folder``: a folder is not watched, because it was missing or
    was deleted. Another one there later may have the same inode.

    Raises:
        OSError: the kernel watches no more folders. Folders that are missing or cannot be read are left out.
    """

    def __init__(
        self, folders: Iterable[str], concerns: Callable[[ChangedFile], bool], before: FolderWatch | None = None
    ) -> None:
        self._concerns = concerns
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._lock = threading.Lock()  # protects all that follows
        self._changed: dict[ChangedFile, float] = {}  # changed files, and until when each waits
        self._first_at = self._latest_at = 0.0  # when these changes came
        self._read_now: Identity | None = None
        self._is_torn = False  # it was written meanwhile
        self.writers: dict[Identity, _Writer] = dict(before.writers) if before else {}
        self._folders: dict[int, str] = {}
        self.has_lost_folder = False
        try:
            self._inotify = INotify(nonblocking=True)
            try:
                for folder in folders:
                    try:
                        self._folders[self._inotify.add_watch(folder, _WATCHED)] = folder
                    except (FileNotFoundError, NotADirectoryError):
                        self.has_lost_folder = True
                    except PermissionError:
                        pass
            except OSError:
                self._inotify.close()
                raise
        except OSError as error:
            raise OSError(error.errno, _LIMITS.get(error.errno or 0, error.strerror)) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._inotify.close()

    def read(self, path: str, identity: Identity) -> str | None:
        """Return the text of *path*, or None if it is being written: it is reported when its writer is done.

        *identity*: the device and the inode.

        Raises:
            OSError, UnicodeDecodeError, ConfigError: as `paths.read`.
        """
        with self._lock:
            self._take_new_events()
            if identity in self.writers:
                return None
            self._read_now, self._is_torn = identity, False
        text = read(path)
        with self._lock:
            self._take_new_events()
            self._read_now = None
            return None if self._is_torn or paths.identity(path) != identity else text

    def _take_new_events(self) -> None:
        """Take the queued events, in any thread."""
        if not self._inotify.closed and self._take_events(time.monotonic()):
            self._loop.call_soon_threadsafe(self._wake.set)

    async def changes(self, timeout_s: float) -> list[ChangedFile]:
        """Wait for changes, and return the files as soon as they are quiet; nothing after *timeout_s*."""
        self._loop.add_reader(self._inotify.fileno(), self._wake.set)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
        finally:
            self._loop.remove_reader(self._inotify.fileno())
        self._wake.clear()
        while True:
            await asyncio.sleep(_GATHER_S)
            with self._lock:
                now = time.monotonic()
                has_events = self._take_events(now)
                if now >= self._due_at():
                    changed = self._hand_over(now)
                    break
        if has_events and not changed:
            await asyncio.sleep(_REST_S)
        return changed

    def _take_events(self, now: float) -> bool:
        """Take the queued events; return whether there were any."""
        events = self._inotify.read(timeout=0)
        for event in events:
            file = ChangedFile(self._folders.get(event.wd, ""), event.name)
            if not event.name:
                self._is_torn |= bool(event.mask & flags.Q_OVERFLOW)
                self.has_lost_folder |= bool(event.mask & flags.IGNORED)
                self._note(file, now, now)
            elif self._concerns(file):
                self._take(event, file, now)
        return bool(events)

    def _take(self, event: Event, file: ChangedFile, now: float) -> None:
        # 1. Deleted, moved away, or no longer there: an editor may create it again. The close of a deleted file is not
        #    reported (IN_EXCL_UNLINK), and another file may get its inode.
        # 2. Created or written: wait for the close. A link and a folder are whole when they are created.
        # 3. Renamed, or new permissions, while it is being written: as before, under its present name.
        # 4. Closed by its writer, moved here (what was written under this name was another file), new permissions: it
        #    can be read.
        found = _lstat(file)
        if event.mask & flags.DELETE:
            self.writers = {identity: writer for identity, writer in self.writers.items() if writer.file != file}
        if found is None or event.mask & _GONE:
            self._note(file, now, now + _GONE_S)
            return
        identity = found.st_dev, found.st_ino
        self._is_torn |= identity == self._read_now
        writer = self.writers.get(identity)
        is_new_file = event.mask & flags.CREATE and stat.S_ISREG(found.st_mode) and found.st_nlink == 1
        if event.mask & flags.MODIFY or is_new_file:
            has_written = bool(event.mask & flags.MODIFY)
            self.writers[identity] = _Writer(file, writer.since if writer else now, now, has_written)
            self._changed.pop(file, None)
        elif writer and (event.mask & flags.ATTRIB or (event.mask & flags.MOVED_TO and writer.file != file)):
            self.writers[identity] = writer._replace(file=file)
        else:
            self.writers.pop(identity, None)
            self._note(file, now, now)

    def _note(self, file: ChangedFile, now: float, waits_until: float) -> None:
        if not self._changed:
            self._first_at = now
        self._latest_at = now
        self._changed[file] = waits_until

    def _due_at(self) -> float:
        """Return when the changed files are to be reported."""
        due_at = max(self._changed.values(), default=0.0)
        if len(self._changed) > 1:
            due_at = max(due_at, self._latest_at + _NEXT_FILE_S)
        return min(due_at, self._first_at + _GATHER_MAX_S)

    def _hand_over(self, now: float) -> list[ChangedFile]:
        for identity, writer in list(self.writers.items()):
            is_unclosed = now - writer.latest >= _UNCLOSED_S or now - writer.since >= _UNCLOSED_MAX_S
            if is_unclosed or _is_linked(writer, now):
                del self.writers[identity]
                self._note(writer.file, now, now)
        changed = list(self._changed)
        self._changed.clear()
        return changed


def _is_linked(writer: _Writer, now: float) -> bool:
    """Return whether the file of *writer* was linked with its content: ``linkat`` of O_TMPFILE, or `ln` and `rm`."""
    if writer.has_written or now - writer.latest < _LINKED_S:
        return False
    found = _lstat(writer.file)
    return found is not None and found.st_size > 0


def _lstat(file: ChangedFile) -> os.stat_result | None:
    try:
        return Path(file.folder, file.name).lstat()
    except OSError:
        return None
