"""Where packets to portals arrive, by kind and sender: in both rule languages, with real packets."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.modes.redirect_cases import ANY4, ANY6, REFUSE_PORT, TCP, UDP, Redirects
from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.lab import Host, Lab, ServiceLab, connect
from userspace_proxy.lab.hosts import CLIENT_IP, NODE_IP, NODE_IP6, build_service_lab
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.redirects import DROPPED, Capture, PodDetector
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.userspace import iptables, nft
from userspace_proxy.netfilter.nft_text import removal

# The proxy ports at which somebody listens, for TCP and UDP.
FOR_ALL, FOR_PODS, FOR_NODE = 10_001, 10_002, 10_003
VIP4, VIP6 = "10.96.0.1", "fd00:96::1"
OTHER_NODE_IP = "192.168.51.1"
DROPPED_SAID, REFUSED_SAID = "dropped", "refused"
_SILENCE_S = 0.3
# Says its port's number; over UDP from the address that was asked, as the data plane does.
_SERVER = """
import contextlib, socket, sys, threading
port = int(sys.argv[1])
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
udp.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
udp.bind(("::", port))
tcp = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
def serve_udp():
    while True:
        _, told, _, client = udp.recvmsg(64, 256)
        udp.sendmsg([b"%d" % port], [(level, kind, data[:16] + bytes(4)) for level, kind, data in told], 0, client)
threading.Thread(target=serve_udp, daemon=True).start()
while True:
    client, _ = tcp.accept()
    with client, contextlib.suppress(OSError):
        client.sendall(b"%d" % port)
