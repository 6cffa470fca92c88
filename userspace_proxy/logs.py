"""How log lines and access-log lines look: text for people, JSON for machines."""

from __future__ import annotations

import json
import logging
import logging.handlers
import queue
import sys
import time
from collections.abc import Callable, Mapping

import msgspec

from userspace_proxy.interfaces import AccessRecord
from userspace_proxy.model.endpoint import join_address

log = logging.getLogger(__name__)

# Lines that wait for a slow disk; more are dropped and counted, because a client must not wait for a log.
_WAITING_MAX = 10_000


class JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": _utc(record.created),
            "level": record.levelname.lower(),
            "logger": record.name.removeprefix("userspace_proxy."),
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _json(line)


class TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        said = f"{clock}.{int(record.msecs):03d} {record.levelname:7} {record.getMessage()}"
        return f"{said}\n{self.formatException(record.exc_info)}" if record.exc_info else said


def configure_logging(log_format: str, *, verbose: bool = False) -> None:
    """Send the program's log to stderr; DEBUG (a line for each connection) only when *verbose*."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("userspace_proxy").setLevel(logging.DEBUG if verbose else logging.INFO)


class AccessLog:
    """Writes a line for each connection and flow that ended, from a thread of its own."""

    def __init__(self, target: str, log_format: str) -> None:
        # A file may be moved away by logrotate: it is opened anew then.
        handler = logging.StreamHandler(sys.stdout) if target == "-" else logging.handlers.WatchedFileHandler(target)
        self.dropped = 0
        self._render: Callable[[AccessRecord], str] = _as_json if log_format == "json" else as_text
        self._queue: queue.Queue[logging.LogRecord] = queue.Queue(_WAITING_MAX)
        self._handler = handler
        self._listener = _PatientListener(self._queue, handler)
        self._listener.start()

    def write(self, record: AccessRecord) -> None:
        line = logging.LogRecord("access", logging.INFO, "", 0, self._render(record), None, None)
        try:
            self._queue.put_nowait(line)
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._listener.stop()
        self._handler.close()


def recorder(access_log: AccessLog | None, *, verbose: bool) -> Callable[[AccessRecord], None] | None:
    """Return what takes the record of each connection that has ended; None where nobody wants it."""
    if not verbose:
        return access_log.write if access_log else None

    def write_and_log(record: AccessRecord) -> None:
        if access_log is not None:
            access_log.write(record)
        log.debug("%s", as_text(record))

    return write_and_log


class _PatientListener(logging.handlers.QueueListener):
    def enqueue_sentinel(self) -> None:
        while True:  # the one of the standard library raises where the queue is full
            try:
                super().enqueue_sentinel()
            except queue.Full:
                time.sleep(0.01)
            else:
                return


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
        return msgspec.json.encode(line).decode()
    except UnicodeEncodeError:  # a file name that is not UTF-8
        return json.dumps(line)


def _utc(at: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at)) + f".{int(at % 1 * 1000):03d}Z"
