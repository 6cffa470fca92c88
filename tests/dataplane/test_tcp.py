"""TCP through a data plane in this process: real redirect rules, real backends, real packet loss."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.contract.splicing import difference
from tests.dataplane.world import (
    CLIENT_IP6,
    CLIENT_IPS,
    FOREIGN,
    LISTENER,
    NAME,
    NODE_PORT,
    OTHER_LISTENER,
    OTHER_NAME,
    OTHER_PORT,
    OTHER_PORTAL,
    PORTAL,
    PORTAL6,
    TCP_PORT,
    UDP_NAME,
    VANISHING_IPS,
    NamedBackend,
    Plane,
    named_backends,
    other_service_port,
    refusing_endpoint,
    running_plane,
    vanished,
)
from tests.ends import PATIENCE_S, End, open_descriptors, settled, until
from tests.fakes import FakeClock
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.sockets import lowest_ephemeral_port, open_listener, prepare_listener, stream_socket
from userspace_proxy.dataplane.suspects import PROOF_S, RESETS_MAX
from userspace_proxy.dataplane.tcp import ACCEPTS_A_TURN
from userspace_proxy.model.access_record import UNANSWERED
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import SourceIP

DEAD_PEER_S = 3.0


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with running_plane() as running:
        yield running


class Listener:
    """A backend that leaves accepted connections to the test."""

    def __init__(self, ip: str = "127.0.0.1", receive_buffer_bytes: int | None = None) -> None:
        self.sock = socket.create_server((ip, 0), family=socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.sock.setblocking(False)
        if receive_buffer_bytes:
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
        self.endpoint = Endpoint(*self.sock.getsockname()[:2])

    async def accept(self) -> End:
        async with asyncio.timeout(PATIENCE_S):
            sock, _ = await asyncio.get_running_loop().sock_accept(self.sock)
        return End(sock)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


async def dial(address: tuple[str, int] = PORTAL, client_ip: str = "") -> End:
    sock = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    try:
        sock.setblocking(False)
        if client_ip:
            sock.bind((client_ip, 0))
        async with asyncio.timeout(PATIENCE_S):
            await asyncio.get_running_loop().sock_connect(sock, address)
    except BaseException:
        sock.close()
        raise
    return End(sock)


async def ask(address: tuple[str, int] = PORTAL, client_ip: str = "") -> str:
    """Connect, read to the end, close: the name of the backend, or ``"reset"``."""
    try:
        end = await dial(address, client_ip)
    except ConnectionResetError:
        return "reset"
    name, how = await end.receive_all()
    end.close()
    return how if how == "reset" else name.decode()


async def all_ended(plane: Plane) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while await plane.connections_open():
            await asyncio.sleep(0.002)


# ---- what is counted of an endpoint


async def test_each_endpoint_has_what_came_to_it(plane: Plane) -> None:
    refusing = refusing_endpoint()
    with named_backends("a", "bb") as (a, b):
        await plane.use(refusing, a.endpoint, b.endpoint)
        assert [await ask() for _ in range(4)] == ["a", "bb", "a", "bb"]
        await all_ended(plane)

        counters = await plane.of_endpoints()

    assert counters[refusing.address] == EndpointCounters(dial_failures=1, ejections=1)
    assert counters[a.endpoint.address] == EndpointCounters(opened=2, bytes_to_clients=2, retries=1)
    assert counters[b.endpoint.address] == EndpointCounters(opened=2, bytes_to_clients=4)
    totals = await plane.counters()
    assert (totals.dial_failures, totals.retries, totals.ejections, totals.bytes_to_clients) == (1, 1, 1, 6)


async def test_bytes_of_a_connection_are_counted_while_it_is_open_and_once(plane: Plane) -> None:
    with Listener() as listener:
        await plane.use(listener.endpoint)
        client = await dial()
        backend = await listener.accept()
        for size in (10, 20):
            await client.send(bytes(size))
            await backend.receive(size)
            await backend.send(bytes(size * 2))
            await client.receive(size * 2)
            await plane.counters()
        counters, of_endpoint = await plane.counters(), (await plane.of_endpoints())[listener.endpoint.address]
        assert (counters.bytes_to_backends, counters.bytes_to_clients) == (30, 60)
        assert (of_endpoint.bytes_to_backends, of_endpoint.bytes_to_clients, of_endpoint.open) == (30, 60, 1)

        await client.send(b"the end")
        client.close()
        await backend.receive_all()
        backend.close()
        await all_ended(plane)
        assert (await plane.of_endpoints())[listener.endpoint.address] == EndpointCounters(
            opened=1, bytes_to_backends=37, bytes_to_clients=60
        )
        assert (await plane.counters()).bytes_to_backends == 37
    assert [(record.bytes_to_backend, record.bytes_to_client) for record in plane.records] == [(37, 60)]


async def test_a_removed_endpoint_is_reported_until_its_last_connection_ends(plane: Plane) -> None:
    with Listener() as old, Listener() as new:
        await plane.use(old.endpoint)
        client = await dial()
        backend = await old.accept()

        await plane.use(new.endpoint)
        told = await plane.of_endpoints()
        assert (told[old.endpoint.address].open, new.endpoint.address in told) == (1, True)
        await plane.use(new.endpoint, old.endpoint)
        assert (await plane.of_endpoints())[old.endpoint.address].opened == 1, "it came back, and counts on"
        await plane.use(new.endpoint)

        client.close()
        backend.close()
        await all_ended(plane)
        assert list(await plane.of_endpoints()) == [new.endpoint.address]


async def test_above_the_maximum_no_endpoint_is_reported(plane: Plane) -> None:
    with named_backends("a", "b") as (a, b):
        await plane.use(a.endpoint, b.endpoint)  # of both service ports
        few, enough = await plane.local.stats(endpoints_max=3), await plane.local.stats(endpoints_max=4)

    assert (few.endpoints, few.hidden_endpoints) == ({}, 4)
    assert ({name: len(told) for name, told in enough.endpoints.items()}, enough.hidden_endpoints) == (
        {NAME: 2, UDP_NAME: 2},
        0,
    )


# ---- endpoints that accept and fail


class ResettingBackend:
    """Accepts each connection and resets it at once, from a thread of its own."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.endpoint = Endpoint(*self._listener.getsockname()[:2])
        self.accepted = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            client.close()

    def __enter__(self) -> ResettingBackend:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)
        self._listener.close()


