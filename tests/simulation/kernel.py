"""A model of the kernel's sockets, epolls and descriptors, on a clock that jumps from event to event.

It covers what the data plane asks of Linux: edge- and level-triggered epoll (fs/eventpoll.c), send and receive buffers
with a window between them, FIN and RST in the order of net/ipv4/tcp_input.c, urgent data, delayed ACKs, UDP with ICMP
errors, and the lowest free number for each new descriptor. The proxy's sockets have descriptors. Those of other hosts
have none: their owner is called instead.
"""

from __future__ import annotations

import errno
import heapq
import os
import random
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

Buffer = bytes | bytearray | memoryview
Address = tuple[str, int]

IN, OUT, PRI, ERR, HUP, RDHUP = (
    select.EPOLLIN,
    select.EPOLLOUT,
    select.EPOLLPRI,
    select.EPOLLERR,
    select.EPOLLHUP,
    select.EPOLLRDHUP,
)
EVERYTHING = IN | OUT | PRI | ERR | HUP | RDHUP
_DELAYED_ACK_S = 0.04
_SYN_TIMEOUT_S = 127.0
_FIRST_DESCRIPTOR = 10
_SO_ORIGINAL_DST, _SO_MEMINFO = 80, 55
_ESTABLISHED, _CLOSE, _CLOSE_WAIT = 1, 7, 8
_STEPS_MAX = 60_000
_MSG_OOB, _MSG_PEEK = int(socket.MSG_OOB), int(socket.MSG_PEEK)
_AGAIN = errno.EAGAIN, os.strerror(errno.EAGAIN)


def _none(*_: object) -> None:
    pass


