"""Each call of the data plane gets the same answer from the model as from the sockets of this kernel."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.simulation.kernel import Address, Datagram, Epoll, Kernel, Network, Stream

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_WITHIN_S = 10.0
_STEPS_MAX = 100


class _Closed(Network):
    """A network on which every port is closed."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel

    def connect(self, sock: Stream, address: Address) -> int:
        self._kernel.call_later(0.001, lambda: sock.fail(errno.ECONNREFUSED))
        return errno.EINPROGRESS

    def send(self, sock: Datagram, data: bytes) -> None:
        self._kernel.call_later(0.001, lambda: sock.fail(errno.ECONNREFUSED))


class Model:
    """Sockets of the model."""

    def __init__(self, on_exit: contextlib.ExitStack) -> None:
        self.kernel = Kernel(seed=1)
        self.kernel.network = _Closed(self.kernel)
        self.closed_port: Address = ("10.0.1.1", 80)

    def stream(self) -> Any:
        return Stream(self.kernel, local=True)

    def pair(self) -> tuple[Any, Any]:
        near, far = self.stream(), self.stream()
        near.join(far)
        near.connected = far.connected = True
        return near, far

    def datagram(self) -> Any:
        return Datagram(self.kernel)

    def events(self, sock: Any, awaited: int) -> int:
        """Return the events of *sock* once it has all those of *awaited*."""
        epoll = Epoll(self.kernel)
        epoll.register(sock.fileno(), awaited)
        for _ in range(_STEPS_MAX):
            found = dict(epoll.poll(0)).get(sock.fileno(), 0)
            if found & awaited == awaited:
                epoll.close()
                return found
            self.kernel.step()
        raise AssertionError(f"no such event: {awaited}")


class Real:
    """Sockets of this kernel, on loopback."""

    def __init__(self, on_exit: contextlib.ExitStack) -> None:
        self._on_exit = on_exit
        # Bound and not listening: the kernel refuses dials to it, and no other program gets the port.
        holder = on_exit.enter_context(socket.socket())
        holder.bind(("127.0.0.1", 0))
        udp = on_exit.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        udp.bind(("127.0.0.1", holder.getsockname()[1]))
        udp.close()
        self.closed_port: Address = holder.getsockname()

    def stream(self) -> Any:
        sock = self._on_exit.enter_context(socket.socket())
        sock.setblocking(False)
        return sock

    def pair(self) -> tuple[Any, Any]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            near = self._on_exit.enter_context(socket.create_connection(server.getsockname()))
            far = self._on_exit.enter_context(server.accept()[0])
        for sock in (near, far):
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        return near, far

    def datagram(self) -> Any:
        sock = self._on_exit.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        sock.setblocking(False)
        return sock

    def events(self, sock: Any, awaited: int) -> int:
        give_up_at = time.monotonic() + _WITHIN_S
        with select.epoll() as epoll:
            epoll.register(sock.fileno(), awaited)
            while (found := dict(epoll.poll(_WITHIN_S))[sock.fileno()]) & awaited != awaited:
                assert time.monotonic() < give_up_at, f"no such event: {awaited}"
        return found


World = Model | Real


@pytest.fixture(params=[Model, Real])
def world(request: pytest.FixtureRequest) -> Iterator[World]:
    with contextlib.ExitStack() as on_exit:
        yield request.param(on_exit)


def failure(call: Callable[[], object]) -> int | None:
    """Return the error number of *call*, or None if it succeeds."""
    try:
        call()
    except OSError as error:
        return error.errno
    return None


def read(sock: Any, count: int = 100, flags: int = 0) -> bytes:
    room = bytearray(count)
    return bytes(room[: sock.recv_into(room, count, flags)])


def test_a_refused_dial_has_its_error_once(world: World) -> None:
    sock = world.stream()
    began = sock.connect_ex(world.closed_port)
    events = world.events(sock, select.EPOLLERR | select.EPOLLHUP)

    assert began == errno.EINPROGRESS
    assert events & select.EPOLLERR
    errors = [sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) for _ in range(2)]
    assert errors == [errno.ECONNREFUSED, 0]


