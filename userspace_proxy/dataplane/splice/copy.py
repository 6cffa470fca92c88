"""The copy engine: recv into one shared buffer, send from it.

One rule keeps bytes safe: bytes that were read but not sent are copied out of the shared buffer *at once*, and that
direction does not read again before they are sent. The rest of this module decides when a direction may continue.

If the backend resets the connection before a byte has passed in either direction, the client's socket goes back to the
caller, which may dial another backend.

A reset is forwarded in order: bytes that came before it are delivered first. So is an urgent byte: both sockets have
SO_OOBINLINE from the start, and a read that stops before an urgent byte is followed by another read. In front of an
urgent byte, recv(2) returns EAGAIN while a signal or the kernel's own work for the thread is pending (signal_pending in
tcp_recvmsg_locked, net/ipv4/tcp.c). So EAGAIN is not the last word either: the length of the receive queue is.
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import functools
import logging
import socket
import termios
from collections.abc import Callable
from dataclasses import dataclass, field
from socket import MSG_DONTWAIT, SocketType

from userspace_proxy.dataplane.pipes import Pipe, PipePool
from userspace_proxy.dataplane.poller import FAILED, HANGUP, READ, URGENT, WRITE, Poller
from userspace_proxy.dataplane.sockets import reset_on_close
from userspace_proxy.interfaces import OnUnused
from userspace_proxy.model.access_record import UNANSWERED

BUFFER_BYTES = 64 * 1024
# After this many full reads another connection gets its turn.
_TURN = range(8)
# First and longest interval of the check whether the bytes before a reset have left the send buffer. The kernel has
# no event for that.
_RESET_POLL_S = 0.01
_RESET_POLL_MAX_S = 1.0

_UNUSUAL = HANGUP | URGENT
_READABLE = READ | HANGUP
_NO_PLAIN_END = FAILED | URGENT
_MSG_MORE = MSG_DONTWAIT | socket.MSG_MORE
_TCP_CLOSE = 7  # linux/net/tcp_states.h
BUG = "a bug: one connection is cut by it"
_DEAD = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH}

log = logging.getLogger(__name__)

_buffer = bytearray(BUFFER_BYTES)
_view = memoryview(_buffer)


@dataclass(slots=True, eq=False)
class Half:
    """One direction, from ``source`` to ``sink``.

    ``stuck``: some bytes were read but not sent yet. They are in ``pending``, or in ``pipe`` in the pipe engine.
    ``to_the_end``: a short read does not mean that the socket is drained. ``queued``: it continues in a later turn.
    ``send_flags``: with MSG_MORE after the source's FIN, so that the last bytes and our FIN leave in one packet.
    """

    source: SocketType
    sink: SocketType
    splice: CopySplice  # deleted at the connection's end, as `opposite` is: see `detach`
    pending: bytes = b""
    pipe: Pipe | None = None
    stuck: bool = False
    to_the_end: bool = False
    queued: bool = False
    send_flags: int = MSG_DONTWAIT
    done: bool = False
    moved_bytes: int = 0
    opposite: Half = field(init=False)

    # A backend that was dialled with `stream_socket` delays its ACKs, and has Nagle's algorithm. Both end when they
    # could delay bytes. Most short connections end before:
    # 1. The last ACK of the handshake leaves with the client's first bytes. If there are none yet, it leaves at once:
    #    the backend may speak first, or must see that the client has gone.
    # 2. Nagle's algorithm holds small bytes back while earlier ones are not acknowledged. So it cannot delay the first
    #    bytes, and a FIN takes the last ones along (tcp_send_fin in net/ipv4/tcp_output.c).
    # 3. A server that writes its answer in two parts, with Nagle's algorithm, waits for the ACK of the first part. The
    #    kernel would delay it for 40 ms (TCP_DELACK_MIN in include/net/tcp.h). After a FIN, no part follows.

    def on_first_events(self, events: int) -> None:
        """Begin to watch the client's socket (case 1)."""
        if not events & READ or events & FAILED:
            self.sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.splice.engine.poller.hand_over(self.source, self._on_events_before_bytes)
        self._on_events_before_bytes(events)

    def _on_events_before_bytes(self, events: int) -> None:
        """Handle events of the client until its first bytes have been sent. The handshake's ACK leaves with them."""
        if events & READ:
            self.splice.engine.poller.hand_over(self.source, self._on_events_after_bytes)
        self.on_socket(events)
        is_one_send = self.moved_bytes < BUFFER_BYTES and not (self.to_the_end or self.stuck or self.queued)
        if not (is_one_send or self.done):
            self._end_nagle()

    def _on_events_after_bytes(self, events: int) -> None:
        """Handle events of the client after its first bytes were sent, and before its next ones are (case 2)."""
        if events & READ and not events & HANGUP:
            self._end_nagle()
        self.on_socket(events)

    def _end_nagle(self) -> None:
        """Send small bytes at once from now on, also those that wait already."""
        self.splice.engine.poller.hand_over(self.source, self.on_socket)
        self.sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def on_first_answer(self, events: int) -> None:
        """Handle events of the backend until its first bytes arrive (case 3)."""
        if events & _READABLE:
            self.splice.engine.poller.hand_over(self.source, self.on_socket)
            if not events & HANGUP:
                self.source.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self.on_socket(events)

    def on_socket(self, events: int) -> None:
        """Handle events of the source: read it, or send to it as the sink of the opposite direction."""
        try:
            writing = self.opposite
            if writing.stuck and events & WRITE:
                writing.flush()
            if events & _UNUSUAL:
                self.to_the_end = True
                self.send_flags = MSG_DONTWAIT if events & _NO_PLAIN_END else _MSG_MORE
                if events & FAILED and self.done and not writing.done:
                    self._look_for_reset()
            if events & _READABLE:
                self.pump()
        except Exception:
            log.exception(BUG)
            self.cut()

    def pump(self) -> None:
        """Move bytes until the source is drained, the sink is full, or the turn is over."""
        if self.stuck or self.done or self.queued:
            return
        for _ in _TURN:
            try:
                # Some sockets are blocking: making them non-blocking would cost a system call.
                count = self.source.recv_into(_buffer, 0, MSG_DONTWAIT)
            except BlockingIOError:
                self.read_what_is_left()
                return
            except OSError as error:
                self.source_failed(error)
                return
            if not count:
                self.source_ended()
                return
            try:
                sent = self.sink.send(_view[:count], self.send_flags)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.pending = bytes(_view[:count])
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
                    return  # a short read: the socket is drained, and an edge reports new bytes
            elif self.take_bulk():
                return
        self.go_on_later()

    def read_what_is_left(self) -> None:
        """Read again in the next turn if recv(2) returned EAGAIN before an urgent byte. No edge reports it again."""
        if self.to_the_end and _queued_bytes(self.source, termios.FIONREAD):
            self.go_on_later()

    def go_on_later(self) -> None:
        self.queued = True
        self.splice.engine.poller.again(self.go_on)

    def go_on(self) -> None:
        self.queued = False
        if not self.done:
            self.on_socket(READ)

    def take_bulk(self) -> bool:
        """Return whether the engine moves this direction, which fills whole buffers, by other means than copying."""
        return False

    def flush(self) -> None:
        """Send the pending bytes. When all are sent, read on."""
        pending = memoryview(self.pending)
        while pending:
            try:
                sent = self.sink.send(pending, MSG_DONTWAIT)
            except BlockingIOError:
                self.pending = bytes(pending)
                return
            except OSError as error:
                self.pending = bytes(pending)
                self.sink_failed(error)
                return
            self.moved_bytes += sent
            pending = pending[sent:]
        self.drop()
        self.pump()

    def drop(self) -> None:
        """Discard bytes that were read but not sent."""
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
        """Handle a reset of the source: no byte can be sent back to it either."""
        splice = self.splice
        if splice.give_client_back(self.source, error):
            return
        splice.note_broken(self.source, error)
        self.done = self.opposite.done = True
        self.opposite.drop()
        splice.reset(splice.broken, self.sink)

    def sink_failed(self, error: OSError) -> None:
        """Handle a reset of the sink. Bytes that it sent before are still in its receive queue and are delivered."""
        splice, opposite = self.splice, self.opposite
        if splice.give_client_back(self.sink, error):
            return
        splice.note_broken(self.sink, error)
        self.done = True
        self.drop()
        if opposite.done:
            splice.reset(splice.broken, self.source)
        else:
            opposite.to_the_end = True
            opposite.pump()

    def _look_for_reset(self) -> None:
        """Check for a reset: another event of a source that has already ended (half-closed) can only be that."""
        code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            self.source_failed(OSError(code, ""))

    def detach(self) -> None:
        """Detach from the ended connection, so that no reference cycle is left for the garbage collector."""
        self.done = True
        if self.stuck:
            self.drop()
        del self.opposite, self.splice

    def cut(self) -> None:
        """Cut the connection after an unexpected exception, so that it does not hang."""
        if hasattr(self, "splice"):
            self.splice.cut("a bug")