class Kernel:
    """The clock with its events, the descriptors of the proxy, and the network that its sockets are on."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1_000.0
        self.steps = 0
        self.has_woken = False  # an epoll has become ready since the loop last looked
        self.descriptors: dict[int, object] = {}
        self.descriptors_max = 1_000_000
        self.network: Network = Network()
        self.latency_s = 0.0005
        self.cuts_pieces = False
        # The sockets between processes: their room, and how long bytes take at most.
        self.channel_bytes = 1 << 17
        self.channel_latency_s = 0.0
        self.proxy_ports: dict[object, Any] = {}  # by protocol
        self.new_plane: Callable[..., object] = _none  # for a worker
        self.count: Callable[[str], None] = _none  # something that has happened
        self._free: list[int] = []
        self.events: list[tuple[float, int, Callable[[], None]]] = []  # a heap
        self._order = 0

    # ---- time

    def call_at(self, when: float, step: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self.events, (when, self._order, step))

    def call_later(self, delay_s: float, step: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self.events, (self.now + delay_s, self._order, step))

    def step(self) -> None:
        """Let the next event happen."""
        when, _, step = heapq.heappop(self.events)
        if when > self.now:
            self.now = when
        self.steps += 1
        step()

    def begin_turn(self, cost_s: float) -> None:
        """Let a turn of the loop begin, and let happen what is due by then."""
        self.steps += 1
        if self.steps > _STEPS_MAX:
            raise AssertionError("the history does not end")
        self.now += cost_s
        events = self.events
        while events and events[0][0] <= self.now:
            self.steps += 1
            heapq.heappop(events)[2]()
        self.has_woken = True  # a level-triggered epoll is ready again without an event

    # ---- descriptors

    def add(self, owner: object) -> int:
        if len(self.descriptors) >= self.descriptors_max:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        fd = heapq.heappop(self._free) if self._free else _FIRST_DESCRIPTOR + len(self.descriptors)
        self.descriptors[fd] = owner
        return fd

    def remove(self, fd: int) -> None:
        del self.descriptors[fd]
        heapq.heappush(self._free, fd)

    def open_socket(self, family: int, kind: int, _protocol: int = 0, fd: int | None = None) -> Stream | Datagram:
        """Return a new socket, or the one that accept has put at *fd*, as `_socket.socket` does."""
        if fd is not None:
            accepted = self.descriptors[fd]
            assert isinstance(accepted, Stream)
            return accepted
        self.network.check_room(kind)
        if kind & 0xF == socket.SOCK_DGRAM:
            return Datagram(self)
        return Stream(self, family, local=True)


class Current:
    """The kernel of the history that is being played."""

    kernel: Kernel


class Network:
    """What is at the far ends. A history has its own."""

    def connect(self, sock: Stream, address: Address) -> int:
        """Begin to connect *sock*, and return the error that connect(2) gives at once, or EINPROGRESS."""
        return errno.ENETUNREACH

    def check_room(self, kind: int) -> None:
        """Raise OSError if there is no room for another socket."""

    def send(self, sock: Datagram, data: bytes) -> None:
        """Carry a datagram from a connected UDP socket of the proxy."""

    def reply(self, listener: Datagram, record: bytes, data: bytes) -> bool:
        """Carry a datagram from a proxy port to its client. Return False if the kernel refuses it."""
        return True

    def udp_ports(self) -> dict[Address, set[int]]:
        """Return the local ports of the UDP flows that conntrack knows, by endpoint."""
        return {}


class Epoll:
    """An epoll. ``ready`` holds the descriptors that may have events, in the order of their wake-ups."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self.watched: dict[int, tuple[Pollable, int]] = {}
        self.ready: dict[int, None] = {}
        self._fd = kernel.add(self)
        self.closed = False

    def fileno(self) -> int:
        return self._fd

    def register(self, fd: int, mask: int) -> None:
        sock = self._kernel.descriptors.get(fd)
        if not isinstance(sock, Pollable):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if fd in self.watched:
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST))
        self.watched[fd] = sock, mask | ERR | HUP
        sock.epolls.append(self)
        self._arm(fd)

    def modify(self, fd: int, mask: int) -> None:
        self.watched[fd] = self.watched[fd][0], mask | ERR | HUP
        self._arm(fd)

    def _arm(self, fd: int) -> None:
        sock, mask = self.watched[fd]
        if sock.poll() & mask:
            self.ready[fd] = None
            self._kernel.has_woken = True

    def unregister(self, fd: int) -> None:
        sock, _ = self.watched.pop(fd)
        sock.epolls.remove(self)
        self.ready.pop(fd, None)

    def wake(self, fd: int, events: int) -> None:
        if events & self.watched[fd][1]:
            self.ready[fd] = None
            self._kernel.has_woken = True

    def poll(self, timeout: float = 0, maxevents: int = -1) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for fd in list(self.ready)[: maxevents if maxevents > 0 else None]:
            del self.ready[fd]
            sock, mask = self.watched[fd]
            events = sock.poll() & mask
            if events:
                found.append((fd, events))
                if not mask & select.EPOLLET:
                    self.ready[fd] = None
        return found

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            for fd in list(self.watched):
                self.unregister(fd)
            self._kernel.remove(self._fd)


class Pollable:
    """A socket that tells epolls, or its owner at another host, about events."""

    def __init__(self, kernel: Kernel, *, local: bool) -> None:
        self.kernel = kernel
        self.epolls: list[Epoll] = []
        self.on_events: Callable[[], None] | None = None
        self.fd = kernel.add(self) if local else -1
        self.closed = False
        self.is_probe = False
        self.options: dict[tuple[int, int], object] = {}

    def poll(self) -> int:
        raise NotImplementedError

    def wake(self, events: int) -> None:
        for epoll in self.epolls:
            epoll.wake(self.fd, events)
        if self.on_events is not None:
            self.on_events()

    def fileno(self) -> int:
        return self.fd

    def setsockopt(self, level: int, option: int, value: object) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        self.options[level, option] = value

    def _leave_table(self) -> bool:
        """Give the descriptor back. Return False if the socket is closed already."""
        if self.closed:
            return False
        self.closed = True
        if self.fd >= 0:
            for epoll in list(self.epolls):
                epoll.unregister(self.fd)
            self.kernel.remove(self.fd)
            self.fd = -1
        return True


