"""Format log and access-log lines (text for people, JSON for machines), and write them from threads.

A full pipe, a stopped terminal or a hanging disk must never block an event loop. Lines that do not fit into the queue
are dropped and counted.
"""

import atexit
import contextlib
import errno
import io
import json
import logging
import os
import queue
import select
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

import msgspec

from userspace_proxy.model.access_record import AccessRecord
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.printable import brief, printable

log = logging.getLogger(__name__)

# Queued lines; more are dropped and counted, because a client must not wait for a log.
_WAITING_MAX = 10_000
# PIPE_BUF: the kernel writes as much to a pipe atomically, so that lines of two processes do not mix.
_WRITE_BYTES = 4096
# A writer has recovered after this time without a drop.
_RECOVERY_S = 0.5
# At process exit: the longest wait for queued lines, and the longest wait without progress.
_FLUSH_TIMEOUT_S = 4.0
_STALLED_S = 0.8
_STDOUT, _STDERR = 1, 2

# A line, an event to set once the lines before it are written, or None to end.
_Item = bytes | threading.Event | None


class LineWriter:
    """Writes lines from its own thread; `put` never blocks.

    *descriptor* returns the descriptor to write to, or raises OSError; it is called before each write. *on_drop* is
    called with the reason when lines begin to be dropped, *on_recovery* with their number when writing works again.
    """

    def __init__(
        self,
        name: str,
        descriptor: Callable[[], int],
        on_drop: Callable[[str], None],
        on_recovery: Callable[[int], None],
    ) -> None:
        self._descriptor = descriptor
        self._on_drop = on_drop
        self._on_recovery = on_recovery
        self._waiting: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self._not_taken = 0  # counted by callers
        self._not_written = 0  # counted by the thread
        self._reported = 0
        self._is_dropping = False
        self._dropped_at = 0.0
        self._is_torn = False
        self._has_failed = False  # the last write
        # A daemon: a write that never ends must not keep the process from ending.
        threading.Thread(target=self._run, name=name, daemon=True).start()

    @property
    def dropped(self) -> int:
        return self._not_taken + self._not_written

    def put(self, line: bytes) -> None:
        """Queue *line*, which includes its newline. Drop it if the queue is full."""
        if self._waiting.qsize() < _WAITING_MAX:
            self._waiting.put(line)
        else:
            self._not_taken += 1
            self._note_drop("it takes lines too slowly")

    def flush(self) -> bool:
        """Wait until all queued lines are written or dropped. Return False if that takes too long."""
        done = threading.Event()
        self._waiting.put(done)
        give_up_at = time.monotonic() + _FLUSH_TIMEOUT_S
        waiting = self.waiting + 1
        while not done.wait(_STALLED_S):
            if self.waiting >= waiting or time.monotonic() > give_up_at:
                return False
            waiting = self.waiting
        return True

    def close(self) -> bool:
        """Flush as `flush` does, and end the thread."""
        flushed = self.flush()
        self._waiting.put(None)
        return flushed

    @property
    def waiting(self) -> int:
        """The number of lines neither written nor dropped yet."""
        return self._waiting.qsize()

    def _note_drop(self, reason: str) -> None:
        self._dropped_at = time.monotonic()
        if not self._is_dropping:
            self._is_dropping = True
            self._on_drop(reason)

    def _note_written(self) -> None:
        if self._is_dropping and time.monotonic() - self._dropped_at >= _RECOVERY_S:
            self._is_dropping = False
            dropped = self.dropped
            self._on_recovery(dropped - self._reported)
            self._reported = dropped

    def _run(self) -> None:
        item = self._next_item()
        while item is not None:
            if isinstance(item, bytes):
                item = self._write_from(item)
            else:
                item.set()
                item = self._next_item()

    def _next_item(self) -> _Item:
        """Wait for an item; meanwhile note that writing works again."""
        while True:
            try:
                return self._waiting.get(timeout=_RECOVERY_S if self._is_dropping else None)
            except queue.Empty:
                if not self._has_failed:
                    self._note_written()

    def _write_from(self, line: bytes) -> _Item:
        """Write *line* and the lines that wait behind it; return the item that follows them."""
        lines = [line]
        while self._waiting.qsize():
            item = self._waiting.get()
            if not isinstance(item, bytes):
                self._write(lines)
                return item
            if sum(map(len, lines)) + len(item) > _WRITE_BYTES:
                self._write(lines)
                lines = []
            lines.append(item)
        self._write(lines)
        return self._next_item()

    def _write(self, lines: Sequence[bytes]) -> None:
        """Write *lines*. On failure, count the lines not completely written."""
        data = memoryview(b"".join(lines))
        try:
            descriptor = self._descriptor()
            if self._is_torn:
                os.write(descriptor, b"\n")
                self._is_torn = False
            while data:
                try:
                    data = data[os.write(descriptor, data) :]
                except BlockingIOError:  # another process that shares the descriptor made it non-blocking
                    poll = select.poll()
                    poll.register(descriptor, select.POLLOUT)
                    poll.poll()
        except OSError as error:
            self._count_unwritten(lines, len(data))
            self._has_failed = True
            self._note_drop(error.strerror or str(error))
        else:
            self._has_failed = False
            self._note_written()

    def _count_unwritten(self, lines: Sequence[bytes], left: int) -> None:
        """Count those of *lines* that are in the last *left* bytes, which were not written."""
        for line in reversed(lines):
            if left <= 0:
                break
            self._is_torn = left < len(line)
            self._not_written += 1
            left -= len(line)


