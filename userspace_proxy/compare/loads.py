"""What clients do: wrk for requests, and in this process bulk readers and clients that come one after another.

Each makes its sockets on the client's host and returns what was done in which time. Bulk is read with
MSG_TRUNC (the kernel counts the bytes and throws them away), so that the client is not what limits.
"""

from __future__ import annotations

import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from userspace_proxy.compare.sites import BULK, BULK_BYTES, SMALL, Site
from userspace_proxy.errors import StartError
from userspace_proxy.lab import connect

REQUEST = b"GET / HTTP/1.1\r\nHost: compare\r\n\r\n"
REQUEST_AND_CLOSE = b"GET / HTTP/1.0\r\n\r\n"
_BULK_REQUEST = b"GET /bulk HTTP/1.1\r\nHost: compare\r\n\r\n"
_READ_BYTES = 1 << 20
_WRK_TIMEOUT_S = 10
_WRK_SCRIPT = Path(__file__).parent / "peers" / "wrk.lua"


@dataclass(frozen=True, slots=True)
class Done:
    """What a load has done: requests, datagrams or bytes."""

    units: float
    seconds: float
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    p999_ms: float = 0.0
    failed: int = 0


class Wrk:
    """wrk with *connections*, until `stop`. (Its own duration is in whole seconds.)"""

    def __init__(self, site: Site, connections: int, *, close: bool = False) -> None:
        header = ["-H", "Connection: close"] if close else []
        url = f"http://{site.front_ip}:{SMALL}/"
        command = ["wrk", "-t1", f"-c{connections}", "-d60s", "-s", str(_WRK_SCRIPT), *header, url]
        self._process = subprocess.Popen(site.client.command(*command), stdout=subprocess.PIPE, text=True)

    def stop(self, meanwhile: Callable[[], object] = lambda: None) -> Done:
        """End it, calling *meanwhile* until it has ended (within 100 ms), and return what it did."""
        self._process.send_signal(signal.SIGINT)
        while self._process.poll() is None:
            meanwhile()
            time.sleep(0.002)
        return _parse_wrk(self._process.communicate(timeout=_WRK_TIMEOUT_S)[0])


def _parse_wrk(output: str) -> Done:
    """Read the line that peers/wrk.lua prints: requests, microseconds, and latencies in microseconds."""
    done = re.search(r"^done (\d+) (\d+) ([\d.]+) ([\d.]+) ([\d.]+) (\d+)$", output, re.MULTILINE)
    if done is None:
        raise StartError(f"wrk said: {output.strip()}")
    requests, took_us, p50_us, p99_us, p999_us, failed = (float(word) for word in done.groups())
    return Done(requests, took_us / 1e6, p50_us / 1000, p99_us / 1000, p999_us / 1000, int(failed))


class Bulk:
    """Readers of an endless answer; a context manager."""

    def __init__(self, site: Site, flows: int) -> None:
        self._buffer = bytearray(_READ_BYTES)
        self._poll = select.epoll()
        self._received: dict[int, int] = {}
        self._socks = {}
        for _ in range(flows):
            sock = connect(site.client, site.front_ip, BULK)
            sock.sendall(_BULK_REQUEST * 2)
            sock.setblocking(False)
            self._socks[sock.fileno()] = sock
            self._received[sock.fileno()] = 0
            self._poll.register(sock.fileno(), select.EPOLLIN)

    def __enter__(self) -> Bulk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sock in self._socks.values():
            sock.close()
        self._poll.close()

    def read(self, seconds: float) -> Done:
        """Read for so long."""
        total, started_at = 0, time.monotonic()
        end_at = started_at + seconds
        while (now := time.monotonic()) < end_at:
            for fd, _ in self._poll.poll(end_at - now):
                total += self._read_from(fd)
        return Done(total, time.monotonic() - started_at)

    def _read_from(self, fd: int) -> int:
        sock = self._socks[fd]
        try:
            count = sock.recv_into(self._buffer, _READ_BYTES, socket.MSG_TRUNC)
        except BlockingIOError:
            return 0
        if not count:
            raise ConnectionError("the bulk server closed")
        before = self._received[fd]
        after = self._received[fd] = before + count
        if after // BULK_BYTES != before // BULK_BYTES:
            sock.send(_BULK_REQUEST)  # the next answer is asked for before this one ends
        return count


def one_after_another(site: Site, addresses: Sequence[tuple[str, int]], seconds: float) -> list[float]:
    """Dial *addresses* in turn, each with one request, for so long; return how long each took, in ms, sorted."""
    took, turn, now = [], 0, time.monotonic()
    end_at = now + seconds
    with site.client.inside():
        while now < end_at:
            with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
                sock.settimeout(2.0)
                started_at = time.monotonic()
                sock.connect(addresses[turn % len(addresses)])
                sock.sendall(REQUEST_AND_CLOSE)
                while sock.recv(4096):
                    pass
                now = time.monotonic()
                took.append((now - started_at) * 1000)
            turn += 1
    return sorted(took)
