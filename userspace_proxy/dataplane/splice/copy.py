"""The copy engine: recv into one shared buffer, send from it.

The rule that keeps bytes safe: what was read and could not be sent is copied out of the shared buffer
*at once*, and that direction does not read again before it is gone. Everything else here is about
when a direction may go on.

A reset travels like the data does: bytes that came before it are delivered first.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import socket
import struct
import termios
from collections.abc import Callable

from userspace_proxy.dataplane.poller import FAILED, HANGUP, READ, WRITE, Poller

BUFFER_BYTES = 64 * 1024
# After so many full reads another connection gets its turn.
READS_A_TURN = 8
# How long a reset waits for bytes before it to leave our send buffer; a peer that reads at all takes less.
_RESET_WAIT_S = 2.0
_RESET_POLL_S = 0.01

_ABORTIVE_CLOSE = struct.pack("ii", 1, 0)

_buffer = bytearray(BUFFER_BYTES)
_view = memoryview(_buffer)


class _Half:
    """One direction. ``pending``: bytes read but not yet sent. ``hangup``: its source said it will end."""

    __slots__ = ("done", "hangup", "moved_bytes", "opposite", "pending", "sink", "source")

    opposite: _Half

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.pending: memoryview | None = None
        self.hangup = False
        self.done = False
        self.moved_bytes = 0


class CopySplicer:
    """Starts a `CopySplice` for each pair of sockets."""

    def __init__(self, poller: Poller, loop: asyncio.AbstractEventLoop) -> None:
        self._poller = poller
        self._loop = loop

    def start(self, client: socket.socket, backend: socket.socket, on_end: Callable[[str], None]) -> CopySplice:
        splice = CopySplice(client, backend, self._poller, self._loop, on_end)
        splice.start()
        return splice


class CopySplice:
    """One connection: two halves, and how they end."""

    __slots__ = ("_broken", "_down", "_ended", "_loop", "_on_end", "_poller", "_up")

    def __init__(
        self,
        client: socket.socket,
        backend: socket.socket,
        poller: Poller,
        loop: asyncio.AbstractEventLoop,
        on_end: Callable[[str], None],
    ) -> None:
        self._up = _Half(client, backend)
        self._down = _Half(backend, client)
        self._up.opposite, self._down.opposite = self._down, self._up
        self._poller = poller
        self._loop = loop
        self._on_end = on_end
        self._broken = ""  # why this connection cannot end well, once that is known
        self._ended = False

    def start(self) -> None:
        self._poller.watch(self._up.sink, self._on_backend)
        self._poller.watch(self._up.source, self._on_client)

    @property
    def bytes_to_backend(self) -> int:
        return self._up.moved_bytes

    @property
    def bytes_to_client(self) -> int:
        return self._down.moved_bytes

    @property
    def half_closed(self) -> bool:
        return self._up.done is not self._down.done

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The client's and the backend's socket; for looking at, not for reading or writing."""
        return self._up.source, self._down.source

    # ---- events

    def _on_client(self, events: int) -> None:
        self._on_socket(events, self._up, self._down)

    def _on_backend(self, events: int) -> None:
        self._on_socket(events, self._down, self._up)

    def _on_socket(self, events: int, reading: _Half, writing: _Half) -> None:
        if events & WRITE and writing.pending is not None:
            self._flush(writing)
        if events & HANGUP:
            reading.hangup = True
        if events & (READ | HANGUP):
            if not reading.done:
                self._pump(reading)
            elif events & FAILED and not writing.done:
                self._look_for_reset(reading)

    def _pump(self, half: _Half) -> None:
        """Move what is there, until the source is dry, the sink is full, or others must have their turn."""
        if half.pending is not None or half.done:
            return
        recv_into, send = half.source.recv_into, half.sink.send
        for _ in range(READS_A_TURN):
            try:
                count = recv_into(_buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self._source_failed(half, error)
                return
            if not count:
                self._source_ended(half)
                return
            try:
                sent = send(_view[:count])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._sink_failed(half, error)
                return
            half.moved_bytes += sent
            if sent != count:
                half.pending = memoryview(bytes(_view[sent:count]))
                return
            if count != BUFFER_BYTES and not half.hangup:
                return  # a short read: the kernel has no more, and tells when it has
        self._poller.again(lambda: self._pump(half))

    def _flush(self, half: _Half) -> None:
        """Send what is pending; when all is gone, read on."""
        pending = half.pending
        assert pending is not None
        while pending:
            try:
                sent = half.sink.send(pending)
            except BlockingIOError:
                half.pending = pending
                return
            except OSError as error:
                half.pending = None
                self._sink_failed(half, error)
                return
            half.moved_bytes += sent
            pending = pending[sent:]
        half.pending = None
        self._pump(half)

    # ---- endings

    def _source_ended(self, half: _Half) -> None:
        half.done = True
        if self._broken:
            self._reset(self._broken, half.sink)
            return
        try:
            half.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._broken = self._whose(half.sink, error)
        if half.opposite.done:
            self._close("closed")

    def _source_failed(self, half: _Half, error: OSError) -> None:
        """The source was reset: nothing can go back to it either."""
        self._broken = self._broken or self._whose(half.source, error)
        half.done = half.opposite.done = True
        half.opposite.pending = None
        self._reset(self._broken, half.sink)

    def _sink_failed(self, half: _Half, error: OSError) -> None:
        """The sink was reset. What it sent before that is still in its receive queue, and is delivered."""
        self._broken = self._broken or self._whose(half.sink, error)
        half.done = True
        opposite = half.opposite
        if opposite.done:
            self._reset(self._broken, half.source)
        else:
            opposite.hangup = True
            self._pump(opposite)

    def _look_for_reset(self, half: _Half) -> None:
        """A source that had already ended (half-closed) has more to say: that can only be a reset."""
        code = half.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code and not self._ended:
            self._source_failed(half, OSError(code, ""))

    def _whose(self, sock: socket.socket, error: OSError) -> str:
        side = "client" if sock is self._up.source else "backend"
        if error.errno == errno.ETIMEDOUT:
            return f"{side} is dead"
        return f"reset by {side}"

    def cut(self, reason: str) -> None:
        self._close(reason, abortive=True)

    def _reset(self, how: str, towards: socket.socket) -> None:
        """End with a reset, once the bytes before it have left our send buffer towards *towards*."""
        if self._ended:
            return
        if not _unsent_bytes(towards):
            self._close(how, abortive=True)
            return
        give_up_at = self._loop.time() + _RESET_WAIT_S

        def look() -> None:
            if self._ended:
                return
            if _unsent_bytes(towards) and self._loop.time() < give_up_at:
                self._loop.call_later(_RESET_POLL_S, look)
            else:
                self._close(how, abortive=True)

        self._loop.call_later(_RESET_POLL_S, look)

    def _close(self, how: str, *, abortive: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        self._up.done = self._down.done = True
        self._up.pending = self._down.pending = None
        for sock in self.sockets:
            if abortive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE_CLOSE)
            self._poller.close(sock)
        self._on_end(how)


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes handed to the kernel that the peer has not acknowledged; 0 when the connection is gone."""
    count = array.array("i", [0])
    try:
        fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]
