"""PROXY headers through a data plane in this process: byte for byte, and as real servers read them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from tests.dataplane.test_tcp import Listener, all_ended, dial
from tests.dataplane.test_udp import Backend, Client
from tests.dataplane.world import (
    CLIENT_IP6,
    CLIENT_IPS,
    NODE_PORT,
    PORTAL,
    PORTAL6,
    UDP_NAME,
    UDP_PORT,
    VANISHING_IPS,
    Plane,
    refusing_endpoint,
    running_plane,
    vanished,
)
from tests.ends import until
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.service import SourceIP

V1, V2 = SourceIP.PROXY_PROTOCOL_V1, SourceIP.PROXY_PROTOCOL_V2
VERSIONS = [V1, V2]
SIGNATURE = bytes.fromhex("0d0a0d0a000d0a515549540a")
TCP_KNOWN_AS, UDP_KNOWN_AS = 1, 2


def header(version: SourceIP, client: Address, dialled: Address, known_as: int = TCP_KNOWN_AS) -> bytes:
    """Return the header as the protocol's specification defines it."""
    family = 2 if ":" in client[0] else 1
    if version is V1:
        return f"PROXY TCP{(4, 6)[family - 1]} {client[0]} {dialled[0]} {client[1]} {dialled[1]}\r\n".encode()
    ips = b"".join(
        socket.inet_pton((socket.AF_INET, socket.AF_INET6)[family - 1], ip) for ip in (client[0], dialled[0])
    )
    rest = ips + client[1].to_bytes(2, "big") + dialled[1].to_bytes(2, "big")
    return SIGNATURE + bytes((0x21, family * 16 + known_as, 0, len(rest))) + rest


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with running_plane() as running:
        yield running


def listener_for(portal: Address) -> Listener:
    return Listener("::1" if ":" in portal[0] else "127.0.0.1")


# ---- TCP


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("portal", [PORTAL, PORTAL6, (CLIENT_IPS[0], NODE_PORT), (CLIENT_IP6, NODE_PORT)])
async def test_the_header_names_client_and_dialled_address_and_precedes_all_bytes(
    plane: Plane, portal: Address, version: SourceIP
) -> None:
    sent, answered = os.urandom(300_000), os.urandom(200_000)
    await plane.tell_sources_by(version)
    with listener_for(portal) as listener:
        await plane.use(listener.endpoint)
        client = await dial(portal)
        expected = header(version, client.sock.getsockname()[:2], portal)
        sending = asyncio.ensure_future(client.send(sent))
        server = await listener.accept()

        assert await server.receive(len(expected) + len(sent)) == expected + sent

        await sending
        client.half_close()
        assert await server.receive_all() == (b"", "eof")
        await server.send(answered)
        server.half_close()
        assert await client.receive_all() == (answered, "eof")
        client.close()
        server.close()
        await all_ended(plane)
    (record,) = plane.records
    assert (record.bytes_to_backend, record.bytes_to_client, record.how) == (len(sent), len(answered), "closed")


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_server_that_speaks_first_has_the_header_all_the_same(plane: Plane, version: SourceIP) -> None:
    await plane.tell_sources_by(version)
    with Listener() as listener:
        await plane.use(listener.endpoint)
        client = await dial()
        server = await listener.accept()
        await server.send(b"220 ready\r\n")
        assert await client.receive(11) == b"220 ready\r\n"
        await client.send(b"EHLO\r\n")
        client.half_close()

        assert await server.receive_all() == (header(version, client.sock.getsockname(), PORTAL) + b"EHLO\r\n", "eof")

        server.close()
        client.close()


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_client_that_only_closes_its_side_is_announced(plane: Plane, version: SourceIP) -> None:
    await plane.tell_sources_by(version)
    with Listener() as listener:
        await plane.use(listener.endpoint)
        client = await dial()
        client.half_close()
        server = await listener.accept()

        assert await server.receive_all() == (header(version, client.sock.getsockname(), PORTAL), "eof")

        await server.send(b"bye")
        server.close()
        assert await client.receive_all() == (b"bye", "eof")
        client.close()


