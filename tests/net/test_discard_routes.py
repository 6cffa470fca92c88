"""No packet for a Service is forwarded by the interface that it came in by, nor is its sender redirected."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.net.world import POD1, Proxy, answers, documents, endpoints, service, udp_socket, wait_until
from userspace_proxy.lab import Host, ServiceLab

GATEWAY = {4: "192.168.50.254", 6: "fd00:50::fe"}
STRAYS = """
table inet strays {
    counter forwarded { }
    counter redirects { }
    counter last { }
    chain p {
        type filter hook prerouting priority -400
        ip daddr 192.0.2.99 counter name last drop
    }
    chain f {
        type filter hook forward priority -300
        iifname "eth0" oifname "eth0" counter name forwarded
    }
    chain o {
        type filter hook output priority -300
        oifname "eth0" icmp type redirect counter name redirects
        oifname "eth0" icmpv6 type nd-redirect counter name redirects
    }
}
"""
WAYS = {
    "userspace-nftables": ("--rules", "nftables"),
    "userspace-iptables": ("--rules", "iptables"),
    "nftables": ("--proxy-mode", "nftables"),
    "iptables": ("--proxy-mode", "iptables"),
}
SERVED = {4: "10.96.8.1", 6: "fd00:96::8:1"}
UNALLOCATED = ("10.96.77.7", "fd00:96::77")
EXTERNAL = ("203.0.113.8", "2001:db8::8")
POOLED = "198.51.100.9"
RANGES = ("--service-cluster-ip-range", "10.96.0.0/16,fd00:96::/64", "--load-balancer-pool", "198.51.100.0/28")


@pytest.fixture
def node(world: ServiceLab) -> Iterator[Host]:
    """The node, with a default route by a gateway in its clients' network."""
    node = world.node
    for version, gateway in GATEWAY.items():
        node.ip("neighbour", "replace", gateway, "lladdr", "02:00:00:00:00:fe", "dev", "eth0", "nud", "permanent")
        node.ip(f"-{version}", "route", "add", "default", "via", gateway)
    node.run("nft", "-f", "-", stdin=STRAYS)
    try:
        yield node
    finally:
        node.run("nft", "delete", "table", "inet", "strays")
        for version, gateway in GATEWAY.items():
            node.ip(f"-{version}", "route", "del", "default")
            node.ip("neighbour", "del", gateway, "dev", "eth0")


@pytest.fixture
def strays(node: Host, world: ServiceLab) -> Callable[[], int]:
    """Returns how many packets were forwarded by where they came from, or led to a redirect, since the last call.

    A packet behind the client's others tells when they have arrived: a busy machine's ksoftirqd may take its time. The
    counters are not reset, as `nft reset` fails if the proxy changes rules meanwhile, where `nft list` begins again.
    """
    before: dict[str, int] = dict.fromkeys(("forwarded", "redirects", "last"), 0)

    def counted() -> dict[str, int]:
        said = json.loads(node.run("nft", "--json", "list", "counters", "table", "inet", "strays").stdout)
        return {item["counter"]["name"]: item["counter"]["packets"] for item in said["nftables"] if "counter" in item}

    def since_the_last_call() -> int:
        with world.client.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"last", ("192.0.2.99", 9))
        wait_until(lambda: counted()["last"] > before["last"], "all packets have arrived")
        now = counted()
        came = sum(now[name] - before[name] for name in ("forwarded", "redirects"))
        before.update(now)
        return came

    return since_the_last_call


def try_all(client: Host, *ips: str) -> None:
    """Send a datagram and a SYN to a port of each of *ips*; nothing answers."""
    for ip in ips:
        with contextlib.suppress(OSError), udp_socket(client, ip, 53) as sock:
            sock.send(b"who")
        with client.inside(), socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET) as sock:
            sock.setblocking(False)
            sock.connect_ex((ip, 80))


