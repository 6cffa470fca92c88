"""The nftables table of kernel mode nftables: its sets, chains and rules. Pure."""

from __future__ import annotations

import re

from userspace_proxy.modes.reasons import nft_common
from userspace_proxy.modes.reasons.lines import patterns
from userspace_proxy.modes.reasons.nft_common import SENDERS, who

NUMBER = r"[\da-f]+:[\da-f]+"
NAMED = r"(?P<what>services|node_ports)(?P<family>[46])(?P<sender>_for_pods|_for_node|)"
_WHO = r'(?P<who>iifname "[^"]+" |ip6? saddr \{ [^}]+ \} )?'
_PORTAL = r"ip6? daddr \. meta l4proto \. th dport"
_OWN = r"(?:ip6? daddr \{ (?P<on>[^}]+) \} )?fib daddr type local ip6? daddr != \S+"
_WHATS = {"services": "addresses of Services", "node_ports": "node ports"}


def _map(match: re.Match[str]) -> str:
    first = " Asked before the map for everybody." if match["sender"] else ""
    return (
        f"Packets{SENDERS[match['sender']]} to {_WHATS[match['what']]} (IPv{match['family']}): portal -> a number that "
        f"says what becomes of the packet.{first}"
    )


def _slots(match: re.Match[str]) -> str:
    return (
        f"Set of endpoints . a number below {match['size']} drawn by chance -> endpoint. Each "
        f"endpoint has nearly as many "
        f"of the {match['size']} slots, so all are met with nearly the same chance (Maglev)."
    )


def _picks(match: re.Match[str]) -> str:
    return (
        f"Services with affinity: set of endpoints . a number below {match['size']} drawn by chance -> the endpoint's "
        f"own number, which the pin remembers. Each endpoint has nearly as many of the {match['size']} slots (Maglev)."
    )


def _lookup(match: re.Match[str]) -> str:
    packets = f"Packets {who(match['who'])}" if match["who"] else "Packets"
    here = f" to {_at(match['on'])}" if "on" in match.groupdict() and "daddr !=" in match[0] else ""
    return (
        f"{packets}{here} whose portal is in @{match['name']} take the number that stands there (into their priority, "
        "which is free until the packet leaves), and go on with it to the chain translate. Others: the next rule."
    )


def _at(on: str | None) -> str:
    return f"an address of this node that is one of {on}" if on else "an address of this node (but loopback)"


def _random(match: re.Match[str]) -> str:
    protocol = match["protocol"].upper()
    return (
        f"{protocol}: draw a slot below {match['size']} and look up set . slot: the endpoint found "
        f"becomes the packet's "
        "destination (DNAT). A set that is not in this map has another size: the next rule."
    )


def _redraw(match: re.Match[str]) -> str:
    return (
        f"No pin was found: draw a slot below {match['size']}, look up the endpoint's number, and "
        f"have it remembered. A set "
        "that is not in this map has another size: the next rule."
    )


def _remember(match: re.Match[str]) -> str:
    return (
        f"For a set in @affinity_{match['s']}: make the client's pin, or renew it. It lasts for "
        f"{match['s']} s from this "
        "connection on."
    )


