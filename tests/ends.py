"""The far ends of connections, as clients and backends have them: real sockets, read and written by a test."""

from __future__ import annotations

import array
import asyncio
import fcntl
import os
import socket
import struct
import termios
import time
from collections.abc import Callable

_ABORTIVE_CLOSE = struct.pack("ii", 1, 0)
# Every wait has an end of its own: a test that hangs in uvloop is not stopped by a signal.
PATIENCE_S = 20.0


class End:
    """One end of a TCP connection."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        async with asyncio.timeout(PATIENCE_S):
            await self._loop.sock_sendall(self.sock, data)

    async def receive(self, count: int) -> bytes:
        """Return exactly *count* bytes, or those before the end of the stream."""
        received = bytearray()
        async with asyncio.timeout(PATIENCE_S):
            while len(received) < count:
                piece = await self._loop.sock_recv(self.sock, min(count - len(received), 1 << 18))
                if not piece:
                    break
                received += piece
        return bytes(received)

    async def receive_all(self) -> tuple[bytes, str]:
        """Return all that comes, and how it ended: ``"eof"`` or ``"reset"``."""
        received = bytearray()
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    piece = await self._loop.sock_recv(self.sock, 1 << 18)
            except ConnectionResetError:
                return bytes(received), "reset"
            if not piece:
                return bytes(received), "eof"
            received += piece

    def send_now(self, data: bytes) -> int:
        """Send the bytes that the kernel accepts at once; return their number."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0

    def receive_now(self) -> bytes:
        """Return the bytes that can be read at once; b"" at the end of the stream."""
        try:
            return self.sock.recv(1 << 20)
        except BlockingIOError:
            return b""

    def half_close(self) -> None:
        self.sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE_CLOSE)
        self.sock.close()

    def close(self) -> None:
        self.sock.close()

    @property
    def unacknowledged_bytes(self) -> int:
        """The number of sent bytes that the other kernel has not acknowledged."""
        count = array.array("i", [0])
        fcntl.ioctl(self.sock, termios.TIOCOUTQ, count)
        return count[0]


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 5.0) -> None:
    """Wait until *condition* holds; fail with *what* if it does not in time."""
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"waited {timeout_s:g} s in vain: {what}"
        await asyncio.sleep(0.002)


async def settled(value: Callable[[], int], quiet_s: float = 0.1, timeout_s: float = 10.0) -> int:
    """Wait until *value* has not changed for *quiet_s*; return it."""
    give_up_at = time.monotonic() + timeout_s
    seen, since = value(), time.monotonic()
    while time.monotonic() - since < quiet_s:
        assert time.monotonic() < give_up_at, f"it still changes after {timeout_s:g} s"
        await asyncio.sleep(0.005)
        if (now := value()) != seen:
            seen, since = now, time.monotonic()
    return seen


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - counted, not used


def tcp_pair(
    buffer_bytes: int | None = None, family: socket.AddressFamily = socket.AF_INET
) -> tuple[socket.socket, socket.socket]:
    """Return two connected non-blocking TCP sockets on loopback; *buffer_bytes* makes their kernel buffers small."""
    with socket.create_server(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0), family=family) as listener:
        near = socket.socket(family)
        if buffer_bytes:
            for sock in (listener, near):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
    for sock in (near, far):
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return near, far