@pytest.mark.parametrize("way", WAYS)
def test_unserved_packets_are_not_forwarded_back(
    node: Host, world: ServiceLab, fresh_proxy: Proxy, strays: Callable[[], int], way: str
) -> None:
    for version, ip, pod in ((4, SERVED[4], POD1), (6, SERVED[6], ServiceLab.pod_ip6(0))):
        extra = f'  externalIPs: ["{EXTERNAL[version // 6]}"]'
        fresh_proxy.apply(
            f"web{version}", documents(service(f"web{version}", ip, extra=extra), endpoints(f"web{version}", pod))
        )
    fresh_proxy.start(*RANGES, *WAYS[way])
    strays()

    # Served, at every portal; and from the node itself, whose packets are routed before they are translated.
    assert {answers(world.client, ip, 80) for ip in (*SERVED.values(), *EXTERNAL)} == {"pod1"}
    assert {answers(node, ip, 80) for ip in (*SERVED.values(), *EXTERNAL)} == {"pod1"}
    # Addresses that no Service has, and ports that none has.
    try_all(world.client, *UNALLOCATED, POOLED)
    for ip in EXTERNAL:
        with udp_socket(world.client, ip, 99) as sock:
            sock.send(b"who")
    assert strays() == 0

    # A Service that is away.
    for version in SERVED:
        fresh_proxy.delete(f"web{version}")
    wait_until(lambda: "web4" not in fresh_proxy.rules_text(), "it is gone")
    try_all(world.client, *SERVED.values(), *EXTERNAL)
    assert strays() == 0

    # The gap of a restart.
    assert fresh_proxy.stop() == 0
    try_all(world.client, *SERVED.values(), *EXTERNAL, *UNALLOCATED, POOLED)
    assert strays() == 0

    node.run(*fresh_proxy.command("cleanup"))
    assert "1077" not in node.ip("rule") + node.ip("-6", "rule")
    assert "107" not in node.ip("route", "show", "table", "all", "proto", "107")
    try_all(world.client, *UNALLOCATED)
    assert strays() > 0, "the test sees strays"


@pytest.mark.parametrize("version", ["-4", "-6"])
def test_routing_rules_that_another_program_removes_are_added_again(
    node: Host, fresh_proxy: Proxy, version: str
) -> None:
    """As systemd-networkd does when it starts again: it removes rules that it did not make."""

    def rules() -> list[str]:
        return sorted(node.ip(version, "rule").splitlines())

    fresh_proxy.start(*RANGES)
    before = rules()
    for priority in ("10778", "10779"):
        node.ip(version, "rule", "del", "priority", priority)
    assert rules() != before

    wait_until(lambda: rules() == before, "the rules are back")


def test_networks_inside_of_the_range_are_reached_as_before(node: Host, world: ServiceLab, fresh_proxy: Proxy) -> None:
    node.ip("route", "add", "10.96.200.0/24", "via", ServiceLab.pod_ip(1))
    world.pods[1].ip("address", "add", "10.96.200.1/32", "dev", "lo")
    try:
        fresh_proxy.start()
        assert answers(world.client, "10.96.200.1", 8080) == "pod2"
        fresh_proxy.stop()
        assert answers(world.client, "10.96.200.1", 8080) == "pod2"
    finally:
        world.pods[1].ip("address", "del", "10.96.200.1/32", "dev", "lo")
        node.ip("route", "del", "10.96.200.0/24")


def test_the_route_of_a_deleted_service_outside_of_the_ranges_goes_with_it(
    world: ServiceLab, fresh_proxy: Proxy
) -> None:
    fresh_proxy.apply(
        "web", documents(service("web", "10.96.8.2", extra='  externalIPs: ["203.0.113.8"]'), endpoints("web", POD1))
    )
    fresh_proxy.start()
    assert answers(world.node, "203.0.113.8", 80) == "pod1"

    fresh_proxy.delete("web")

    wait_until(lambda: "203.0.113.8" not in world.node.ip("route", "show", "proto", "107"), "its route is gone")
    assert "10.96.0.0/16" in world.node.ip("route", "show", "proto", "107")