@pytest.mark.parametrize("source_ip", [SourceIP.NODE, SourceIP.PROXY_PROTOCOL_V1])
async def test_a_client_that_has_not_spoken_never_notices_an_endpoint_that_accepts_and_resets(
    plane: Plane, source_ip: SourceIP
) -> None:
    await plane.tell_sources_by(source_ip)
    with ResettingBackend() as bad, Listener() as good:
        await plane.use(bad.endpoint, good.endpoint)
        client = await dial()
        backend = await good.accept()
        if source_ip is SourceIP.PROXY_PROTOCOL_V1:
            assert (await backend.receive(8)).startswith(b"PROXY")
            backend.receive_now()
        await client.send(b"question")
        assert await backend.receive(8) == b"question"
        client.close()
        backend.close()
        await all_ended(plane)
        counters = await plane.counters()
        of_bad = (await plane.of_endpoints())[bad.endpoint.address]

    assert (counters.failed, counters.unanswered, counters.dial_failures, counters.ejections) == (0, 0, 1, 1)
    assert (of_bad.dial_failures, of_bad.open, counters.open) == (1, 0, 0)
    assert [(record.why, record.endpoint) for record in plane.records] == [("failover", good.endpoint)]


async def test_a_client_is_reset_if_every_endpoint_accepts_and_resets(plane: Plane) -> None:
    with ResettingBackend() as one, ResettingBackend() as two:
        await plane.use(one.endpoint, two.endpoint)
        client = await dial()
        assert await client.receive_all() == (b"", "reset")
        client.close()
        await all_ended(plane)

    assert (one.accepted, two.accepted) == (1, 1)
    assert [record.how for record in plane.records] == ["no endpoint could be reached"]


async def test_a_request_that_an_endpoint_resets_is_never_sent_twice_and_later_ones_are_spared() -> None:
    """The first client has sent its bytes when the reset arrives. The bytes of later ones wait for 100 ms.

    Each trial after an ejection is such a wait, and ends with a reset again.
    """
    clock = FakeClock()
    async with running_plane(now=clock) as plane:
        with ResettingBackend() as bad, named_backends("a") as (good,):
            await plane.use(bad.endpoint, good.endpoint)
            answers = []
            for _ in range(12):
                client = await dial()
                await client.send(b"question")
                answers.append(await client.receive_all())
                client.close()
                clock.now_s += 1
            counters = await plane.counters()

    assert answers.count((b"", "reset")) == 1, "the first"
    assert answers.count((b"a", "eof")) + answers.count((b"a", "reset")) == 11
    assert (counters.unanswered, counters.failed) == (1, 0)
    assert counters.ejections >= 2
    assert [record.how for record in plane.records if record.endpoint == bad.endpoint] == [UNANSWERED]


async def ask_and_reset(bad: Listener) -> None:
    client = await dial()
    backend = await bad.accept()
    await client.send(b"question")
    await backend.receive(8)
    backend.reset()
    assert await client.receive_all() == (b"", "reset")
    client.close()


async def assert_is_suspect(listener: Listener) -> None:
    """Fail unless the next connection gets to *listener* without a byte until it has proved itself."""
    began = time.monotonic()
    client = await dial()
    await client.send(b"question")
    backend = await listener.accept()
    assert await backend.receive(8) == b"question"
    assert time.monotonic() - began > PROOF_S * 0.9
    client.close()
    backend.close()