class _TextToWriter(io.RawIOBase):
    """Raw end of a text stream; a `LineWriter` writes its lines to stderr."""

    def __init__(self, writer: LineWriter) -> None:
        super().__init__()
        self._writer = writer

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        line = bytes(data)  # type: ignore[call-overload]  # any buffer
        self._writer.put(line)
        return len(line)

    def fileno(self) -> int:
        return _STDERR

    def isatty(self) -> bool:
        return os.isatty(_STDERR)


# Logged characters of one message.
_LINE_MAX = 4_000


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("userspace_proxy."),
            "message": brief(record.getMessage(), _LINE_MAX),
        }
        if record.exc_info:
            line["exception"] = brief(self.formatException(record.exc_info))
        return _json(line)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = f"{clock}.{int(record.msecs):03d} {record.levelname:7} {printable(record.getMessage(), _LINE_MAX)}"
        traceback = self.formatException(record.exc_info).split("\n") if record.exc_info else []
        return "\n".join((line, *(printable(each, _LINE_MAX) for each in traceback)))


_stderr: LineWriter | None = None


def configure_logging(log_format: str, *, verbose: bool = False) -> None:
    """Send the program's log, and everything else written to stderr, through a writer thread.

    DEBUG (a line for each connection) only if *verbose*.
    """
    global _stderr
    # If stderr is closed, its descriptor number may belong to a socket.
    descriptor = _STDERR if sys.stderr is not None else os.open(os.devnull, os.O_WRONLY)
    _stderr = LineWriter(
        "log",
        lambda: descriptor,
        lambda _: None,
        lambda count: log.warning("log lines dropped, because stderr did not take them: %d", count),
    )
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    sys.stderr = io.TextIOWrapper(
        _TextToWriter(_stderr),
        encoding=encoding,
        errors="backslashreplace",
        write_through=True,
    )
    atexit.register(flush_log)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("userspace_proxy").setLevel(logging.DEBUG if verbose else logging.INFO)


def flush_log() -> None:
    """Wait briefly until queued log lines are written.

    Call it before this process exits or executes another program.
    """
    if _stderr is not None:
        _stderr.flush()


