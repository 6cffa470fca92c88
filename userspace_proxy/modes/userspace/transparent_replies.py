"""Bring the replies of backends to a client's own address to the sockets of this node, by nftables rules and routes.

A backend that sees the client's address replies to it. If the reply passes this node, nftables finds our socket with
that address and marks the packet. A routing rule sends marked packets to a table in which every address is local. ICMP
errors are found by the packet that they quote (nf_socket_ipv4.c, extract_icmp4_fields).
"""

import logging
import socket
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from userspace_proxy.errors import SyncError
from userspace_proxy.host import rtnetlink
from userspace_proxy.host.network import ROUTE_PROTOCOL, own_routes
from userspace_proxy.host.tool import run_tool
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.redirects import OWN_MARK, TRANSPARENT_MARK

BRIDGE_TABLE = "bridge userspace_proxy"
REPLY_RULE = (
    "meta l4proto { tcp, udp, icmp, ipv6-icmp } socket transparent 1 "
    f"meta mark set meta mark | {TRANSPARENT_MARK:#x} accept"
)
_OWN_AND_TRANSPARENT = OWN_MARK | TRANSPARENT_MARK
_FLOW_S = 600  # longer than a connection stays silent with the data plane's keepalive
_FLOWS_MAX = 262_144
BRIDGE_RULES, BRIDGE_ERROR_RULES = 4, 2
_IP = {4: "ip", 6: "ip6"}
# ICMP errors, and the bit of the source port in a packet of ours (behind an IP header without options) and in one that
# an ICMP error quotes (behind the error's own header of 8 bytes). The destination port follows.
_ERRORS = {
    4: ("icmp type { destination-unreachable, time-exceeded, parameter-problem }", 160, 224),
    6: ("icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem }", 320, 384),
}

log = logging.getLogger(__name__)


def bridge_table(*, errors: bool = True) -> str:
    """Return the script that diverts replies to this node which a bridge would carry directly to a client on it.

    Packets of ours add their flow and the bridge's own address to sets. Replies on these flows get that address as
    destination; other frames stay on the bridge. The sets survive when the script is loaded again. (nft 1.0.6 cannot
    store an address behind a concatenated key, hence a set and a map.)

    *errors*: divert ICMP errors of backends about these flows, too. The ports that they quote have no names in nft, and
    some versions of it do not support sets of plain numbers.
    """
    sets, chains = "", {"output": "", "prerouting": ""}
    size = f"flags dynamic,timeout; timeout {_FLOW_S}s; size {_FLOWS_MAX}"
    for family, ip in _IP.items():
        address = f"ipv{family}_addr"
        key = f"{address} . inet_proto . inet_service . {address} . inet_service"
        sets += f"\tset flows{family} {{\n\t\ttype {key}; {size}\n\t}}\n"
        sets += f"\tmap bridges{family} {{\n\t\ttype {address} : ether_addr; {size}\n\t}}\n"
        there = f"{ip} daddr . meta l4proto . th dport . {ip} saddr . th sport"
        back = f"{ip} saddr . meta l4proto . th sport . {ip} daddr . th dport"
        chains["output"] += (
            f"\t\tmeta mark & {_OWN_AND_TRANSPARENT:#x} == {_OWN_AND_TRANSPARENT:#x} meta l4proto {{ tcp, udp }} "
            f"update @flows{family} {{ {there} }} update @bridges{family} {{ {ip} daddr : ether saddr }}"
        )
        up = f"ether daddr set {ip} saddr map @bridges{family} meta pkttype set host accept\n"
        chains["prerouting"] += f"\t\t{back} @flows{family} {up}"
        if errors:
            is_error, sent, quoted = _ERRORS[family]
            ports = f"{ip} saddr . @th,{quoted + 16},16 . {ip} daddr . @th,{quoted},16"
            sets += f"\tset told{family} {{\n\t\ttypeof {ports}; {size}\n\t}}\n"
            note = f"{ip} daddr . @nh,{sent + 16},16 . {ip} saddr . @nh,{sent},16"
            chains["output"] += f" update @told{family} {{ {note} }}"
            chains["prerouting"] += f"\t\t{is_error} {ports} @told{family} {up}"
        chains["output"] += "\n"
    return f"""\
table {BRIDGE_TABLE} {{
{sets}\
	chain output {{
		type filter hook output priority 0; policy accept;
	}}
	chain prerouting {{
		type filter hook prerouting priority -300; policy accept;
	}}
}}
flush chain {BRIDGE_TABLE} output
flush chain {BRIDGE_TABLE} prerouting
table {BRIDGE_TABLE} {{
	chain output {{
{chains["output"]}\
	}}
	chain prerouting {{
{chains["prerouting"]}\
	}}
}}
"""


