"""How what backends answer to a client's own address comes to this node's sockets, as nftables text. Pure.

A backend that saw the client's address answers to that address. Where its packets come by this node they are told by
our socket that is bound to it, marked, and led to a table in which every address is local (network.py). So are ICMP
errors: `socket` looks for the socket of the packet that such a message quotes (nf_socket_ipv4.c, extract_icmp4_fields).
"""

from __future__ import annotations

from userspace_proxy.interfaces import OWN_MARK, TRANSPARENT_MARK

BRIDGE_TABLE = "bridge userspace_proxy"
REPLY_RULE = (
    "meta l4proto { tcp, udp, icmp, ipv6-icmp } socket transparent 1 "
    f"meta mark set meta mark | {TRANSPARENT_MARK:#x} accept"
)
_OWN_AND_TRANSPARENT = OWN_MARK | TRANSPARENT_MARK
_FLOW_S = 600  # longer than the data plane's keepalive lets a connection be silent
_FLOWS_MAX = 262_144
BRIDGE_RULES = 4
_IP = {4: "ip", 6: "ip6"}


def bridge_table() -> str:
    """Return the script that brings answers up to us that a bridge would carry straight to a client on it.

    What we send notes the flow and the bridge's own address; what comes back on such a flow is sent to that address.
    No other frame is touched: what the two send each other directly stays on the bridge. Loaded again, it keeps the
    flows that it knows. (nft 1.0.6 cannot note an address behind a concatenated key, hence a set and a map.)
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
            f"update @flows{family} {{ {there} }} update @bridges{family} {{ {ip} daddr : ether saddr }}\n"
        )
        chains["prerouting"] += (
            f"\t\t{back} @flows{family} ether daddr set {ip} saddr map @bridges{family} meta pkttype set host accept\n"
        )
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
