"""Paths that users name: the files they stand for, their content, and the folders to watch.

Only regular files are read repeatedly, because reading them always ends. A pipe is a stream and is read once. A device
is rejected.
"""

import asyncio
import codecs
import contextlib
import functools
import logging
import os
import stat
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from userspace_proxy.errors import ConfigError, StartError
from userspace_proxy.sources.documents import Problem

STDIN = "-"
_ENDINGS = (".yaml", ".yml", ".json")
_FOLDERS_SHOWN = 3
# 10,000 Services with their slices take 6 MB; a file of this size is something else.
_SIZE_MAX_BYTES = 256 * 1024 * 1024
# 10,000 Services with their slices are 20,000 documents.
_DOCUMENTS_MAX = 100_000
_CHUNK_BYTES = 1024 * 1024
_Result = TypeVar("_Result")
UNREADABLE = (OSError, UnicodeDecodeError, ConfigError)

log = logging.getLogger(__name__)


def check_path(path: str) -> None:
    """Raise StartError if *path* does not exist or cannot be read."""
    if path == STDIN:
        if sys.stdin is None:
            raise StartError("stdin is closed")
        return
    if not Path(path).exists():
        raise StartError(f"{path}: no such file or folder")
    if not os.access(path, os.R_OK):
        raise StartError(f"{path}: permission denied")
    if Path(path).is_dir():
        _warn_if_empty(path)
    elif not Path(path).is_file() and not is_stream(path):
        raise StartError(f"{path}: neither a file, a folder nor a pipe; for stdin write '{STDIN}'")


def _warn_if_empty(folder: str) -> None:
    if any(True for _ in expand(folder)):
        return
    nested = sorted({str(p.parent) for p in Path(folder).glob("*/*") if p.suffix in _ENDINGS})
    more = f" and {len(nested) - _FOLDERS_SHOWN} more" if len(nested) > _FOLDERS_SHOWN else ""
    shown = " ".join(nested[:_FOLDERS_SHOWN])
    hint = f"; folders below it are not searched, name them: {shown}{more}" if nested else ""
    log.warning("%s holds no file that ends in %s yet%s", folder, ", ".join(_ENDINGS), hint)


def is_stream(path: str) -> bool:
    """Return whether *path* can be read only once: stdin, or a pipe as the shell makes for ``<(command)``."""
    return path == STDIN or Path(path).is_fifo()


def expand(path: str) -> Iterator[str]:
    """Yield the manifest files of *path*: itself, or the files directly in a folder, sorted by name.

    Raises:
        OSError: *path* cannot be read.
    """
    if path == STDIN:
        yield path
        return
    if not Path(path).is_dir():
        Path(path).stat()
        yield str(Path(path))
        return
    yield from manifests_in(path)


def manifests_in(folder: str) -> dict[str, os.DirEntry[str]]:
    """Return the manifest files directly in *folder*, sorted by name, by their paths.

    Raises:
        OSError: the folder cannot be read.
    """
    with os.scandir(str(Path(folder))) as entries:  # a Path for each of 10,000 files takes too long
        found = [entry for entry in entries if is_manifest_name(entry.name) and entry.is_file()]
    return {entry.path.removeprefix("./"): entry for entry in sorted(found, key=lambda entry: entry.name)}


def is_manifest_name(name: str) -> bool:
    return name.endswith(_ENDINGS) and not name.startswith(".")


def is_regular(path: str) -> bool:
    """Return whether *path* is a regular file, and no link to one."""
    try:
        return stat.S_ISREG(Path(path).lstat().st_mode)
    except OSError:
        return False


def identity(path: str) -> tuple[int, int] | None:
    """Return what distinguishes the file or folder at *path* from another one there later; None if there is none."""
    try:
        found = Path(path).stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def watched_folders(paths: Iterable[str]) -> dict[str, set[str] | None]:
    """Return the folders where changes of *paths* are visible, and the files that matter there; None: all of them.

    Of a folder in *paths*, manifest files matter besides. Any file may be part of the way that a link leads.

    Raises:
        OSError: a link is broken, for example circular.
        RuntimeError: the same, before Python 3.13.
    """
    names: dict[str, set[str]] = defaultdict(set)
    linked: set[Path] = set()
    for path in paths:
        given, real = Path(path).absolute(), Path(path).resolve()
        if real.is_dir():
            if given.is_symlink():
                linked |= {given.parent, given, real}
            else:
                names[str(real)] |= set()
        elif given == real:
            names[str(real.parent)].add(real.name)
        else:
            linked |= {given.parent, real.parent}
    return {**names, **dict.fromkeys(map(str, linked))}


# ---- content


