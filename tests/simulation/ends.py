"""The far ends of TCP connections: each follows a plan, checks nothing, and remembers everything."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.kernel import Address, Kernel, Stream

# All streams are parts of this, at different places, so that no two of them are alike.
_TABLE = random.Random(1).randbytes(1 << 20)
HEAD_BYTES = 8


def stream_of(number: int, size: int) -> bytes:
    """Return the stream with this number: the number and the size, then bytes that only this stream has."""
    start = number * 7_919 % (len(_TABLE) - size)
    return number.to_bytes(4, "big") + size.to_bytes(4, "big") + _TABLE[start : start + size]


@dataclass(slots=True)
class Plan:
    """What one end does.

    ``pieces``: bytes of a send, and the pause after it. ``fate``: "" for an orderly end, else "reset", "vanish" or
    "stall", once ``fate_after`` bytes have been received and ``fate_s`` seconds have passed since.
    """

    size: int
    pieces: tuple[int, float] = (1 << 16, 0.0)
    begins_s: float = 0.0
    half_closes: bool = False
    speaks_first: bool = False
    reads_slowly: bool = False
    fate: str = ""
    fate_after: int = 0
    fate_s: float = 0.0


class End:
    """One far end. ``how``: "eof" or "reset" once its stream has ended, "" before."""

    def __init__(self, kernel: Kernel, sock: Stream, number: int, plan: Plan) -> None:
        self.kernel = kernel
        self.sock = sock
        self.number = number
        self.plan = plan
        self.data = stream_of(number, plan.size)
        self.sent = 0
        self.received = bytearray()
        self.how = ""
        self.met_fate = False  # its plan has broken the connection
        self.unacknowledged_at_fate = 0
        self.unread = 0  # bytes that had arrived when it gave up, because it could not send any more
        self._may_send = False
        self._has_timer = False
        self.is_shut = False
        self._stalls = False
        self._waits_to_read = False
        self._fate_is_due = False

    def begin(self) -> None:
        self.sock.on_events = self.on_events
        self._note_fate()
        self.on_events()

    def allow_sending(self) -> None:
        self._may_send = True
        self.on_events()

    def on_events(self) -> None:
        if self.sock.closed:
            return
        self._read()
        if not self.sock.closed:
            self._send()
        self._close_if_done()

    def is_served(self) -> bool:
        """Return whether all is received that this end waits for before it ends its stream."""
        return True

    def _read(self) -> None:
        sock = self.sock
        while not self._stalls and not self._waits_to_read and not self.how:
            if not sock.is_readable():
                return
            try:
                piece = sock.recv(500 if self.plan.reads_slowly else 1 << 16)
            except OSError:
                self.how = "reset"
                return
            if not piece:
                self.how = "eof"
                return
            self.received += piece
            self._note_fate()
            if self.plan.reads_slowly:
                self._waits_to_read = True
                self.kernel.call_later(0.02, self._read_on)

    def _read_on(self) -> None:
        self._waits_to_read = False
        self.on_events()

    def _send(self) -> None:
        while self._may_send and not self._has_timer and self.sent < len(self.data) and self.how != "reset":
            piece_bytes, pause_s = self.plan.pieces
            try:
                self.sent += self.sock.send(memoryview(self.data)[self.sent : self.sent + piece_bytes])
            except BlockingIOError:
                return
            except OSError:
                self._read()
                self.how = self.how if self.how == "eof" else "reset"
                return
            if pause_s:
                self._has_timer = True
                self.kernel.call_later(pause_s, self._send_on)

    def _send_on(self) -> None:
        self._has_timer = False
        self.on_events()

    def _close_if_done(self) -> None:
        if self.sock.closed:
            return
        if self.how == "reset" or (self.how and self.sent == len(self.data)):
            self.unread = len(self.sock.incoming)
            self.sock.close()
        elif self.sent == len(self.data) and not self.is_shut and self.is_served():
            self.is_shut = True
            with contextlib.suppress(OSError):  # reset meanwhile
                self.sock.shutdown(socket.SHUT_WR)

    def _note_fate(self) -> None:
        if self.plan.fate and not self._fate_is_due and len(self.received) >= self.plan.fate_after:
            self._fate_is_due = True
            self.kernel.call_later(self.plan.fate_s, self._meet_fate)

    def _meet_fate(self) -> None:
        if self.sock.closed:
            return
        self.met_fate = True
        self.unacknowledged_at_fate = self.sock.unacknowledged
        if self.plan.fate == "reset":
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"")
            self.sock.close()
        elif self.plan.fate == "vanish":
            self.sock.lose()
        else:
            self._stalls = True


class Client(End):
    """A client, which sends a request and reads the reply to its end."""

    def __init__(self, kernel: Kernel, sock: Stream, number: int, plan: Plan, address: Address) -> None:
        super().__init__(kernel, sock, number, plan)
        self.address = address
        self.began_at = kernel.now

    def is_served(self) -> bool:
        return self.plan.half_closes


class Backend(End):
    """An endpoint's end of one connection. It replies when it has the whole request, or the client's end."""

    def __init__(
        self,
        kernel: Kernel,
        sock: Stream,
        number: int,
        plan: Plan,
        address: Address,
        on_begin: Callable[[Backend], None],
    ) -> None:
        super().__init__(kernel, sock, number, plan)
        self.address = address
        self.began_at = 0.0
        self._on_begin = on_begin

    def begin(self) -> None:
        self.began_at = self.kernel.now
        self._on_begin(self)
        self._may_send = self.plan.speaks_first
        super().begin()

    @property
    def client(self) -> int | None:
        """The number of the client whose bytes have come, or None before."""
        return int.from_bytes(self.received[:4], "big") if len(self.received) >= HEAD_BYTES else None

    def has_request(self) -> bool:
        size = int.from_bytes(self.received[4:8], "big")
        return len(self.received) >= HEAD_BYTES and len(self.received) >= HEAD_BYTES + size

    def on_events(self) -> None:
        if not self.sock.closed:
            self._read()
            self._may_send = self._may_send or self.has_request() or bool(self.how)
            super().on_events()

    def is_served(self) -> bool:
        return self.has_request() or bool(self.how)