class CopySplicer:
    """Starts a `CopySplice` for each connection."""

    half: type[Half] = Half

    def __init__(self, poller: Poller, loop: asyncio.AbstractEventLoop, pipes: PipePool | None = None) -> None:
        self.poller = poller
        self.loop = loop
        self.pipes = pipes or PipePool()

    def start(
        self,
        client: SocketType,
        backend: SocketType,
        on_end: Callable[[str], None],
        events: int,
        on_unused: OnUnused | None = None,
        unsent: bytes = b"",
    ) -> CopySplice:
        splice = CopySplice(self, on_end, on_unused)
        splice.up = up = self.half(client, backend, splice)
        splice.down = down = self.half(backend, client, splice)
        up.opposite, down.opposite = down, up
        poller = self.poller
        poller.watch(client, up.on_first_events)
        poller.hand_over(backend, down.on_first_answer)
        if unsent:
            up.pending, up.stuck = unsent, True
            backend.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the client's next bytes may follow at once
        if events & ~WRITE or unsent:  # the backend spoke first: no edge will report these bytes again
            poller.again(lambda: None if down.done else down.on_first_answer(events))
        return splice


@dataclass(slots=True, eq=False)
class CopySplice:
    """One connection: its two directions, and how they end. ``broken``: its first error, "" while there is none."""

    engine: CopySplicer
    _on_end: Callable[[str], None]
    _on_unused: OnUnused | None
    broken: str = ""
    _ended: bool = False
    _is_unanswered: bool = False  # the backend has reset it while the client was open
    up: Half = field(init=False)
    down: Half = field(init=False)

    @property
    def bytes_to_backend(self) -> int:
        return self.up.moved_bytes

    @property
    def bytes_to_client(self) -> int:
        return self.down.moved_bytes

    @property
    def half_closed(self) -> bool:
        return self.up.done or self.down.done

    @property
    def sockets(self) -> tuple[SocketType, SocketType]:
        """The client's and the backend's socket, for inspection only."""
        return self.up.source, self.down.source

    # ---- endings

    def note_broken(self, sock: SocketType, error: OSError) -> None:
        """Record the first error of the connection, which occurred at *sock*."""
        if not self.broken:
            side = "client" if sock is self.up.source else "backend"
            is_dead = error.errno in _DEAD
            self.broken = f"{side} is dead" if is_dead else f"reset by {side}"
            self._is_unanswered = side == "backend" and not (is_dead or self.up.done)

    def give_client_back(self, broken: SocketType, error: OSError) -> bool:
        """Give the client's socket back to the caller if a reset broke the backend's, and nothing has passed.

        Return whether it was given back. The caller may dial again then: no byte was sent to the backend, so none can
        arrive twice.
        """
        up, down, on_unused = self.up, self.down, self._on_unused
        if on_unused is None or broken is not down.source or error.errno in _DEAD or up.done or self._ended:
            return False
        if up.moved_bytes or down.moved_bytes or down.stuck or down.done:
            return False
        self._ended = True
        self.engine.poller.mute(up.source)
        self.engine.poller.close(down.source)
        unsent = up.pending
        up.detach()
        down.detach()
        on_unused(error.errno or errno.ECONNRESET, unsent)
        return True

    def cut(self, reason: str) -> None:
        self.close(reason, abortive=True)

    def reset(self, how: str, towards: SocketType, wait_s: float = _RESET_POLL_S) -> None:
        """Reset both sides when the send buffer of *towards* is empty, so that the bytes sent before arrive.

        A slow reader may take its time. A reader that never reads is left to the timeouts, as without a reset.
        """
        if self._ended:
            return
        if _unsent_bytes(towards):
            again = functools.partial(self.reset, how, towards, min(2 * wait_s, _RESET_POLL_MAX_S))
            self.engine.loop.call_later(wait_s, again)
        else:
            self.close(UNANSWERED if self._is_unanswered and not self.down.moved_bytes else how, abortive=True)

    def close(self, how: str, *, abortive: bool = False) -> None:
        if self._ended:
            return
        self._ended = True
        poller = self.engine.poller
        for half in (self.up, self.down):
            if abortive:
                reset_on_close(half.source)
            poller.close(half.source)
            half.detach()
        self._on_end(how)


def _unsent_bytes(sock: SocketType) -> int:
    """Return the bytes in the send buffer that the peer has not acknowledged; 0 if the connection is gone."""
    if sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == _TCP_CLOSE:
        return 0
    return _queued_bytes(sock, termios.TIOCOUTQ)


def _queued_bytes(sock: SocketType, queue: int) -> int:
    """Return the bytes in the receive queue (FIONREAD) or in the send buffer (TIOCOUTQ)."""
    count = array.array("i", [0])
    fcntl.ioctl(sock, queue, count)
    return count[0]
