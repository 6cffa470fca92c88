"""How packets reach the proxy, and what can prevent it."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.net.world import Proxy, answers, ask_udp, documents, endpoints, is_refused, service, wait_until
from userspace_proxy.lab import Host, Lab, ServiceLab, ask

POD1 = ServiceLab.pod_ip(0)
UNNUMBERED_IP = "10.245.0.2"


@pytest.fixture
def serving(fresh_proxy: Proxy) -> Proxy:
    ports = "[{name: http, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP}]"
    fresh_proxy.apply("web", documents(service("web", "10.96.5.1", ports, "  type: NodePort"), endpoints("web", POD1)))
    fresh_proxy.apply("six", documents(service("six", "fd00:96::5"), endpoints("six", ServiceLab.pod_ip6(0))))
    return fresh_proxy


@pytest.fixture
def bare() -> Iterator[Host]:
    """A host whose link to the node is made by `plug`, after Calico's pattern."""
    with Lab() as lab:
        yield lab.add("bare")


def plug(world: ServiceLab, bare: Host) -> None:
    """Connect *bare* to the node by a veth without any IPv4 address at the node's end."""
    node = world.node
    node.ip("link", "add", "cali1", "type", "veth", "peer", "name", "eth0", "netns", bare.name)
    node.ip("link", "set", "cali1", "up")
    bare.ip("link", "set", "eth0", "up")
    bare.ip("address", "add", f"{UNNUMBERED_IP}/32", "dev", "eth0")
    bare.ip("route", "add", "169.254.1.1", "dev", "eth0", "scope", "link")
    bare.ip("route", "add", "default", "via", "169.254.1.1")
    # Where Calico answers ARP by proxy, the neighbour is simply stated.
    (link,) = json.loads(node.ip("-json", "link", "show", "cali1"))
    bare.ip("neighbour", "replace", "169.254.1.1", "lladdr", link["address"], "dev", "eth0")
    node.ip("route", "add", UNNUMBERED_IP, "dev", "cali1", "scope", "link")


@pytest.mark.parametrize("rules", ["nftables", "iptables"])
def test_a_pod_at_an_interface_without_address_is_served(
    serving: Proxy, world: ServiceLab, bare: Host, rules: str
) -> None:
    plug(world, bare)
    serving.rules = rules

    serving.start()

    assert ask(bare, "10.96.5.1") == "pod1"
    assert ask_udp(bare, "10.96.5.1") == "pod1"
    assert ask(world.client, "10.96.5.1") == ask(world.node, "10.96.5.1") == "pod1"
    assert ask_udp(world.client, "10.96.5.1") == ask_udp(world.node, "10.96.5.1") == "pod1"
    assert ask(world.client, "fd00:96::5") == ask(world.node, "fd00:96::5") == "pod1"
    assert ask(world.node, "127.0.0.1", 30080) == ask(world.client, "192.168.50.1", 30080) == "pod1"
    assert is_refused(world.client, "192.168.50.1", serving.proxy_port("default/web:http"))
    serving.wait_logged("cali1 has no IPv4 address")
    serving.stop()
    assert "169.254.77.7" not in world.node.ip("address")


@pytest.mark.parametrize("rules", ["nftables", "iptables"])
@pytest.mark.parametrize(("family", "ip"), [("-4", "10.96.5.1"), ("-6", "fd00:96::5")])
def test_a_routing_rule_for_replies_that_another_program_removes_is_added_again(
    serving: Proxy, world: ServiceLab, rules: str, family: str, ip: str
) -> None:
    """As systemd-networkd does when it starts again: it removes rules that it did not make."""
    serving.rules = rules
    serving.start("--source-ip", "transparent")
    assert ask(world.client, ip) == "pod1"

    world.node.ip(family, "rule", "del", "priority", "10777")

    wait_until(lambda: answers(world.client, ip, 80) == "pod1", "clients are served again")
    serving.wait_logged("our rules were removed or changed by another program")


def test_a_kernel_mode_needs_no_private_address(serving: Proxy, world: ServiceLab, bare: Host) -> None:
    plug(world, bare)

    serving.start("--proxy-mode", "nftables")

    assert ask(bare, "10.96.5.1") == "pod1"
    assert "has no IPv4 address" not in serving.log()
    assert "169.254.77.7" not in world.node.ip("address")


def test_an_interface_without_address_that_comes_later_is_noticed(
    serving: Proxy, world: ServiceLab, bare: Host
) -> None:
    serving.start()
    assert ask(world.client, "10.96.5.1") == "pod1"

    plug(world, bare)

    wait_until(lambda: answers(bare, "10.96.5.1", 80) == "pod1", "the pod at it is served")
    assert ask(world.client, "10.96.5.1") == "pod1"


@pytest.mark.parametrize(
    "firewall",
    ["nft", "iptables"],
)
def test_a_firewall_that_would_drop_the_traffic_is_named_with_the_fix(
    serving: Proxy, world: ServiceLab, firewall: str
) -> None:
    if firewall == "nft":
        world.node.run(
            "nft",
            "table inet filter { chain input { type filter hook input priority 0; policy drop; iif lo accept; }; }",
        )
    else:
        world.node.run("iptables", "-P", "INPUT", "DROP")
        world.node.run("iptables", "-I", "INPUT", "-i", "lo", "-j", "ACCEPT")
    try:
        serving.start()
        wait_until(lambda: "a firewall on this node drops redirected traffic" in serving.log(), "it is named")
        line = next(line for line in serving.log().splitlines() if "firewall" in line)
        fix = line.split("`")[1]
        world.node.run(*fix.split())
        # Replies of backends are no business of this firewall's test: they come back as established.
        world.node.run("nft", "insert rule ip filter INPUT ct state established accept", check=False)
        world.node.run("nft", "insert rule inet filter input ct state established accept", check=False)

        wait_until(lambda: answers(world.client, "10.96.5.1", 80) == "pod1", "the printed command lets clients in")
    finally:
        world.node.run("nft", "delete table inet filter", check=False)
        world.node.run("iptables", "-P", "INPUT", "ACCEPT")
        world.node.run("iptables", "-F", "INPUT")


def test_a_foreign_dnat_into_a_proxy_port_is_refused(serving: Proxy, world: ServiceLab) -> None:
    serving.start()
    port = serving.proxy_port("default/web:http")
    world.node.run(
        "nft",
        "table ip theirs { chain pre { type nat hook prerouting priority -100; "
        f"ip daddr 203.0.113.9 tcp dport 80 redirect to :{port}; }}; }}",
    )
    try:
        assert answers(world.client, "203.0.113.9", 80) == ""
        assert serving.metric("userspace_proxy_refused_connections_total", service="web") == 1
    finally:
        world.node.run("nft", "delete table ip theirs")
