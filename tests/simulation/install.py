"""Put the model in the place of the kernel under the modules of the data plane.

Each module is given a small stand-in for the system module that it uses. All stand-ins lead to the kernel of the
history that is being played.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import termios
from array import array
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import pytest

from tests.simulation import processes
from tests.simulation.datagrams import SimulatedBatch
from tests.simulation.kernel import Current, Datagram, Epoll, Kernel, Stream
from userspace_proxy.dataplane import connections, datagrams, lifetimes, pipes, plane, poller, sockets
from userspace_proxy.dataplane.splice import copy, pipe
from userspace_proxy.model.endpoint import Address
from userspace_proxy.probes import attempt

# Smaller than the real ones, so that a history of few bytes fills them.
BUFFER_BYTES = 512
LOCAL_PORTS = 8


def use(kernel: Kernel) -> None:
    """Lead all stand-ins to *kernel* from now on."""
    Current.kernel = SimulatedBatch.kernel = kernel


class SimulatedPipe:
    """A pipe of the model, for splice(2)."""

    def __init__(self, kernel: Kernel) -> None:
        self.content = bytearray()
        self.ends = kernel.add(self), kernel.add(self)


class EmptyTables:
    """Stands in for `KernelTables`: no NAT entry, no local address, no flow."""

    def is_local(self, ip: str) -> bool:
        return False

    def dialled_by(self, client: Address, reached: Address) -> Address:
        return reached

    def udp_flows(self) -> dict[tuple[str, Address], set[int]]:
        return {}

    def close(self) -> None:
        pass


class SimulatedTables(EmptyTables):
    """The same with the UDP flows of the model's conntrack."""

    def udp_flows(self) -> dict[tuple[str, Address], set[int]]:
        return {("", address): ports for address, ports in Current.kernel.network.udp_ports().items()}


def _open(family: int, kind: int, protocol: int = 0, fd: int | None = None) -> Stream | Datagram:
    return Current.kernel.open_socket(family, kind, protocol, fd)


def _open_probe(family: int, kind: int, protocol: int = 0) -> Stream | Datagram:
    sock = _open(family, kind, protocol)
    sock.is_probe = True
    return sock


def _stream_for_probe(address: Address) -> Any:
    sock: Any = sockets.stream_socket(address)
    sock.is_probe = True
    return sock


def _epoll() -> Epoll:
    return Epoll(Current.kernel)


def _pipe2(flags: int) -> tuple[int, int]:
    return SimulatedPipe(Current.kernel).ends


def _close(fd: int) -> None:
    Current.kernel.remove(fd)


def _splice(source: int, target: int, count: int, flags: int = 0) -> int:
    """Move bytes between a socket and a pipe, as splice(2) does: never past an urgent byte."""
    known = Current.kernel.descriptors
    from_, to = known[source], known[target]
    if isinstance(from_, Stream):
        assert isinstance(to, SimulatedPipe)
        room = bytearray(min(count, len(from_.incoming)) or 1)
        if from_.is_at_urgent():
            if from_.ended:
                return 0
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        moved = from_.recv_into(room)
        to.content += room[:moved]
        return moved
    assert isinstance(from_, SimulatedPipe)
    assert isinstance(to, Stream)
    moved = to.send(from_.content[:count])
    del from_.content[:moved]
    return moved


def _queued(sock: Stream, request: int, count: array[int]) -> None:
    count[0] = len(sock.incoming) if request == termios.FIONREAD else sock.unacknowledged


def _limit(resource: int) -> tuple[int, int]:
    most = Current.kernel.descriptors_max
    return most, most


class _Random:
    """Stands in for the module `random`, with the history's own seed."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Current.kernel.random, name)


def _choices(*population: Any, **weights: Any) -> list[Any]:
    return Current.kernel.random.choices(*population, **weights)


@contextlib.contextmanager
def installed(buffer_bytes: int = BUFFER_BYTES) -> Iterator[None]:
    """Run the data plane on the model. Histories in turn each set `Current.kernel`."""
    selecting = SimpleNamespace(epoll=_epoll, EPOLLIN=select.EPOLLIN)
    limits = SimpleNamespace(getrlimit=_limit, setrlimit=lambda *_: None, RLIMIT_NOFILE=0)
    system = {name: getattr(os, name) for name in ("SPLICE_F_MOVE", "SPLICE_F_NONBLOCK", "O_NONBLOCK", "O_CLOEXEC")}
    with pytest.MonkeyPatch.context() as patch:
        for module in (poller, datagrams):
            patch.setattr(module, "select", selecting)
        for limited in (connections, datagrams):
            patch.setattr(limited, "resource", limits)
        patch.setattr(sockets, "SocketType", _open)
        patch.setattr(attempt, "SocketType", _open_probe)
        patch.setattr(attempt, "stream_socket", _stream_for_probe)
        patch.setattr(sockets, "lowest_ephemeral_port", lambda _period: 1 << 16)
        patch.setattr(copy, "fcntl", SimpleNamespace(ioctl=_queued))
        patch.setattr(copy, "BUFFER_BYTES", buffer_bytes)
        patch.setattr(copy, "_buffer", bytearray(buffer_bytes))
        patch.setattr(copy, "_view", memoryview(copy._buffer))
        patch.setattr(pipe, "os", SimpleNamespace(splice=_splice, **system))
        patch.setattr(pipes, "os", SimpleNamespace(pipe2=_pipe2, close=_close, **system))
        patch.setattr(pipes, "fcntl", SimpleNamespace(fcntl=lambda *_: 0, F_SETPIPE_SZ=0))
        patch.setattr(plane, "KernelTables", SimulatedTables)
        patch.setattr(plane, "raise_descriptor_limit", lambda: None)
        patch.setattr(datagrams, "Batch", SimulatedBatch)
        patch.setattr(datagrams, "local_ports", lambda share: array("H", range(40_000, 40_000 + LOCAL_PORTS)))
        # Strings have another hash in each process.
        patch.setattr(lifetimes, "hash", lambda client: crc32(repr(client).encode()), raising=False)
        patch.setattr("userspace_proxy.dataplane.local_ports.random", _Random())
        patch.setattr("userspace_proxy.dataplane.balancing.random_choice.choices", _choices)
        processes.install(patch)
        yield