def test_a_socket_without_bytes_would_block_and_can_be_written(world: World) -> None:
    near, _ = world.pair()

    assert failure(lambda: read(near)) == errno.EAGAIN
    assert not world.events(near, select.EPOLLOUT) & select.EPOLLIN


def test_a_half_close_is_an_end_behind_the_bytes_and_the_other_direction_goes_on(world: World) -> None:
    near, far = world.pair()
    near.send(b"ask")
    near.shutdown(socket.SHUT_WR)

    events = world.events(far, select.EPOLLIN | select.EPOLLRDHUP)
    assert not events & select.EPOLLHUP
    assert (read(far), read(far)) == (b"ask", b"")
    far.send(b"reply")
    world.events(near, select.EPOLLIN)
    assert read(near) == b"reply"
    assert failure(lambda: near.send(b"more")) == errno.EPIPE


def test_both_ends_make_a_hang_up(world: World) -> None:
    near, far = world.pair()
    near.shutdown(socket.SHUT_WR)
    far.shutdown(socket.SHUT_WR)

    assert world.events(near, select.EPOLLIN | select.EPOLLHUP) & select.EPOLLHUP


def test_a_close_with_linger_0_is_a_reset_behind_the_bytes(world: World) -> None:
    near, far = world.pair()
    near.send(b"bytes")
    world.events(far, select.EPOLLIN)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    near.close()

    world.events(far, select.EPOLLERR | select.EPOLLHUP)
    assert read(far) == b"bytes"
    assert failure(lambda: read(far)) == errno.ECONNRESET
    assert read(far) == b""
    assert failure(lambda: far.send(b"more")) == errno.EPIPE


def test_a_close_with_unread_bytes_is_a_reset(world: World) -> None:
    near, far = world.pair()
    far.send(b"never read")
    world.events(near, select.EPOLLIN)
    near.close()

    world.events(far, select.EPOLLERR | select.EPOLLHUP)
    assert failure(lambda: read(far)) == errno.ECONNRESET


def test_bytes_to_a_closed_socket_make_a_reset_that_tells_of_a_broken_pipe(world: World) -> None:
    near, far = world.pair()
    near.close()
    world.events(far, select.EPOLLIN | select.EPOLLRDHUP)
    far.send(b"too late")

    world.events(far, select.EPOLLERR | select.EPOLLHUP)
    assert far.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE


def test_a_read_stops_before_an_urgent_byte_and_goes_on_with_it(world: World) -> None:
    near, far = world.pair()
    near.send(b"before")
    near.send(b"!", socket.MSG_OOB)
    near.send(b"after")

    world.events(far, select.EPOLLIN | select.EPOLLPRI)
    seen, rest = read(far), b""
    while len(rest) < len(b"!after"):
        world.events(far, select.EPOLLIN)
        rest += read(far)
    assert (seen, rest) == (b"before", b"!after")


def test_a_shutdown_of_a_reset_connection_is_refused(world: World) -> None:
    near, far = world.pair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    near.close()
    world.events(far, select.EPOLLERR | select.EPOLLHUP)

    assert failure(lambda: far.shutdown(socket.SHUT_WR)) == errno.ENOTCONN


@pytest.mark.parametrize("call", ["send", "receive"])
def test_a_datagram_to_a_closed_port_makes_the_next_call_fail_once(world: World, call: str) -> None:
    sock = world.datagram()
    sock.connect(world.closed_port)
    sock.send(b"lost")

    assert not world.events(sock, select.EPOLLERR) & select.EPOLLIN
    if call == "send":
        assert [failure(lambda: sock.send(b"next")), failure(lambda: read(sock))][0] == errno.ECONNREFUSED
    else:
        assert [failure(lambda: read(sock)) for _ in range(2)] == [errno.ECONNREFUSED, errno.EAGAIN]


@pytest.mark.parametrize("kind", ["stream", "datagram"])
def test_a_call_on_a_closed_socket_has_no_descriptor(world: World, kind: str) -> None:
    sock = getattr(world, kind)()
    sock.close()

    assert failure(lambda: sock.send(b"")) == failure(lambda: read(sock)) == errno.EBADF
    assert sock.fileno() == -1
