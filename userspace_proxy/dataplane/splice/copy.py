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
import functools
import logging
import socket
import struct
import termios
from collections.abc import Callable

from userspace_proxy.dataplane.pipes import Pipe
from userspace_proxy.dataplane.poller import FAILED, HANGUP, READ, URGENT, WRITE, Poller

BUFFER_BYTES = 64 * 1024
# After so many full reads another connection gets its turn.
READS_A_TURN = 8
# How often a reset looks whether the bytes before it have left our send buffer (nothing tells): at first, and at last.
_RESET_POLL_S = 0.01
_RESET_POLL_MAX_S = 1.0

_ABORTIVE_CLOSE = struct.pack("ii", 1, 0)
_TCP_CLOSE = 7  # linux/net/tcp_states.h
BUG = "a bug: one connection is cut by it"
_DEAD = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}

log = logging.getLogger(__name__)

_buffer = bytearray(BUFFER_BYTES)
_view = memoryview(_buffer)


class Half:
    """One direction.

    ``pending``: bytes read but not yet sent; ``pipe``: the same, where an engine keeps them in one.
    ``to_the_end``: a short read does not mean that there is no more. ``queued``: it goes on in another turn.
    """

    __slots__ = ("done", "moved_bytes", "opposite", "pending", "pipe", "queued", "sink", "source", "to_the_end")

    opposite: Half

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source = source
        self.sink = sink
        self.pending: memoryview | None = None
        self.pipe: Pipe | None = None
        self.to_the_end = False
        self.queued = False
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
        self._up = Half(client, backend)
        self._down = Half(backend, client)
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
        return self._up.done or self._down.done

    @property
    def sockets(self) -> tuple[socket.socket, socket.socket]:
        """The client's and the backend's socket; for looking at, not for reading or writing."""
        return self._up.source, self._down.source

    # ---- events

    def _on_client(self, events: int) -> None:
        self._on_socket(events, self._up, self._down)

    def _on_backend(self, events: int) -> None:
        self._on_socket(events, self._down, self._up)

    def _on_socket(self, events: int, reading: Half, writing: Half) -> None:
        try:
            if events & WRITE and (writing.pending is not None or writing.pipe is not None):
                self._flush(writing)
            if events & (HANGUP | URGENT):
                reading.to_the_end = True
                if events & URGENT and not reading.done:
                    # In its place among the other bytes; the kernel would drop it otherwise.
                    reading.source.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
            if events & (READ | HANGUP):
                if not reading.done:
                    self._pump(reading)
                elif events & FAILED and not writing.done:
                    self._look_for_reset(reading)
        except Exception:
            log.exception(BUG)
            self.cut("a bug")

    def _pump(self, half: Half) -> None:
        """Move what is there, until the source is dry, the sink is full, or others must have their turn."""
        if half.pending is not None or half.pipe is not None or half.done or half.queued:
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
            if count != BUFFER_BYTES and not half.to_the_end:
                return  # a short read: the kernel has no more, and tells when it has
            if count == BUFFER_BYTES and self._take_bulk(half):
                return
        half.queued = True
        self._poller.again(lambda: self._pump_again(half))

    def _take_bulk(self, half: Half) -> bool:
        """Return whether another way than copying is taken for a direction that fills whole buffers."""
        return False

    def _pump_again(self, half: Half) -> None:
        half.queued = False
        try:
            self._pump(half)
        except Exception:
            log.exception(BUG)
            self.cut("a bug")

    def _flush(self, half: Half) -> None:
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

    def _drop_pipe(self, half: Half) -> None:
        """Forget what is in the pipe of *half*, if it has one."""

    # ---- endings

    def _source_ended(self, half: Half) -> None:
        half.done = True
        if self._broken:
            self._reset(self._broken, half.sink)
            return
        if half.opposite.done:
            self._close("closed")
            return
        try:
            half.sink.shutdown(socket.SHUT_WR)
        except OSError as error:
            self._sink_failed(half, error)

    def _source_failed(self, half: Half, error: OSError) -> None:
        """The source was reset: nothing can go back to it either."""
        self._broken = self._broken or self._whose(half.source, error)
        half.done = half.opposite.done = True
        half.opposite.pending = None
        self._drop_pipe(half.opposite)
        self._reset(self._broken, half.sink)

    def _sink_failed(self, half: Half, error: OSError) -> None:
        """The sink was reset. What it sent before that is still in its receive queue, and is delivered."""
        self._broken = self._broken or self._whose(half.sink, error)
        half.done = True
        self._drop_pipe(half)
        opposite = half.opposite
        if opposite.done:
            self._reset(self._broken, half.source)
        else:
            opposite.to_the_end = True
            self._pump(opposite)

    def _look_for_reset(self, half: Half) -> None:
        """A source that had already ended (half-closed) has more to say: that can only be a reset."""
        code = half.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code and not self._ended:
            self._source_failed(half, OSError(code, ""))

    def _whose(self, sock: socket.socket, error: OSError) -> str:
        side = "client" if sock is self._up.source else "backend"
        return f"{side} is dead" if error.errno in _DEAD else f"reset by {side}"

    def cut(self, reason: str) -> None:
        self._close(reason, abortive=True)

    def _reset(self, how: str, towards: socket.socket, wait_s: float = _RESET_POLL_S) -> None:
        """End with a reset, once the bytes before it have left our send buffer towards *towards*.

        A reader may take its time for them: who never reads is a matter of time-outs, as it is without a reset.
        """
        if self._ended:
            return
        if _unsent_bytes(towards):
            again = functools.partial(self._reset, how, towards, min(2 * wait_s, _RESET_POLL_MAX_S))
            self._loop.call_later(wait_s, again)
        else:
            self._close(how, abortive=True)

    def _close(self, how: str, *, abortive: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        self._up.done = self._down.done = True
        for half in (self._up, self._down):
            half.pending = None
            self._drop_pipe(half)
        for sock in self.sockets:
            if abortive:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE_CLOSE)
            self._poller.close(sock)
        self._on_end(how)


def _unsent_bytes(sock: socket.socket) -> int:
    """Bytes handed to the kernel that the peer has not acknowledged; 0 when the connection is gone."""
    count = array.array("i", [0])
    try:
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            return 0
        fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]