"""


@pytest.fixture(scope="module")
def world() -> Iterator[ServiceLab]:
    """A client, a node and a pod; servers at the node's proxy ports send the port's number."""
    with Lab() as lab:
        world = build_service_lab(lab, pods=1)
        node = world.node
        for ip4_or_6, network in (("-4", "10.96.0.0/16"), ("-6", "fd00:96::/64")):
            node.ip(ip4_or_6, "route", "add", network, "dev", "lo")
        node.ip("address", "add", f"{OTHER_NODE_IP}/32", "dev", "eth0")
        for address in (LOCAL_ADDRESS4, LOCAL_ADDRESS6):
            node.ip("address", "add", address, "dev", "lo")
        for port in (FOR_ALL, FOR_PODS, FOR_NODE):
            node.start(sys.executable, "-c", _SERVER, str(port))
            while led_to(node, "127.0.0.1", port) != port:
                pass
        yield world


@pytest.fixture(params=["nftables", "iptables"])
def load(request: pytest.FixtureRequest, world: ServiceLab) -> Iterator[Loader]:
    loader = Loader(world.node, request.param)
    yield loader
    loader.remove()


class Loader:
    """Loads redirects on a host, whatever was loaded before."""

    def __init__(self, host: Host, language: str) -> None:
        self._host, self._language = host, language

    def __call__(self, redirects: Redirects) -> None:
        self._host.run("conntrack", "-F")  # a datagram from a port that was used before must not go the way of then
        if self._language == "nftables":
            self._host.run("nft", "-f", "-", stdin=redirects.nft())
            return
        self._restore("iptables", redirects.iptables(4, self._host.run("iptables-save").stdout))
        self._restore("ip6tables", redirects.iptables(6, self._host.run("ip6tables-save").stdout))

    def remove(self) -> None:
        if self._language == "nftables":
            self._host.run("nft", "-f", "-", stdin=removal(nft.TABLE))
            return
        for prefix in ("iptables", "ip6tables"):
            self._restore(prefix, iptables.removal(self._host.run(f"{prefix}-save").stdout))

    def _restore(self, prefix: str, script: str) -> None:
        self._host.run(f"{prefix}-restore", "--noflush", stdin=script)


def led_to(host: Host, ip: str, port: int, protocol: L4Protocol = TCP) -> int | str:
    """Return the proxy port that answers *host*, or how the request failed."""
    kind = socket.SOCK_STREAM if protocol is TCP else socket.SOCK_DGRAM
    try:
        with connect(host, ip, port, _SILENCE_S, kind) as sock:
            if protocol is UDP:
                sock.send(b"who")
            return int(sock.recv(64))
    except TimeoutError:
        return DROPPED_SAID
    except OSError as error:
        if error.errno == errno.EPERM and protocol is UDP:
            return DROPPED_SAID  # what the node itself sends is not lost without a word
        if error.errno == errno.ECONNREFUSED:
            return REFUSED_SAID
        raise


def both(ip: str, port: int, to: int) -> dict[Portal, int]:
    return {Portal(ip, port, protocol): to for protocol in (TCP, UDP)}


BOTH_FAMILIES = both(VIP4, 80, FOR_ALL) | both(VIP6, 80, FOR_ALL) | both(ANY4, 30_080, FOR_ALL)
BOTH_FAMILIES |= both(ANY6, 30_080, FOR_ALL)
PODS = PodDetector(cidrs=("10.244.0.0/24", "fd00:244::/64"))
TARGETS = [(VIP4, 80), (VIP6, 80), (NODE_IP, 30_080), (NODE_IP6, 30_080)]


@pytest.mark.parametrize("capture", Capture)
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_packets_of_all_senders_go_to_the_portals_proxy_port(
    world: ServiceLab, load: Loader, protocol: L4Protocol, capture: Capture
) -> None:
    load(Redirects(BOTH_FAMILIES, refuse_port=REFUSE_PORT, capture=capture))

    for host in (world.client, world.pods[0], world.node):
        assert [led_to(host, *target, protocol) for target in TARGETS] == [FOR_ALL] * 4, host.name
    loopback = [("127.0.0.1", 30_080), ("::1", 30_080), (OTHER_NODE_IP, 30_080)]
    assert [led_to(world.node, *target, protocol) for target in loopback] == [FOR_ALL] * 3


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_dropped_portals_do_not_answer_and_others_do(world: ServiceLab, load: Loader, protocol: L4Protocol) -> None:
    silent = (
        both(VIP4, 80, DROPPED) | both(VIP6, 80, DROPPED) | both(ANY4, 30_080, DROPPED) | both(ANY6, 30_080, DROPPED)
    )
    load(Redirects(silent | both(VIP4, 81, FOR_ALL) | both(VIP4, 82, REFUSE_PORT), refuse_port=REFUSE_PORT))

    for host in (world.client, world.pods[0], world.node):
        assert {led_to(host, *target, protocol) for target in TARGETS} == {DROPPED_SAID}, host.name
        assert led_to(host, VIP4, 81, protocol) == FOR_ALL
        assert led_to(host, VIP4, 82, protocol) == REFUSED_SAID


@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize("pods", [PODS, PodDetector(interface="cni*"), PodDetector(interface="cni0")], ids=str)
def test_pods_and_the_node_itself_meet_their_exceptions(
    world: ServiceLab, load: Loader, pods: PodDetector, protocol: L4Protocol
) -> None:
    load(
        Redirects(
            BOTH_FAMILIES,
            refuse_port=REFUSE_PORT,
            pods=pods,
            exceptions={
                Sender.POD: dict.fromkeys(BOTH_FAMILIES, FOR_PODS),
                Sender.NODE: dict.fromkeys(BOTH_FAMILIES, FOR_NODE),
            },
        )
    )

    for host, port in ((world.client, FOR_ALL), (world.pods[0], FOR_PODS), (world.node, FOR_NODE)):
        assert [led_to(host, *target, protocol) for target in TARGETS] == [port] * 4, host.name
    assert [led_to(world.node, ip, 30_080, protocol) for ip in ("127.0.0.1", "::1")] == [FOR_NODE] * 2


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_an_exception_may_drop_and_may_be_made_from_a_drop(
    world: ServiceLab, load: Loader, protocol: L4Protocol
) -> None:
    load(
        Redirects(
            dict.fromkeys(BOTH_FAMILIES, DROPPED),
            refuse_port=REFUSE_PORT,
            pods=PODS,
            exceptions={
                Sender.POD: dict.fromkeys(BOTH_FAMILIES, FOR_PODS),
                Sender.NODE: dict.fromkeys(BOTH_FAMILIES, REFUSE_PORT),
            },
        )
    )
    for host, said in ((world.client, DROPPED_SAID), (world.pods[0], FOR_PODS), (world.node, REFUSED_SAID)):
        assert {led_to(host, *target, protocol) for target in TARGETS} == {said}, host.name

    load(
        Redirects(
            BOTH_FAMILIES,
            refuse_port=REFUSE_PORT,
            pods=PODS,
            exceptions={Sender.POD: dict.fromkeys(BOTH_FAMILIES, DROPPED)},
        )
    )
    for host, said in ((world.client, FOR_ALL), (world.pods[0], DROPPED_SAID), (world.node, FOR_ALL)):
        assert {led_to(host, *target, protocol) for target in TARGETS} == {said}, host.name


def test_the_node_comes_before_pods_where_its_address_is_one_of_theirs(world: ServiceLab, load: Loader) -> None:
    """The node's own address on the pods' bridge is in their CIDR."""
    portal = Portal("10.244.0.1", 80, TCP)
    exceptions = {Sender.POD: {portal: FOR_PODS}, Sender.NODE: {portal: FOR_NODE}}
    load(Redirects({portal: FOR_ALL}, refuse_port=REFUSE_PORT, pods=PODS, exceptions=exceptions))

    assert led_to(world.node, "10.244.0.1", 80) == FOR_NODE
    assert led_to(world.pods[0], "10.244.0.1", 80) == FOR_PODS


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_only_clients_in_a_range_may_dial_and_ranges_may_overlap(
    world: ServiceLab, load: Loader, protocol: L4Protocol
) -> None:
    ranges = ("192.168.50.0/24", "192.168.50.0/25", f"{CLIENT_IP}/32", "fd00:50::/64", "fd00::/48", "203.0.113.0/24")
    restricted = both(VIP4, 80, FOR_ALL) | both(VIP6, 80, FOR_ALL)
    wanted = Redirects(
        BOTH_FAMILIES | both(VIP4, 81, FOR_ALL),
        refuse_port=REFUSE_PORT,
        allowed=dict.fromkeys(restricted, ranges),
        exceptions={Sender.POD: restricted},
        pods=PODS,
    )
    load(wanted)

    assert [led_to(world.client, *target, protocol) for target in TARGETS] == [FOR_ALL] * 4
    assert [led_to(world.pods[0], *target, protocol) for target in TARGETS] == [DROPPED_SAID] * 2 + [FOR_ALL] * 2
    assert led_to(world.pods[0], VIP4, 81, protocol) == FOR_ALL

    load(replace(wanted, allowed=dict.fromkeys(restricted, ("0.0.0.0/0", "10.0.0.0/8"))))
    assert led_to(world.pods[0], VIP4, 80, protocol) == FOR_ALL
    assert led_to(world.pods[0], VIP6, 80, protocol) == DROPPED_SAID


def test_node_ports_are_served_at_the_chosen_addresses_only(world: ServiceLab, load: Loader) -> None:
    wanted = Redirects(BOTH_FAMILIES, refuse_port=REFUSE_PORT, node_ports_on=("192.168.50.0/24", "192.168.50.1/32"))
    load(wanted)

    at = [(NODE_IP, 30_080), (OTHER_NODE_IP, 30_080), ("127.0.0.1", 30_080), (NODE_IP6, 30_080), ("::1", 30_080)]
    asked = [led_to(world.node, *target) for target in at]
    assert asked == [FOR_ALL, REFUSED_SAID, REFUSED_SAID, FOR_ALL, FOR_ALL]
    assert [led_to(world.client, *target) for target in at[:2]] == [FOR_ALL, REFUSED_SAID]

    load(replace(wanted, node_ports_on=("192.168.50.0/24", "0.0.0.0/0", "fd00:50::/64")))
    asked = [led_to(world.node, *target) for target in at]
    assert asked == [FOR_ALL, FOR_ALL, FOR_ALL, FOR_ALL, REFUSED_SAID]


def test_a_dropped_node_port_does_not_drop_a_service_at_the_same_port_of_a_node_address(
    world: ServiceLab, load: Loader
) -> None:
    external = Portal(OTHER_NODE_IP, 30_080, TCP)
    load(Redirects({Portal(ANY4, 30_080, TCP): DROPPED, external: FOR_ALL}, refuse_port=REFUSE_PORT))

    assert led_to(world.client, OTHER_NODE_IP, 30_080) == FOR_ALL
    assert led_to(world.client, NODE_IP, 30_080) == DROPPED_SAID


@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_no_proxy_port_can_be_dialled_as_such(world: ServiceLab, load: Loader, protocol: L4Protocol) -> None:
    exceptions = {Sender.POD: both(VIP4, 80, FOR_PODS)}
    load(Redirects(both(VIP4, 80, FOR_ALL), refuse_port=REFUSE_PORT, pods=PODS, exceptions=exceptions))

    for host in (world.client, world.pods[0], world.node):
        asked = {led_to(host, NODE_IP, port, protocol) for port in (FOR_ALL, FOR_PODS, REFUSE_PORT)}
        assert asked == {REFUSED_SAID}, host.name
