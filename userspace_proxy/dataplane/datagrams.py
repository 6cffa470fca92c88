"""The UDP sockets of a plane, in a level-triggered epoll of their own.

Level-triggered, because one call for each datagram is then enough: what is left in a socket is reported
again by the next poll, which is made anyway, while edge-triggered a socket has to be read until it says
EAGAIN. Answers are gathered, and leave for the clients of a proxy port in one call.

The socket of a flow that has ended rests, and is leased to another flow afterwards, at a third of what
closing it and opening another would cost; and no answer to the ended flow reaches the other, as if it had
been closed. It is dissolved at once, which gives its port back: who sends there finds no socket. What came
before, or was on its way from the kernel's lookup into the socket's queue, is thrown away when it is leased.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import logging
import select
import socket
from collections import deque
from collections.abc import Callable
from typing import Protocol

from userspace_proxy.dataplane.mmsg import MESSAGES, Batch
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.sockets import backend_socket
from userspace_proxy.model.endpoint import Address

_EVENTS_A_POLL = 256
_POLLS_A_TURN = 4
# The kernel needs microseconds from its lookup of a socket to the socket's queue, unless a hypervisor stops it there.
_REST_S = 0.03
_RESTING_AT_MOST = 1024
_KEEP_S = 10.0
_UNSPECIFIED = bytes(28)  # a struct sockaddr with AF_UNSPEC, which is 0

log = logging.getLogger(__name__)

_connect = ctypes.CDLL(None).connect
_nowhere = bytearray(1)


class Front(Protocol):
    """Where the clients of a proxy port are: the owner of flows."""

    @property
    def fd(self) -> int: ...

    @property
    def touch(self) -> Callable[[bytes], None]:
        """Makes the flow with this key the most recently used one."""
        ...

    def receive(self) -> None:
        """Take what waits at the proxy port."""
        ...

    def answered(self, flow: UdpFlow) -> None:
        """The endpoint of *flow* has answered for the first time."""
        ...

    def lose(self, flow: UdpFlow, error: OSError) -> None:
        """The endpoint of *flow* refused."""
        ...

    def not_sent(self, datagrams: int) -> None:
        """So many answers were not taken by the kernel."""
        ...


class UdpFlow:
    """One client's conversation with one endpoint. ``front`` is None once it has ended.

    ``header`` goes in front of each datagram to the endpoint; mostly it is empty. ``counted``: the bytes, to the
    backend and to the client, that counters know of.
    """

    __slots__ = (
        "answered",
        "bytes_to_backend",
        "bytes_to_client",
        "counted",
        "counters",
        "endpoint",
        "front",
        "header",
        "key",
        "last_at",
        "reply",
        "sock",
        "started_at",
        "why",
    )

    def __init__(
        self,
        key: bytes,
        reply: bytes,
        front: Front,
        sock: socket.socket,
        pick: Pick,
        now: float,
        header: bytes = b"",
    ) -> None:
        self.key = key
        self.reply = reply
        self.front: Front | None = front
        self.sock = sock
        self.header = header
        self.endpoint, self.why, self.counters = pick
        self.started_at = self.last_at = now
        self.bytes_to_backend = 0
        self.bytes_to_client = 0
        self.counted = (0, 0)
        self.answered = False

    def send(self, datagram: memoryview) -> None:
        """Send *datagram* to the endpoint; raises OSError."""
        if self.header:
            self.sock.sendmsg((self.header, datagram))
        else:
            self.sock.send(datagram)


class DatagramPoller:
    """Reads fronts and flows as they become ready. Not thread-safe: it belongs to the loop's thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop, now: Callable[[], float]) -> None:
        self.inbox = Batch()
        self._outbox = Batch()
        self._loop = loop
        self._now = now
        self._epoll = select.epoll()
        self._fronts: dict[int, Front] = {}
        self._flows: dict[int, UdpFlow] = {}
        # Flows that have ended and whose socket rests, the longest first, for each family: IPv4, IPv6.
        self._rest: tuple[deque[UdpFlow], deque[UdpFlow]] = (deque(), deque())
        # When all sockets that had something were last read.
        self._quiet_at = float("-inf")
        loop.add_reader(self._epoll.fileno(), self._turn)

    # ---- proxy ports

    def serve(self, front: Front) -> None:
        self._epoll.register(front.fd, select.EPOLLIN)
        self._fronts[front.fd] = front

    def leave(self, front: Front) -> None:
        """Read no more from *front*, whose owner closes it."""
        if self._fronts.pop(front.fd, None) is not None:
            self._epoll.unregister(front.fd)
        if not self._fronts:
            self.shed()

    # ---- sockets of flows

    def __len__(self) -> int:
        """How many sockets flows have, those that rest included."""
        return len(self._flows)

    def lease(self, address: Address) -> socket.socket | None:
        """Return a socket of the family of *address*, not connected, that has rested for long enough."""
        rest = self._rest[":" in address[0]]
        if rest and rest[0].last_at < self._quiet_at - _REST_S:
            return rest.popleft().sock
        return None

    def open(self, address: Address) -> socket.socket:
        """Return a new socket of the family of *address*, not connected yet.

        Raises:
            OSError: none could be opened.
        """
        sock = backend_socket(socket.SOCK_DGRAM, address)
        try:
            self._epoll.register(sock, select.EPOLLIN)
        except BaseException:
            sock.close()
            raise
        return sock

    def begin(self, flow: UdpFlow) -> None:
        """Carry the answers that come to *flow*."""
        self._flows[flow.sock.fileno()] = flow

    def end(self, flow: UdpFlow, now: float, *, rest: bool = True) -> None:
        """Carry no more answers; the socket rests where there is room for it, or is closed."""
        fd = flow.sock.fileno()
        flow.front = None
        resting = self._rest[":" in flow.endpoint.ip]
        if rest and len(resting) < _RESTING_AT_MOST and not _connect(fd, _UNSPECIFIED, len(_UNSPECIFIED)):
            flow.last_at = now
            resting.append(flow)
        else:
            del self._flows[fd]
            flow.sock.close()

    def close(self, sock: socket.socket) -> None:
        """Close *sock*, which was leased or opened and which no flow has."""
        self._flows.pop(sock.fileno(), None)
        sock.close()

    def shed(self, ended_before: float = float("inf")) -> None:
        """Close the sockets that rest: all, or those whose flow ended before that."""
        for rest in self._rest:
            while rest and rest[0].last_at < ended_before:
                self.close(rest.popleft().sock)

    def expire(self, now: float) -> None:
        """Close the sockets for which there was no use."""
        self.shed(now - _KEEP_S)

    # ---- turns

    def _turn(self) -> None:
        for _ in range(_POLLS_A_TURN):
            ready = self._epoll.poll(0, _EVENTS_A_POLL)
            if not ready:
                return
            now = self._now()
            try:
                self._handle(ready, now)
                if len(ready) < _EVENTS_A_POLL:
                    self._quiet_at = now
            except Exception:
                log.exception("a bug: datagrams were not handled")

    def _handle(self, ready: list[tuple[int, int]], now: float) -> None:
        flows, outbox = self._flows, self._outbox
        room, address = outbox.room, outbox.address
        front: Front | None = None
        count = 0
        asked: list[Front] = []
        for fd, _ in ready:
            flow = flows.get(fd)
            if flow is None:
                if fd in self._fronts:
                    asked.append(self._fronts[fd])
                continue
            if flow.front is not front or count == MESSAGES:
                if front is not None:
                    self._send(front, count)
                front, count = flow.front, 0
            if front is None:
                _drain(flow.sock)
                continue
            try:
                length = flow.sock.recv_into(room[count])
            except BlockingIOError:
                continue
            except OSError as error:
                # Too long: the way has become narrower than an earlier datagram; the kernel knows now.
                if error.errno != errno.EMSGSIZE:
                    front.lose(flow, error)
                continue
            address(count, flow.reply, length)
            count += 1
            flow.last_at = now
            flow.bytes_to_client += length
            front.touch(flow.key)
            if not flow.answered:
                front.answered(flow)
        if front is not None:
            self._send(front, count)
        # Answers first: a new flow may end the one that was idle for longest, and not while an answer to it waits.
        for each in asked:
            each.receive()

    def _send(self, front: Front, count: int) -> None:
        if count and (refused := self._outbox.send(front.fd, count)):
            front.not_sent(refused)

    def stop(self) -> None:
        """Close every socket that rests, and the epoll."""
        self.shed()
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()


def _drain(sock: socket.socket) -> None:
    """Throw away what is in *sock*: datagrams, and an error that nobody was told."""
    errors = 0
    while errors < 2:
        try:
            sock.recv_into(_nowhere)
        except BlockingIOError:
            return
        except OSError:
            errors += 1
