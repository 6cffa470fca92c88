"""Routes for clients on the node, the private address, and interfaces without one."""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import json
import os
import resource
import socket
from pathlib import Path

import pytest

from userspace_proxy.errors import SyncError
from userspace_proxy.host import network, rtnetlink
from userspace_proxy.host.network import missing_routes, unnumbered_interfaces
from userspace_proxy.host.rtnetlink import HostAddress, HostRoute, Interface, Network
from userspace_proxy.lab import Lab, ip


def networks(*texts: str) -> list[Network]:
    return [ipaddress.ip_network(text) for text in texts]


# ---- routes


@pytest.mark.parametrize(
    ("wanted", "routes", "missing"),
    [
        (["10.96.0.0/16"], [], ["10.96.0.0/16"]),
        (["10.96.0.0/16"], ["0.0.0.0/0"], []),
        (["10.96.0.0/16"], ["10.0.0.0/8"], []),
        (["10.96.0.0/16"], ["10.96.0.0/16"], []),
        (["10.96.0.0/16"], ["10.96.0.0/17", "10.96.128.0/18"], ["10.96.0.0/16"]),
        (["10.96.0.0/16"], ["::/0", "192.168.50.1"], ["10.96.0.0/16"]),
        (["fd00:96::/112"], ["0.0.0.0/0", "fd00::/16"], []),
        (["fd00:96::/112"], ["fe80::/64"], ["fd00:96::/112"]),
        (["172.30.0.1/32", "10.96.0.5/32", "10.96.0.0/16"], [], ["10.96.0.0/16", "172.30.0.1/32"]),
        (["10.96.0.0/16", "10.96.0.0/16"], [], ["10.96.0.0/16"]),
        ([], ["0.0.0.0/0"], []),
    ],
)
def test_only_what_no_route_covers_is_missing_and_the_widest_is_enough(
    wanted: list[str], routes: list[str], missing: list[str]
) -> None:
    assert missing_routes(networks(*wanted), routes) == networks(*missing)


def test_ten_thousand_addresses_are_not_compared_each_with_each(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = networks(*(f"10.100.{number // 256}.{number % 256}/32" for number in range(10_000)))
    looked_up = itertools.count()
    leading_bits = network.leading_bits

    def counted(of: Network, length: int) -> tuple[int, int, int]:
        next(looked_up)
        return leading_bits(of, length)

    monkeypatch.setattr(network, "leading_bits", counted)
    monkeypatch.setattr(ipaddress.IPv4Network, "subnet_of", None)

    assert len(missing_routes(addresses, ["10.101.0.0/16"])) == 10_000
    assert next(looked_up) <= 35 * 10_000


def destinations(version: str) -> set[str]:
    return {
        route["dst"]
        for route in json.loads(ip("-json", version, "route", "show", "proto", network.ROUTE_PROTOCOL) or "[]")
    }


async def test_routes_are_added_once_and_only_ours_are_removed() -> None:
    ip("route", "add", "10.97.0.0/16", "dev", "lo")
    try:
        first = await network.add_routes(networks("10.96.0.0/16", "10.97.3.0/24", "fd00:96::/112"))
        again = await network.add_routes(networks("10.96.0.0/16", "10.97.3.0/24", "fd00:96::/112"))
        assert (first, again) == (networks("10.96.0.0/16", "fd00:96::/112"), [])
        assert (destinations("-4"), destinations("-6")) == ({"10.96.0.0/16"}, {"fd00:96::/112"})

        await network.remove_routes()
        await network.remove_routes()

        assert (destinations("-4"), destinations("-6")) == (set(), set())
        assert "10.97.0.0/16" in ip("route", "show")
    finally:
        ip("route", "del", "10.97.0.0/16", "dev", "lo")


@pytest.mark.parametrize("kind", ["blackhole", "unreachable", "prohibit"])
async def test_a_route_that_leads_nowhere_covers_nothing(kind: str) -> None:
    ip("route", "add", kind, "10.0.0.0/8")
    try:
        assert await network.add_routes(networks("10.96.0.0/16")) == networks("10.96.0.0/16")
    finally:
        await network.remove_routes()
        ip("route", "del", kind, "10.0.0.0/8")


# ---- the private address


async def test_the_private_addresses_come_and_go_and_both_may_be_repeated() -> None:
    for _ in range(2):
        await network.add_local_addresses()
    held = ip("address", "show", "dev", "lo")
    assert (held.count("169.254.77.7/32"), held.count("fd00:77::7/128")) == (1, 1)

    for _ in range(2):
        await network.remove_local_addresses()

    held = ip("address", "show", "dev", "lo")
    assert "169.254.77.7" not in held
    assert "fd00:77::7" not in held
    assert "127.0.0.1" in held


# ---- interfaces without an address


def link(name: str, *ips: str, flags: int = 0, has_master: bool = False) -> Interface:
    return Interface(
        name, flags, 0, "", has_master, tuple(HostAddress(ip, 24, rtnetlink.SCOPE_GLOBAL, 0) for ip in ips)
    )


def route(destination: str, device: str = "", kind: int = 1) -> HostRoute:
    return HostRoute(ipaddress.ip_network(destination), kind, rtnetlink.TABLE_MAIN, device, 0, "")


@pytest.mark.parametrize(
    ("given", "to", "unnumbered"),
    [
        (link("cali0", "fe80::1"), route("10.244.0.2", "cali0"), ["cali0"]),
        (link("eth0", "fe80::1", "192.0.2.1"), route("0.0.0.0/0", "eth0"), []),
        (link("cali0"), route("0.0.0.0/0", "eth0"), []),
        (link("lo", flags=rtnetlink.IS_LOOPBACK), route("10.0.0.1", "lo"), []),
        (link("veth0", has_master=True), route("10.0.0.1", "veth0"), []),
        (link("tun0"), route("10.0.0.1", "tun0"), ["tun0"]),
        (link("eth0"), route("10.0.0.0/8", kind=rtnetlink.BLACKHOLE), []),
    ],
)
def test_an_interface_with_routes_and_no_address_is_unnumbered(
    given: Interface, to: HostRoute, unnumbered: list[str]
) -> None:
    assert unnumbered_interfaces([given], [to]) == unnumbered


async def test_this_namespace_has_no_such_interface() -> None:
    assert await network.find_unnumbered_interfaces() == []


# ---- conntrack


def test_the_time_outs_of_conntrack_are_read_in_seconds() -> None:
    unanswered_s, answered_s = network.conntrack_udp_timeouts()

    assert 0 < unanswered_s <= answered_s


def test_the_reserved_ports_of_this_host_are_read() -> None:
    knob = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    before = knob.read_text()
    knob.write_text("10300,10310-10312")
    try:
        assert network.reserved_ports() == {10300, 10310, 10311, 10312}
    finally:
        knob.write_text(before)
    assert network.reserved_ports() == frozenset()


# ---- addresses


async def test_the_addresses_and_networks_of_this_host_are_found() -> None:
    ip("link", "add", "left", "type", "veth", "peer", "name", "right")
    ip("address", "add", "192.0.2.9/24", "dev", "left")
    ip("address", "add", "192.0.2.77/32", "dev", "lo")
    try:
        own, networks = await network.look_at_networks()
        assert {"192.0.2.9", "192.0.2.77"} <= own
        assert ipaddress.ip_network("192.0.2.0/24") in networks
        assert ipaddress.ip_network("192.0.2.77/32") not in networks
    finally:
        ip("link", "del", "left")
        ip("address", "del", "192.0.2.77/32", "dev", "lo")


def test_the_listening_ports_of_this_host_are_found() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.create_connection(tcp.getsockname()) as client,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as udp,
    ):
        udp.bind(("::1", 0))
        found = network.listening_ports()

        assert {("TCP", tcp.getsockname()[1]), ("UDP", udp.getsockname()[1])} <= found
        assert ("TCP", client.getsockname()[1]) not in found


