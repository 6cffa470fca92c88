"""Backends that see their clients' own addresses: a data plane on the lab's node, and packets between real hosts."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import socket
import sys
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.modes.redirect_cases import Redirects
from tests.net.world import wait_until
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.lab import Host, ServiceLab, connect
from userspace_proxy.lab.hosts import CLIENT_IP, CLIENT_IP6
from userspace_proxy.model.counters import Counters
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort, SourceIP, portals
from userspace_proxy.modes.userspace import nft
from userspace_proxy.netfilter.nft_text import removal

PORT = 7000
SERVICE_IP, SERVICE_IP6 = "10.96.200.1", "fd00:96::200:1"
OTHER_CLIENT_IP = "192.168.50.77"
NODE_IP_TO_PODS, NODE_IP6_TO_PODS = "10.244.0.1", "fd00:244::1"
TABLE = "100"
MARK = "0x10000"
# Answers each connection and each datagram with the address that it comes from; after that, with the hash of the rest.
TELLS_WHO = f"""
import hashlib, socket, threading
def tcp():
    with socket.create_server(("::", {PORT}), family=socket.AF_INET6, dualstack_ipv6=True, backlog=100) as server:
        while True:
            sock, address = server.accept()
            threading.Thread(target=tell, args=(sock, address[0].removeprefix("::ffff:"))).start()
def tell(sock, ip):
    with sock:
        sock.sendall(ip.encode().ljust(40))
        digest = hashlib.blake2b()
        while piece := sock.recv(1 << 16):
            digest.update(piece)
        sock.sendall(digest.digest())
threading.Thread(target=tcp).start()
with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", {PORT}))
    while True:
        data, client = sock.recvfrom(65_536)
        sock.sendto(client[0].removeprefix("::ffff:").encode() + b" " + data, client)
"""

TCP = ServicePort(
    ServicePortName(NamespacedName("shop", "who"), "tcp", L4Protocol.TCP),
    80,
    (SERVICE_IP, SERVICE_IP6),
    source_ip=SourceIP.TRANSPARENT,
)
UDP = ServicePort(
    ServicePortName(NamespacedName("shop", "who"), "udp", L4Protocol.UDP),
    80,
    (SERVICE_IP, SERVICE_IP6),
    source_ip=SourceIP.TRANSPARENT,
)
SPECS = [ListenerSpec(TCP, 10_501, transparent=True), ListenerSpec(UDP, 10_502, transparent=True)]
KINDS = [socket.SOCK_STREAM, socket.SOCK_DGRAM]


@pytest.fixture(scope="module", autouse=True)
def surroundings(world: ServiceLab) -> Iterator[None]:
    """Servers that answer with their client's address; rules and the route for replies on the node."""
    node = world.node
    ports = {portal: spec.proxy_port for spec in SPECS for portal in portals(spec.service_port)}
    back = (
        "table inet back { chain prerouting { type filter hook prerouting priority mangle; "
        f"meta l4proto {{ tcp, udp }} socket transparent 1 meta mark set {MARK}; }}; }}\n"
    )
    families = (("-4", "10.96.200.0/24"), ("-6", "fd00:96::200:0/112"))
    node.run("nft", "-f", "-", stdin=Redirects(ports).nft() + back)
    for family, services in families:
        node.ip(family, "rule", "add", "fwmark", MARK, "lookup", TABLE)
        node.ip(family, "route", "add", "local", "default", "dev", "lo", "table", TABLE)
        node.ip(family, "route", "add", services, "dev", "lo")
    servers = [pod.start(sys.executable, "-c", TELLS_WHO) for pod in world.pods]
    wait_until(lambda: all(_listens(pod) for pod in world.pods), "the servers listen")
    world.client.ip("address", "add", f"{OTHER_CLIENT_IP}/24", "dev", "eth0")
    yield
    world.client.ip("address", "del", f"{OTHER_CLIENT_IP}/24", "dev", "eth0")
    for server in servers:
        server.kill()
        server.wait(20)
    for family, services in families:
        node.ip(family, "rule", "del", "fwmark", MARK, "lookup", TABLE)
        node.ip(family, "route", "flush", "table", TABLE)
        node.ip(family, "route", "del", services, "dev", "lo")
    node.run("nft", "-f", "-", stdin="delete table inet back\n" + removal(nft.TABLE))