# ---- routes for replies to a client's own address

# Packets with TRANSPARENT_MARK and without OWN_MARK are for this node, whatever their destination.
_PRIORITY = _TABLE = 10777
_MARK, _MASK = TRANSPARENT_MARK, OWN_MARK | TRANSPARENT_MARK
_TRANSPARENT_RULE = ("priority", str(_PRIORITY), "fwmark", f"{_MARK:#x}/{_MASK:#x}", "lookup", str(_TABLE))
_TRANSPARENT_ROUTE = ("local", "default", "dev", "lo", "table", str(_TABLE), "proto", ROUTE_PROTOCOL)


async def add_transparent_routes() -> list[Family]:
    """Route marked replies to this node's own sockets. May be repeated.

    Return the IP families in which it succeeded.

    Raises:
        SyncError: refused for IPv4. Without IPv6, only a warning is logged.
    """
    added: list[Family] = []
    for family in FAMILIES:
        try:
            await run_tool("ip", f"-{family}", "route", "replace", *_TRANSPARENT_ROUTE)
            if not await _has_rule(family):
                await run_tool("ip", f"-{family}", "rule", "add", *_TRANSPARENT_RULE)
            added.append(family)
        except SyncError as error:
            if family == 4:
                raise
            log.warning("IPv6 clients cannot be served transparently: %s", error)
    return added


async def has_transparent_routes(families: Sequence[Family]) -> bool:
    """Return whether the routes and rules of `add_transparent_routes` are there in *families*, which it returned."""
    for family in families:
        if not await _has_route(family) or not await _has_rule(family):
            return False
    return True


async def remove_transparent_routes() -> None:
    """Remove the routes of `add_transparent_routes`, also those of other processes of this proxy."""
    for family in FAMILIES:
        try:
            while await _has_rule(family):
                await run_tool("ip", f"-{family}", "rule", "del", *_TRANSPARENT_RULE)
            if await _has_route(family):
                await run_tool("ip", f"-{family}", "route", "flush", "table", str(_TABLE), "proto", ROUTE_PROTOCOL)
        except SyncError as error:
            log.debug("no transparent routes were removed: %s", error)


async def _has_route(family: Family) -> bool:
    return any(route.table == _TABLE for route in await own_routes(family))


async def _has_rule(family: Family) -> bool:
    rules = await rtnetlink.read(partial(rtnetlink.routing_rules, family))
    return any((rule.priority, rule.mark, rule.table) == (_PRIORITY, (_MARK, _MASK), _TABLE) for rule in rules)


async def transparent_obstacles(language: str) -> list[str]:
    """Return why backends cannot see clients' own addresses on this node, each obstacle with its remedy.

    *language*: the rule language. Strict ``rp_filter`` is no obstacle: replies arrive by the route to their backend.
    """
    obstacles = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    except OSError as error:
        obstacles.append(f"sockets cannot take a client's address ({error}); run with CAP_NET_ADMIN")
    if language == "nftables":
        obstacles += await _refused(
            "this kernel cannot match packets of our sockets; load the module nft_socket",
            ("nft", "--check", "-f", "-"),
            "table inet userspace_proxy_check { chain c { "
            f"type filter hook prerouting priority -150; {REPLY_RULE}; }}; }}",
        )
    else:
        obstacles += await _refused(
            "this kernel cannot match packets of our sockets; load the module xt_socket",
            ("iptables-restore", "--test", "--noflush", "-w", "5"),
            "*mangle\n:USERSPACE-PROXY-CHECK - [0:0]\n"
            "-A USERSPACE-PROXY-CHECK -m socket --transparent -j RETURN\nCOMMIT\n",
        )
    if any(interface.kind == "bridge" for interface in await rtnetlink.read(rtnetlink.interfaces)):
        obstacles += await _refused(
            "backends cannot answer clients on the same bridge; nft and a kernel with bridge rules are needed",
            ("nft", "--check", "-f", "-"),
            bridge_table(errors=False),
        )
    if on := _interfaces_that_validate_marks():
        obstacles.append(
            f"the kernel drops replies as forged; set net.ipv4.conf.*.src_valid_mark to 0 for {', '.join(on)}"
        )
    return obstacles


async def _refused(what: str, command: Sequence[str], script: str) -> list[str]:
    try:
        await run_tool(*command, stdin=script)
    except SyncError as error:
        return [f"{what} ({error})"]
    return []


def _interfaces_that_validate_marks() -> list[str]:
    """Return the interfaces that check a packet's source with its mark, which routes every address to this node."""
    knobs = Path("/proc/sys/net/ipv4/conf").glob("*/src_valid_mark")
    return sorted(knob.parent.name for knob in knobs if knob.read_text().strip() != "0")