async def test_a_suspect_gets_no_byte_before_it_has_proved_itself(plane: Plane) -> None:
    with Listener() as listener:
        await plane.use(listener.endpoint)
        await ask_and_reset(listener)
        await assert_is_suspect(listener)


async def test_an_older_connection_does_not_clear_a_suspect(plane: Plane) -> None:
    with Listener() as listener:
        await plane.use(listener.endpoint)
        older = await dial()
        its_backend = await listener.accept()
        await its_backend.send(b"welcome")
        assert await older.receive(7) == b"welcome"
        await ask_and_reset(listener)
        its_backend.reset()
        assert await older.receive_all() == (b"", "reset")
        older.close()
        await assert_is_suspect(listener)


async def test_an_endpoint_that_resets_late_is_ejected_after_three_connections_in_a_row(plane: Plane) -> None:
    with Listener() as bad, named_backends("a") as (good,):
        await plane.use(bad.endpoint, good.endpoint)
        for count in (1, 2):
            await ask_and_reset(bad)
            assert (await plane.counters()).ejections == 0, count
            assert await ask() == "a"
        client = await dial()
        backend = await bad.accept()
        await backend.send(b"welcome")
        assert await client.receive(7) == b"welcome"
        backend.reset()
        assert await client.receive_all() == (b"", "reset")
        client.close()
        assert await ask() == "a"
        for count in range(1, RESETS_MAX + 1):
            await ask_and_reset(bad)
            assert (await plane.counters()).ejections == (count == RESETS_MAX)
            assert await ask() == "a"


async def test_a_backend_that_accepts_and_closes_has_answered_with_nothing(plane: Plane) -> None:
    with named_backends("", "a") as (empty, other):
        await plane.use(empty.endpoint, other.endpoint)
        assert [await ask() for _ in range(4)] == ["", "a", "", "a"]
        assert (await plane.counters()).dial_failures == 0


# ---- who speaks first


async def test_a_backend_that_speaks_first_is_not_kept_waiting(plane: Plane) -> None:
    """The last ACK of its handshake is held back for the client's first bytes; here there are none.

    A kernel that held it until its own timer would let each of these wait 40 ms or more.
    """
    with named_backends("a") as (a,):
        await plane.use(a.endpoint)
        waited_s = []
        for _ in range(9):
            started_at = time.monotonic()
            assert await ask() == "a"
            waited_s.append(time.monotonic() - started_at)

    assert sorted(waited_s)[4] < 0.03, waited_s


async def test_a_backend_that_answers_in_two_parts_is_not_kept_waiting(plane: Plane) -> None:
    """Nagle's algorithm sends the second part when the first is acknowledged: 40 ms later, if ACKs are delayed."""
    with Listener() as backend:
        await plane.use(backend.endpoint)
        waited_s = []
        for _ in range(9):
            client = await dial()
            await client.send(b"?")
            server = await backend.accept()
            assert await server.receive(1) == b"?"
            started_at = time.monotonic()
            await server.send(b"head")
            await server.send(b"body")
            assert await client.receive(8) == b"headbody"
            waited_s.append(time.monotonic() - started_at)
            client.close()
            server.close()
        await all_ended(plane)

    assert min(waited_s) < 0.03, waited_s


@pytest.mark.parametrize("first", [b"?", b"x" * 70_000])
async def test_a_client_that_asks_in_two_parts_is_not_kept_waiting(plane: Plane, first: bytes) -> None:
    """With Nagle's algorithm, the second part would wait for the ACK of the first, which the backend delays."""
    with Listener() as backend:
        await plane.use(backend.endpoint)
        waited_s = []
        for _ in range(9):
            client = await dial()
            await client.send(b"!")
            server = await backend.accept()
            assert await server.receive(1) == b"!"
            server.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
            started_at = time.monotonic()
            for part in (first, b".", b"."):
                await client.send(part)
                assert await server.receive(len(part)) == part
            waited_s.append(time.monotonic() - started_at)
            client.close()
            server.close()
        await all_ended(plane)

    assert min(waited_s) < 0.03, waited_s


def segments_received(end: End) -> int:
    """Return how many TCP segments have arrived at *end*: tcpi_segs_in of struct tcp_info (linux/tcp.h)."""
    return int(struct.unpack_from("I", end.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 144), 140)[0])


async def test_the_last_bytes_before_a_half_close_are_not_held_back(plane: Plane) -> None:
    """They leave in the same packet as the FIN, without waiting for more bytes."""
    with Listener() as backend:
        await plane.use(backend.endpoint)
        client = await dial()
        server = await backend.accept()
        for _ in range(3):
            await client.send(b"x" * 1000)
        assert await server.receive(3000) == b"x" * 3000
        before = segments_received(server)
        client.send_now(b"last")
        client.half_close()

        assert await server.receive_all() == (b"last", "eof")
        assert segments_received(server) == before + 1

        await server.send(b"y" * 70_000)
        server.half_close()
        assert await client.receive_all() == (b"y" * 70_000, "eof")
        client.close()
        server.close()
        await all_ended(plane)


