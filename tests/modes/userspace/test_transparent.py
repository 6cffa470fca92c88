"""Replies of backends to a client's own address reach this node's sockets, also over bridges; with real packets."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator

import pytest

from tests.modes.redirect_cases import REFUSE_PORT, Redirects
from userspace_proxy.lab import Host, Lab, ServiceLab, connect
from userspace_proxy.lab.hosts import CLIENT_IP, CLIENT_IP6, build_service_lab
from userspace_proxy.model.redirects import OWN_MARK, TRANSPARENT_MARK
from userspace_proxy.modes.userspace import transparent_replies as answers
from userspace_proxy.modes.userspace.loader import KERNELS, IptablesKernel, NftKernel

PORT, CLOSED_PORT = 9_000, 9_001
# Says who asked, for each message, over TCP and UDP.
_BACKEND = """
import socket, threading
def answer_udp():
    while True:
        _, peer = udp.recvfrom(64)
        udp.sendto(peer[0].encode(), peer)
def answer(client, peer):
    while client.recv(64):
        client.sendall(peer[0].encode())
tcp = socket.create_server(("::", 9000), family=socket.AF_INET6, dualstack_ipv6=True)
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
udp.bind(("::", 9000))
threading.Thread(target=answer_udp, daemon=True).start()
while True:
    threading.Thread(target=answer, args=tcp.accept(), daemon=True).start()
"""
_IPV6_TRANSPARENT = 75
POD1, POD1_IP6 = ServiceLab.pod_ip(0), ServiceLab.pod_ip6(0)
POD2, POD2_IP6 = ServiceLab.pod_ip(1), ServiceLab.pod_ip6(1)
# Of a client elsewhere, and of one on the backend's own bridge; with the backend.
PAIRS = [(CLIENT_IP, POD1), (CLIENT_IP6, POD1_IP6), (POD2, POD1), (POD2_IP6, POD1_IP6)]
TRANSPARENT = Redirects(refuse_port=REFUSE_PORT, transparent=True)
OPAQUE = Redirects(refuse_port=REFUSE_PORT)


@pytest.fixture(scope="module")
def world() -> Iterator[ServiceLab]:
    with Lab() as lab:
        world = build_service_lab(lab, pods=2)
        for knob in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            world.node.set_knob(knob, 1)
        world.pods[0].start(sys.executable, "-c", _BACKEND)
        while True:
            try:
                connect(world.pods[0], "127.0.0.1", PORT).close()
                break
            except ConnectionRefusedError:
                pass
        yield world


@pytest.fixture(params=KERNELS.values(), ids=list(KERNELS))
def kernel(request: pytest.FixtureRequest) -> NftKernel | IptablesKernel:
    made: NftKernel | IptablesKernel = request.param()
    return made


def dial_as(client_ip: str, ip: str, kind: socket.SocketKind, port: int = PORT) -> socket.socket:
    """Return a connection from this host with the client's address, as the data plane makes it."""
    is_ip6 = ":" in client_ip
    sock = socket.socket(socket.AF_INET6 if is_ip6 else socket.AF_INET, kind)
    sock.settimeout(0.5)
    if is_ip6:
        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
    else:
        sock.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, OWN_MARK | TRANSPARENT_MARK)
    try:
        sock.bind((client_ip, 0))
        sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return sock


def seen_by_backend(client_ip: str, ip: str, kind: socket.SocketKind = socket.SOCK_STREAM) -> str:
    """Return the client's address that the backend saw and answered; "" where no answer came."""
    try:
        with dial_as(client_ip, ip, kind) as sock:
            return said(sock)
    except OSError:
        return ""


def said(sock: socket.socket) -> str:
    sock.send(b"who")
    return sock.recv(64).decode().removeprefix("::ffff:")


@pytest.mark.parametrize("bridge_netfilter", [0, 1])
async def test_backends_see_and_answer_the_clients_own_address(
    world: ServiceLab, kernel: NftKernel | IptablesKernel, bridge_netfilter: int
) -> None:
    for language in ("iptables", "ip6tables"):
        world.node.set_knob(f"bridge/bridge-nf-call-{language}", bridge_netfilter)
    with world.node.inside():
        await kernel.load(TRANSPARENT.update())
        assert await kernel.is_intact()
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            assert [seen_by_backend(*pair, kind) for pair in PAIRS] == [client for client, _ in PAIRS], kind

        await kernel.remove()
        assert [seen_by_backend(*pair) for pair in PAIRS] == [""] * 4