class Listener(Pollable):
    """The listening socket of a proxy port, with its accept queue. *origin*: another descriptor of the same socket."""

    family = socket.AF_INET

    def __init__(self, kernel: Kernel, origin: Listener | None = None) -> None:
        super().__init__(kernel, local=True)
        self.queue: deque[tuple[Stream, Address]] = deque() if origin is None else origin.queue
        self.errors: deque[int] = deque() if origin is None else origin.errors
        self.holders: list[Listener] = [] if origin is None else origin.holders
        self.holders.append(self)

    def poll(self) -> int:
        return IN if self.queue or self.errors else 0

    def wake(self, events: int) -> None:
        for holder in self.holders:
            Pollable.wake(holder, events)

    def arrive(self, sock: Stream, client: Address) -> None:
        if self.holders:
            self.queue.append((sock, client))
            self.wake(IN)
        else:
            sock.abort()

    def _accept(self) -> tuple[int, Address]:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.errors:
            code = self.errors.popleft()
            raise OSError(code, os.strerror(code))
        if not self.queue:
            raise BlockingIOError(*_AGAIN)
        sock, client = self.queue[0]
        sock.fd = self.kernel.add(sock)
        self.queue.popleft()
        return sock.fd, client

    def close(self) -> None:
        if self._leave_table():
            self.holders.remove(self)
            for sock, _ in () if self.holders else self.queue:
                sock.abort()