@pytest.mark.parametrize("speaker", ["client", "backend"])
async def test_urgent_bytes_arrive_in_their_place(plane: Plane, speaker: str) -> None:
    """Also the first that a peer sends: a socket that wants them inline too late has dropped it."""
    bulk = b"x" * 400_000
    with Listener() as listener:
        await plane.use(listener.endpoint)
        for _ in range(6):
            client = await dial()
            backend = await listener.accept()
            sender, receiver = (client, backend) if speaker == "client" else (backend, client)
            sender.sock.send(b"1", socket.MSG_OOB)
            receiving = asyncio.ensure_future(receiver.receive_all())
            await sender.send(bulk)
            sender.sock.setblocking(True)
            await asyncio.to_thread(sender.sock.send, b"2", socket.MSG_OOB)
            sender.sock.setblocking(False)
            await sender.send(bulk)
            sender.half_close()

            received, how = await receiving
            assert (difference(received, b"1" + bulk + b"2" + bulk), how) == ("", "eof")
            client.close()
            backend.close()


# ---- the way in


@pytest.mark.parametrize(
    ("portal", "recorded_ip"),
    [
        (PORTAL, PORTAL[0]),
        (PORTAL6, PORTAL6[0]),
        (("127.0.0.1", NODE_PORT), "0.0.0.0"),
        ((CLIENT_IPS[0], NODE_PORT), "0.0.0.0"),
        ((CLIENT_IP6, NODE_PORT), "::"),
    ],
)
async def test_every_portal_leads_to_the_endpoint_and_the_record_names_it(
    plane: Plane, portal: tuple[str, int], recorded_ip: str
) -> None:
    with contextlib.closing(NamedBackend("a", ("::1" if ":" in portal[0] else "127.0.0.1", 0))) as a:
        await plane.use(a.endpoint)

        assert await ask(portal) == "a"

        await all_ended(plane)
        (record,) = plane.records
        assert record.portal is not None
        assert (record.portal.ip, record.portal.port) == (recorded_ip, portal[1])
        assert (record.endpoint, record.why, record.how) == (a.endpoint, "round robin", "closed")
        assert (record.bytes_to_backend, record.bytes_to_client) == (0, 1)
    counters = await plane.counters()
    assert (counters.accepted, counters.open, counters.bytes_to_clients) == (1, 0, 1)


async def test_a_client_at_the_proxy_port_by_a_foreign_nat_rule_is_reset(plane: Plane) -> None:
    with named_backends("a") as (a,):
        await plane.use(a.endpoint)

        assert await ask(FOREIGN) == "reset"
    assert (await plane.counters()).refused == 1
    assert await plane.connections_open() == 0


async def test_clients_meet_endpoints_of_their_own_family(plane: Plane) -> None:
    with named_backends("4") as (four,), contextlib.closing(NamedBackend("6", ("::1", 0))) as six:
        await plane.use(four.endpoint, six.endpoint)
        assert [await ask(portal) for portal in (PORTAL, PORTAL6) * 3] == ["4", "6"] * 3

        await plane.use(four.endpoint)
        assert [await ask(portal) for portal in (PORTAL, PORTAL6)] == ["4", "reset"]


# ---- failover


async def test_a_refused_dial_goes_elsewhere_within_the_same_attempt(plane: Plane) -> None:
    with named_backends("a", "b") as (a, b):
        await plane.use(a.endpoint, refusing_endpoint(), b.endpoint)

        assert [await ask() for _ in range(6)] == ["a", "b", "a", "b", "a", "b"]

    counters = await plane.counters()
    assert (counters.dial_failures, counters.retries, counters.ejections, counters.failed) == (1, 1, 1, 0)


async def test_an_endpoint_whose_packets_vanish_costs_a_quarter_second_once(plane: Plane) -> None:
    with named_backends("a") as (a,), vanished(VANISHING_IPS[0]):
        await plane.use(Endpoint(VANISHING_IPS[0], 80), a.endpoint)
        began = time.monotonic()
        assert await ask() == "a"
        assert 0.25 <= time.monotonic() - began < 2
        dialled = (await plane.counters()).dial_failures

        assert [await ask() for _ in range(5)] == ["a"] * 5

    counters = await plane.counters()
    assert (counters.dial_failures, counters.ejections) == (dialled, 1)


async def test_no_client_fails_while_six_adjacent_endpoints_are_silent_and_two_answer(plane: Plane) -> None:
    silent = [Endpoint(VANISHING_IPS[0], 80 + n) for n in range(6)]
    with named_backends("a", "b") as (a, b), vanished(VANISHING_IPS[0]):
        await plane.use(*silent, a.endpoint, b.endpoint)

        assert set(await asyncio.gather(*(ask() for _ in range(8)))) == {"a", "b"}
        assert {await ask() for _ in range(4)} == {"a", "b"}

    assert (await plane.counters()).failed == 0


