"""Batches of datagrams: the dialled address, replies from it, and datagrams that the kernel refuses."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator

import pytest

from tests.dataplane.world import CLIENT_IP6
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, asked_ip, client_address, flow_record_bytes, reply_record
from userspace_proxy.dataplane.sockets import IP_PKTINFO
from userspace_proxy.lab import ip

SO_PEEK_OFF = 42  # not in the socket module of Python 3.11


@contextlib.contextmanager
def front(family: socket.AddressFamily) -> Iterator[socket.socket]:
    """Open a socket as proxy ports do, also on a host without IPv6."""
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind(("", 0))
        if family == socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        yield sock


@contextlib.contextmanager
def client_of(sock: socket.socket, asked: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_INET6 if ":" in asked else socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.connect((asked, sock.getsockname()[1]))
        yield client


def wait_for(number: int, sock: socket.socket) -> None:
    """Wait until *sock* has *number* datagrams, and take none: on a busy machine they arrive after `send` returns."""
    sock.settimeout(5)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, 0)
    for _ in range(number):
        sock.recv(65_536, socket.MSG_PEEK)
    sock.setsockopt(socket.SOL_SOCKET, SO_PEEK_OFF, -1)
    sock.setblocking(False)


@pytest.mark.parametrize(
    ("family", "asked"),
    [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET6, "127.0.0.2"), (socket.AF_INET6, "::1")],
)
def test_the_reply_record_leads_to_the_client_from_the_address_it_asked(
    family: socket.AddressFamily, asked: str
) -> None:
    batch = Batch()
    with front(family) as sock, client_of(sock, asked) as client:
        client.send(b"who")
        wait_for(1, sock)
        ((record, length, room),) = batch.receive(sock.fileno())
        assert (client_address(record), bytes(room[:length])) == (client.getsockname()[:2], b"who")

        batch.room[0][:2] = b"me"
        batch.address(0, reply_record(record), 2)
        assert batch.send(sock.fileno(), 1) == 0

        assert client.recv(10) == b"me"


@pytest.fixture
def link_local() -> Iterator[tuple[str, int, int, int]]:
    """An address that is valid at one interface of this host alone."""
    ip("link", "add", "near", "type", "veth", "peer", "far")
    try:
        for name in ("near", "far"):
            ip("link", "set", name, "up")
        ip("address", "add", "fe80::91/64", "dev", "near", "nodad")
        yield "fe80::91", 0, 0, socket.if_nametoindex("near")
    finally:
        ip("link", "del", "near")


def test_a_reply_from_a_link_local_address_leaves_at_its_interface(link_local: tuple[str, int, int, int]) -> None:
    """Also to a client with a global address: some nodes have link-local addresses alone towards their pods."""
    batch = Batch(flow_record_bytes(socket.AF_INET6))
    with front(socket.AF_INET6) as sock, socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as client:
        client.settimeout(5)
        client.bind((CLIENT_IP6, 0))
        client.sendto(b"", (link_local[0], sock.getsockname()[1], *link_local[2:]))
        wait_for(1, sock)
        ((record, _, _),) = batch.receive(sock.fileno())
        assert asked_ip(record) == link_local[0]

        batch.address(0, batch.reply_record(record), 0)
        assert batch.send(sock.fileno(), 1) == 0

        assert client.recvfrom(10)[1][0].partition("%")[0] == link_local[0]


def test_a_client_has_the_same_record_each_time_and_another_has_another() -> None:
    batch = Batch()
    with front(socket.AF_INET6) as sock, client_of(sock, "127.0.0.1") as a, client_of(sock, "127.0.0.1") as b:
        for client in (a, b, a):
            client.send(b"")
        wait_for(3, sock)
        first, second, third = (record for record, _, _ in batch.receive(sock.fileno()))

    assert first == third != second


def test_what_is_more_than_a_batch_waits_for_the_next() -> None:
    batch = Batch()
    with front(socket.AF_INET6) as sock, client_of(sock, "127.0.0.1") as client:
        for number in range(MESSAGES + 1):
            client.send(b"%d" % number)
        wait_for(MESSAGES + 1, sock)
        got = [[bytes(room[:length]) for _, length, room in batch.receive(sock.fileno())] for _ in range(3)]

    assert [len(part) for part in got] == [MESSAGES, 1, 0]
    assert [*got[0], *got[1]] == [b"%d" % number for number in range(MESSAGES + 1)]


@pytest.mark.parametrize("refused", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_a_refused_datagram_is_counted_and_delays_no_other(refused: tuple[int, ...]) -> None:
    batch = Batch()
    with front(socket.AF_INET6) as sock, client_of(sock, "127.0.0.1") as client:
        client.send(b"")
        wait_for(1, sock)
        ((record, _, _),) = batch.receive(sock.fileno())
        to_port_zero = record[:2] + bytes(2) + record[4:]  # EINVAL
        for index in range(3):
            batch.room[index][:1] = b"%d" % index
            batch.address(index, to_port_zero if index in refused else reply_record(record), 1)

        assert batch.send(sock.fileno(), 3) == len(refused)

        wait_for(3 - len(refused), client)
        for index in {0, 1, 2} - set(refused):
            assert client.recv(10) == b"%d" % index
        with pytest.raises(BlockingIOError):
            client.recv(10)
