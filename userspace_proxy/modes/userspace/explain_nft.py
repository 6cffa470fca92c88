"""The nftables table of userspace mode, line by line. Pure."""

from __future__ import annotations

import re

from userspace_proxy.modes.reasons import nft_common
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import patterns, said_of
from userspace_proxy.modes.reasons.nft_common import SENDERS, who
from userspace_proxy.modes.reasons.nft_text import Block, Explainer, Said

_KEY = r"(?:(?P<ip>[\da-f.:]+) \. )?(?P<protocol>tcp|udp) \. (?P<port>\d+)"
_MAPPED = re.compile(rf'{_KEY}(?: comment "(?P<name>[^"]+)")?(?: : (?P<to>\d+))?')
_ALLOWED = re.compile(rf"{_KEY} \. (?P<source>[\da-f.:/]+)")
_WHO = r'(?P<who>fib saddr type local |iifname "[^"]+" |ip6? saddr \{ [^}]+ \} )?'
_PORTAL = r"(?:ip6? daddr \. )?meta l4proto \. th dport"
_LEADS = r"(?:redirect|dnat ip6? to (?P<to>[\da-f.:]+)) ?(?:to )?:"

# Behind which words of a set's name who is meant stands.
_NAMED = r"(?P<what>service_ips|node_ports)(?P<family>[46])(?P<sender>_for_pods|_for_node|)"
_WHATS = {"service_ips": "addresses of Services", "node_ports": "node ports"}


def _sender(match: re.Match[str]) -> str:
    return SENDERS[match["sender"]]


def _map(match: re.Match[str]) -> str:
    first = " Asked before the map for everybody." if match["sender"] else ""
    return (
        f"Where packets{_sender(match)} to {_WHATS[match['what']]} (IPv{match['family']}) go: portal -> proxy port. "
        f"One look-up, however many Services there are.{first}"
    )


def _set(match: re.Match[str]) -> str:
    return (
        f"Packets{_sender(match)} to these {_WHATS[match['what']]} (IPv{match['family']}) are dropped: their traffic "
        "policy wants endpoints of this node, and it has none."
    )


def _lookup(match: re.Match[str]) -> str:
    packets = f"Packets {who(match['who'])}" if match["who"] else "TCP and UDP packets"
    here = f"{match['to']}, an address of ours on lo," if match["to"] else "this node itself"
    return (
        f"{packets} whose destination, protocol and port are a key of @{match['name']} go to {here} at the proxy "
        "port that stands there. What is not found goes on to the next rule."
    )


def _drop(match: re.Match[str]) -> str:
    return f"Packets {who(match['who'])}".rstrip() + f" to a portal in @{match['name']} are dropped, without an answer."


def _guard(match: re.Match[str]) -> str:
    return (
        "Who dials a proxy port of this node directly is led to port "
        f"{match['port']}, at which nobody listens, so that the kernel refuses: a proxy port is "
        f"reached by its portals only."
    )


def _own(match: re.Match[str]) -> str:
    where = f"one of {match['on']}" if match["on"] else "an address"
    return f"Packets to {where} of this node: see whether it is a node port. Behind the Services' own addresses."


