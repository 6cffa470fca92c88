"""How what backends answer to a client's own address comes to this node's sockets, as nftables text. Pure.

A backend that saw the client's address answers to that address. Where its packets come by this node they are told by
our socket that is bound to it, marked, and led to a table in which every address is local (network.py). So are ICMP
errors: `socket` looks for the socket of the packet that such a message quotes (nf_socket_ipv4.c, extract_icmp4_fields).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Sequence
from pathlib import Path

from userspace_proxy.errors import SyncError
from userspace_proxy.host.network import ROUTE_PROTOCOL
from userspace_proxy.host.tool import parsed, run_tool
from userspace_proxy.interfaces import OWN_MARK, TRANSPARENT_MARK

BRIDGE_TABLE = "bridge userspace_proxy"
REPLY_RULE = (
    "meta l4proto { tcp, udp, icmp, ipv6-icmp } socket transparent 1 "
    f"meta mark set meta mark | {TRANSPARENT_MARK:#x} accept"
)
_OWN_AND_TRANSPARENT = OWN_MARK | TRANSPARENT_MARK
_FLOW_S = 600  # longer than the data plane's keepalive lets a connection be silent
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
    """Return the script that brings answers up to us that a bridge would carry straight to a client on it.

    What we send notes the flow and the bridge's own address; what comes back on such a flow is sent to that address.
    No other frame is touched: what the two send each other directly stays on the bridge. Loaded again, it keeps the
    flows that it knows. (nft 1.0.6 cannot note an address behind a concatenated key, hence a set and a map.)

    *errors*: bring up ICMP errors that a backend sends about such a flow, too. The ports that they quote have no names
    in nft, and sets of plain numbers are not known to every version of it.
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
            told = f"{ip} saddr . @th,{quoted + 16},16 . {ip} daddr . @th,{quoted},16"
            sets += f"\tset told{family} {{\n\t\ttypeof {told}; {size}\n\t}}\n"
            note = f"{ip} daddr . @nh,{sent + 16},16 . {ip} saddr . @nh,{sent},16"
            chains["output"] += f" update @told{family} {{ {note} }}"
            chains["prerouting"] += f"\t\t{is_error} {told} @told{family} {up}"
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


def bridge_removal() -> str:
    """Return the script that removes it; a script of its own, as not every kernel knows rules for bridges."""
    return f"table {BRIDGE_TABLE}\ndelete table {BRIDGE_TABLE}\n"


# ---- routes for answers to a client's own address

# Where packets with TRANSPARENT_MARK, and without OWN_MARK, are for this node, whatever their address.
_TRANSPARENT_RULE = (
    *("priority", "10777", "fwmark", f"{TRANSPARENT_MARK:#x}/{OWN_MARK | TRANSPARENT_MARK:#x}"),
    *("lookup", "10777"),
)
_TRANSPARENT_ROUTE = ("local", "default", "dev", "lo", "table", "10777", "proto", ROUTE_PROTOCOL)


async def add_transparent_routes() -> None:
    """Lead marked answers to this node's own sockets. May be repeated.

    Raises:
        SyncError: refused for IPv4; a host without IPv6 is none the worse.
    """
    for version in ("-4", "-6"):
        try:
            await run_tool("ip", version, "route", "replace", *_TRANSPARENT_ROUTE)
            if not parsed(await run_tool("ip", "-json", version, "rule", "show", *_TRANSPARENT_RULE)):
                await run_tool("ip", version, "rule", "add", *_TRANSPARENT_RULE)
        except SyncError as error:
            if version == "-4":
                raise
            log.warning("IPv6 clients cannot be served transparently: %s", error)


async def remove_transparent_routes() -> None:
    """Take these away, whoever of us added them."""
    for version in ("-4", "-6"):
        try:
            while parsed(await run_tool("ip", "-json", version, "rule", "show", *_TRANSPARENT_RULE)):
                await run_tool("ip", version, "rule", "del", *_TRANSPARENT_RULE)
            if parsed(await run_tool("ip", "-json", version, "route", "show", "table", "all", "proto", ROUTE_PROTOCOL)):
                await run_tool("ip", version, "route", "flush", "table", "10777", "proto", ROUTE_PROTOCOL)
        except SyncError as error:
            log.debug("no transparent routes were removed: %s", error)


async def transparent_obstacles(language: str) -> list[str]:
    """Return why this node cannot carry clients' own addresses to backends, each with what would mend it.

    *language* is that of the rules. Strict ``rp_filter`` does no harm: answers come by the way to their backend.
    """
    obstacles = []
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
            sock.setsockopt(socket.SOL_IP, socket.IP_TRANSPARENT, 1)
    except OSError as error:
        obstacles.append(f"sockets cannot take a client's address ({error}); run with CAP_NET_ADMIN")
    if language == "nftables":
        obstacles += await _refused(
            "this kernel cannot tell packets for our sockets; load the module nft_socket",
            ("nft", "--check", "-f", "-"),
            "table inet userspace_proxy_check { chain c { "
            f"type filter hook prerouting priority -150; {REPLY_RULE}; }}; }}",
        )
    else:
        obstacles += await _refused(
            "this kernel cannot tell packets for our sockets; load the module xt_socket",
            ("iptables-restore", "--test", "--noflush", "-w", "5"),
            "*mangle\n:USERSPACE-PROXY-CHECK - [0:0]\n"
            "-A USERSPACE-PROXY-CHECK -m socket --transparent -j RETURN\nCOMMIT\n",
        )
    if parsed(await run_tool("ip", "-json", "link", "show", "type", "bridge")):
        obstacles += await _refused(
            "backends on a bridge cannot answer clients beside them; nft and its rules for bridges are needed",
            ("nft", "--check", "-f", "-"),
            bridge_table(errors=False),
        )
    if on := _interfaces_that_validate_marks():
        obstacles.append(f"answers are taken for forged; set net.ipv4.conf.*.src_valid_mark to 0 for {', '.join(on)}")
    return obstacles


async def _refused(what: str, command: Sequence[str], script: str) -> list[str]:
    try:
        await run_tool(*command, stdin=script)
    except SyncError as error:
        return [f"{what} ({error})"]
    return []


def _interfaces_that_validate_marks() -> list[str]:
    """Return where the way back to a packet's source is looked for by its mark, which leads to this node alone."""
    knobs = Path("/proc/sys/net/ipv4/conf").glob("*/src_valid_mark")
    return sorted(knob.parent.name for knob in knobs if knob.read_text().strip() != "0")