async def test_without_endpoints_a_client_is_reset(plane: Plane) -> None:
    assert await ask() == "reset"
    await all_ended(plane)
    assert [(r.endpoint, r.how) for r in plane.records] == [(None, "no endpoint")]


async def test_when_all_endpoints_refuse_a_client_is_reset(plane: Plane) -> None:
    await plane.use(refusing_endpoint(), refusing_endpoint())

    assert await ask() == "reset"
    assert (await plane.counters()).failed == 1


async def test_no_byte_of_the_client_is_read_before_a_backend_is_connected(plane: Plane) -> None:
    data = os.urandom(30_000)
    with Listener() as live, vanished(VANISHING_IPS[0]):
        await plane.use(Endpoint(VANISHING_IPS[0], 80), live.endpoint)
        client = await dial()
        await client.send(data)
        client.half_close()
        await until(lambda: not client.unacknowledged_bytes, "all has reached the proxy's kernel")
        # One more than the bytes: the half-close waits unread, too.
        assert unread_bytes(client.sock) in (len(data), len(data) + 1)

        backend = await live.accept()
        assert await backend.receive_all() == (data, "eof")
        for end in (backend, client):
            end.close()


def unread_bytes(client: socket.socket) -> int:
    """Return the number of bytes of *client* that the proxy has not read yet."""
    port = f":{client.getsockname()[1]:04X}"
    for line in Path("/proc/net/tcp6").read_text().splitlines()[1:]:
        _, local, remote, _, queues, *_ = line.split()
        if local.endswith(f":{TCP_PORT:04X}") and remote.endswith(port):
            return int(queues.split(":")[1], 16)
    raise AssertionError("the proxy has no socket for this client")