class Stream(Pollable):
    """One end of a TCP connection."""

    def __init__(self, kernel: Kernel, family: int = socket.AF_INET, *, local: bool) -> None:
        super().__init__(kernel, local=local)
        self.family = family
        self.peer: Stream | None = None
        self.connected = False
        self.incoming = bytearray()
        self.outgoing = bytearray()
        self.flying = 0  # bytes between the send buffer and the peer's receive buffer
        self.receive_room = 1 << 16
        self.send_room = 1 << 16
        self.latency_s = kernel.latency_s
        self.error = 0
        self.dead = False  # reset, or given up
        self.ended = False  # a FIN has arrived
        self.shut = False  # no more may be sent
        self.lost_at: float | None = None  # no packet passes to or from the peer any more
        self.original: Address | None = None  # what the client dialled
        self.on_ack: Callable[[], None] | None = None  # the peer's accept, due with the last ACK of the handshake
        self.acked_at = kernel.now
        self.sent_at = self.received_at = kernel.now
        self.blocking = True
        self._connects = False
        self._fin_left = False
        self._is_full = False  # SOCK_NOSPACE
        self._arrives_at = 0.0
        self._read = 0  # bytes read so far
        self._arrived = 0
        self._urgent_at: int | None = None
        # How many reads that begin at an urgent byte find a signal pending.
        self.pending_signals = 0

    # ---- state

    @property
    def unacknowledged(self) -> int:
        return len(self.outgoing) + self.flying

    def poll(self) -> int:
        mask = ERR if self.error else 0
        if self.dead or (self.ended and self.shut):
            mask |= HUP
        if self.dead or self.ended:
            mask |= IN | RDHUP
        elif self.incoming:
            mask |= IN
        if self._urgent_at is not None and self._urgent_at >= self._read:
            mask |= PRI
        if self.connected or self.dead:
            if self.shut or self.dead or self._has_room():
                mask |= OUT
            else:
                self._is_full = True
        return mask

    def _has_room(self) -> bool:
        used = self.unacknowledged
        return self.send_room - used >= used // 2

    # ---- connecting

    def connect_ex(self, address: Address) -> int:
        """Connect; if a connection is under way, return how it is (inet_stream_connect in net/ipv4/af_inet.c)."""
        if self.connected or self.dead:
            code, self.error = self.error, 0
            return code
        if self._connects:
            return errno.EALREADY
        self._connects = True
        return self.kernel.network.connect(self, address)

    def join(self, peer: Stream) -> None:
        self.peer, peer.peer = peer, self

    def establish(self) -> None:
        """The peer's answer to our SYN arrives."""
        if not self.closed and not self.dead:
            self.connected = True
            if not self.options.get((socket.IPPROTO_TCP, socket.TCP_QUICKACK), 1):
                self.kernel.call_later(_DELAYED_ACK_S, self._acknowledge)
            else:
                self._acknowledge()
            self.wake(OUT)

    def _acknowledge(self) -> None:
        """Send the last ACK of the handshake, alone or with the first bytes."""
        if self.on_ack is not None and not self.dead:
            accept, self.on_ack = self.on_ack, None
            self.kernel.call_at(self._arrival(), accept)

    def fail(self, code: int) -> None:
        """Give the connection up with the error *code*."""
        if not self.dead:
            self.dead, self.error = True, code
            self.connected = False
            self.outgoing.clear()
            self.flying = 0
            self.wake(EVERYTHING)

    def getsockname(self) -> Address:
        return "10.0.0.1", 1

    def gettimeout(self) -> float | None:
        return None if self.blocking else 0.0

    def setblocking(self, blocking: bool) -> None:
        self.blocking = blocking

    def setsockopt(self, level: int, option: int, value: object) -> None:
        super().setsockopt(level, option, value)
        if (level, option, value) == (socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1) and self.connected:
            self._acknowledge()

    def getsockopt(self, level: int, option: int, size: int = 0) -> int | bytes:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if (level, option) == (socket.SOL_SOCKET, socket.SO_ERROR):
            code, self.error = self.error, 0
            return code
        if (level, option) == (socket.IPPROTO_TCP, socket.TCP_NODELAY):
            return bool(self.options.get((level, option)))
        if option == _SO_ORIGINAL_DST:
            if self.original is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            ip, port = self.original
            return struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + socket.inet_aton(ip) + bytes(8)
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return self._info()[:size]

    def _info(self) -> bytes:
        """Return a struct tcp_info with the fields that the data plane reads."""
        info = bytearray(148)
        info[0] = _CLOSE if self.dead else _CLOSE_WAIT if self.ended else _ESTABLISHED
        now = self.kernel.now
        if self.lost_at is not None and self.unacknowledged:
            info[2] = 1 + min(int(now - self.lost_at), 14)
        struct.pack_into("=I", info, 24, 1 if self.flying else 0)
        struct.pack_into("=I", info, 44, int((now - self.sent_at) * 1000))
        struct.pack_into("=I", info, 52, int((now - self.received_at) * 1000))
        struct.pack_into("=I", info, 56, int((now - self.acked_at) * 1000))
        struct.pack_into("=I", info, 144, len(self.outgoing))
        return bytes(info)

    # ---- sending

    def send(self, data: Buffer, flags: int = 0) -> int:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if self.dead or self.shut:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        room = self.send_room - len(self.outgoing) - self.flying
        if room <= 0 or not self.connected:
            self._is_full = True
            raise BlockingIOError(*_AGAIN)
        taken = memoryview(data)
        if len(taken) > room:
            taken = taken[:room]
            self._is_full = True
        if flags and int(flags) & _MSG_OOB and self.peer is not None:
            self.peer.note_urgent(self._sent + len(taken) - 1)
        self.outgoing += taken
        self.sent_at = self.kernel.now
        if self.on_ack is not None:
            self._acknowledge()
        self._push()
        return len(taken)

    @property
    def _sent(self) -> int:
        """The number of bytes that the stream has had so far."""
        peer = self.peer
        return self.unacknowledged + (0 if peer is None else peer._arrived)

    def note_urgent(self, at: int) -> None:
        self._urgent_at = at
        self.kernel.call_later(self.latency_s, lambda: self.wake(PRI))

    def _arrival(self) -> float:
        """Return when a packet that leaves now arrives: never before an earlier one."""
        kernel = self.kernel
        delay_s = self.latency_s * (1 + kernel.random.random()) if kernel.cuts_pieces else self.latency_s
        self._arrives_at = max(self._arrives_at, kernel.now + delay_s)
        return self._arrives_at

    def _push(self) -> None:
        """Send as much as the peer's window takes, then the FIN."""
        peer, kernel = self.peer, self.kernel
        if peer is None or self.lost_at is not None or self.dead:
            return
        window = peer.receive_room - len(peer.incoming) - self.flying
        count = len(self.outgoing)
        if count > window:
            count = window
        if count == window < peer.receive_room >> 1:
            count = 0  # silly window avoidance (RFC 9293, 3.8.6.2): wait until more is free
        while count > 0:
            piece_bytes = count
            if kernel.cuts_pieces and count > 1 and kernel.random.random() < 0.3:
                piece_bytes = 1 + int(kernel.random.random() * (count - 1))
            piece = bytes(memoryview(self.outgoing)[:piece_bytes])
            del self.outgoing[:piece_bytes]
            self.flying += piece_bytes
            count -= piece_bytes
            kernel.call_at(self._arrival(), lambda piece=piece: peer.arrive(piece))  # type: ignore[misc]
        if self.shut and not self.outgoing and not self._fin_left:
            self._fin_left = True
            kernel.call_at(self._arrival(), peer.end)

    # ---- packets of the peer

    def arrive(self, piece: bytes) -> None:
        peer = self.peer
        assert peer is not None
        if self.lost_at is not None or self.dead:
            return
        peer.flying -= len(piece)
        peer.acked_at = self.kernel.now
        if self.closed:
            peer.kernel.call_at(self._arrival(), peer.reset)
            return
        self.incoming += piece
        self._arrived += len(piece)
        self.received_at = self.kernel.now
        if peer._is_full and not peer.shut and peer._has_room():
            peer._is_full = False
            peer.wake(OUT)
        self.wake(IN)

    def end(self) -> None:
        """The peer's FIN arrives."""
        if self.lost_at is None and not self.dead:
            self.ended = True
            self.wake(EVERYTHING)

    def reset(self) -> None:
        """A reset arrives (tcp_reset in net/ipv4/tcp_input.c)."""
        if self.lost_at is None:
            self.fail(errno.EPIPE if self.ended else errno.ECONNRESET)

    def lose(self) -> None:
        """From now on no packet passes in either direction."""
        for end in (self, self.peer):
            if end is not None and end.lost_at is None:
                end.lost_at = self.kernel.now
                end._keep_alive()

    def _keep_alive(self) -> None:
        idle_s = self.options.get((socket.IPPROTO_TCP, socket.TCP_KEEPIDLE))
        if isinstance(idle_s, int):
            probes = self.options[socket.IPPROTO_TCP, socket.TCP_KEEPCNT]
            interval_s = self.options[socket.IPPROTO_TCP, socket.TCP_KEEPINTVL]
            assert isinstance(probes, int)
            assert isinstance(interval_s, int)
            self.kernel.call_later(idle_s + probes * interval_s, self._give_up_idle)

    def _give_up_idle(self) -> None:
        if not self.unacknowledged and not self.closed:
            self.fail(errno.ETIMEDOUT)

    # ---- receiving

    def recv_into(self, room: Buffer, size: int = 0, flags: int = 0) -> int:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        incoming = self.incoming
        if self.pending_signals and self.is_at_urgent():
            self.pending_signals -= 1
            raise BlockingIOError(*_AGAIN)
        if incoming:
            target = memoryview(room)
            count = min(size or target.nbytes, len(incoming), self._before_urgent())
            target[:count] = memoryview(incoming)[:count]
            del incoming[:count]
            self._read += count
            peer = self.peer
            if peer is not None and (peer.outgoing or peer.shut):
                peer._push()
            return count
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))
        if self.ended or self.dead:
            return 0
        raise BlockingIOError(*_AGAIN)

    def is_at_urgent(self) -> bool:
        return bool(self.incoming) and self._urgent_at == self._read

    def _before_urgent(self) -> int:
        """Return how many bytes a read may take: it stops before an urgent byte."""
        if self._urgent_at is None or self._urgent_at <= self._read:
            return len(self.incoming)
        return self._urgent_at - self._read

    def is_readable(self) -> bool:
        return bool(self.incoming) or self.ended or self.dead

    def recv(self, count: int) -> bytes:
        room = bytearray(min(count, len(self.incoming)) or 1)
        return bytes(room[: self.recv_into(room)])

    # ---- endings

    def shutdown(self, how: int) -> None:
        if self.closed or self.dead or not self.connected:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        if not self.shut:
            self.shut = True
            self._acknowledge()
            self._push()
            self.wake(EVERYTHING)

    def close(self) -> None:
        if not self._leave_table():
            return
        self.on_events = None
        linger = self.options.get((socket.SOL_SOCKET, socket.SO_LINGER))
        if self.dead or self.peer is None:
            self.dead = True
        elif linger is not None or self.incoming:
            self.abort()
        else:
            self._acknowledge()
            self.shut = True
            self._push()

    def detach(self) -> Stream:
        return self

    def abort(self) -> None:
        """Send a reset; what is in the send buffer is lost."""
        peer, self.closed = self.peer, True
        if not self.dead and peer is not None and self.lost_at is None:
            self.kernel.call_at(self._arrival(), peer.reset)
        self.dead = True
        self.outgoing.clear()


