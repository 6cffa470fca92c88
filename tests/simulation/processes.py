"""The model's processes: a control process and its workers, which share the kernel and the loop of a history.

Each runs its own code and talks to the others by the messages of the product alone, over unix sockets that carry
descriptors. Frames arrive late, in pieces, and in order. A sender finds a full socket.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from types import SimpleNamespace
from typing import Any, Self

import msgspec
import pytest

from tests.simulation.kernel import Current, Datagram, Kernel, Listener, Pollable
from userspace_proxy.dataplane import channel, child, plane, remote, wire, worker
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.runtime import instance_lock

# Beside those of `history.py` and `probing.py`.
FAULTS = frozenset({"cut-frame", "full-channel", "hand-over", "replaced-worker"})
# A worker is silent without need between two of these looks, each of which costs a ping.
_LOOK_EVERY_S = 5.0
# Rarer than on a node, for the same reason.
_LINGER_POLL_S = 0.5
_PIECES_MAX = 3
_STARTS_WITHIN_S = 0.2
_pids = itertools.count(1_000)


class _Room:
    """Whether a unix socket can be written to."""

    ready = True


class UnixSocket(Pollable):
    """A connected unix stream socket."""

    def __init__(self, kernel: Kernel) -> None:
        super().__init__(kernel, local=True)
        # What has arrived: bytes, each time with the sockets that came with the first of them.
        self.incoming: deque[tuple[bytearray, list[Pollable]]] = deque()
        self.peer = self
        self.writable = _Room()
        self.unread = 0  # bytes sent that the peer has not read
        self.ready = False
        self._ended = False
        self._arrives_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def setblocking(self, blocking: bool) -> None:
        assert not blocking

    def send_with(self, data: memoryview, descriptors: Sequence[int]) -> int:
        """Send the first bytes of *data*, with *descriptors*, as unix_stream_sendmsg in net/unix/af_unix.c does."""
        kernel = self.kernel
        if self.peer.closed:
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))
        room = kernel.channel_bytes - self.unread
        if room <= 0:
            kernel.count("full-channel")
            self.writable.ready = False
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        passed = [duplicate(kernel.descriptors[descriptor]) for descriptor in descriptors]
        sent = bytes(data[:room])
        self.unread += len(sent)
        for piece in self._pieces(sent):
            self._later(lambda piece=piece, its=passed: self.peer.arrive(piece, its))  # type: ignore[misc]
            passed = []
        return len(sent)

    def _pieces(self, sent: bytes) -> Iterable[bytes]:
        kernel = self.kernel
        if not kernel.cuts_pieces or len(sent) == 1 or kernel.random.random() < 0.7:
            return (sent,)
        kernel.count("cut-frame")
        cuts = sorted(kernel.random.randrange(1, len(sent)) for _ in range(kernel.random.randrange(1, _PIECES_MAX)))
        return filter(None, (sent[start:end] for start, end in itertools.pairwise((0, *cuts, len(sent)))))

    def _later(self, step: Callable[[], None]) -> None:
        kernel = self.kernel
        delay_s = kernel.random.random() * kernel.channel_latency_s
        self._arrives_at = max(self._arrives_at, kernel.now + delay_s)
        kernel.call_at(self._arrives_at, step)

    def arrive(self, piece: bytes, passed: list[Pollable]) -> None:
        if self.closed:
            _close_all(passed)
        else:
            self.incoming.append((bytearray(piece), passed))
            self._note_ready()

    def _end(self) -> None:
        self._ended = True
        self._note_ready()

    def _note_ready(self) -> None:
        self.ready = self.kernel.has_woken = True

    def receive_with(self, count: int) -> tuple[bytes, list[int]]:
        """Return bytes, and the descriptors of at most one message, as unix_stream_read_generic does."""
        data = bytearray()
        passed: list[Pollable] = []
        while self.incoming and len(data) < count and not passed:
            piece, its = self.incoming[0]
            room = count - len(data)
            data += piece[:room]
            del piece[:room]
            passed = its[:]
            its.clear()
            if not piece:
                self.incoming.popleft()
        if not data and not self._ended:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self.ready = bool(self.incoming) or self._ended
        self.peer.unread -= len(data)
        self.peer.writable.ready = True
        return bytes(data), [sock.fd for sock in passed]

    def poll(self) -> int:
        return 0

    def move(self) -> UnixSocket:
        """Return the socket at a new descriptor, in a child process; the one here is closed."""
        moved = UnixSocket(self.kernel)
        moved.peer, self.peer.peer = self.peer, moved
        moved.incoming = self.incoming
        self._leave_table()
        return moved

    def close(self) -> None:
        if self._leave_table():
            for _, passed in self.incoming:
                _close_all(passed)
            self._later(self.peer._end)


class Name(Pollable):
    """The socket bound to the name of the proxy, or a member of the group of serving processes."""

    def __init__(self, kernel: Kernel, origin: Name | None = None) -> None:
        super().__init__(kernel, local=True)

    def poll(self) -> int:
        return 0

    def close(self) -> None:
        self._leave_table()


def duplicate(sock: Any) -> Any:
    """Return another descriptor of *sock*, as a message between processes carries it."""
    return type(sock)(sock.kernel, sock)


def socketpair() -> tuple[UnixSocket, UnixSocket]:
    first, second = UnixSocket(Current.kernel), UnixSocket(Current.kernel)
    first.peer, second.peer = second, first
    return first, second


def _close_all(sockets: Iterable[Any]) -> None:
    for sock in sockets:
        sock.close()


class SimulatedProcess:
    """Stands in for a `Popen` of a worker, which runs in the loop of the history."""

    def __init__(self, command: Sequence[str], *, pass_fds: Sequence[int], **_: object) -> None:
        kernel = Current.kernel
        (descriptor,) = pass_fds
        self._sock = kernel.descriptors[descriptor].move()  # type: ignore[attr-defined]
        self._settings = msgspec.json.decode(command[-1], type=WorkerSettings)
        self._worker: worker.Worker | None = None
        self._task: asyncio.Task[None] | None = None
        self.pid = next(_pids)
        kernel.call_later(kernel.random.uniform(0, _STARTS_WITHIN_S), self._begin)

    def _begin(self) -> None:
        self._worker = worker.Worker(self._sock, self._settings)
        self._task = asyncio.get_running_loop().create_task(self._worker.run(), name="worker")

    def poll(self) -> int | None:
        return 0 if self._task is not None and self._task.done() else None

    def terminate(self) -> None:
        assert self._worker is not None
        self._worker._on_sigterm()

    def kill(self) -> None:
        raise AssertionError("a worker does not end")


def _send_fds(sock: UnixSocket, buffers: Sequence[memoryview], descriptors: Sequence[int]) -> int:
    return sock.send_with(buffers[0], descriptors)


def _receive_fds(sock: UnixSocket, count: int, _most: int) -> tuple[bytes, list[int], int, None]:
    return *sock.receive_with(count), 0, None


def _close(descriptor: int) -> None:
    Current.kernel.descriptors[descriptor].close()  # type: ignore[attr-defined]


def _of(fileno: int) -> object:
    return Current.kernel.descriptors[fileno]


def _open_group(protocol: L4Protocol, _port: int, _count: int, _limits: object) -> list[Listener | Datagram]:
    sock = Listener(Current.kernel) if protocol is L4Protocol.TCP else Datagram(Current.kernel)
    Current.kernel.proxy_ports[protocol] = sock
    return [sock]


def _new_plane(*arguments: Any, **settings: Any) -> Any:
    return Current.kernel.new_plane(*arguments, **settings)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put the model in the place of the kernel under the messages between processes."""
    system = SimpleNamespace(close=_close, set_inheritable=lambda *_: None, strerror=os.strerror, getpid=lambda: 1)
    patch.setattr(
        channel, "socket", SimpleNamespace(send_fds=_send_fds, recv_fds=_receive_fds, MSG_CTRUNC=socket.MSG_CTRUNC)
    )
    for module in (channel, worker, instance_lock):
        patch.setattr(module, "os", system)
    for module in (worker, instance_lock):
        patch.setattr(module, "socket", SimpleNamespace(socket=_of))
    patch.setattr(child, "socket", SimpleNamespace(socketpair=socketpair))
    patch.setattr(child, "subprocess", SimpleNamespace(Popen=SimulatedProcess, DEVNULL=None))
    patch.setattr(child, "time", SimpleNamespace(monotonic=lambda: Current.kernel.now))
    patch.setattr(child, "activity_of", lambda _: None)
    patch.setattr(child, "LOOK_EVERY_S", _LOOK_EVERY_S)
    patch.setattr(worker, "gc", SimpleNamespace(freeze=lambda: None))
    patch.setattr(
        worker, "rendezvous", SimpleNamespace(join=lambda _: Name(Current.kernel), Role=SimpleNamespace(SERVES_ON=0))
    )
    patch.setattr(worker, "LocalPlane", _new_plane)
    patch.setattr(remote, "raise_descriptor_limit", lambda: None)
    patch.setattr(remote, "_A_FRAME", 1)
    patch.setattr(wire, "OPENED_A_FRAME", 1)
    patch.setattr(instance_lock, "_hold_name", lambda _: None)
    patch.setattr(plane, "_LINGER_POLL_S", _LINGER_POLL_S)
    for module in (plane, remote):
        patch.setattr(module, "open_group", _open_group)