@pytest.mark.parametrize("version", VERSIONS)
async def test_another_backend_gets_the_header_where_the_first_refused(plane: Plane, version: SourceIP) -> None:
    await plane.tell_sources_by(version)
    with Listener() as listener:
        await plane.use(refusing_endpoint(), listener.endpoint)
        client = await dial()
        await client.send(b"hello")
        server = await listener.accept()
        client.half_close()

        assert await server.receive_all() == (header(version, client.sock.getsockname(), PORTAL) + b"hello", "eof")

        server.close()
        client.close()
    assert (await plane.counters()).retries == 1


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_backend_that_takes_its_time_gets_the_header_before_what_has_waited(
    plane: Plane, version: SourceIP
) -> None:
    """The endpoint's packets are dropped at first, so the client's bytes arrive long before the connection is open."""
    await plane.tell_sources_by(version)
    with Listener(VANISHING_IPS[0]) as slow, contextlib.ExitStack() as away:
        away.enter_context(vanished(VANISHING_IPS[0]))
        await plane.use(slow.endpoint)
        client = await dial()
        await client.send(b"hello")
        await until(lambda: VANISHING_IPS[0] in dialled(), "the backend is dialled")
        away.close()
        client.half_close()
        server = await slow.accept()

        assert await server.receive_all() == (header(version, client.sock.getsockname(), PORTAL) + b"hello", "eof")

        server.close()
        client.close()


def dialled() -> str:
    """Return the connections of this host whose SYN has no answer yet."""
    return subprocess.run(
        ["ss", "-tnH", "state", "syn-sent"], capture_output=True, text=True, timeout=10, check=True
    ).stdout


async def test_a_service_port_uses_another_source_ip_from_the_next_connection_on(plane: Plane) -> None:
    with Listener() as listener:
        await plane.use(listener.endpoint)
        seen = []
        for source_ip in (SourceIP.NODE, V1, V2, SourceIP.NODE):
            await plane.tell_sources_by(source_ip)
            client = await dial()
            client.half_close()
            server = await listener.accept()
            received, _ = await server.receive_all()
            expected = b"" if source_ip is SourceIP.NODE else header(source_ip, client.sock.getsockname(), PORTAL)
            seen.append(received == expected)
            server.close()
            client.close()

        assert seen == [True] * 4


async def test_a_udp_flow_uses_another_source_ip_from_the_next_datagram_on(plane: Plane) -> None:
    with Backend() as backend, Client() as client:
        await plane.use(backend.endpoint)
        seen = []
        for source_ip in (SourceIP.NODE, V2, SourceIP.NODE):
            await plane.tell_sources_by(source_ip)
            client.ask(b"payload")
            received, _ = await backend.receive()
            has_header = received != b"payload"
            seen.append(has_header)

    assert seen == [False, True, False]


# ---- servers that read it


@contextlib.contextmanager
def serving(*command: str, at: Address) -> Iterator[None]:
    with subprocess.Popen(command) as process:
        try:
            give_up_at = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(at, 1).close()
                    break
                except OSError:
                    assert time.monotonic() < give_up_at
                    time.sleep(0.01)
            yield
        finally:
            process.terminate()


def nginx(folder: Path, ip: str, port: int) -> tuple[str, ...]:
    said = "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr $proxy_protocol_server_port"
    (folder / "nginx.conf").write_text(
        f"daemon off; master_process off; pid {folder}/pid; error_log stderr crit; events {{ }}\n"
        f"http {{ access_log off; server {{ listen {ip}:{port} proxy_protocol; "
        f'location / {{ default_type text/plain; return 200 "{said}"; }} }} }}\n'
    )
    return "nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"


def haproxy(folder: Path, ip: str, port: int) -> tuple[str, ...]:
    (folder / "haproxy.cfg").write_text(
        "defaults\n mode http\n timeout client 5s\n timeout server 5s\n timeout connect 5s\n"
        f"frontend web\n bind {ip}:{port} accept-proxy\n http-request return status 200 content-type text/plain "
        'lf-string "%[src] %[src_port] %[dst] %[dst_port]"\n'
    )
    return "haproxy", "-db", "-q", "-f", str(folder / "haproxy.cfg")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("portal", [PORTAL, PORTAL6, (CLIENT_IPS[0], NODE_PORT)])