def _listens(pod: Host) -> bool:
    with contextlib.suppress(OSError):
        connect(pod, "127.0.0.1", PORT, 1.0).close()
        return True
    return False


@contextlib.asynccontextmanager
async def plane_on(node: Host, limits: Limits | None = None) -> AsyncIterator[RemotePlane]:
    plane = RemotePlane(WorkerSettings(limits or Limits()))
    with node.inside():  # what a process and a socket are born in they stay in
        plane.start()
        assert await plane.open(SPECS) == {}
    try:
        yield plane
    finally:
        await plane.close(0)


async def use(plane: RemotePlane, *pods: int) -> None:
    """Let these pods serve, at both of their addresses."""
    endpoints = tuple(Endpoint(ip(pod), PORT) for pod in pods for ip in (ServiceLab.pod_ip, ServiceLab.pod_ip6))
    await plane.update({spec.name: Backends(endpoints, endpoints) for spec in SPECS})


def who(host: Host, service_ip: str, kind: socket.SocketKind, source_ip: str = "") -> str:
    """Return as whom a backend sees this client."""
    with host.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in service_ip else socket.AF_INET, kind)
    with sock:
        sock.settimeout(5)
        if source_ip:
            sock.bind((source_ip, 0))
        sock.connect((service_ip, 80))
        if kind is socket.SOCK_DGRAM:
            sock.send(b"")
        return sock.recv(40).decode().strip()


async def counters_of(plane: RemotePlane, service_port: ServicePort = TCP) -> Counters:
    return (await plane.stats()).services[service_port.name]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_backend_sees_the_client_s_own_address(world: ServiceLab, kind: socket.SocketKind) -> None:
    async with plane_on(world.node) as plane:
        await use(plane, 0)

        assert await asyncio.to_thread(who, world.client, SERVICE_IP, kind) == CLIENT_IP
        assert await asyncio.to_thread(who, world.client, SERVICE_IP, kind, OTHER_CLIENT_IP) == OTHER_CLIENT_IP
        assert await asyncio.to_thread(who, world.client, SERVICE_IP6, kind) == CLIENT_IP6


@pytest.mark.parametrize("kind", KINDS)
async def test_the_node_s_own_clients_and_a_pod_that_meets_itself_are_seen_as_the_node(
    world: ServiceLab, kind: socket.SocketKind
) -> None:
    async with plane_on(world.node) as plane:
        await use(plane, 0)
        for host in (world.node, world.pods[0]):
            seen = [await asyncio.to_thread(who, host, ip, kind) for ip in (SERVICE_IP, SERVICE_IP6)]

            assert seen == [NODE_IP_TO_PODS, NODE_IP6_TO_PODS], host.name


async def test_bytes_pass_whole_both_ways(world: ServiceLab) -> None:
    sent = os.urandom(3_000_000)

    def exchange() -> tuple[bytes, bytes]:
        with connect(world.client, SERVICE_IP, 80) as sock:
            seen = sock.recv(40, socket.MSG_WAITALL)
            sock.sendall(sent)
            sock.shutdown(socket.SHUT_WR)
            return seen, sock.recv(64, socket.MSG_WAITALL)

    async with plane_on(world.node) as plane:
        await use(plane, 1)
        seen, digest = await asyncio.to_thread(exchange)

    assert seen.decode().strip() == CLIENT_IP
    assert digest == hashlib.blake2b(sent).digest()


async def test_after_a_refused_dial_the_next_backend_sees_the_clients_address(world: ServiceLab) -> None:
    nobody, pod = Endpoint(ServiceLab.pod_ip(0), 7001), Endpoint(ServiceLab.pod_ip(1), PORT)
    async with plane_on(world.node) as plane:
        await plane.update({SPECS[0].name: Backends((nobody, pod), (nobody, pod))})

        assert await asyncio.to_thread(who, world.client, SERVICE_IP, socket.SOCK_STREAM) == CLIENT_IP
        counters = await counters_of(plane)
    assert (counters.dial_failures, counters.retries, counters.ejections) == (1, 1, 1)