async def test_a_host_whose_addresses_cannot_be_read_is_not_one_without_addresses() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    await network.look_at_addresses()  # makes the thread that asks the kernel
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))  # no socket can be opened
    try:
        with pytest.raises(SyncError, match="Too many open files"):
            await network.look_at_addresses()
        assert await network.host_addresses() == ()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


async def test_the_addresses_of_the_interface_with_the_default_route_come_first() -> None:
    with Lab() as lab:
        host = lab.add("two-legs")
        for name, given4, given6 in (("bridge", "172.17.0.1", "fd00:17::1"), ("uplink", "192.0.2.7", "fd00:2::7")):
            host.ip("link", "add", name, "type", "veth", "peer", "name", f"{name}-peer")
            for end in (name, f"{name}-peer"):
                host.ip("link", "set", end, "up")
            host.ip("address", "add", f"{given4}/24", "dev", name)
            host.ip("address", "add", f"{given6}/64", "dev", name, "nodad")
        host.ip("address", "add", "fd00:2::9/64", "dev", "uplink", "nodad", "valid_lft", "600", "preferred_lft", "0")
        with host.inside():
            host.ip("route", "add", "default", "via", "192.0.2.1")
            host.ip("-6", "route", "add", "default", "via", "fd00:2::1")
            found = await network.host_addresses()

    assert found == ("192.0.2.7", "fd00:2::7", "fd00:2::9", "172.17.0.1", "fd00:17::1"), "a deprecated one is last"


async def test_an_ipv6_address_is_this_hosts_once_no_other_host_can_have_it() -> None:
    with Lab() as lab:
        host = lab.add("detecting")
        for knob in ("all", "default"):
            host.set_knob(f"ipv6/conf/{knob}/accept_dad", 1)
        host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "peer")
        host.ip("link", "set", "eth0", "up")
        host.ip("address", "add", "fd00:2::7/64", "dev", "eth0")
        with host.inside():
            assert await network.host_addresses() == (), "without a carrier the detection cannot begin"
            host.ip("link", "set", "peer", "up")
            async with asyncio.timeout(20):
                while await network.host_addresses() != ("fd00:2::7",):
                    await asyncio.sleep(0.1)


async def test_the_private_addresses_of_this_proxy_are_not_those_of_the_host() -> None:
    with Lab() as lab:
        host = lab.add("capturing")
        host.ip("link", "add", "eth0", "type", "veth", "peer", "name", "peer")
        host.ip("address", "add", "192.0.2.7/24", "dev", "eth0")
        with host.inside():
            await network.add_local_addresses()
            found = await network.host_addresses()

    assert found == ("192.0.2.7",)