async def test_a_connection_that_would_meet_itself_is_refused(plane: Plane) -> None:
    """A dial to a free local port may be given this very port as its source: it is then its own peer."""
    endpoint = refusing_endpoint()
    with named_backends("a") as (a,), socket.socket() as client:
        client.bind(("", 0))
        client.setblocking(False)
        await plane.use(endpoint, a.endpoint)
        with local_ports(endpoint.port, endpoint.port):
            async with asyncio.timeout(PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(client, PORTAL)
            assert await End(client).receive_all() == (b"a", "eof")
    assert (await plane.counters()).ejections == 1


def test_a_change_of_the_ports_that_the_kernel_chooses_is_noticed_in_the_next_period() -> None:
    with local_ports(40_000, 40_001):
        assert lowest_ephemeral_port(1) == 40_000
        Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("20000 40001")
        assert lowest_ephemeral_port(1) == 40_000
        assert lowest_ephemeral_port(2) == 20_000


async def test_a_client_that_resets_while_its_backend_is_dialled_leaves_nothing(plane: Plane) -> None:
    before = open_descriptors()
    with Listener() as live, vanished(VANISHING_IPS[0]):
        await plane.use(Endpoint(VANISHING_IPS[0], 80), live.endpoint)
        client = await dial()
        client.reset()
        backend = await live.accept()
        assert await backend.receive_all() == (b"", "reset")
        backend.close()
    await all_ended(plane)
    await until(lambda: open_descriptors() == before, "all descriptors are closed")


@contextlib.contextmanager
def local_ports(first: int, last: int) -> Iterator[None]:
    """Connections of this host get no other source port."""
    knob = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = knob.read_text()
    knob.write_text(f"{first} {last}")
    lowest_ephemeral_port.cache_clear()
    try:
        yield
    finally:
        knob.write_text(before)
        lowest_ephemeral_port.cache_clear()


async def test_when_all_local_ports_towards_an_endpoint_are_in_use_another_takes_over_and_none_is_ejected(
    plane: Plane,
) -> None:
    with Listener() as full, Listener() as free, local_ports(20_000, 20_001):
        await plane.use(full.endpoint)
        clients = [await dial() for _ in range(2)]
        backends = [await full.accept() for _ in clients]
        # By other portals: to this one the client, too, has no port left.
        assert await ask(("127.0.0.1", NODE_PORT)) == "reset"

        await plane.use(full.endpoint, free.endpoint)
        clients.append(await dial((CLIENT_IPS[0], NODE_PORT)))
        backends.append(await free.accept())

        counters = await plane.counters()
        assert (counters.port_exhaustions, counters.failed, counters.ejections) == (2, 1, 0)
        for client in clients:
            client.reset()  # which leaves no port in TIME_WAIT
        await all_ended(plane)
        for backend in backends:
            backend.close()


# ---- endpoints and affinity


async def test_open_connections_stay_when_endpoints_change(plane: Plane) -> None:
    with Listener() as old, Listener() as new:
        await plane.use(old.endpoint)
        client = await dial()
        backend = await old.accept()

        await plane.use(new.endpoint)

        await client.send(b"still here")
        assert await backend.receive(10) == b"still here"
        other_client = await dial()
        other_backend = await new.accept()
        for end in (client, backend, other_client, other_backend):
            end.close()


async def test_a_client_ip_keeps_its_endpoint_with_affinity() -> None:
    with named_backends("a", "b", "c") as backends:
        async with running_plane(affinity_timeout_s=10) as plane:
            await plane.use(*(backend.endpoint for backend in backends))
            rounds = [[await ask(client_ip=client_ip) for client_ip in CLIENT_IPS] for _ in range(3)]

    assert rounds == [["a", "b", "c"]] * 3


async def test_a_client_whose_endpoint_refuses_is_pinned_to_another() -> None:
    with named_backends("b", "c") as (b, c):
        async with running_plane(affinity_timeout_s=10) as plane:
            await plane.use(refusing_endpoint(), b.endpoint, c.endpoint)

            assert [await ask() for _ in range(4)] == ["b"] * 4


# ---- limits


async def test_a_half_closed_connection_ends_after_its_time_and_a_whole_one_does_not() -> None:
    with Listener() as listener:
        async with running_plane(Limits(half_closed_timeout_s=0.3)) as plane:
            await plane.use(listener.endpoint)
            half, half_backend = await dial(), await listener.accept()
            whole, whole_backend = await dial(), await listener.accept()
            half.half_close()
            assert await half_backend.receive_all() == (b"", "eof")

            assert await half.receive_all() == (b"", "reset")
            await whole.send(b"alive")
            assert await whole_backend.receive(5) == b"alive"
            assert [record.how for record in plane.records] == ["half-closed for too long"]
            for end in (half, half_backend, whole, whole_backend):
                end.close()


async def test_an_idle_connection_ends_after_its_time_and_a_busy_one_does_not() -> None:
    with Listener() as listener:
        async with running_plane(Limits(idle_timeout_s=0.6)) as plane:
            await plane.use(listener.endpoint)
            idle, idle_backend = await dial(), await listener.accept()
            busy, busy_backend = await dial(), await listener.accept()
            ending = asyncio.ensure_future(idle.receive_all())
            began = time.monotonic()
            while not ending.done():
                await busy.send(b"x")
                assert await busy_backend.receive(1) == b"x"
                await asyncio.sleep(0.02)

            assert 0.6 <= time.monotonic() - began < 1.5
            assert await ending == (b"", "reset")
            assert [record.how for record in plane.records] == ["idle"]
            for end in (idle, idle_backend, busy, busy_backend):
                end.close()


async def test_a_dead_peer_ends_its_connection_in_time_while_a_stalled_reader_lives_on() -> None:
    """Dead: one backend has unacknowledged bytes, one is idle, one had closed its window. Stalled: acknowledges all."""
    sent = b"x" * 3_000_000

    with (
        Listener(VANISHING_IPS[0]) as in_flight,
        Listener(VANISHING_IPS[1]) as idle,
        Listener(VANISHING_IPS[2], 4096) as closed_window,
        Listener(receive_buffer_bytes=4096) as stalled,
    ):
        async with running_plane(Limits(dead_peer_timeout_s=DEAD_PEER_S)) as plane:
            ends: dict[str, tuple[End, End]] = {}
            for listener in (in_flight, idle, closed_window, stalled):
                await plane.use(listener.endpoint)
                ends[str(listener.endpoint)] = (await dial(), await listener.accept())
            reader_client, reader = ends[str(stalled.endpoint)]
            reader_sent = await fill(reader_client, sent)
            await fill(ends[str(closed_window.endpoint)][0], sent)

            with vanished(*VANISHING_IPS):
                began = time.monotonic()
                await ends[str(in_flight.endpoint)][0].send(b"into the void")
                dead = [in_flight, idle, closed_window]
                await asyncio.gather(*(broken(ends[str(listener.endpoint)][0]) for listener in dead))
                assert time.monotonic() - began < DEAD_PEER_S + 1
                # The stalled one must outlive the limit by far.
                await asyncio.sleep(max(0.0, 1.5 * DEAD_PEER_S - (time.monotonic() - began)))

            assert await plane.connections_open() == 1
            assert len(await reader.receive(reader_sent)) == reader_sent
            assert {record.how for record in plane.records} == {"backend is dead"}
            for pair in ends.values():
                for end in pair:
                    end.close()


@pytest.mark.parametrize("timeout_s", [300.0, 60.0, 30.0, 6.0])
def test_an_idle_peer_is_given_up_in_time_and_not_before_five_sixths_of_it(timeout_s: float) -> None:
    with open_listener(L4Protocol.TCP, 0, 30.0) as listener:
        prepare_listener(listener, timeout_s)  # as a process does that takes the listener over

        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle_s, probe_s, probes = (
            listener.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert (idle_s + probes * probe_s, probes * probe_s) == (timeout_s, timeout_s * 5 / 6)


def test_a_listener_of_another_process_keeps_no_keepalive_that_this_one_does_not_want() -> None:
    with open_listener(L4Protocol.TCP, 0, 30.0) as listener:
        prepare_listener(listener, 0.0)

        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


def test_a_limit_longer_than_the_kernel_can_watch_an_idle_peer_is_no_reason_to_have_no_listener() -> None:
    with open_listener(L4Protocol.TCP, 0, 7 * 86_400.0) as listener:
        options = socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL
        assert [listener.getsockopt(socket.IPPROTO_TCP, option) for option in options] == [32_767, 32_767]


async def test_the_peer_of_a_later_backend_is_watched_as_that_of_the_first_one() -> None:
    """A client that has not spoken is connected to another backend when the first one resets, however late."""
    with Listener() as first, Listener() as second:
        async with running_plane(Limits(dead_peer_timeout_s=DEAD_PEER_S)) as plane:
            await plane.use(first.endpoint)
            client = await dial()
            backend = await first.accept()
            (connection,) = plane.local._context.connections

            def is_watched() -> bool:
                splice = connection.splice
                return splice is not None and bool(splice.sockets[1].getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))

            await until(is_watched, "the first backend is watched")
            await plane.use(second.endpoint)
            backend.reset()
            backend = await second.accept()
            await until(is_watched, "the second backend is watched")
            client.close()
            backend.close()
            await all_ended(plane)


async def fill(writer: End, data: bytes) -> int:
    """Send until the kernel accepts no more; return the number of bytes."""
    taken = 0

    def push() -> int:
        nonlocal taken
        taken += writer.send_now(data[taken:])
        return taken

    return await settled(push)


async def broken(end: End) -> None:
    _, how = await end.receive_all()
    assert how == "reset"


async def test_the_limit_of_connections_for_each_client_does_not_affect_other_clients() -> None:
    with Listener() as listener:
        async with running_plane(Limits(connections_per_client=2)) as plane:
            await plane.local.open([ListenerSpec(other_service_port(), OTHER_PORT)])
            await plane.use(listener.endpoint)
            await plane.local.update({OTHER_LISTENER: Backends((listener.endpoint,), (listener.endpoint,))})
            first, second = await dial(client_ip=CLIENT_IPS[0]), await dial(OTHER_PORTAL, CLIENT_IPS[0])
            backends = [await listener.accept() for _ in range(2)]

            assert await ask(client_ip=CLIENT_IPS[0]) == "reset"
            other = await dial(client_ip=CLIENT_IPS[1])
            backends.append(await listener.accept())

            counters = await plane.counters()
            assert (counters.limited, counters.accepted, counters.refused) == (1, 2, 0)
            for end in (first, second, *backends[:2]):
                end.close()
            while await plane.connections_open() > 1:
                await asyncio.sleep(0.002)
            again = await dial(client_ip=CLIENT_IPS[0])
            backends.append(await listener.accept())
            for end in (again, other, *backends[2:]):
                end.close()


async def test_a_flood_on_one_listener_keeps_no_other_from_accepting(plane: Plane) -> None:
    with Listener() as listener:
        await plane.local.open([ListenerSpec(other_service_port(), OTHER_PORT)])
        await plane.use(listener.endpoint)
        await plane.local.update({OTHER_LISTENER: Backends((listener.endpoint,), (listener.endpoint,))})
        # The loop does not run meanwhile.
        flood = [socket.create_connection(PORTAL) for _ in range(10 * ACCEPTS_A_TURN)]
        late = socket.create_connection(OTHER_PORTAL)

        async with asyncio.timeout(PATIENCE_S):
            while not (await plane.counters(OTHER_NAME)).accepted:
                await asyncio.sleep(0)

        assert (await plane.counters()).accepted <= 2 * ACCEPTS_A_TURN
        for sock in (*flood, late):
            sock.close()


async def test_both_sides_use_the_congestion_control_that_is_asked_for() -> None:
    with Listener() as backend, open_listener(L4Protocol.TCP, 0, 0, congestion_control="reno") as listener:
        client = socket.create_connection(("127.0.0.1", listener.getsockname()[1]))
        await asyncio.sleep(0)
        accepted, _ = listener.accept()
        to_backend = stream_socket((backend.endpoint.ip, backend.endpoint.port), "reno")

        for sock in (accepted, to_backend):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0") == b"reno"
            sock.close()
        client.close()


# ---- ending


async def test_a_drain_ends_as_soon_as_the_last_connection_does() -> None:
    with Listener() as listener:
        async with running_plane() as plane:
            await plane.use(listener.endpoint)
            client, backend = await dial(), await listener.accept()
            began = time.monotonic()
            closing = asyncio.ensure_future(plane.local.close(10))
            await client.send(b"last words")
            assert await backend.receive(10) == b"last words"
            client.close()
            backend.close()
            await closing

            assert time.monotonic() - began < 2
            assert [record.how for record in plane.records] == ["closed"]


async def test_what_is_left_after_the_drain_is_cut_dialling_or_connected() -> None:
    before = open_descriptors()
    with Listener() as listener, vanished(VANISHING_IPS[0]):
        async with running_plane() as plane:
            await plane.use(listener.endpoint)
            connected, backend = await dial(), await listener.accept()
            await plane.use(Endpoint(VANISHING_IPS[0], 80))
            dialling = await dial()
            await until(lambda: plane.local is not None and len(plane.records) == 0, "nothing has ended")
            while await plane.connections_open() < 2:
                await asyncio.sleep(0.002)

            await plane.local.close(0.05)

            for end in (connected, backend, dialling):
                assert await end.receive_all() == (b"", "reset")
                end.close()
            assert [record.how for record in plane.records] == ["cut: the proxy stops"] * 2
    assert open_descriptors() <= before


async def test_clients_that_wait_to_be_accepted_are_served_though_the_listener_is_retired(plane: Plane) -> None:
    with named_backends("a") as (a,):
        await plane.use(a.endpoint)
        clients = ACCEPTS_A_TURN + 5
        waiting = [socket.create_connection(PORTAL) for _ in range(clients)]  # the loop does not run meanwhile

        await plane.local.retire([LISTENER])

        ends = [End(sock) for sock in waiting]
        assert [await end.receive_all() for end in ends] == [(b"a", "eof")] * clients
        for end in ends:
            end.close()


# ---- descriptors and memory


async def test_without_descriptors_accepting_pauses_and_all_clients_are_served_later() -> None:
    """In a process of its own with 64 descriptors, while 60 clients want two each."""
    with named_backends("a") as (a,):
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.dataplane.small_plane", a.endpoint.ip, str(a.endpoint.port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        with process:
            assert process.stdout.readline() == "ready\n"
            loop = asyncio.get_running_loop()
            clients = [await dial() for _ in range(60)]
            names = []
            for client in clients:
                async with asyncio.timeout(PATIENCE_S):
                    names.append(await loop.sock_recv(client.sock, 10))
                client.close()

            process.stdin.close()
            paused, shortages = (int(word) for word in process.stdout.readline().split())
        assert names == [b"a"] * 60
        assert paused >= 1
        assert shortages >= paused
        assert process.returncode == 0


async def test_a_loop_takes_its_share_of_descriptors_and_unwinds_when_its_client_has_gone() -> None:
    """An endpoint on another host leads back to its own Service: each connection there makes one more here."""
    hops = 0

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
        writer.write_eof()

    async def lead_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal hops
        hops += 1
        with contextlib.suppress(OSError):
            onward, to_portal = await asyncio.open_connection(*PORTAL)
            try:
                await asyncio.gather(pass_on(reader, to_portal), pass_on(onward, writer))
            finally:
                to_portal.transport.abort()
        writer.transport.abort()
        hops -= 1

    other_host = await asyncio.start_server(lead_back, "127.0.0.1", 0)
    with named_backends("a") as (a,):
        address = [str(part) for part in other_host.sockets[0].getsockname()]
        command = [sys.executable, "-m", "tests.dataplane.small_plane", *address, a.endpoint.ip, str(a.endpoint.port)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            client = await dial()
            await until(lambda: hops > 10, "the loop has grown")
            assert [await ask(OTHER_PORTAL) for _ in range(5)] == ["a"] * 5

            client.close()

            await until(lambda: hops == 0, "the loop has gone", PATIENCE_S)
            assert await ask(OTHER_PORTAL) == "a"
            process.stdin.close()
            process.wait(PATIENCE_S)
    other_host.close()


async def churn(count: int, at_once: int = 16) -> None:
    left = iter(range(count))

    async def client() -> None:
        for _ in left:
            assert await ask() in ("a", "b")

    await asyncio.gather(*(client() for _ in range(at_once)))


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize(
    "connections", [3_000, pytest.param(100_000, marks=[pytest.mark.soak, pytest.mark.timeout(900)])]
)
async def test_descriptors_and_memory_are_flat_after_thousands_of_connections(plane: Plane, connections: int) -> None:
    with named_backends("a", "b") as (a, b):
        await plane.use(a.endpoint, b.endpoint, refusing_endpoint())
        await churn(500)
        await all_ended(plane)
        plane.records.clear()
        descriptors, memory = await settled(open_descriptors), resident_bytes()

        for _ in range(connections // 1000):
            await churn(1000)
            await all_ended(plane)
            plane.records.clear()

        await until(lambda: open_descriptors() == descriptors, "all descriptors are closed")
        assert resident_bytes() - memory < 4_000_000
        counters = await plane.counters()
        assert (counters.open, counters.accepted, counters.failed) == (0, 500 + connections, 0)
        assert counters.bytes_to_clients == 500 + connections
