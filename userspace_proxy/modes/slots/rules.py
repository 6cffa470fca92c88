"""The rules of a `SlotTable`: which packets are refused, dropped, masqueraded or translated. Pure."""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.modes import nft_blocks
from userspace_proxy.modes.kernel_rules import NodeFacts
from userspace_proxy.modes.nft_blocks import IP, NO_LOOP, Block, nat_hook
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.kinds import CLIENT, SIZES
from userspace_proxy.modes.slots.packet_number import (
    DROPPED,
    ENDPOINT,
    ENDPOINT_SET,
    MASQUERADED,
    OURS,
    PINNED,
    REJECTED,
    REJECTED_AT_INPUT,
)
from userspace_proxy.netfilter.nft_text import is_everything, merged
from userspace_proxy.netfilter.sets import class_id

MASQUERADE_MARK = 0x4000
_MARK, _OURS = f"{MASQUERADE_MARK:#x}", class_id(OURS)
_SET_NUMBER, _ENDPOINT_NUMBER = (f"meta priority & {class_id(bits)}" for bits in (ENDPOINT_SET, ENDPOINT))

_HOOKS = {
    # Before other NAT at -100, and after the NAT of userspace mode's table, in case both are there for a moment.
    "prerouting": nat_hook("prerouting", -104),
    "output": nat_hook("output", -104),
    "input": RuleLine(
        "type filter hook input priority 0; policy accept;", "Called for every packet to this node itself."
    ),
    "postrouting": RuleLine(
        "type nat hook postrouting priority 99; policy accept;",
        "Called for the first packet of each connection, before other source NAT (100).",
    ),
    "forward": nft_blocks.FORWARD_BLOCK.head[0],
}
_REASONS = nft_blocks.CHAIN_REASONS | {
    "refuse": "Refused packets: an immediate answer, so that clients need not wait.",
    "remembered": "Stores the pin, and translates to the endpoint whose number the packet carries.",
    "pinned": "Services with affinity: the endpoint of the client's pin, else a random one.",
    "translate": "Decides by the number that was found.",
    "services": "Packets to Services, in the order of the look-ups.",
    "from_node": "Packets of processes of this node itself, before the chain services.",
    "postrouting": "POSTROUTING: packets about to leave, after routing; source addresses are replaced here.",
}


def chains_of(
    family: Family,
    facts: NodeFacts,
    timeouts_s: Sequence[int],
    refused: Iterable[RuleLine],
    translate: Iterable[RuleLine],
) -> dict[str, list[RuleLine]]:
    """Return the chains of *family*, each before its callers. *refused* and *translate*: the rules of the mode."""
    chains = {
        f"remembered{family}": _remembered(family, timeouts_s),
        f"pinned{family}": _pinned(family),
        f"translate{family}": [_TO_REFUSE, _TO_DROP, _TO_MASQUERADE, *translate],
        f"node_ports{family}": _lookups("meta l4proto . th dport", f"node_ports{family}", family, facts),
        f"services{family}": _services(family, facts, refused),
        f"from_node{family}": _from_node(family, facts),
    }
    return {name: list(rules) for name, rules in chains.items()}


def hooked_chains(hairpin: str) -> dict[str, Sequence[RuleLine]]:
    """Return the chains that the kernel calls. *hairpin*: what a rule for hairpin packets matches beside addresses."""
    services, from_node = (
        [RuleLine(f"meta nfproto ipv{f} jump {to}{f}", f"IPv{f} has rules of its own.") for f in FAMILIES]
        for to in ("services", "from_node")
    )
    hairpins = (
        RuleLine(
            f"{hairpin}{ip} saddr . {ip} daddr @hairpins{family} masquerade fully-random",
            "Hairpin: an endpoint dialled its own Service and was chosen. With its own source address it "
            "would reply to itself directly, untranslated.",
        )
        for family, ip in IP.items()
    )
    return {
        "prerouting": services,
        "output": [*from_node, *services],
        "input": [_REFUSE_AT_INPUT],
        "forward": [NO_LOOP],
        "postrouting": [_CLEAR_NUMBER, _MASQUERADE, *hairpins],
    }


def blocks(chains: Mapping[str, Sequence[RuleLine]]) -> list[Block]:
    """Return *chains* with their reasons, and with their hooks if the kernel calls them."""
    return [
        Block("chain", name, _REASONS[name.rstrip("46")], (_HOOKS[name],) if name in _HOOKS else (), rules)
        for name, rules in chains.items()
    ]