async def test_a_client_that_all_backends_refuse_ejects_none_for_others(world: ServiceLab) -> None:
    against = f"ip saddr {CLIENT_IP} tcp dport {PORT} reject with tcp reset"
    rule = f"table ip deny {{ chain i {{ type filter hook input priority 0; {against}; }}; }}"
    async with plane_on(world.node) as plane:
        await use(plane, 0, 1)
        for pod in world.pods[:2]:
            pod.run("nft", rule)
        try:
            for _ in range(3):
                with pytest.raises(ConnectionResetError):
                    await asyncio.to_thread(who, world.client, SERVICE_IP, socket.SOCK_STREAM)
            for _ in range(4):
                seen = await asyncio.to_thread(who, world.client, SERVICE_IP, socket.SOCK_STREAM, OTHER_CLIENT_IP)
                assert seen == OTHER_CLIENT_IP
        finally:
            for pod in world.pods[:2]:
                pod.run("nft", "delete table ip deny")
        stats = await plane.stats(endpoints_max=100)

    counters = stats.services[TCP.name]
    assert (counters.failed, counters.ejected) == (3, 0)
    opened = [stats.endpoints[TCP.name][ServiceLab.pod_ip(pod), PORT].opened for pod in (0, 1)]
    assert opened == [2, 2], "others have their turns as before"


async def test_a_transparent_udp_flow_gets_its_answers_and_then_frees_its_socket(world: ServiceLab) -> None:
    def converse(source_ip: str) -> list[str]:
        with world.client.inside():
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with sock:
            sock.settimeout(5)
            sock.bind((source_ip, 0))
            sock.connect((SERVICE_IP, 80))
            told = []
            for number in range(20):
                sock.send(b"%d" % number)
                told.append(sock.recv(100).decode())
            return told

    async with plane_on(world.node, Limits(udp_flows_per_service=1)) as plane:
        await use(plane, 0)
        for source_ip in (CLIENT_IP, OTHER_CLIENT_IP, CLIENT_IP):
            told = await asyncio.to_thread(converse, source_ip)
            await asyncio.sleep(0.05)  # as long as a socket rests before another flow may have it

            assert told == [f"{source_ip} {number}" for number in range(20)]
        assert (await counters_of(plane, UDP)).flows_total == 3


@pytest.mark.parametrize("kind", KINDS)
async def test_a_transparent_client_with_a_link_local_address_is_refused(
    world: ServiceLab, kind: socket.SocketKind
) -> None:
    """A link-local client address: a backend behind another interface cannot reply to it."""
    client = world.client
    (link,) = [line.split()[3] for line in client.ip("-6", "-o", "address", "show", "scope", "link").splitlines()]
    client.ip("-6", "route", "add", SERVICE_IP6, "via", "fd00:50::1", "src", link.partition("/")[0])
    service_port = TCP if kind is socket.SOCK_STREAM else UDP

    def ask() -> None:
        with connect(client, SERVICE_IP6, 80, 1.0, kind) as sock:
            sock.send(b"who")
            assert sock.recv(40) == b"", "nobody answers"

    try:
        async with plane_on(world.node) as plane:
            await use(plane, 0)
            with pytest.raises((ConnectionResetError, TimeoutError)):
                await asyncio.to_thread(ask)
            counters = await counters_of(plane, service_port)
    finally:
        client.ip("-6", "route", "del", SERVICE_IP6)
    assert counters.sources_refused == 1
    assert (counters.dial_failures, counters.ejected) == (0, 0), "no endpoint is to blame"


async def test_a_service_port_can_have_a_transparent_and_a_plain_listener(world: ServiceLab) -> None:
    """Two listeners, as for clients of a node port and of a cluster IP."""
    plain = ListenerSpec(TCP, 10_503)
    async with plane_on(world.node) as plane:
        with world.node.inside():
            await plane.open([plain])
        endpoints = (Endpoint(ServiceLab.pod_ip(0), PORT),)
        await plane.update(dict.fromkeys((SPECS[0].name, plain.name), Backends(endpoints, endpoints)))
        assert plain.name == ListenerName(TCP.name)
        assert await asyncio.to_thread(who, world.client, SERVICE_IP, socket.SOCK_STREAM) == CLIENT_IP
        to_plain = Redirects({portals(TCP)[0]: 10_503})
        to_transparent = Redirects({portal: spec.proxy_port for spec in SPECS for portal in portals(spec.service_port)})
        world.node.run("nft", "-f", "-", stdin=to_plain.nft())
        try:
            assert await asyncio.to_thread(who, world.client, SERVICE_IP, socket.SOCK_STREAM) == NODE_IP_TO_PODS
        finally:
            world.node.run("nft", "-f", "-", stdin=to_transparent.nft())
        assert (await counters_of(plane)).accepted == 2