_FRAME = nft_common.FRAME + patterns(
    (r"table inet userspace_proxy", "Makes sure that our table is there, so that the next line has one to delete."),
    (
        r"delete table inet userspace_proxy",
        "Away with what it held: nft applies all of this as one transaction, so no packet meets a gap.",
    ),
    (
        r"table inet userspace_proxy \{",
        "Our table, for IPv4 and IPv6 (inet). All that is ours stands in it; other tables of the node are left alone.",
    ),
    (rf"map {_NAMED} \{{", _map),
    (rf"set dropped_{_NAMED} \{{", _set),
    (r"set allowed[46] \{", "From where these may be dialled: portal . network of the sender."),
    (r"set proxy_ports \{", "The local ports at which our proxy listens."),
    (r'comment "reached through the maps only, never directly"', "A note for who reads the rules in the kernel."),
    (r"type inet_proto \. inet_service : inet_service", "Key: protocol . port; value: the proxy port."),
    (
        r"type ipv[46]_addr \. inet_proto \. inet_service : inet_service",
        "Key: address . protocol . port; value: the proxy port.",
    ),
    (
        r"type ipv[46]_addr \. inet_proto \. inet_service \. ipv[46]_addr; flags interval",
        "An element is address . protocol . port . network of the sender.",
    ),
    (
        r"type nat hook \w+ priority -105; policy accept;",
        "Called for the first packet of each connection only; conntrack does the same to all later "
        "ones. -105 is before "
        "other NAT (-100). Accept: what no rule leads elsewhere goes its usual way.",
    ),
    (
        r"chain replies \{",
        "Packets that come in, before conntrack's NAT: answers that endpoints give to clients' own addresses.",
    ),
    (
        r"type filter hook prerouting priority -150; policy accept;",
        "Called for every packet that comes in, before NAT.",
    ),
    (r"chain services \{", "The Services, for whatever comes in or leaves."),
    (
        r"chain services[46] \{",
        "Packets to Services, in the order in which they are looked up; the first rule that matches ends it.",
    ),
)
_RULES = nft_common.RULES + patterns(
    (r"jump services", "On to the chain services."),
    (
        r"meta mark & 0x2000 == 0 jump services",
        "On to the chain services, but not for what our proxy itself sends: its sockets mark their "
        "packets with 0x2000, "
        "so a dial to an endpoint never comes back to us.",
    ),
    (r"meta nfproto ipv(?P<f>[46]) jump services(?P=f)", lambda m: f"IPv{m['f']} has rules of its own."),
    (
        rf"{_PORTAL} @restricted[46] {_PORTAL} \. ip6? saddr != @allowed[46] drop",
        "Is the portal one of @restricted, and the sender in none of the networks of @allowed? "
        "Dropped, without an answer.",
    ),
    (rf"{_WHO}{_PORTAL} @(?P<name>dropped_\w+) drop", _drop),
    (rf"{_WHO}meta l4proto \{{ tcp, udp \}} {_LEADS} ?{_PORTAL} map @(?P<name>\w+)", _lookup),
    (r"(?:ip6? daddr \{ (?P<on>[^}]+) \} )?fib daddr type local jump node_ports[46]", _own),
    (
        rf"fib daddr type local meta l4proto \{{ tcp, udp \}} {_PORTAL} @proxy_ports {_LEADS} ?(?P<port>\d+)",
        _guard,
    ),
    (
        r"meta l4proto \{ tcp, udp, icmp, ipv6-icmp \} socket transparent 1 meta mark set meta mark \| 0x1000 accept",
        "An answer (or ICMP error) to a client whose address a socket of ours speaks with: marked with 0x1000, by "
        "which routing brings it to this node instead of to the client.",
    ),
)


def explainer(known: Known) -> Explainer:
    """Return what explains lines that `nft.table` has rendered."""

    def explain(block: Block | None, line: str) -> Said:
        if block is None or line in block.head:
            return Said(said_of(line, _FRAME))
        if block.is_chain:
            return Said(said_of(line, _RULES))
        return _element(block.name, line, known)

    return explain


def _element(place: str, line: str, known: Known) -> Said:
    if match := _ALLOWED.fullmatch(line):
        owner = known.owner(match["ip"], match["port"], match["protocol"])
        portal = known.portal(match["ip"], match["port"], match["protocol"])
        return Said(f"{portal[0].upper()}{portal[1:]} may be dialled from {match['source']}.", owner)
    if (match := _MAPPED.fullmatch(line)) is None:
        return Said("")
    ip, port, protocol = match["ip"] or "", match["port"], match["protocol"]
    if place == "proxy_ports":
        if port == known.refuse_port:
            return Said(f"{protocol.upper()} port {port} is the one at which nobody listens.")
        return Said(f"{protocol.upper()} port {port} is a proxy port: it may not be dialled directly.")
    portal, owner = known.portal(ip, port, protocol), known.owner(ip, port, protocol) or match["name"] or ""
    sender = next((said for suffix, said in SENDERS.items() if place.endswith(suffix)), "")
    if place.startswith("restricted"):
        return Said(f"{portal[0].upper()}{portal[1:]} may be dialled from the networks in @allowed only.", owner)
    if place.startswith("dropped"):
        return Said(f"Packets{sender} to {portal} are dropped.", owner)
    if match["to"] == known.refuse_port:
        end = (
            f"are led to port {known.refuse_port}, at which nobody listens: no endpoint is there, and "
            f"the kernel refuses at once."
        )
        return Said(f"Packets{sender} to {portal} {end}", owner)
    return Said(f"Packets{sender} to {portal} are led to our proxy port {match['to']}.", owner)