def unmatched(numbers: Set[int]) -> set[RuleLine]:
    """Return the rules that match none of *numbers*."""
    found = {rule for number, rule in ((REJECTED, _TO_REFUSE), (DROPPED, _TO_DROP)) if number not in numbers}
    if not any(number & MASQUERADED for number in numbers):
        found.add(_TO_MASQUERADE)
    return found if any(number & PINNED for number in numbers) else found | set(map(_to_pinned, FAMILIES))


# ---- refuse, drop, masquerade

REFUSE = (
    RuleLine(
        "tcp flags & rst == rst accept",
        "The reset itself passes here, too, if this node dialled one of its own addresses: accept it.",
    ),
    RuleLine("meta l4proto tcp reject with tcp reset", "TCP: a reset; the client sees `connection refused`."),
    # A reject at OUTPUT makes sendto() fail with EPERM; at INPUT the sender gets ECONNREFUSED.
    RuleLine(
        f'oif "lo" fib daddr type local meta priority set {class_id(REJECTED_AT_INPUT)} accept',
        "UDP from this node to one of its own addresses: INPUT rejects packets with this number. Rejected here, the "
        "sender would see `operation not permitted` instead of `connection refused`.",
    ),
    RuleLine("reject with icmpx type port-unreachable", "Otherwise (UDP): ICMP port unreachable."),
)
_TO_REFUSE = RuleLine(
    f"meta priority {class_id(REJECTED)} goto refuse",
    f"The number {class_id(REJECTED)} means: the Service has no endpoints. Refused at once.",
)
_TO_DROP = RuleLine(
    f"meta priority {class_id(DROPPED)} drop",
    f"The number {class_id(DROPPED)} means: traffic policy Local, and no endpoint on this node. Dropped.",
)
_TO_MASQUERADE = RuleLine(
    f"meta priority & {class_id(MASQUERADED)} == {class_id(MASQUERADED)} meta mark set meta mark | {_MARK}",
    f"The bit {class_id(MASQUERADED)} means masquerade: POSTROUTING replaces the source address of packets with the "
    f"mark {_MARK}, so that replies come back to this node.",
)
_REFUSE_AT_INPUT = RuleLine(
    f'iif "lo" meta priority {class_id(REJECTED_AT_INPUT)} reject with icmpx type port-unreachable',
    "UDP packets of this node to itself that the chain refuse gave this number: ICMP port unreachable.",
)
_CLEAR_NUMBER = RuleLine(
    f"meta priority & {_OURS} == {_OURS} meta priority set none",
    "The packet is about to leave: clear our number, which traffic shapers (tc) would read as a class.",
)
_MASQUERADE = RuleLine(
    f"meta mark & {_MARK} == {_MARK} meta mark set meta mark & {0xFFFF_FFFF ^ MASQUERADE_MARK:#x} "
    "masquerade fully-random",
    f"Packets with the mark {_MARK}: clear it, and replace the source address with this node's "
    "(masquerade), at a random port.",
)


# ---- look up a portal


def _services(family: Family, facts: NodeFacts, refused: Iterable[RuleLine]) -> Iterator[RuleLine]:
    ip = IP[family]
    yield nft_blocks.restriction(family)
    yield from _lookups(f"{ip} daddr . meta l4proto . th dport", f"services{family}", family, facts)
    yield RuleLine(
        f"{ip} daddr @cluster_ips{family} goto refuse",
        "A cluster IP at a port without a Service: refused at once.",
    )
    yield from refused
    if cidrs := ", ".join(merged(facts.service_cidrs, family)):
        yield RuleLine(
            f"{ip} daddr {{ {cidrs} }} fib daddr type != local drop",
            f"An address in {cidrs}, the range of cluster IPs, without a Service: dropped, unless it is an address of "
            "this node, such as that of cluster DNS.",
        )
    match, words = _at_node_ports(family, facts)
    yield RuleLine(f"{match} jump node_ports{family}", f"Packets to {words}: is it a node port?")