class Datagram(Pollable):
    """A UDP socket of the proxy: of a proxy port, or connected to an endpoint, for a flow or a probe.

    *origin*: another descriptor of the same proxy port.
    """

    family = socket.AF_INET

    def __init__(self, kernel: Kernel, origin: Datagram | None = None) -> None:
        super().__init__(kernel, local=True)
        self.incoming: deque[bytes] = deque()
        # Of a proxy port: record and content of what clients have sent, and all descriptors of the socket.
        self.records: deque[tuple[bytes, bytes]] = deque() if origin is None else origin.records
        self.holders: list[Datagram] = [] if origin is None else origin.holders
        self.holders.append(self)
        self.error = 0
        self.port = 0
        self.address: Address | None = None

    def poll(self) -> int:
        return (IN if self.incoming or self.records else 0) | (ERR if self.error else 0)

    def bind(self, address: Address) -> None:
        self.port = address[1]

    def connect_ex(self, address: Address) -> int:
        """Connect from any free port. Later calls change nothing."""
        self.address = address
        return 0

    def connect(self, address: Address) -> None:
        for other in self.kernel.descriptors.values():
            if isinstance(other, Datagram) and (other.port, other.address) == (self.port, address):
                raise AssertionError(f"port {self.port} has two flows to {address}")
        self.address = address

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option) == (socket.SOL_SOCKET, _SO_MEMINFO)
        return struct.pack("=I", sum(1 + len(datagram) for datagram in self.incoming))[:size]

    def _raise_error(self) -> None:
        if self.closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.error:
            code, self.error = self.error, 0
            raise OSError(code, os.strerror(code))

    def send(self, data: Buffer) -> int:
        self._raise_error()
        content = bytes(data)
        self.kernel.network.send(self, content)
        return len(content)

    def recv_into(self, room: Buffer, size: int = 0, flags: int = 0) -> int:
        self._raise_error()
        if not self.incoming:
            raise BlockingIOError(*_AGAIN)
        datagram = self.incoming[0] if flags & _MSG_PEEK else self.incoming.popleft()
        target = memoryview(room)
        count = min(target.nbytes, len(datagram))
        target[:count] = datagram[:count]
        return count

    def recv(self, count: int) -> bytes:
        room = bytearray(count)
        return bytes(room[: self.recv_into(room)])

    def arrive(self, datagram: bytes) -> None:
        if not self.closed:
            self.incoming.append(datagram)
            self.wake(IN)

    def ask(self, record: bytes, content: bytes) -> None:
        """A datagram from a client arrives at the proxy port."""
        self.records.append((record, content))
        for holder in self.holders:
            holder.wake(IN)

    def fail(self, code: int) -> None:
        if not self.closed:
            self.error = code
            self.wake(IN | ERR)

    def close(self) -> None:
        if self._leave_table():
            self.holders.remove(self)