@pytest.mark.parametrize("bridge_netfilter", [0, 1])
async def test_an_icmp_error_of_a_backend_reaches_the_flow_that_it_is_about_and_no_other(
    world: ServiceLab, kernel: NftKernel | IptablesKernel, bridge_netfilter: int
) -> None:
    for language in ("iptables", "ip6tables"):
        world.node.set_knob(f"bridge/bridge-nf-call-{language}", bridge_netfilter)
    with world.node.inside():
        await kernel.load(TRANSPARENT.update())
        assert await kernel.is_intact()
        for pair in PAIRS:
            with dial_as(*pair, socket.SOCK_DGRAM, CLOSED_PORT) as sock, pytest.raises(ConnectionRefusedError):
                said(sock)
        with (
            connect(world.pods[1], POD1, CLOSED_PORT, 0.5, socket.SOCK_DGRAM) as sock,
            pytest.raises(ConnectionRefusedError),
        ):
            said(sock)  # of a pod's own
        await kernel.remove()


async def test_strict_reverse_path_filters_do_no_harm(world: ServiceLab, kernel: NftKernel | IptablesKernel) -> None:
    for device in ("all", "eth0", "cni0"):
        world.node.set_knob(f"ipv4/conf/{device}/rp_filter", 1)
    with world.node.inside():
        await kernel.load(TRANSPARENT.update())
        assert [seen_by_backend(*pair) for pair in PAIRS] == [client for client, _ in PAIRS]
        await kernel.remove()
    for device in ("all", "eth0", "cni0"):
        world.node.set_knob(f"ipv4/conf/{device}/rp_filter", 0)


async def test_open_connections_outlive_a_change_and_another_process_that_loads_the_same(world: ServiceLab) -> None:
    first, second = NftKernel(), NftKernel()
    with world.node.inside():
        await first.load(TRANSPARENT.update())
        with dial_as(POD2, POD1, socket.SOCK_STREAM) as sock:
            await first.load(Redirects(refuse_port=REFUSE_PORT + 1, transparent=True).update())
            assert said(sock) == POD2
            await second.load(TRANSPARENT.update())
            assert said(sock) == POD2
            await second.reload()
            assert said(sock) == POD2
        first.unwatch()
        await second.remove()


async def test_pods_that_talk_directly_are_left_on_their_bridge(world: ServiceLab) -> None:
    """The replies do not pass a firewall that drops packets of unknown connections, as kube-proxy's rules do."""
    kernel = NftKernel()
    for language in ("iptables", "ip6tables"):
        world.node.set_knob(f"bridge/bridge-nf-call-{language}", 0)
    world.node.run(
        "nft",
        "table inet fw { chain c { type filter hook forward priority 0; ct state invalid drop; counter drop; }; }",
    )
    with world.node.inside():
        await kernel.load(TRANSPARENT.update())
        assert seen_by_backend(POD2, POD1) == POD2
        with connect(world.pods[1], POD1, PORT, 0.5) as sock:
            assert said(sock) == POD2
        await kernel.remove()
    world.node.run("nft", "delete table inet fw")


def rules_and_routes(host: Host) -> str:
    return "".join(host.ip(family, what, "show", *more) for family in ("-4", "-6") for what, more in _SHOWN)


_SHOWN = (("rule", ()), ("route", ("table", "all")))


async def test_the_routes_come_once_and_go_and_those_of_others_stay(world: ServiceLab) -> None:
    theirs = ("priority", "10777", "fwmark", "0x1/0x1", "lookup", "10778")
    world.node.ip("rule", "add", *theirs)
    before = rules_and_routes(world.node)
    with world.node.inside():
        await answers.add_transparent_routes()
        once = rules_and_routes(world.node)
        await answers.add_transparent_routes()
        assert rules_and_routes(world.node) == once != before

        for _ in range(2):
            await answers.remove_transparent_routes()
        assert rules_and_routes(world.node) == before
    world.node.ip("rule", "del", *theirs)


async def test_when_no_listener_is_transparent_any_more_nothing_is_left(
    world: ServiceLab, kernel: NftKernel | IptablesKernel
) -> None:
    before = rules_and_routes(world.node)
    with world.node.inside():
        await kernel.load(TRANSPARENT.update())
        await kernel.load(OPAQUE.update())

        assert rules_and_routes(world.node) == before
        assert "bridge" not in world.node.run("nft", "list", "tables").stdout
        assert await kernel.is_intact()
        await kernel.remove()


@pytest.mark.parametrize("language", KERNELS)
async def test_src_valid_mark_is_reported_as_an_obstacle_to_transparent_clients(
    world: ServiceLab, language: str
) -> None:
    with world.node.inside():
        assert await answers.transparent_obstacles(language) == []

        world.node.set_knob("ipv4/conf/all/src_valid_mark", 1)
        (found,) = await answers.transparent_obstacles(language)
        world.node.set_knob("ipv4/conf/all/src_valid_mark", 0)

    assert "src_valid_mark to 0 for all" in found
