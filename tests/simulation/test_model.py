"""The model keeps every promise of the splice engines' contract, as real sockets do."""

from __future__ import annotations

import socket
from array import array
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from tests import ends
from tests.contract import splicing, test_splicer
from tests.contract.test_splicer import *  # noqa: F403 - every test of the contract, with its fixture
from tests.simulation.install import installed
from tests.simulation.kernel import Current, Stream

_ROOM_BYTES = 1 << 18


def _pair(buffer_bytes: int | None = None, family: int = socket.AF_INET) -> tuple[Stream, Stream]:
    """Return two connected sockets of the model, as `tcp_pair` does with real ones."""
    near, far = (Stream(Current.kernel, family, local=True) for _ in range(2))
    near.join(far)
    for sock in (near, far):
        sock.connected = True
        sock.send_room = sock.receive_room = 2 * buffer_bytes if buffer_bytes else _ROOM_BYTES
    return near, far


def _faulty(fileno: Stream) -> Stream:
    def recv_into(*_: object) -> int:
        raise MemoryError

    fileno.recv_into = recv_into  # type: ignore[method-assign, assignment]
    return fileno


def _interrupted(fileno: Stream) -> Stream:
    fileno.pending_signals = 1
    return fileno


def _unacknowledged(sock: Stream, request: int, count: array[int]) -> None:
    count[0] = sock.unacknowledged


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the contract's helpers make sockets of the model, and wait on its clock."""
    for module in (splicing, test_splicer):
        monkeypatch.setattr(module, "tcp_pair", _pair)
    monkeypatch.setattr(test_splicer, "open_descriptors", lambda: len(Current.kernel.descriptors))
    monkeypatch.setattr(test_splicer, "FaultySocket", _faulty)
    monkeypatch.setattr(test_splicer, "InterruptedSocket", _interrupted)
    monkeypatch.setattr(ends, "fcntl", SimpleNamespace(ioctl=_unacknowledged))
    monkeypatch.setattr(ends, "time", SimpleNamespace(monotonic=lambda: Current.kernel.now))
    with installed(buffer_bytes=1 << 16):
        yield