FRAME = nft_common.FRAME + patterns(
    (
        r"table inet userspace_proxy_(?:nat|ipvs) \{",
        "Our table, for IPv4 and IPv6 (inet). All that is ours stands in it; other tables of the node are left alone.",
    ),
    (rf"map {NAMED} \{{", _map),
    (r"map slots[46]_(?:tcp|udp)_(?P<size>\d+) \{", _slots),
    (r"map picks[46]_(?P<size>\d+) \{", _picks),
    (
        r"map endpoints[46]_(?:tcp|udp) \{",
        "The endpoints that pins lead to: an endpoint's number -> its address and port.",
    ),
    (
        r"map pins[46] \{",
        "The pins of clients (affinity): client . set of endpoints -> the endpoint's number. The "
        "kernel fills it by itself.",
    ),
    (r"set hairpins[46] \{", "Endpoints beside themselves: who dials its own Service and is chosen itself."),
    (r"set cluster_ips[46] \{", "All cluster IPs, whatever the port."),
    (r"set virtual_ips[46] \{", "All load balancer IPs and external IPs, whatever the port."),
    (r"set health_checks[46] \{", "Ports at which this node answers health checks of load balancers."),
    (r"set allowed[46] \{", "From where these may be dialled: portal . addresses of senders."),
    (r"set affinity_(?P<s>\d+) \{", lambda m: f"Sets of endpoints whose clients keep their endpoint for {m['s']} s."),
    (
        r"type inet_proto \. inet_service : classid",
        "Key: protocol . port; value: a number of 32 bits, shown as xxxx:xxxx.",
    ),
    (
        r"type ipv[46]_addr \. inet_proto \. inet_service : classid",
        "Key: address . protocol . port; value: a number of 32 bits, shown as xxxx:xxxx.",
    ),
    (
        r"type ipv[46]_addr \. inet_proto \. inet_service \. ipv[46]_addr; flags interval",
        "An element is address . protocol . port . addresses of senders, from - to.",
    ),
    (r"type ipv[46]_addr \. ipv[46]_addr", "An element is sender . destination, after DNAT."),
    (r"type ipv[46]_addr", "An element is an address."),
    (r"typeof meta priority : ip6? daddr \. (?:tcp|udp) dport", "Key: an endpoint's number; value: address . port."),
    (
        r"typeof meta priority \. numgen random mod \d+ : ip6? daddr \. (?:tcp|udp) dport",
        "Key: the set's number . slot; value: the endpoint's address . port.",
    ),
    (
        r"typeof meta priority \. numgen random mod \d+ : meta priority",
        "Key: the set's number . slot; value: the endpoint's number.",
    ),
    (r"typeof meta priority", "An element is a set's number."),
    (
        r"typeof ip saddr \. meta priority : meta priority",
        "Key: the client's address . the set's number; value: the endpoint's.",
    ),
    (
        r"typeof numgen inc mod 4294967295 \. meta priority : meta priority",
        "Key: a hash of the client's address (IPv6 addresses are too long for this key) . the set's number.",
    ),
    (
        r"size (?P<size>\d+); flags dynamic,timeout; timeout 3h",
        lambda m: f"Rules may add to it (dynamic), up to {m['size']} pins; each ends by itself (timeout).",
    ),
    (r"chain refuse \{", "Packets that nobody may serve: an answer at once, so that clients need not wait."),
    (r"chain remembered[46] \{", "Keeps the pin, and leads to the endpoint whose number the packet has."),
    (r"chain pinned[46] \{", "Services with affinity: the endpoint of the client's pin, else one by chance."),
    (r"chain translate[46] \{", "What becomes of a packet whose number was found."),
    (r"chain services[46] \{", "Packets to Services, in the order in which they are looked up."),
    (r"chain from_node[46] \{", "What goes before the rest for processes of this node itself."),
    (
        r"chain postrouting \{",
        "POSTROUTING: what is about to leave, after routing; here senders' addresses are replaced.",
    ),
    (
        r"type nat hook (?:prerouting|output) priority -104; policy accept;",
        "Called for the first packet of each connection only; conntrack does the same to all later "
        "ones. -104 is before "
        "other NAT (-100). Accept: what no rule leads elsewhere goes its usual way.",
    ),
    (
        r"type nat hook postrouting priority 99; policy accept;",
        "Called for the first packet of each connection only, before other source NAT (100).",
    ),
    (r"type filter hook input priority 0; policy accept;", "Called for every packet that is for this node itself."),
)
RULES = nft_common.RULES + patterns(
    (r"meta nfproto ipv(?P<f>[46]) jump (?:services|from_node)(?P=f)", lambda m: f"IPv{m['f']} has rules of its own."),
    (
        r"tcp flags & rst == rst accept",
        "The reset itself, where this node refuses what it dialled at an address of its own: let it pass.",
    ),
    (r"meta l4proto tcp reject with tcp reset", "TCP: a reset; the client sees `connection refused`."),
    (
        rf'oif "lo" fib daddr type local meta priority set {NUMBER} accept',
        "UDP from this node to an address of its own: let it pass with this number, which INPUT rejects. Rejected "
        "here, its sender would see `operation not permitted` in place of `connection refused`.",
    ),
    (
        rf'iif "lo" meta priority {NUMBER} reject with icmpx type port-unreachable',
        "The number that the chain refuse gives what this node sends to itself: ICMP port unreachable.",
    ),
    (r"reject with icmpx type port-unreachable", "Else (UDP): ICMP port unreachable."),
    (
        rf"{_PORTAL} @restricted[46] {_PORTAL} \. ip6? saddr != @allowed[46] drop",
        "Is the portal one of @restricted, and the sender none of @allowed? Dropped, without an answer.",
    ),
    (rf"{_WHO}meta priority set {_PORTAL} map @(?P<name>\w+) goto translate[46]", _lookup),
    (
        rf"(?:{_OWN} |{_WHO})meta priority set meta l4proto \. th dport map @(?P<name>\w+) goto translate[46]",
        _lookup,
    ),
    (r"ip6? daddr @cluster_ips[46] goto refuse", "A cluster IP at a port that no Service has there: refused at once."),
    (
        r"ip6? daddr @virtual_ips[46] (?:ip6? daddr != \{ [^}]+ \} )?"
        r"meta l4proto \. th dport != @health_checks[46] goto refuse",
        "A load balancer IP or an external IP, here this node's own, at a port that no Service has there: refused "
        "at once, so that this node's own servers are not met by it; health checks are.",
    ),
    (
        r"ip6? daddr \{ (?P<cidrs>[^}]+) \} drop",
        lambda m: f"An address out of {m['cidrs']}, where cluster IPs come from, that no Service has: dropped.",
    ),
    (rf"{_OWN} jump node_ports[46]", lambda m: f"Packets to {_at(m['on'])}: see whether it is a node port."),
    (r"meta priority 0:1 goto refuse", "The number 0:1 says: no endpoint is there. Refused at once."),
    (
        r"meta priority 0:2 drop",
        "The number 0:2 says: the traffic policy wants endpoints of this node, and it has none. Dropped.",
    ),
    (
        rf"meta priority & (?P<bit>{NUMBER}) == (?P=bit) meta mark set meta mark \| (?P<mark>0x[\da-f]+)",
        lambda m: (
            f"The bit {m['bit']} says: the sender's address is to be replaced by this node's, so that "
            f"answers come back "
            f"here. Marked with {m['mark']}; POSTROUTING does it."
        ),
    ),
    (
        rf"meta priority & {NUMBER} == {NUMBER} accept",
        "Of no set here: a virtual server leads it on, as IPVS sees it at INPUT, or at OUTPUT after us.",
    ),
    (
        rf"meta priority & (?P<bit>{NUMBER}) == (?P=bit) goto pinned[46]",
        lambda m: f"The bit {m['bit']} says: the Service has affinity. On to the chain pinned.",
    ),
    (
        rf"meta priority set meta priority & (?P<mask>{NUMBER})",
        "Leave only the set's number of what the packet carries: that is what is looked up next.",
    ),
    (
        r"meta l4proto (?P<protocol>tcp|udp) dnat ip6? to meta priority \. numgen random mod "
        r"(?P<size>\d+) map @slots\w+",
        _random,
    ),
    (
        r"meta priority set (?:ip saddr|jhash ip6 saddr mod \d+ seed 1) \. meta priority map "
        r"@pins[46] jump remembered[46]",
        "Has this client a pin in this set? Then take the endpoint's number from it, renew the pin, and go there.",
    ),
    (
        rf"meta priority & (?P<seat>{NUMBER}) != 0:0 delete @pins[46] \{{ .* \}}",
        "Came back although there was a pin: its endpoint is gone. So is the pin, now.",
    ),
    (
        rf"meta priority & {NUMBER} == 0:0 meta priority set meta priority \. numgen random mod (?P<size>\d+) map "
        r"@picks\w+ goto remembered[46]",
        _redraw,
    ),
    (rf"meta priority & {NUMBER} @affinity_(?P<s>\d+) update @pins[46] \{{ .* \}}", _remember),
    (
        r"meta l4proto (?P<protocol>tcp|udp) dnat ip6? to meta priority map @endpoints\w+",
        lambda m: (
            f"{m['protocol'].upper()}: the address and port of the endpoint with this number become the "
            f"packet's destination "
            "(DNAT)."
        ),
    ),
    (
        rf"meta priority & (?P<bit>{NUMBER}) == (?P=bit) meta priority set none",
        "The packet is about to leave: take our number away again, lest a traffic shaper (tc) reads it as a class.",
    ),
    (
        r"meta mark & (?P<mark>0x[\da-f]+) == (?P=mark) meta mark set meta mark & 0x[\da-f]+ masquerade fully-random",
        lambda m: (
            f"Marked with {m['mark']}: take the mark away, and replace the sender's address by this "
            f"node's (masquerade), at "
            "a port drawn by chance."
        ),
    ),
    (
        r"(?:ct status dnat )?ip6? saddr \. ip6? daddr @hairpins[46] masquerade fully-random",
        "An endpoint that dialled its own Service and met itself: without another sender's address it would answer "
        "itself directly, past us, and not know the answer.",
    ),
)
