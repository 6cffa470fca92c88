"""What the kernel tells by netlink is what ``ip`` prints."""

import asyncio
import ipaddress
import json
import socket
import subprocess
import sys

import pytest

from userspace_proxy import netlink
from userspace_proxy.errors import SyncError
from userspace_proxy.host import network, rtnetlink
from userspace_proxy.host.tool import run_tool
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.netfilter.conntrack import open_connections


def printed(host: Host, *arguments: str) -> list[dict[str, object]]:
    return json.loads(host.run("ip", "-json", *arguments).stdout or "[]")  # type: ignore[no-any-return]


def furnish(host: Host) -> None:
    """Give *host* each kind of interface, address, route and rule that the proxy looks at."""
    host.set_knob("ipv6/conf/default/accept_dad", 0)  # no address changes by itself
    for command in (
        "link add bridge0 type bridge",
        "link add left group 10777 type veth peer name right",
        "link set right master bridge0",
        *(f"link set {name} up" for name in ("bridge0", "left", "right")),
        "address add 192.0.2.7/24 dev left",
        "address add 192.0.2.8/24 dev left",
        "address add 198.51.100.1 peer 198.51.100.2/32 dev left",
        "address add fd00:2::7/64 dev left nodad",
        "address add fd00:2::9/64 dev left nodad valid_lft 600 preferred_lft 0",
        "address add 169.254.77.7/32 dev lo scope host",
        "route add default via 192.0.2.1 src 192.0.2.8 metric 7",
        "route add blackhole 10.96.0.0/16 table 10778 proto 107 metric 100",
        "route add 10.97.0.0/16 nexthop via 192.0.2.3 nexthop via 192.0.2.4",
        "route add unreachable 10.98.0.0/16",
        "-6 route add default via fd00:2::1 metric 9",
        "-6 route add throw fd00:96::/112 table 10778 proto 107",
        "rule add priority 9 to 10.0.0.0/8 lookup main",
        "rule add priority 10777 fwmark 0x1000/0x3000 lookup 10777",
        "-6 rule add priority 10 to fd00:96::/112 lookup main",
    ):
        host.run("ip", *command.split())


def test_interfaces_addresses_routes_and_rules_are_those_that_ip_prints() -> None:
    families: tuple[Family, ...] = (4, 6)
    with Lab() as lab:
        host = lab.add("furnished")
        furnish(host)
        with host.inside():
            interfaces = rtnetlink.interfaces()
            routes = {family: rtnetlink.routes(family) for family in families}
            of_proxy = {family: rtnetlink.routes(family, protocol=107) for family in families}
            defaults = {family: rtnetlink.routes(family, table=254, default_only=True) for family in families}
            rules = {family: rtnetlink.routing_rules(family) for family in families}
        links = printed(host, "-details", "address", "show")
        tables = {family: printed(host, "-N", f"-{family}", "route", "show", "table", "all") for family in families}
        listed_rules = {family: printed(host, "-N", f"-{family}", "rule", "show") for family in families}

    assert [(link.name, link.has_master, link.kind) for link in interfaces] == [
        (link["ifname"], "master" in link, link.get("linkinfo", {}).get("info_kind", ""))  # type: ignore[attr-defined]
        for link in links
    ]
    assert {link.name: link.group for link in interfaces if link.group} == {"left": 10_777}
    scopes = {"global": rtnetlink.SCOPE_GLOBAL, "link": rtnetlink.SCOPE_LINK, "host": 254}
    assert [
        (
            a.ip,
            a.prefix_length,
            a.scope,
            bool(a.flags & rtnetlink.IS_DEPRECATED),
            bool(a.flags & rtnetlink.IS_TENTATIVE),
        )
        for link in interfaces
        for a in link.addresses
    ] == [
        (a["local"], a["prefixlen"], scopes[a["scope"]], "deprecated" in a, "tentative" in a)
        for link in links
        for a in link["addr_info"]  # type: ignore[attr-defined]
    ]
    for family in families:
        everything = "0.0.0.0/0" if family == 4 else "::/0"
        assert sorted(
            (str(r.destination), r.table, r.device, r.metric, r.source, r.kind) for r in routes[family]
        ) == sorted(
            (
                str(ipaddress.ip_network(everything if r["dst"] == "default" else str(r["dst"]))),
                int(str(r.get("table", 254))),
                r.get("dev", ""),
                r.get("metric", 0),
                r.get("prefsrc", ""),
                int(str(r.get("type", 1))),
            )
            for r in tables[family]
        )
        assert [(r.priority, r.table) for r in rules[family]] == [
            (r["priority"], int(str(r["table"]))) for r in listed_rules[family]
        ]
    assert [str(r.destination) for family in families for r in of_proxy[family]] == ["10.96.0.0/16", "fd00:96::/112"]
    assert [(r.destination.prefixlen, r.metric, r.source) for r in defaults[4]] == [(0, 7, "192.0.2.8")]
    assert [(r.destination.prefixlen, r.metric, r.device) for r in defaults[6]] == [(0, 9, "left")]
    assert (0x1000, 0x3000) in [rule.mark for rule in rules[4]]
    assert [str(r.destination) for family in families for r in rules[family] if r.destination] == [
        "10.0.0.0/8",
        "fd00:96::/112",
    ]