def shown(path: str) -> str:
    """Return *path* for messages; bytes of a name that are not UTF-8 are escaped as ``\\xff``."""
    return "stdin" if path == STDIN else os.fsencode(path).decode(errors="backslashreplace")


def read(path: str) -> str:
    """Return the text of the regular file *path*, without blocking on a pipe.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: *path* cannot be read, is not text, or is not a regular file.
    """
    if shown(path) != path:
        raise ConfigError("cannot be read: its name is not UTF-8 text", fix="rename it")
    # Do not open a FIFO: its writer would take this process for the reader.
    _check_regular_file(Path(path).stat())
    # Do not block either if a FIFO has replaced the file since.
    with open(path, "rb", opener=_open_nonblocking) as file:
        _check_regular_file(os.fstat(file.fileno()))
        return decoded(file.read())


def replace_file(path: Path, content: bytes) -> None:
    """Write *content* to *path* atomically, with mode 0600.

    Raises:
        OSError: the file could not be written; its old content is unchanged.
    """
    # A unique name: another process may write at the same time, in a container even with the same process id.
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f"{path.name}.")
    try:
        with open(descriptor, "wb") as out:  # noqa: PTH123 - a descriptor
            out.write(content)
            out.flush()
            os.fsync(out.fileno())
        Path(name).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(name).unlink(missing_ok=True)
        raise


def decoded(data: bytes) -> str:
    """Return *data* as text: UTF-8, or UTF-16 with a byte order mark, as Windows tools write it.

    Raises:
        UnicodeDecodeError: *data* has neither encoding.
        ConfigError: the text has too many YAML documents.
    """
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = data.decode("utf-16" if is_utf16 else "utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    if text.count("\n---") >= _DOCUMENTS_MAX:
        reason = f"cannot be read: it holds more than {_DOCUMENTS_MAX} documents"
        raise ConfigError(reason, fix="split it into several files")
    return text


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def _check_regular_file(found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError("cannot be read: not a regular file", fix="put a file in its place")
    if found.st_size > _SIZE_MAX_BYTES:
        raise _too_large()


def _too_large() -> ConfigError:
    return ConfigError(
        f"cannot be read: it is larger than {_SIZE_MAX_BYTES // 1024**2} MB", fix="split it into several files"
    )


def read_stream(path: str) -> str:
    """Return the whole stream *path*, once its writer has closed it; unbuffered.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: the stream cannot be read, is not text, or is too large.
    """
    descriptor = os.dup(sys.stdin.fileno()) if path == STDIN else os.open(path, os.O_RDONLY)
    # Unbuffered: a thread that blocks in a buffered reader holds a lock, and the interpreter would abort at exit.
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
    """Return all of stdin through its buffer; blocks until it ends.

    Raises:
        OSError, UnicodeDecodeError, ConfigError: stdin cannot be read, is not text, or is too large.
    """
    data = sys.stdin.buffer.read(_SIZE_MAX_BYTES + 1)
    if len(data) > _SIZE_MAX_BYTES:
        raise _too_large()
    return decoded(data)


def run_in_thread(name: str, work: Callable[[], _Result]) -> asyncio.Future[_Result]:
    """Run *work* in a daemon thread; return a future of its result. It delays neither the event loop nor the exit."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Result] = loop.create_future()

    def run() -> None:
        try:
            settle = functools.partial(_settle, future.set_result, work())
        except Exception as error:  # noqa: BLE001 - raised where the future is asked
            settle = functools.partial(_settle, future.set_exception, error)
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle)

    # Not in a pool: the interpreter waits for pool threads at exit.
    threading.Thread(target=run, name=name, daemon=True).start()
    return future


def _settle(how: Callable[[Any], None], outcome: object) -> None:
    with contextlib.suppress(asyncio.InvalidStateError):  # it was cancelled
        how(outcome)


def begin_to_read_stream(path: str) -> asyncio.Future[str]:
    """Run `read_stream` in a thread; return a future of its text."""
    reading = run_in_thread(f"read {shown(path)}", functools.partial(read_stream, path))
    reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # also raised by `result`
    return reading


def unreadable(path: str, error: OSError | UnicodeDecodeError | ConfigError) -> Problem:
    """Return a Problem for *path*, whose reading raised *error*."""
    if isinstance(error, ConfigError):
        return Problem(shown(path), None, error)
    if isinstance(error, OSError):
        return Problem(shown(path), None, ConfigError(f"cannot be read: {(error.strerror or str(error)).lower()}"))
    line = error.object.count(b"\n", 0, error.start) + 1
    return Problem(shown(path), line, ConfigError("cannot be read: it is not UTF-8 text", fix="save it as UTF-8"))
