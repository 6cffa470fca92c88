"""What clients do beyond the loads of `userspace-proxy compare`: bulk, datagrams, idle connections, a fixed rate.

Each makes its sockets on the client's host, in this process, and returns what was done in which time. Bulk is read with
MSG_TRUNC (the kernel counts the bytes and throws them away), so that the proxy is what limits, not the client.
"""

from __future__ import annotations

import select
import socket
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType

from userspace_proxy.compare.loads import REQUEST, Done
from userspace_proxy.compare.sites import BULK, SMALL, Site
from userspace_proxy.lab import connect

UDP, UDP_ONCE = 9053, 9054
BULK_FILE_BYTES = 64 * 1024 * 1024
_BULK_REQUEST = b"GET /bulk HTTP/1.1\r\nHost: compare\r\n\r\n"
_READ_BYTES = 1 << 20
_ANSWER_END = b"ok\n"
_DATAGRAM = bytes(64)
_LOST_AFTER_S = 0.1


# ---- bytes


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
        if after // BULK_FILE_BYTES != before // BULK_FILE_BYTES:
            sock.send(_BULK_REQUEST)  # the next answer is asked for before this one ends
        return count


# ---- datagrams


class Datagrams:
    """So many flows, one datagram of each under way; with *once*, a flow has one datagram only. A context manager."""

    _ports = 1024  # where source ports of single-datagram flows have come to; a port returns after all the others

    def __init__(self, site: Site, port: int, flows: int, *, once: bool) -> None:
        self._site = site
        self._address = (site.front_ip, port)
        self._once = once
        self._poll = select.epoll()
        self._sent_at: dict[socket.socket, float] = {}
        self._socks: dict[int, socket.socket] = {}
        self._lost = 0
        with site.client.inside():
            for _ in range(flows):
                self._open()

    def __enter__(self) -> Datagrams:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sock in self._socks.values():
            sock.close()
        self._poll.close()

    def _open(self) -> None:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        if self._once:
            Datagrams._ports = 1024 + (Datagrams._ports - 1023) % 60_000
            sock.bind(("", Datagrams._ports))
        sock.connect(self._address)
        self._socks[sock.fileno()] = sock
        self._poll.register(sock.fileno(), select.EPOLLIN)
        sock.send(_DATAGRAM)
        self._sent_at[sock] = time.monotonic()

    def _replace(self, sock: socket.socket) -> None:
        del self._socks[sock.fileno()], self._sent_at[sock]
        sock.close()
        self._open()

    def exchange(self, seconds: float) -> Done:
        """Ask and be answered for so long."""
        with self._site.client.inside():
            return self._exchange(seconds)

    def _exchange(self, seconds: float) -> Done:
        answered, buffer = 0, bytearray(2048)
        started_at = now = time.monotonic()
        end_at, look_at = started_at + seconds, started_at + _LOST_AFTER_S
        while now < end_at:
            for fd, _ in self._poll.poll(min(end_at, look_at) - now):
                sock = self._socks[fd]
                sock.recv_into(buffer)
                answered += 1
                if self._once:
                    self._replace(sock)
                else:
                    sock.send(_DATAGRAM)
                    self._sent_at[sock] = now
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _LOST_AFTER_S
                self._ask_again(now - _LOST_AFTER_S)
        return Done(answered, time.monotonic() - started_at, failed=self._lost)

    def _ask_again(self, before: float) -> None:
        for sock, sent_at in list(self._sent_at.items()):
            if sent_at < before:
                self._lost += 1
                if self._once:
                    self._replace(sock)
                else:
                    sock.send(_DATAGRAM)
                    self._sent_at[sock] = time.monotonic()


# ---- connections that stay


class Idle:
    """Connections that have had one answer and stay; a context manager."""

    def __init__(self, site: Site, connections: int) -> None:
        self._socks = []
        for start in range(0, connections, 100):
            part = [connect(site.client, site.front_ip, SMALL) for _ in range(min(100, connections - start))]
            self._socks += part
            for sock in part:
                sock.sendall(REQUEST)
            for sock in part:
                sock.recv(4096)

    def __enter__(self) -> Idle:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for sock in self._socks:
            sock.close()


def latencies_at(site: Site, rate: float, connections: int, until: Callable[[], bool]) -> list[float]:
    """Send *rate* requests a second whether answers come or not; return how long each took, in milliseconds.

    The clock of a request starts when it was due, also where no connection was free then: a plane that
    stops for a moment pays for every request that had to wait.
    """
    socks = [connect(site.client, site.front_ip, SMALL) for _ in range(connections)]
    by_fd = {sock.fileno(): sock for sock in socks}
    due_at_of: dict[int, float] = {}
    took: list[float] = []
    waiting: deque[float] = deque()
    free = list(by_fd)
    poll = select.epoll()
    for fd in free:
        poll.register(fd, select.EPOLLIN)
    buffer = bytearray(4096)
    view = memoryview(buffer)
    due_at = look_at = time.monotonic()
    try:
        while True:
            now = time.monotonic()
            if now >= look_at:
                look_at = now + 0.02
                if until():
                    return took
            while due_at <= now:
                waiting.append(due_at)
                due_at += 1 / rate
            while waiting and free:
                fd = free.pop()
                due_at_of[fd] = waiting.popleft()
                by_fd[fd].send(REQUEST)
            # select and not epoll, whose time-outs are whole milliseconds.
            if not select.select([poll], [], [], max(0.0, due_at - time.monotonic()))[0]:
                continue
            for fd, _ in poll.poll(0):
                count = by_fd[fd].recv_into(buffer)
                if not count:
                    raise ConnectionError(f"{site.name} closed a connection")
                if view[:count].tobytes().endswith(_ANSWER_END):
                    took.append((time.monotonic() - due_at_of.pop(fd)) * 1000)
                    free.append(fd)
    finally:
        for sock in socks:
            sock.close()
        poll.close()