@pytest.mark.parametrize("server", [nginx, haproxy])
async def test_real_servers_understand_it(
    plane: Plane,
    portal: Address,
    version: SourceIP,
    server: Callable[[Path, str, int], tuple[str, ...]],
    tmp_path: Path,
) -> None:
    ip = "::1" if ":" in portal[0] else "127.0.0.1"
    endpoint = refusing_endpoint(ip)
    command = server(tmp_path, f"[{ip}]" if ":" in ip else ip, endpoint.port)
    await plane.tell_sources_by(version)
    await plane.use(endpoint)
    # A connection that conntrack knows from before would have the kernel give this one another source port.
    subprocess.run(["conntrack", "-F"], capture_output=True, timeout=10, check=True)
    with serving(*command, at=endpoint.address):
        client = await dial(portal)
        await client.send(b"GET / HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
        answer, how = await client.receive_all()

    known_as, port = client.sock.getsockname()[:2]
    assert how == "eof", plane.records
    assert answer.decode().partition("\r\n\r\n")[2] == f"{known_as} {port} {portal[0]} {portal[1]}", answer
    client.close()


# ---- UDP


@pytest.mark.parametrize("asked", [(PORTAL[0], 53), (PORTAL6[0], 53), ("127.0.0.2", UDP_PORT), ("::1", UDP_PORT)])
async def test_each_datagram_has_the_header_and_answers_have_none(plane: Plane, asked: Address) -> None:
    """As it was dialled: at a portal, or where there was no NAT at the proxy port itself."""
    await plane.tell_sources_by(V2)
    with Backend("::1" if ":" in asked[0] else "127.0.0.1") as backend, Client(*asked) as client:
        await plane.use(backend.endpoint)
        expected = header(V2, client.sock.getsockname()[:2], asked, UDP_KNOWN_AS)
        for size in (0, 1, 1_400, 9_000):
            data = os.urandom(size)
            client.ask(data)
            received, flow = await backend.receive()
            assert received == expected + data
            backend.answer(data[::-1], flow)
            assert (await client.receive())[0] == data[::-1]

        counters = await plane.counters(UDP_NAME)
        assert counters.flows_total == 1
        await plane.use()
    (record,) = plane.records
    assert (record.bytes_to_backend, record.bytes_to_client) == (10_401, 10_401)


async def test_a_datagram_that_is_too_long_with_its_header_is_dropped_and_the_next_is_not(plane: Plane) -> None:
    await plane.tell_sources_by(V2)
    with Backend() as backend, Client() as client:
        await plane.use(backend.endpoint)
        client.ask(bytes(65_507))
        client.ask(b"short")

        assert (await backend.receive())[0].endswith(b"short")
    assert (await plane.counters(UDP_NAME)).datagrams_dropped == 1


async def test_a_datagram_that_goes_elsewhere_after_a_refusal_has_its_header_once(plane: Plane) -> None:
    await plane.tell_sources_by(V2)
    with Backend() as backend, Client() as client:
        await plane.use(refusing_endpoint(), backend.endpoint)
        for number in range(3):
            client.ask(b"%d" % number)

        expected = header(V2, client.sock.getsockname(), ("127.0.0.1", UDP_PORT), UDP_KNOWN_AS)
        assert [(await backend.receive())[0] for _ in range(2)] == [expected + b"1", expected + b"2"]


async def test_clients_of_one_socket_have_headers_of_their_own(plane: Plane) -> None:
    """The socket of an ended flow is leased to the next."""
    await plane.tell_sources_by(V2)
    with Backend() as backend, contextlib.ExitStack() as stack:
        for _ in range(3):
            client = stack.enter_context(Client())
            await plane.use(backend.endpoint)
            client.ask()
            expected = header(V2, client.sock.getsockname(), ("127.0.0.1", UDP_PORT), UDP_KNOWN_AS)
            assert (await backend.receive())[0] == expected + b"who"
            await plane.use()
            await asyncio.sleep(0.05)