def test_routes_of_one_table_are_listed_and_a_table_that_does_not_exist_has_none() -> None:
    with Lab() as lab:
        host = lab.add("tables")
        with host.inside():
            assert rtnetlink.routes(4, table=rtnetlink.TABLE_MAIN) == []
            host.ip("link", "set", "lo", "up")
            host.ip("route", "add", "10.96.0.0/16", "dev", "lo")
            host.ip("route", "add", "10.97.0.0/16", "dev", "lo", "table", "200")
            found = rtnetlink.routes(4, table=rtnetlink.TABLE_MAIN)
            others = rtnetlink.routes(4, table=200)

    assert [str(route.destination) for route in (*found, *others)] == ["10.96.0.0/16", "10.97.0.0/16"]


async def test_a_name_of_any_bytes_is_read() -> None:
    with Lab() as lab:
        host = lab.add("foreign")
        with host.inside():
            for command in (
                [b"ip", b"link", b"add", b"caf\xe9", b"up", b"type", b"bridge"],
                [b"ip", b"address", b"add", b"192.0.2.7/24", b"dev", b"caf\xe9"],
                [b"ip", b"address", b"add", b"198.51.100.7/32", b"dev", b"lo"],
                [b"ip", b"route", b"add", b"default", b"via", b"192.0.2.1"],
            ):
                subprocess.run(command, check=True, timeout=10)
            assert await network.host_addresses() == ("192.0.2.7", "198.51.100.7")


async def test_a_host_that_is_out_of_threads_has_a_problem_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio.get_running_loop(), "run_in_executor", refuse)

    with pytest.raises(SyncError, match="can't start new thread"):
        await network.look_at_addresses()
    assert await network.host_addresses() == ()
    assert await open_connections([Portal("10.96.0.1", 80, L4Protocol.TCP)]) == 0


async def test_routes_of_one_table_are_removed_if_those_of_another_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail_at_main(tool: str, *arguments: str, stdin: str = "") -> str:
        if str(rtnetlink.TABLE_MAIN) in arguments:
            raise SyncError("Failed to send flush request")
        return await run_tool(tool, *arguments, stdin=stdin)

    with Lab() as lab:
        host = lab.add("crashed")
        host.ip("link", "set", "lo", "up")
        host.ip("route", "add", "10.96.0.0/16", "dev", "lo", "proto", "107")
        with host.inside():
            await network.add_own_address("10.96.0.10")
            monkeypatch.setattr(network, "run_tool", fail_at_main)
            await network.remove_routes()
            assert [route.table for route in await network.own_routes(4)] == [rtnetlink.TABLE_MAIN]


def test_a_list_that_the_kernel_refuses_is_not_an_empty_one() -> None:
    one_table = bytes((socket.AF_INET,)) + bytes(11) + netlink.attribute(15, (12_345).to_bytes(4, sys.byteorder))
    with netlink.open_socket(netlink.ROUTE, 5.0) as sock:
        sock.setsockopt(270, 12, 1)
        with pytest.raises(OSError, match="No such file or directory"):
            list(netlink.dump(sock, netlink.message(26, netlink.REQUEST | netlink.DUMP, one_table)))