def log_lines_dropped() -> int:
    """Return the number of dropped lines of this process's log."""
    return _stderr.dropped if _stderr is not None else 0


class _File:
    """A file opened on demand, and reopened after it was renamed (logrotate)."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = -1

    def descriptor(self) -> int:
        """Return a descriptor of the file that has the path now; raises OSError."""
        if self._descriptor >= 0:
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self._descriptor), os.stat(self._path)):  # noqa: PTH116 - for each write
                    return self._descriptor
            self.close()
        self._descriptor = _open(self._path)
        return self._descriptor

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: str) -> int:
    """Return a descriptor to append to *path*; raises OSError if it is not writable or is a FIFO without a reader."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO's open waits for a reader
    descriptor = os.open(path, flags, 0o666)
    os.set_blocking(descriptor, True)
    return descriptor


def require_writable(target: str) -> None:
    """Raise OSError if an access log cannot be written to *target*."""
    if target != "-":
        try:
            os.close(_open(target))
        except OSError as error:
            if error.errno != errno.ENXIO:  # a FIFO whose reader may come later
                raise


class AccessLog:
    """Writes a line for each ended connection and flow, from its own thread."""

    def __init__(self, target: str, log_format: str) -> None:
        self._target = target
        self._render: Callable[[AccessRecord], str] = _as_json if log_format == "json" else as_text
        self._file = _File(target)
        self._writer = LineWriter(
            "access log",
            self._file.descriptor if target != "-" else lambda: _STDOUT,
            lambda why: log.warning("access log %s is not written, lines are dropped: %s", target, why),
            lambda count: log.warning("access log %s is written again; lines dropped: %d", target, count),
        )

    @property
    def dropped(self) -> int:
        return self._writer.dropped

    def write(self, record: AccessRecord) -> None:
        self._writer.put(self._render(record).encode(errors="backslashreplace") + b"\n")

    def close(self) -> None:
        """Write the queued lines and close the file. Give up on lines that cannot be written."""
        if self._writer.close():
            self._file.close()
        else:
            log.warning("access log %s: lines that could not be written: %d", self._target, self._writer.waiting)


def drop_count(access_log: AccessLog | None) -> Callable[[], int]:
    """Return a function that returns the number of access-log lines dropped so far."""
    return lambda: access_log.dropped if access_log is not None else 0


def recorder(access_log: AccessLog | None, *, verbose: bool) -> Callable[[AccessRecord], None] | None:
    """Return the function that records each ended connection, or None if nothing is to be recorded."""
    if not verbose:
        return access_log.write if access_log else None

    def write_and_log(record: AccessRecord) -> None:
        if access_log is not None:
            access_log.write(record)
        log.debug("%s", as_text(record))

    return write_and_log


def as_text(record: AccessRecord) -> str:
    endpoint = record.endpoint or "-"
    return (
        f"{_utc(time.time())} {record.service_port} {record.protocol} {join_address(*record.client)}"
        f" -> {record.portal or '-'} -> {endpoint} ({record.why or '-'})"
        f" up={record.bytes_to_backend} down={record.bytes_to_client}"
        f" {record.duration_s * 1000:.1f}ms {record.how}"
    )


def _as_json(record: AccessRecord) -> str:
    line = {
        "time": _utc(time.time()),
        "service": str(record.service_port.service),
        "port": record.service_port.port_name,
        "protocol": str(record.protocol),
        "client": join_address(*record.client),
        "portal": str(record.portal) if record.portal else None,
        "endpoint": str(record.endpoint) if record.endpoint else None,
        "why": record.why,
        "bytesToBackend": record.bytes_to_backend,
        "bytesToClient": record.bytes_to_client,
        "durationMs": round(record.duration_s * 1000, 3),
        "end": record.how,
    }
    return _json(line)


def _json(line: Mapping[str, object]) -> str:
    try:
        text = msgspec.json.encode(line).decode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(line)
    return text if text.isprintable() else "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in text)


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