def _from_node(family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
    """Yield the rules for packets of this node itself, before those for all senders."""
    yield nft_blocks.restriction(family)
    yield _lookup("", f"{IP[family]} daddr . meta l4proto . th dport", f"services{family}_for_node", family, "")
    match, words = _at_node_ports(family, facts)
    yield _lookup(f"{match} ", "meta l4proto . th dport", f"node_ports{family}_for_node", family, f" to {words}")


def _at_node_ports(family: Family, facts: NodeFacts) -> tuple[str, str]:
    """Return what matches the node addresses that serve node ports, and the same in words.

    Loopback is left out: the kernel routes no packet with a loopback address.
    """
    ip, loopback = IP[family], {4: "127.0.0.0/8", 6: "::1"}[family]
    here = f"fib daddr type local {ip} daddr != {loopback}"
    networks = merged(facts.node_ports_on, family)
    if not networks or is_everything(networks):
        return here, "an address of this node (except loopback)"
    on = ", ".join(networks)
    return f"{ip} daddr {{ {on} }} {here}", f"an address of this node in {on}"


def _lookups(key: str, name: str, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
    match, words = nft_blocks.from_pods(facts.pods, family)
    if match:
        yield _lookup(match, key, f"{name}_for_pods", family, f" {words}")
    yield _lookup("", key, name, family, "")


def _lookup(match: str, key: str, name: str, family: Family, which: str) -> RuleLine:
    return RuleLine(
        f"{match}meta priority set {key} map @{name} goto translate{family}",
        f"Packets{which} whose portal is in @{name} get the number found there as their priority, and continue in the "
        "chain translate. Others: the next rule.",
    )


# ---- translate

_KEEP_SET = RuleLine(
    f"meta priority set {_SET_NUMBER}",
    "Keep only the set's number in the packet's priority, for the next look-up.",
)


def translate(family: Family) -> Iterator[RuleLine]:
    """Yield the rules that translate to an endpoint of the set whose number the packet carries."""
    yield _to_pinned(family)
    yield _KEEP_SET
    for protocol in L4Protocol:
        for size in SIZES:
            slot = f"meta priority . numgen random mod {size} map @slots{family}_{protocol.lower()}_{size}"
            yield RuleLine(
                f"meta l4proto {protocol.lower()} dnat {IP[family]} to {slot}",
                f"{protocol}: a random slot below {size}; the endpoint found for set . slot becomes the packet's "
                "destination (DNAT). A set that is not in this map has another size: the next rule.",
            )


def _to_pinned(family: Family) -> RuleLine:
    bit = class_id(PINNED)
    return RuleLine(
        f"meta priority & {bit} == {bit} goto pinned{family}",
        f"The bit {bit} means affinity: continue in the chain pinned.",
    )


def _pinned(family: Family) -> Iterator[RuleLine]:
    """Yield the rules for affinity: to the endpoint of the client's pin, else to a random one."""
    yield _KEEP_SET
    yield RuleLine(
        f"meta priority set {CLIENT[family]} . meta priority map @pins{family} jump remembered{family}",
        "Has the client a pin in this set? Then take the endpoint's number from it, renew the pin, and go there.",
    )
    yield RuleLine(
        f"{_ENDPOINT_NUMBER} != 0:0 delete @pins{family} {{ {CLIENT[family]} . {_SET_NUMBER} : meta priority }}",
        "The packet came back, so the endpoint of the pin is gone: delete the pin.",
    )
    yield _KEEP_SET
    for size in SIZES:
        slot = f"meta priority . numgen random mod {size} map @picks{family}_{size}"
        yield RuleLine(
            f"{_ENDPOINT_NUMBER} == 0:0 meta priority set {slot} goto remembered{family}",
            f"No pin: a random slot below {size} yields an endpoint's number, which the chain remembered stores. A set "
            "that is not in this map has another size: the next rule.",
        )


def _remembered(family: Family, timeouts_s: Iterable[int]) -> Iterator[RuleLine]:
    """Yield the rules that store or renew a pin, and translate to its endpoint if that still exists."""
    for timeout_s in timeouts_s:
        element = f"{CLIENT[family]} . {_SET_NUMBER} timeout {timeout_s}s : meta priority"
        yield RuleLine(
            f"{_SET_NUMBER} @affinity_{timeout_s} update @pins{family} {{ {element} }}",
            f"For a set in @affinity_{timeout_s}: store the client's pin, or renew it, for {timeout_s} s from now.",
        )
    for protocol in L4Protocol:
        endpoints = f"@endpoints{family}_{protocol.lower()}"
        yield RuleLine(
            f"meta l4proto {protocol.lower()} dnat {IP[family]} to meta priority map {endpoints}",
            f"{protocol}: the endpoint with this number becomes the packet's destination (DNAT).",
        )
