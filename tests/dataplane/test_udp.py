"""UDP through a data plane in this process: flows, which client gets a reply, and when a flow moves."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Self

import pytest

from tests.dataplane.world import (
    CLIENT_IP6,
    CLIENT_IPS,
    UDP_LISTENER,
    UDP_NAME,
    UDP_PORT,
    VANISHING_IPS,
    Plane,
    forbidden,
    refusing_endpoint,
    running_plane,
    udp_service_port,
)
from tests.ends import open_descriptors, until
from tests.fakes import FakeClock
from userspace_proxy.dataplane.connections import Connections, Limits
from userspace_proxy.dataplane.datagrams import DatagramPoller, Leased
from userspace_proxy.dataplane.dial import DIALS_MAX
from userspace_proxy.dataplane.groups import open_group
from userspace_proxy.dataplane.sockets import open_listener
from userspace_proxy.lab import ip
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.listeners import Backends as PlaneBackends
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName
from userspace_proxy.model.service import Balance

# The idle time-out is not what is tested with it: it only makes the plane look at its flows 60 times a second.
OFTEN = 0.1


class Datagrams:
    """A UDP socket that is waited for."""

    def __init__(self, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)

    async def receive(self) -> tuple[bytes, Address]:
        """Return the next datagram and its sender."""
        got: list[tuple[bytes, Address]] = []

        def try_once() -> bool:
            with contextlib.suppress(BlockingIOError):
                data, sender = self.sock.recvfrom(65_536)
                got.append((data, sender[:2]))
            return bool(got)

        await until(try_once, "a datagram arrives")
        return got[0]

    def nothing(self) -> bool:
        """Return whether nothing has arrived."""
        try:
            self.sock.recv(65_536)
        except BlockingIOError:
            return True
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()


class Backend(Datagrams):
    def __init__(self, ip: str = "127.0.0.1") -> None:
        super().__init__(socket.AF_INET6 if ":" in ip else socket.AF_INET)
        self.sock.bind((ip, 0))
        self.endpoint = Endpoint(*self.sock.getsockname()[:2])

    def answer(self, data: bytes, flow: Address) -> None:
        self.sock.sendto(data, flow)


class Client(Datagrams):
    """Connected to the proxy port, or a portal, at one address, so that answers from any other address are not seen."""

    def __init__(self, asked_ip: str = "127.0.0.1", port: int = UDP_PORT, source: str = "") -> None:
        super().__init__(socket.AF_INET6 if ":" in asked_ip else socket.AF_INET)
        if source:
            self.sock.bind((source, 0))
        self.sock.connect((asked_ip, port))

    def ask(self, data: bytes = b"who") -> None:
        self.sock.send(data)


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with running_plane() as running:
        yield running


@pytest.fixture
def backends() -> Iterator[tuple[Backend, Backend]]:
    with Backend() as a, Backend() as b:
        yield a, b


@pytest.fixture
def clients() -> Iterator[tuple[Client, Client, Client]]:
    with Client() as first, Client() as second, Client() as third:
        yield first, second, third


Backends = tuple[Backend, Backend]
Clients = tuple[Client, Client, Client]


LOCAL_PORT = 10_004
LOCAL = UDP_LISTENER._replace(scope=Scope.LOCAL)


async def open_local(plane: Plane, local: Endpoint, *serving: Endpoint) -> None:
    """Open a second listener, which has *local* alone for new flows."""
    spec = ListenerSpec(udp_service_port(), LOCAL_PORT, Scope.LOCAL)
    assert await plane.local.open([spec]) == {}
    await plane.local.update({LOCAL: PlaneBackends((local,), (local, *serving))})


# ---- flows and answers


async def test_each_client_has_a_flow_to_one_endpoint(plane: Plane, backends: Backends, clients: Clients) -> None:
    a, b = backends
    await plane.use(a.endpoint, b.endpoint)
    seen = []
    for _ in range(3):
        for client, backend in zip(clients, (a, b, a), strict=True):
            client.ask()
            seen.append((backend.endpoint, (await backend.receive())[1]))

    assert seen[:3] == seen[3:6] == seen[6:]
    assert len(set(seen)) == 3
    counters = await plane.counters(UDP_NAME)
    assert (counters.flows, counters.flows_total) == (3, 3)


@pytest.mark.parametrize("asked_ip", ["127.0.0.1", "127.0.0.2", *CLIENT_IPS[:2], "::1", CLIENT_IP6])
async def test_the_answer_comes_from_the_address_that_was_asked(plane: Plane, asked_ip: str) -> None:
    with Backend("::1" if ":" in asked_ip else "127.0.0.1") as backend, Client(asked_ip) as client:
        await plane.use(backend.endpoint)
        client.ask()
        _, flow = await backend.receive()
        backend.answer(b"me", flow)

        assert await client.receive() == (b"me", (asked_ip, UDP_PORT))


async def test_a_client_keeps_its_flow_beside_clients_of_another_family(plane: Plane, backends: Backends) -> None:
    """As with `forward`, which has a listener for each family in one process."""
    a, b = backends
    listeners = {}
    for at in ("127.0.0.1", "::1"):
        name = ListenerName(UDP_NAME._replace(port_name=at))
        sock = open_listener(L4Protocol.UDP, 0, 0, at=at)
        port = sock.getsockname()[1]
        listeners[at] = name, port
        plane.local.serve(ListenerSpec(replace(udp_service_port(), name=name.service_port), port, at=at), sock)
        await plane.local.update({name: PlaneBackends((a.endpoint, b.endpoint), (a.endpoint, b.endpoint))})
    (name4, port4), (_, port6) = listeners.values()
    with Client("127.0.0.1", port4) as client4, Client("::1", port6) as client6:
        client4.ask()
        first = await a.receive()
        client6.ask()
        await a.receive()

        for _ in range(3):
            client4.ask()

        assert [await a.receive() for _ in range(3)] == [first] * 3
    assert plane.local.listeners[name4].counters.flows_total == 1


@contextlib.contextmanager
def side_links() -> Iterator[list[Callable[[bytes], None]]]:
    """Two interfaces of this host; yield a function for each that lets a packet come in there."""
    reverse_path_filter = Path("/proc/sys/net/ipv4/conf/all/rp_filter")
    before = reverse_path_filter.read_text()
    reverse_path_filter.write_text("0")
    with contextlib.ExitStack() as stack:
        stack.callback(reverse_path_filter.write_text, before)
        sends: list[Callable[[bytes], None]] = []
        for number in (1, 2):
            mac = bytes((2, 0, 0, 0, 0, number))
            link = ("link", "add", f"side{number}", "address", mac.hex(":"), "type", "veth", "peer", f"far{number}")
            ip(*link)
            stack.callback(ip, "link", "del", f"side{number}")
            Path(f"/proc/sys/net/ipv4/conf/side{number}/rp_filter").write_text("0")
            for name in (f"side{number}", f"far{number}"):
                ip("link", "set", name, "up")
            far = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_RAW))
            far.bind((f"far{number}", 0))
            sends.append(functools.partial(_send_frame, far, mac))
        yield sends


def _send_frame(far: socket.socket, mac: bytes, packet: bytes) -> None:
    far.send(mac + bytes(6) + b"\x08\x00" + packet)


def udp_packet(client: Address, to: Address, content: bytes) -> bytes:
    """Return an IPv4 packet."""
    udp = struct.pack("!4H", client[1], to[1], 8 + len(content), 0) + content
    header = [0x4500, 20 + len(udp), 0, 0, 64 << 8 | socket.IPPROTO_UDP, 0]
    header += struct.unpack("!4H", socket.inet_aton(client[0]) + socket.inet_aton(to[0]))
    total = sum(header)
    header[5] = ~(total % 0xFFFF) & 0xFFFF
    return struct.pack("!10H", *header) + udp


async def test_a_client_keeps_its_flow_when_its_packets_come_in_at_another_interface(
    plane: Plane, backends: Backends
) -> None:
    """A node with two uplinks: routers send the client's packets along the other one when the first fails."""
    a, b = backends
    await plane.use(a.endpoint, b.endpoint)
    with side_links() as (send_here, send_there):
        for number, send in enumerate((send_here, send_there, send_here)):
            send(udp_packet(("10.91.0.1", 4_000), (CLIENT_IPS[0], UDP_PORT), b"%d" % number))
            assert (await a.receive())[0] == b"%d" % number
    assert (await plane.counters(UDP_NAME)).flows_total == 1


