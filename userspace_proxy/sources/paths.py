"""The paths a user names: which files they stand for, what these hold, and which folders to watch for them.

Only a regular file is read again and again, because only its reading always ends: a pipe is a stream, read once,
where it may take its time, and a device is refused.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import functools
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.sources.documents import Problem

STDIN = "-"
_ENDINGS = (".yaml", ".yml", ".json")
_FOLDERS_SHOWN = 3
# 10,000 Services with their slices are 6 MB; what is so much larger is something else.
_SIZE_MAX_BYTES = 256 * 1024 * 1024
# 10,000 Services with their slices are 20,000.
_DOCUMENTS_MAX = 100_000
_CHUNK_BYTES = 1024 * 1024
_Result = TypeVar("_Result")
UNREADABLE = (OSError, UnicodeDecodeError, ConfigError)

log = logging.getLogger(__name__)


def check_path(path: str) -> None:
    """Raise StartError when *path* names nothing that could be read."""
    if path == STDIN:
        if sys.stdin is None:
            raise StartError("stdin is closed")
        return
    if not Path(path).exists():
        raise StartError(f"{path}: no such file or folder")
    if not os.access(path, os.R_OK):
        raise StartError(f"{path}: permission denied")
    if Path(path).is_dir():
        _warn_of_nothing(path)
    elif not Path(path).is_file() and not is_stream(path):
        raise StartError(f"{path}: neither a file, a folder nor a pipe; for stdin write '{STDIN}'")


def _warn_of_nothing(folder: str) -> None:
    if any(True for _ in expand(folder)):
        return
    nested = sorted({str(p.parent) for p in Path(folder).glob("*/*") if p.suffix in _ENDINGS})
    more = f" and {len(nested) - _FOLDERS_SHOWN} more" if len(nested) > _FOLDERS_SHOWN else ""
    shown = " ".join(nested[:_FOLDERS_SHOWN])
    hint = f"; folders below it are not searched, name them: {shown}{more}" if nested else ""
    log.warning("%s holds no file that ends in %s yet%s", folder, ", ".join(_ENDINGS), hint)


def is_stream(path: str) -> bool:
    """Return whether *path* can be read only once: stdin, or a pipe such as a shell makes of ``<(command)``."""
    return path == STDIN or Path(path).is_fifo()


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


def watched_folders(path: str) -> list[Path]:
    """Return the folders in which a change of *path* shows: its own, and that of what a link leads to.

    Raises:
        OSError: a link leads nowhere, in a circle say.
        RuntimeError: the same, before Python 3.13.
    """
    given, real = Path(path), Path(path).resolve()
    if real.is_dir():
        return list({given.absolute(), real, given.absolute().parent} if given.is_symlink() else {real})
    return list({given.absolute().parent, real.parent})


# ---- what they hold


def shown(path: str) -> str:
    """Return *path* as it stands in messages; bytes of a name that are not UTF-8 are written as ``\\xff``."""
    return "stdin" if path == STDIN else os.fsencode(path).decode(errors="backslashreplace")


def read(path: str) -> str:
    """Return the text of the file *path*, at once.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: it cannot be read, is no text, or no file to read.
    """
    if shown(path) != path:
        raise ConfigError("cannot be read: its name is not UTF-8 text", mend="rename it")
    # A FIFO is not even opened: whoever writes to it would take us for its reader.
    _refuse_what_never_ends(Path(path).stat())
    # Not to wait at one that was put in its place meanwhile, either.
    with open(path, "rb", opener=_open_without_waiting) as file:
        _refuse_what_never_ends(os.fstat(file.fileno()))
        return decoded(file.read())


def decoded(data: bytes) -> str:
    """Return the text of *data*: UTF-8, or UTF-16 with a byte order mark as Windows tools write it.

    Raises:
        UnicodeDecodeError: it is neither.
        ConfigError: it holds too many documents.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n---") >= _DOCUMENTS_MAX:
        said = f"cannot be read: it holds more than {_DOCUMENTS_MAX} documents"
        raise ConfigError(said, mend="split it into several files")
    return text


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_what_never_ends(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError("cannot be read: not a regular file", mend="put a file in its place")
    if found.st_size > _SIZE_MAX_BYTES:
        raise _too_large()


def _too_large() -> ConfigError:
    return ConfigError(
        f"cannot be read: it is larger than {_SIZE_MAX_BYTES // 1024**2} MB", mend="split it into several files"
    )


def read_stream(path: str) -> str:
    """Return all of the stream *path*, when its writer has ended; reads it by the descriptor, past any buffer.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: it cannot be read, is no text, or is too much.
    """
    descriptor = os.dup(sys.stdin.fileno()) if path == STDIN else os.open(path, os.O_RDONLY)
    # No buffered reader: a thread that waits in one holds a lock, at which the interpreter's end would abort.
    with open(descriptor, "rb", buffering=0) as stream:  # noqa: PTH123 - a descriptor
        chunks = []
        size = 0
        while chunk := stream.read(_CHUNK_BYTES):
            chunks.append(chunk)
            size += len(chunk)
            if size > _SIZE_MAX_BYTES:
                raise _too_large()
    return decoded(b"".join(chunks))


def read_stdin() -> str:
    """Return all of stdin, at once, by way of its buffer.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: it cannot be read, is no text, or is too much.
    """
    data = sys.stdin.buffer.read(_SIZE_MAX_BYTES + 1)
    if len(data) > _SIZE_MAX_BYTES:
        raise _too_large()
    return decoded(data)


def run_in_thread(name: str, work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Return what *work* will return or raise, without holding up the event loop, or our end."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        try:
            settle = functools.partial(_settle, future.set_result, work())
        except Exception as error:  # noqa: BLE001 - raised where the future is asked
            settle = functools.partial(_settle, future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle)

    # A thread of its own, because one of a pool is waited for at the end.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _settle(how: Callable[[Any], None], outcome: object) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # it was cancelled
        how(outcome)


def begin_to_read_stream(path: str) -> asyncio.Future[str | Exception]:
    """Return what `read_stream` will return or raise."""

    def work() -> str | Exception:
        try:
            return read_stream(path)
        except Exception as error:  # noqa: BLE001 - raised where the future is asked
            return error

    return run_in_thread(f"read {shown(path)}", work)


def unreadable(path: str, error: OSError | UnicodeDecodeError | ConfigError) -> Problem:
    """Return what to say of *path*, the reading of which ended with *error*."""
    if isinstance(error, ConfigError):
        return Problem(shown(path), None, error)
    if isinstance(error, OSError):
        return Problem(shown(path), None, ConfigError(f"cannot be read: {(error.strerror or str(error)).lower()}"))
    line = error.object.count(b"\n", 0, error.start) + 1
    return Problem(shown(path), line, ConfigError("cannot be read: it is not UTF-8 text", mend="save it as UTF-8"))
