"""Loads beyond those of `userspace-proxy compare`: bulk, datagrams, idle connections, a fixed rate.

Each opens its sockets on the client's host, in this process. Bulk is read with MSG_TRUNC: the kernel counts the bytes
and discards them, so that the proxy is the bottleneck and not the client.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

from userspace_proxy.compare.loads import REQUEST, LoadResult
from userspace_proxy.compare.nodes import BULK, SMALL, ModeNode
from userspace_proxy.lab import connect

UDP, UDP_ONCE = 9053, 9054
BULK_FILE_BYTES = 64 * 1024 * 1024
_BULK_REQUEST = b"GET /bulk HTTP/1.1\r\nHost: compare\r\n\r\n"
_READ_BYTES = 1 << 20
_ANSWER_END = b"ok\n"
_DATAGRAM = bytes(64)
_LOST_AFTER_S = 0.1
_LOOK_S = 0.02


# ---- bytes


class Bulk:
    """Readers of an endless answer; a context manager."""

    def __init__(self, node: ModeNode, flows: int) -> None:
        self._buffer = bytearray(_READ_BYTES)
        self._poll = select.epoll()
        self._received: dict[int, int] = {}
        self._socks = {}
        for _ in range(flows):
            sock = connect(node.client, node.front_ip, BULK)
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

    def read(self, seconds: float) -> LoadResult:
        """Read for *seconds*."""
        total, started_at = 0, time.monotonic()
        end_at = started_at + seconds
        while (now := time.monotonic()) < end_at:
            for fd, _ in self._poll.poll(end_at - now):
                total += self._read_from(fd)
        return LoadResult(total, time.monotonic() - started_at)

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
            sock.send(_BULK_REQUEST)  # request the next answer before this one ends
        return count


# ---- datagrams


class Datagrams:
    """Flows with one datagram in flight each; with *once*, a flow has only one datagram. A context manager."""

    _ports = 1024  # the last source port of a single-datagram flow; a port is used again after all others

    def __init__(self, node: ModeNode, port: int, flows: int, *, once: bool) -> None:
        self._node = node
        self._address = (node.front_ip, port)
        self._once = once
        self._poll = select.epoll()
        self._sent_at: dict[socket.socket, float] = {}
        self._socks: dict[int, socket.socket] = {}
        self.lost = 0
        with node.client.inside():
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

    def exchange(self, seconds: float) -> LoadResult:
        """Send datagrams and count answers for *seconds*."""
        with self._node.client.inside():
            return self._exchange(seconds)

    def _exchange(self, seconds: float) -> LoadResult:
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
                self._resend(now - _LOST_AFTER_S)
        return LoadResult(answered, time.monotonic() - started_at)

    def open_flows(self, seconds: float, rate: float) -> LoadResult:
        """Open *rate* flows of one datagram a second, and count answers, for *seconds*."""
        answered, buffer, started_at = 0, bytearray(2048), time.monotonic()
        due_at = started_at
        with self._node.client.inside():
            while (now := time.monotonic()) < started_at + seconds:
                while due_at <= now:
                    self._open()
                    due_at += 1 / rate
                for fd, _ in self._poll.poll(max(0.0, due_at - now)):
                    sock = self._socks.pop(fd)
                    del self._sent_at[sock]
                    sock.recv_into(buffer)
                    sock.close()
                    answered += 1
        return LoadResult(answered, time.monotonic() - started_at)

    def _resend(self, before: float) -> None:
        for sock, sent_at in list(self._sent_at.items()):
            if sent_at < before:
                self.lost += 1
                if self._once:
                    self._replace(sock)
                else:
                    sock.send(_DATAGRAM)
                    self._sent_at[sock] = time.monotonic()


# ---- connections that stay


class Idle:
    """Connections that stay open after one answer; a context manager."""

    def __init__(self, node: ModeNode, connections: int) -> None:
        self._socks = []
        for start in range(0, connections, 100):
            part = [connect(node.client, node.front_ip, SMALL) for _ in range(min(100, connections - start))]
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


class _OpenLoop:
    """Connections that send requests when they are due, whether answers come or not.

    The time of a request starts when it is due, even if no connection is free then: a plane that stops for a moment
    is charged for every request that had to wait.
    """

    def __init__(self, socks: Sequence[socket.socket]) -> None:
        self.took_ms: list[float] = []
        self._by_fd = {sock.fileno(): sock for sock in socks}
        self._free = list(self._by_fd)
        self._waiting: deque[float] = deque()
        self._due_at_of: dict[int, float] = {}
        self._buffer = bytearray(4096)
        self.poll = select.epoll()
        for fd in self._free:
            self.poll.register(fd, select.EPOLLIN)

    def send(self, due_at: float) -> None:
        """Send a request that is due, or queue it."""
        self._waiting.append(due_at)
        self._send_waiting()

    def _send_waiting(self) -> None:
        while self._waiting and self._free:
            fd = self._free.pop()
            self._due_at_of[fd] = self._waiting.popleft()
            self._by_fd[fd].send(REQUEST)

    def receive(self, until: float) -> None:
        """Receive what comes until then, once."""
        # select and not epoll, whose time-outs are whole milliseconds.
        if not select.select([self.poll], [], [], max(0.0, until - time.monotonic()))[0]:
            return
        for fd, _ in self.poll.poll(0):
            count = self._by_fd[fd].recv_into(self._buffer)
            if not count:
                raise ConnectionError("the plane closed a connection")
            if self._buffer[:count].endswith(_ANSWER_END):
                self.took_ms.append((time.monotonic() - self._due_at_of.pop(fd)) * 1000)
                self._free.append(fd)
        self._send_waiting()


def latencies_at(node: ModeNode, rate: float, connections: int, until: Callable[[], bool]) -> list[float]:
    """Send *rate* requests a second whether answers come or not; return how long each took, in milliseconds."""
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(connect(node.client, node.front_ip, SMALL)) for _ in range(connections)]
        loop = _OpenLoop(socks)
        stack.callback(loop.poll.close)
        due_at = look_at = time.monotonic()
        while True:
            now = time.monotonic()
            if now >= look_at:
                look_at = now + _LOOK_S
                if until():
                    return loop.took_ms
            while due_at <= now:
                loop.send(due_at)
                due_at += 1 / rate
            loop.receive(due_at)