async def test_clients_meet_endpoints_of_their_own_family(plane: Plane) -> None:
    with Backend("::1") as six, Backend() as four, Client() as client, Client("::1") as client6:
        await plane.use(six.endpoint)
        client.ask(b"nobody is there for me")
        counters = await plane.counters(UDP_NAME)
        await until(lambda: counters.datagrams_dropped == 1, "it is dropped")

        await plane.use(six.endpoint, four.endpoint)
        for number in range(3):
            client.ask(b"4 %d" % number)
            client6.ask(b"6 %d" % number)

        assert [(await four.receive())[0] for _ in range(3)] == [b"4 0", b"4 1", b"4 2"]
        assert [(await six.receive())[0] for _ in range(3)] == [b"6 0", b"6 1", b"6 2"]


@pytest.mark.parametrize("size", [0, 1, 1_472, 9_000, 65_507])
async def test_datagrams_of_every_size_pass_whole_both_ways(plane: Plane, size: int) -> None:
    question, answer = os.urandom(size), os.urandom(size)
    with Backend() as backend, Client() as client:
        await plane.use(backend.endpoint)
        client.ask(question)
        received, flow = await backend.receive()
        backend.answer(answer, flow)

        assert received == question
        assert (await client.receive())[0] == answer


async def test_late_and_second_answers_reach_only_the_client_that_sent_the_request(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, _ = backends
    first, second, _ = clients
    await plane.use(a.endpoint)
    first.ask()
    _, flow_of_first = await a.receive()
    a.answer(b"one", flow_of_first)
    second.ask()
    _, flow_of_second = await a.receive()
    a.answer(b"two", flow_of_first)
    a.answer(b"other", flow_of_second)

    assert [(await first.receive())[0] for _ in range(2)] == [b"one", b"two"]
    assert (await second.receive())[0] == b"other"
    assert first.nothing()
    assert second.nothing()


async def test_an_answer_after_its_flow_has_ended_reaches_no_client(backends: Backends, clients: Clients) -> None:
    a, _ = backends
    async with running_plane(Limits(udp_flows_per_service=1)) as plane:
        await plane.use(a.endpoint)
        clients[0].ask()
        _, flow_of_first = await a.receive()
        clients[1].ask()
        _, flow_of_second = await a.receive()

        a.answer(b"late", flow_of_first)
        a.answer(b"in time", flow_of_second)

        assert (await clients[1].receive())[0] == b"in time"
        assert clients[0].nothing()


# ---- local ports


@contextlib.contextmanager
def local_ports(first: int, last: int) -> Iterator[None]:
    """Let planes that are made meanwhile have these local ports alone."""
    file = Path("/proc/sys/net/ipv4/ip_local_port_range")
    before = file.read_text()
    file.write_text(f"{first} {last}")
    try:
        yield
    finally:
        file.write_text(before)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
async def test_a_local_port_is_not_used_again_until_it_has_rested(
    ip: str, clock: FakeClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Though its flow has ended; after that it is the one that has rested for longest."""
    with contextlib.ExitStack() as stack:
        backend = stack.enter_context(Backend(ip))
        clients = [stack.enter_context(Client(ip)) for _ in range(4)]
        stack.enter_context(local_ports(20_000, 20_001))
        async with running_plane(Limits(udp_port_rest_s=30), now=clock) as plane:
            flows = []
            for client in clients[:2]:
                await plane.use(backend.endpoint)
                client.ask()
                flows.append((await backend.receive())[1])
                await plane.use()  # which ends it
                clock.now_s += 10
            await plane.use(backend.endpoint)
            counters = await plane.counters(UDP_NAME)  # live
            clock.now_s += 9
            for _ in range(2):
                clients[2].ask(b"too early")
            await until(lambda: counters.port_exhaustions == 2, "it is counted")
            assert counters.datagrams_dropped == 2
            assert [r.levelname for r in caplog.records if "every local port" in r.message] == ["WARNING"]
            clock.now_s += 1
            clients[2].ask()
            data, flow = await backend.receive()
            assert (data, flow) == (b"who", flows[0])
            clock.now_s += 10
            clients[3].ask()
            assert await backend.receive() == (b"who", flows[1])
            backend.answer(b"yes", flow)
            assert (await clients[2].receive())[0] == b"yes"
            assert all(client.nothing() for client in clients)


async def test_flows_to_different_endpoints_share_local_ports(backends: Backends) -> None:
    """Each is answered from its own, though both ends of a port are sockets of ours."""
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client()) for _ in range(8)]
        stack.enter_context(local_ports(20_000, 20_003))
        async with running_plane() as plane:
            await plane.use(*(backend.endpoint for backend in backends))
            flows = []
            for client, backend in zip(clients, backends * 4, strict=True):
                client.ask()
                flows.append((await backend.receive())[1])
            assert {port for _, port in flows} == set(range(20_000, 20_004))
            for number, (client, backend, flow) in enumerate(zip(clients, backends * 4, flows, strict=True)):
                backend.answer(b"%d" % number, flow)
                assert (await client.receive())[0] == b"%d" % number


@pytest.mark.parametrize("late", [b"too late", b""])
async def test_datagrams_that_arrive_before_a_shared_port_is_connected_are_dropped(
    backends: Backends, monkeypatch: pytest.MonkeyPatch, late: bytes
) -> None:
    """As a late answer to an ended flow may, towards another endpoint, while the socket has no peer yet."""
    a, b = backends
    connect = DatagramPoller.connect

    def connect_late(self: DatagramPoller, leased: Leased, address: Address) -> None:
        b.answer(late, ("127.0.0.1", leased.port))
        connect(self, leased, address)

    monkeypatch.setattr(DatagramPoller, "connect", connect_late)
    async with running_plane() as plane:
        with Client() as client:
            await plane.use(a.endpoint)
            client.ask()
            data, flow = await a.receive()
            a.answer(data, flow)
            assert (await client.receive())[0] == b"who"
            assert client.nothing()


async def test_a_flow_that_was_silent_for_as_long_as_ports_rest_leaves_its_socket(
    backends: Backends, clients: Clients, clock: FakeClock
) -> None:
    """To the next client, where no port is free; and not if it has an answer that was not read yet."""
    a, _ = backends
    with local_ports(20_000, 20_000):
        async with running_plane(Limits(udp_port_rest_s=2), now=clock) as plane:
            await plane.use(a.endpoint)
            clients[0].ask()
            _, flow = await a.receive()
            descriptors = open_descriptors()
            clock.now_s += 2
            clients[1].ask()
            assert (await a.receive())[1] == flow
            assert open_descriptors() == descriptors
            clock.now_s += 1
            a.answer(b"for the second", flow)
            assert (await clients[1].receive())[0] == b"for the second"
            clock.now_s += 1.9
            clients[2].ask()
            counters = await plane.counters(UDP_NAME)
            await until(lambda: counters.datagrams_dropped == 1, "it finds no port")
            assert (counters.flows, counters.flows_evicted, counters.port_exhaustions) == (1, 1, 1)
    assert clients[0].nothing()


async def test_a_client_with_many_flows_loses_only_flows_of_its_own(backends: Backends) -> None:
    a, _ = backends
    async with running_plane(Limits(udp_flows_per_service=8)) as plane:
        await plane.use(a.endpoint)
        with Client(source=CLIENT_IPS[0]) as quiet, contextlib.ExitStack() as stack:
            quiet.ask()
            _, flow = await a.receive()
            for _ in range(30):
                stack.enter_context(Client(source=CLIENT_IPS[1])).ask()
                await a.receive()
            a.answer(b"still there", flow)
            assert (await quiet.receive())[0] == b"still there"
            quiet.ask()
            assert (await a.receive())[1] == flow
            for _ in range(3):  # and those who have less than their share are served at its cost
                with Client(source=CLIENT_IPS[2]) as another:
                    another.ask()
                    await a.receive()
            quiet.ask()
            assert (await a.receive())[1] == flow
        counters = await plane.counters(UDP_NAME)
        assert (counters.flows, counters.flows_evicted) == (8, 26)


async def test_another_process_uses_no_port_that_has_not_rested(backends: Backends) -> None:
    """Whether the one before has ended or not: conntrack remembers its flows."""
    a, _ = backends
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(Client(port=UDP_PORT)) for _ in range(5)]
        stack.enter_context(local_ports(20_000, 20_003))
        used = []
        async with running_plane() as plane:
            await plane.use(a.endpoint)
            for client in clients[:2]:
                client.ask()
                used.append((await a.receive())[1])
        async with running_plane() as plane:
            await plane.use(a.endpoint)
            for client in clients[2:4]:
                client.ask()
                used.append((await a.receive())[1])
            clients[4].ask()
            counters = await plane.counters(UDP_NAME)
            await until(lambda: counters.port_exhaustions == 1, "all four are in use or rest")
        assert len(set(used)) == 4


async def test_a_proxy_port_that_is_taken_over_is_read_once_the_process_before_has_made_way(
    backends: Backends, clients: Clients
) -> None:
    """Both would choose local ports, and neither would know which the other has chosen just now."""
    a, _ = backends
    async with running_plane() as plane:
        spec = next(spec for spec in plane.specs if spec.name.protocol is L4Protocol.UDP)
        await plane.local.retire([spec.name])
        (sock,) = open_group(L4Protocol.UDP, UDP_PORT, 1, Limits())
        plane.local.serve(spec, sock, PlaneBackends((a.endpoint,), (a.endpoint,)), waits=True)
        clients[0].ask()
        for _ in range(10):
            await asyncio.sleep(0)
        assert (await plane.counters(UDP_NAME)).flows == 0

        await plane.local.begin([])

        assert (await a.receive())[0] == b"who"


async def test_a_refusal_of_an_ended_flow_is_not_held_against_the_next(
    backends: Backends, clients: Clients, clock: FakeClock
) -> None:
    a, _ = backends
    async with running_plane(now=clock) as plane:
        await plane.use(refusing_endpoint())
        clients[0].ask()
        await until(lambda: bool(plane.records), "the refusal has come")
        await plane.use(a.endpoint)
        for client in clients[1:]:
            client.ask()
            assert (await a.receive())[0] == b"who"

        assert [record.how for record in plane.records] == ["refused: Connection refused"]
        assert (await plane.counters(UDP_NAME)).dial_failures == 1


async def test_the_socket_of_an_ended_flow_is_closed(backends: Backends, clients: Clients, clock: FakeClock) -> None:
    a, _ = backends
    async with running_plane(Limits(idle_timeout_s=OFTEN), now=clock) as plane:
        await plane.use(a.endpoint)
        for client in clients:
            client.ask()
            await a.receive()
        with_flows = open_descriptors()
        clock.now_s += 30
        await until(lambda: len(plane.records) == 3, "the flows end")
        assert open_descriptors() == with_flows - 3


# ---- how answers travel


async def test_answers_that_come_at_once_all_arrive_in_order(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    """One event stands for many datagrams: those left after one read must be reported again."""
    a, _ = backends
    await plane.use(a.endpoint)
    flows = []
    for client in clients[:2]:
        client.ask()
        flows.append((await a.receive())[1])
    for number in range(100):
        for flow in flows:
            a.answer(b"%d" % number, flow)

    for client in clients[:2]:
        assert [(await client.receive())[0] for _ in range(100)] == [b"%d" % number for number in range(100)]


async def test_many_clients_at_once_each_have_their_own_answer(plane: Plane, backends: Backends) -> None:
    """More than one batch of questions, and of answers."""
    a, _ = backends
    await plane.use(a.endpoint)
    with contextlib.ExitStack() as stack:
        many = [stack.enter_context(Client()) for _ in range(100)]
        for number, client in enumerate(many):
            client.ask(b"%d" % number * 7)
        for data, flow in [await a.receive() for _ in many]:
            a.answer(data + b"!", flow)

        for number, client in enumerate(many):
            assert (await client.receive())[0] == b"%d" % number * 7 + b"!"
            assert client.nothing()


# ---- how many, how long


async def test_the_flow_idle_for_longest_is_evicted(backends: Backends, clients: Clients) -> None:
    a, _ = backends
    async with running_plane(Limits(udp_flows_per_service=2)) as plane:
        await plane.use(a.endpoint)
        flows = []
        for client in clients[:2]:
            client.ask()
            flows.append((await a.receive())[1])
        a.answer(b"so the second is idle for longer", flows[0])
        await clients[0].receive()

        clients[2].ask()
        await a.receive()

        clients[0].ask()
        assert (await a.receive())[1] == flows[0]
        counters = await plane.counters(UDP_NAME)
        assert (counters.flows, counters.flows_evicted) == (2, 1)
    assert [r.how for r in plane.records] == ["evicted: too many flows"] + ["service gone"] * 2


async def test_an_idle_flow_ends_as_conntrack_would_end_it(
    backends: Backends, clients: Clients, clock: FakeClock
) -> None:
    a, _ = backends
    limits = Limits(idle_timeout_s=OFTEN, udp_timeout_s=30, udp_stream_timeout_s=120)
    async with running_plane(limits, now=clock) as plane:
        await plane.use(a.endpoint)
        clients[0].ask()
        _, flow = await a.receive()
        a.answer(b"", flow)  # an empty answer is an answer
        await clients[0].receive()
        clients[1].ask()
        await a.receive()

        clock.now_s += 30
        await until(lambda: len(plane.records) == 1, "the unanswered flow ends")
        clock.now_s += 89
        clients[0].ask()
        assert (await a.receive())[1] == flow

        clock.now_s += 120
        await until(lambda: len(plane.records) == 2, "the answered flow ends")
    assert [record.how for record in plane.records] == ["idle", "idle"]
    assert [record.portal for record in plane.records] == [None, None], "either of two may be a flow's"


async def test_a_flow_that_is_answered_all_the_time_does_not_keep_idle_ones(
    backends: Backends, clients: Clients, clock: FakeClock
) -> None:
    a, _ = backends
    async with running_plane(Limits(idle_timeout_s=OFTEN), now=clock) as plane:
        await plane.use(a.endpoint)
        clients[0].ask(b"subscribe")
        _, stream = await a.receive()
        clients[1].ask()
        await a.receive()
        for _ in range(4):
            clock.now_s += 10
            a.answer(b"news", stream)
            await clients[0].receive()

        await until(lambda: bool(plane.records), "the idle one ends")
        assert (await plane.counters(UDP_NAME)).flows == 1


async def test_a_datagram_that_two_endpoints_cannot_be_sent_leaves_no_flow(plane: Plane, clients: Clients) -> None:
    counters = await plane.counters(UDP_NAME)  # live
    with forbidden(*VANISHING_IPS[:2]):
        await plane.use(*(Endpoint(ip, 9) for ip in VANISHING_IPS[:2]))
        clients[0].ask()
        await until(lambda: counters.datagrams_dropped == 1, "it is dropped")

        assert (counters.flows, counters.flows_total, counters.dial_failures) == (0, 2, 2)


async def test_source_hash_spreads_clients_by_their_addresses(plane: Plane, backends: Backends) -> None:
    await plane.balance(Balance.SOURCE_HASH)
    await plane.use(*(backend.endpoint for backend in backends))
    with contextlib.ExitStack() as stack:
        for number in range(1, 17):
            stack.enter_context(Client(source=f"127.0.2.{number}")).ask()

        for backend in backends:
            assert (await backend.receive())[0] == b"who"


async def test_a_flow_that_is_used_does_not_keep_idle_ones_though_it_began_first(
    backends: Backends, clients: Clients, clock: FakeClock
) -> None:
    a, _ = backends
    async with running_plane(Limits(idle_timeout_s=OFTEN), now=clock) as plane:
        await plane.use(a.endpoint)
        for client in clients[:2]:
            client.ask()
            await a.receive()
        for _ in range(4):
            clock.now_s += 10
            clients[0].ask(b"again")
            await a.receive()

        await until(lambda: bool(plane.records), "the idle one ends")
        assert (await plane.counters(UDP_NAME)).flows == 1


# ---- when a flow moves


async def test_a_refusal_ejects_the_endpoint_and_the_next_datagram_goes_elsewhere(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, _ = backends
    await plane.use(refusing_endpoint(), a.endpoint)
    clients[0].ask(b"into the void")
    await until(lambda: bool(plane.records), "the refusal has come")

    clients[0].ask(b"again")

    assert (await a.receive())[0] == b"again"
    counters = await plane.counters(UDP_NAME)
    assert (counters.ejections, counters.dial_failures, counters.flows) == (1, 1, 1)


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1", CLIENT_IPS[0], CLIENT_IP6])
@pytest.mark.parametrize("proxy_port", [UDP_PORT, LOCAL_PORT])
async def test_an_endpoint_that_is_a_proxy_port_is_refused(
    plane: Plane, backends: Backends, ip: str, proxy_port: int
) -> None:
    """Otherwise its datagrams would return as those of new clients, endlessly."""
    await open_local(plane, Endpoint(ip, UDP_PORT))
    await plane.use(Endpoint(ip, proxy_port))
    counters = await plane.counters(UDP_NAME)  # live
    with Client("::1" if ":" in ip else "127.0.0.1") as client, Client() as another:
        client.ask()
        await until(lambda: counters.datagrams_dropped == 1, "it is dropped")
        assert counters.flows_total == 0
        await plane.use(Endpoint(ip, proxy_port), backends[0].endpoint)
        for _ in range(2):
            another.ask(b"to the other endpoint")
            assert (await backends[0].receive())[0] == b"to the other endpoint"


async def test_a_datagram_that_learns_of_an_earlier_refusal_goes_elsewhere_itself(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    """Three are waiting: the first is refused before the second is sent."""
    a, _ = backends
    await plane.use(refusing_endpoint(), a.endpoint)
    for number in range(3):
        clients[0].ask(b"%d" % number)

    assert [(await a.receive())[0] for _ in range(2)] == [b"1", b"2"]


async def test_a_flow_moves_when_its_endpoint_serves_no_more(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, b = backends
    await plane.use(a.endpoint)
    clients[0].ask()
    await a.receive()

    await plane.use(b.endpoint)
    clients[0].ask()

    assert (await b.receive())[0] == b"who"
    assert [record.how for record in plane.records] == ["endpoint gone"]


async def test_a_flow_stays_where_it_is_still_served_and_new_ones_go_elsewhere(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, b = backends
    await plane.use(a.endpoint)
    clients[0].ask()
    _, flow = await a.receive()

    await plane.use(b.endpoint, serving=(a.endpoint, b.endpoint))
    clients[0].ask()
    clients[1].ask()

    assert await a.receive() == (b"who", flow)
    assert (await b.receive())[0] == b"who"


async def test_without_endpoints_a_datagram_is_dropped_and_counted(plane: Plane, clients: Clients) -> None:
    clients[0].ask()
    counters = await plane.counters(UDP_NAME)  # live

    await until(lambda: counters.datagrams_dropped == 1, "it is counted")
    assert counters.flows == 0


# ---- endings


async def test_a_listener_that_is_retired_with_datagrams_waiting_begins_no_flow(
    backends: Backends, clients: Clients
) -> None:
    """The listener is retired between two turns: more datagrams wait than one turn reads."""
    a, _ = backends
    before = open_descriptors()
    async with running_plane(Limits(udp_flows_per_service=1)) as plane:
        await plane.use(a.endpoint)
        clients[0].ask()
        await a.receive()
        retiring: list[asyncio.Task[None]] = []
        plane.on_record = lambda: retiring.append(asyncio.ensure_future(plane.local.retire([UDP_LISTENER])))
        for _ in range(200):
            clients[1].ask()

        await until(lambda: len(plane.records) == 2, "the first flow has made way, the second is over with the service")
        plane.on_record = lambda: None
        await asyncio.gather(*retiring)
        await a.receive()
    assert [record.how for record in plane.records] == ["evicted: too many flows", "service gone"]
    assert open_descriptors() == before


async def test_records_and_counters_of_a_flow_are_exact(backends: Backends, clients: Clients) -> None:
    a, _ = backends
    async with running_plane() as plane:
        await plane.use(a.endpoint)
        for size in (10, 20):
            clients[0].ask(bytes(size))
            _, flow = await a.receive()
            a.answer(bytes(size * 3), flow)
            await clients[0].receive()
        counters = await plane.counters(UDP_NAME)
    (record,) = plane.records

    assert (record.bytes_to_backend, record.bytes_to_client) == (30, 90)
    assert (counters.bytes_to_backends, counters.bytes_to_clients, counters.flows) == (30, 90, 0)
    assert record.client == clients[0].sock.getsockname()
    assert (record.endpoint, record.why) == (a.endpoint, "round robin")


async def test_a_datagram_is_tried_at_a_bounded_number_of_endpoints_that_have_failed_before(
    clients: Clients, clock: FakeClock
) -> None:
    unreachable = [Endpoint("255.255.255.255", port) for port in range(1, DIALS_MAX + 100)]
    async with running_plane(now=clock) as plane:
        counters = await plane.counters(UDP_NAME)  # live
        await plane.use(*unreachable)
        clients[0].ask()
        await until(lambda: counters.datagrams_dropped == 1, "it is dropped")
        assert counters.dial_failures == len(unreachable), "each might have been the one that can be reached"

        clients[0].ask()
        await until(lambda: counters.datagrams_dropped == 2, "it is dropped")
        assert counters.dial_failures == len(unreachable) + DIALS_MAX


async def test_each_endpoint_has_the_flows_that_came_to_it(plane: Plane, backends: Backends, clients: Clients) -> None:
    a, b = backends
    unreachable = Endpoint("255.255.255.255", 9)  # connecting there is refused by this host itself
    await plane.use(unreachable, a.endpoint, b.endpoint)
    for client, backend in zip(clients, (a, b, a), strict=True):
        client.ask(bytes(10))
        _, flow = await backend.receive()
        backend.answer(bytes(30), flow)
        await client.receive()

    counters = await plane.of_endpoints(UDP_NAME)

    assert counters[unreachable.address] == EndpointCounters(dial_failures=1, ejections=1)
    assert counters[a.endpoint.address] == EndpointCounters(
        opened=2, open=2, bytes_to_backends=20, bytes_to_clients=60, retries=1
    )
    assert counters[b.endpoint.address] == EndpointCounters(opened=1, open=1, bytes_to_backends=10, bytes_to_clients=30)
    await plane.use(b.endpoint)
    assert list(await plane.of_endpoints(UDP_NAME)) == [b.endpoint.address], "its flows have ended with it"
    assert (await plane.counters(UDP_NAME)).bytes_to_backends == 30


async def test_short_of_descriptors_the_service_with_the_most_flows_gives_them_up(
    backends: Backends, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flows of another Service, to another endpoint, stay: they once evicted each other."""
    a, b = backends
    async with running_plane() as plane:
        name = ServicePortName(UDP_NAME.service, "other", L4Protocol.UDP)
        other = ListenerSpec(replace(plane.specs[1].service_port, name=name), UDP_PORT + 1)
        assert await plane.local.open([other]) == {}
        await plane.use(a.endpoint)
        await plane.local.update({ListenerName(name): PlaneBackends((b.endpoint,), (b.endpoint,))})
        with contextlib.ExitStack() as stack:
            quiet = stack.enter_context(Client(source=CLIENT_IPS[0]))
            quiet.ask()
            _, waiting = await a.receive()
            for _ in range(20):
                stack.enter_context(Client(source=CLIENT_IPS[1])).ask()
                await a.receive()
            monkeypatch.setattr(Connections, "fits", lambda *_: len(plane.local._datagrams) < 21)
            few = [stack.enter_context(Client(port=UDP_PORT + 1)) for _ in range(3)]
            flows = []
            for client in few:
                client.ask()
                flows.append((await b.receive())[1])
            for client, flow in zip(few, flows, strict=True):
                client.ask()
                assert (await b.receive())[1] == flow
            a.answer(b"still there", waiting)
            assert (await quiet.receive())[0] == b"still there"
        assert (await plane.counters(UDP_NAME)).flows_evicted == 3
        assert (await plane.counters(name)).flows_evicted == 0


async def test_no_descriptor_is_left_after_many_flows(backends: Backends) -> None:
    a, _ = backends
    before = open_descriptors()
    async with running_plane(Limits(udp_flows_per_service=50)) as plane:
        await plane.use(a.endpoint)
        for _ in range(400):
            with Client() as client:
                client.ask()
                _, flow = await a.receive()
                a.answer(b"x", flow)
                await client.receive()
        counters = await plane.counters(UDP_NAME)
        # The kernel may give a port to two clients, one after the other; both are one flow then.
        assert counters.flows == 50
        assert counters.flows_total - counters.flows_evicted == 50
    assert open_descriptors() <= before


# ---- as conntrack's rules have it: behaviours 10


async def test_a_client_that_keeps_sending_is_answered_after_its_service_had_no_endpoints(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, b = backends
    await plane.use(a.endpoint)
    clients[0].ask()
    await a.receive()
    await plane.use()
    clients[0].ask(b"nobody is there")
    counters = await plane.counters(UDP_NAME)
    await until(lambda: counters.datagrams_dropped == 1, "it is dropped")

    await plane.use(b.endpoint)
    clients[0].ask(b"again")

    data, flow = await b.receive()
    b.answer(data, flow)
    assert await clients[0].receive() == (b"again", ("127.0.0.1", UDP_PORT))
    assert a.nothing()


async def test_a_flow_moves_when_its_endpoint_has_another_port(plane: Plane, clients: Clients) -> None:
    """Same pod, same address: the target port was changed."""
    with Backend("127.0.0.5") as before, Backend("127.0.0.5") as after:
        await plane.use(before.endpoint)
        clients[0].ask()
        await before.receive()

        await plane.use(after.endpoint)
        clients[0].ask(b"moved")

        assert (await after.receive())[0] == b"moved"


# ---- several listeners of one service port


async def test_each_listener_leads_to_its_own_endpoints_and_answers_for_itself(
    plane: Plane, backends: Backends
) -> None:
    a, b = backends
    await plane.use(a.endpoint, serving=(a.endpoint, b.endpoint))
    await open_local(plane, b.endpoint, a.endpoint)
    with Client() as everywhere, Client(port=LOCAL_PORT) as here:
        for client, backend in ((everywhere, a), (here, b)):
            client.ask()
            data, flow = await backend.receive()
            backend.answer(data, flow)
            assert (await client.receive())[0] == b"who"
    counters = await plane.counters(UDP_NAME)
    assert (counters.flows, counters.flows_total, counters.endpoints) == (2, 2, 2)


async def test_flows_stay_with_their_endpoint_when_the_traffic_policy_retires_their_listener(
    plane: Plane, backends: Backends
) -> None:
    """The client's next datagram reaches the other listener, which uses other endpoints for new clients."""
    a, b = backends
    await plane.use(a.endpoint)
    with Client() as client:
        client.ask()
        _, flow = await a.receive()
        await open_local(plane, b.endpoint, a.endpoint)
        port = client.sock.getsockname()[1]

        await plane.local.retire([UDP_LISTENER])

        client.sock.close()
        with Datagrams() as same:
            same.sock.bind(("127.0.0.1", port))  # as the kernel's rules show the same client to the other listener
            same.sock.connect(("127.0.0.1", LOCAL_PORT))
            same.sock.send(b"still you")
            assert await a.receive() == (b"still you", flow)
            a.answer(b"yes", flow)
            assert (await same.receive())[0] == b"yes"
        with Client(port=LOCAL_PORT) as new:
            new.ask()
            assert (await b.receive())[0] == b"who"
    counters = await plane.counters(UDP_NAME)
    assert (counters.flows, counters.flows_total) == (2, 2)
    assert not plane.records


async def test_flows_end_with_their_listener_where_no_other_serves_their_endpoint(
    plane: Plane, backends: Backends, clients: Clients
) -> None:
    a, b = backends
    await plane.use(a.endpoint)
    clients[0].ask()
    await a.receive()
    await open_local(plane, b.endpoint)

    await plane.local.retire([UDP_LISTENER])

    assert [record.how for record in plane.records] == ["service gone"]
    assert (await plane.counters(UDP_NAME)).flows == 0
