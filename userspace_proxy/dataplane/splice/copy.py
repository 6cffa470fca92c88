"""The copy engine: recv into one shared buffer, send from it.

The rule that keeps bytes safe: what was read and could not be sent is copied out of the shared buffer
*at once*, and that direction does not read again before it is gone. Everything else here is about
when a direction may go on.

A reset travels like the data does: bytes that came before it are delivered first. So does an urgent byte: both sockets
have SO_OOBINLINE from their beginning, and a read that stops in front of one is followed by another.
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
from socket import MSG_DONTWAIT, SocketType

from userspace_proxy.dataplane.pipes import Pipe, PipePool
from userspace_proxy.dataplane.poller import FAILED, HANGUP, READ, URGENT, WRITE, Poller

BUFFER_BYTES = 64 * 1024
# After so many full reads another connection gets its turn.
READS_A_TURN = 8
# How often a reset looks whether the bytes before it have left our send buffer (nothing tells): at first, and at last.
_RESET_POLL_S = 0.01
_RESET_POLL_MAX_S = 1.0

_UNUSUAL = HANGUP | URGENT
_READABLE = READ | HANGUP
_NO_PLAIN_END = FAILED | URGENT
_MSG_MORE = MSG_DONTWAIT | socket.MSG_MORE
_ABORTIVE_CLOSE = struct.pack("ii", 1, 0)
_TCP_CLOSE = 7  # linux/net/tcp_states.h
BUG = "a bug: one connection is cut by it"
_DEAD = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}

log = logging.getLogger(__name__)

_buffer = bytearray(BUFFER_BYTES)
_view = memoryview(_buffer)


class Half:
    """One direction, from ``source`` to ``sink``.

    ``stuck``: there are bytes that were read but not yet sent; ``pending`` has them, or, where an engine keeps them in
    one, ``pipe``.
    ``to_the_end``: a short read does not mean that there is no more. ``queued``: it goes on in another turn.
    ``send_flags``: with MSG_MORE once the source has told its end: the last bytes and the end leave as one packet.
    """

    __slots__ = (
        "done",
        "moved_bytes",
        "opposite",
        "pending",
        "pipe",
        "queued",
        "send_flags",
        "sink",
        "source",
        "splice",
        "stuck",
        "to_the_end",
    )

    # Both are taken away at the connection's end (see `part`): no cycle is left for the garbage collector to find.
    opposite: Half
    splice: CopySplice

    def __init__(self, source: SocketType, sink: SocketType, splice: CopySplice) -> None:
        self.source = source
        self.sink = sink
        self.splice = splice
        self.pending = b""
        self.pipe: Pipe | None = None
        self.stuck = False
        self.to_the_end = False
        self.queued = False
        self.send_flags = MSG_DONTWAIT
        self.done = False
        self.moved_bytes = 0

    def on_first_events(self, events: int) -> None:
        """The client's socket is watched from now on, and a backend was dialled with `stream_socket`.

        The last packet of its handshake is held back, to leave with the client's first bytes. Where there are none yet
        it must leave now: the backend may be who speaks first, and it is to see that the client has gone.
        """
        self.splice.engine.poller.hand_over(self.source, self.on_socket)
        if not events & READ or events & FAILED:
            self.sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.on_socket(events)

    def on_socket(self, events: int) -> None:
        """The source has something to read; or it takes bytes again, being the sink of the opposite direction."""
        try:
            writing = self.opposite
            if events & WRITE and writing.stuck:
                writing.flush()
            if events & _UNUSUAL:
                self.to_the_end = True
                if events & _NO_PLAIN_END:
                    self.send_flags = MSG_DONTWAIT
                else:
                    self.send_flags = _MSG_MORE
            if events & _READABLE:
                if not self.done:
                    self.pump()
                elif events & FAILED and not writing.done:
                    self._look_for_reset()
        except Exception:
            log.exception(BUG)
            self.cut()

    def pump(self) -> None:
        """Move what is there, until the source is dry, the sink is full, or others must have their turn."""
        if self.stuck or self.done or self.queued:
            return
        source, sink = self.source, self.sink
        reads = 0
        while True:
            try:
                # Not every socket is a non-blocking one: to make it that is a system call.
                count = source.recv_into(_buffer, 0, MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                self.source_failed(error)
                return
            if not count:
                self.source_ended()
                return
            try:
                sent = sink.send(_view[:count], self.send_flags)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.sink_failed(error)
                return
            self.moved_bytes += sent
            if sent != count:
                self.pending = bytes(_view[sent:count])
                self.stuck = True
                return
            if count != BUFFER_BYTES:
                self.splice.engine.poller.messages += 1
                if not self.to_the_end:
                    return  # a short read: the kernel has no more, and tells when it has
            elif self.take_bulk():
                return
            reads += 1
            if reads == READS_A_TURN:
                break
        self.queued = True
        self.splice.engine.poller.again(self.go_on)

    def go_on(self) -> None:
        self.queued = False
        try:
            self.pump()
        except Exception:
            log.exception(BUG)
            self.cut()

    def take_bulk(self) -> bool:
        """Return whether another way than copying is taken for a direction that fills whole buffers."""
        return False

    def flush(self) -> None:
        """Send what is pending; when all is gone, read on."""
        pending = memoryview(self.pending)
        while pending:
            try:
                sent = self.sink.send(pending, MSG_DONTWAIT)
            except BlockingIOError:
                self.pending = bytes(pending)
                return
            except OSError as error:
                self.drop()
                self.sink_failed(error)
                return
            self.moved_bytes += sent
            pending = pending[sent:]
        self.drop()
        self.pump()

    def drop(self) -> None:
        """Forget what was read and not sent."""
        self.pending = b""
        self.stuck = False

    # ---- endings

    def source_ended(self) -> None:
        self.done = True
        splice = self.splice
        if splice.broken:
            splice.reset(splice.broken, self.sink)
        elif self.opposite.done:
            splice.close("closed")
        else:
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.sink_failed(error)

    def source_failed(self, error: OSError) -> None:
        """The source was reset: nothing can go back to it either."""
        splice = self.splice
        splice.note_broken(self.source, error)
        self.done = self.opposite.done = True
        self.opposite.drop()
        splice.reset(splice.broken, self.sink)

    def sink_failed(self, error: OSError) -> None:
        """The sink was reset. What it sent before that is still in its receive queue, and is delivered."""
        splice, opposite = self.splice, self.opposite
        splice.note_broken(self.sink, error)
        self.done = True
        self.drop()
        if opposite.done:
            splice.reset(splice.broken, self.source)
        else:
            opposite.to_the_end = True
            opposite.pump()

    def _look_for_reset(self) -> None:
        """A source that had already ended (half-closed) has more to say: that can only be a reset."""
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.source_failed(OSError(code, ""))

    def part(self) -> None:
        """The connection has ended."""
        self.done = True
        if self.stuck:
            self.drop()
        del self.opposite, self.splice

    def cut(self) -> None:
        """After an exception that nobody foresaw: no connection may be left hanging."""
        if hasattr(self, "splice"):
            self.splice.cut("a bug")


class CopySplicer:
    """Starts a `CopySplice` for each pair of sockets."""

    half: type[Half] = Half

    def __init__(self, poller: Poller, loop: asyncio.AbstractEventLoop, pipes: PipePool | None = None) -> None:
        self.poller = poller
        self.loop = loop
        self.pipes = pipes or PipePool()

    def start(
        self, client: SocketType, backend: SocketType, on_end: Callable[[str], None], told: int | None = None
    ) -> CopySplice:
        splice = CopySplice(client, backend, self, on_end)
        splice.start(told)
        return splice


class CopySplice:
    """One connection: two halves, and how they end."""

    __slots__ = ("_down", "_ended", "_on_end", "_up", "broken", "engine")

    def __init__(
        self, client: SocketType, backend: SocketType, engine: CopySplicer, on_end: Callable[[str], None]
    ) -> None:
        self.engine = engine
        self._on_end = on_end
        self.broken = ""  # why this connection cannot end well, once that is known
        self._ended = False
        self._up = up = engine.half(client, backend, self)
        self._down = down = engine.half(backend, client, self)
        up.opposite, down.opposite = down, up

    def start(self, told: int | None) -> None:
        poller, up, down = self.engine.poller, self._up, self._down
        if told is None:
            poller.watch(down.source, down.on_socket)
        poller.watch(up.source, up.on_socket if told is None else up.on_first_events)
        if told is not None:
            poller.hand_over(down.source, down.on_socket)
            if told & ~WRITE:  # a backend that spoke first: nothing will tell of these bytes again
                poller.again(lambda: None if down.done else down.on_socket(told))

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
    def sockets(self) -> tuple[SocketType, SocketType]:
        """The client's and the backend's socket; for looking at, not for reading or writing."""
        return self._up.source, self._down.source

    # ---- endings

    def note_broken(self, sock: SocketType, error: OSError) -> None:
        """Remember the first thing that went wrong; it was at *sock*."""
        if not self.broken:
            side = "client" if sock is self._up.source else "backend"
            self.broken = f"{side} is dead" if error.errno in _DEAD else f"reset by {side}"

    def cut(self, reason: str) -> None:
        self.close(reason, abortive=True)

    def reset(self, how: str, towards: SocketType, wait_s: float = _RESET_POLL_S) -> None:
        """End with a reset, once the bytes before it have left our send buffer towards *towards*.

        A reader may take its time for them: who never reads is a matter of time-outs, as it is without a reset.
        """
        if self._ended:
            return
        if _unsent_bytes(towards):
            again = functools.partial(self.reset, how, towards, min(2 * wait_s, _RESET_POLL_MAX_S))
            self.engine.loop.call_later(wait_s, again)
        else:
            self.close(how, abortive=True)

    def close(self, how: str, *, abortive: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        poller = self.engine.poller
        for half in (self._up, self._down):
            if abortive:
                half.source.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE_CLOSE)
            poller.close(half.source)
            half.part()
        self._on_end(how)


def _unsent_bytes(sock: SocketType) -> int:
    """Bytes handed to the kernel that the peer has not acknowledged; 0 when the connection is gone."""
    count = array.array("i", [0])
    try:
        if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
            return 0
        fcntl.ioctl(sock, termios.TIOCOUTQ, count)
    except OSError:
        return 0
    return count[0]
