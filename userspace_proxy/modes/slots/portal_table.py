"""The nftables table of kernel modes: which packets are refused, dropped, masqueraded or translated. Pure.

A look-up of a packet's destination, one for each kind of sender, yields a number. The packet carries it in its
*priority*, which nothing reads before the packet leaves, when it is cleared. The number says whether the packet is
refused, dropped or translated, and whether it is masqueraded. How it is translated is the mode's own (`translate`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence, Set

from userspace_proxy.model.endpoint import FAMILIES, Endpoint, Family
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal
from userspace_proxy.model.service import Portal, internal_portals
from userspace_proxy.modes import nft_blocks
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import IP, NO_LOOP, SENDERS, SENT, Block, NftTable, nat_hook, set_block
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.element_reasons import element_reason, leads, unpacked
from userspace_proxy.modes.slots.packet_number import DROPPED, MASQUERADED, OURS, REJECTED, REJECTED_AT_INPUT
from userspace_proxy.netfilter.nft_text import is_everything, merged
from userspace_proxy.netfilter.sets import (
    Elements,
    SetKind,
    class_id,
    packed_ip,
    packed_number,
    packed_portal,
    packed_ranges,
    shown,
)

MASQUERADE_MARK = 0x4000

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


class PortalTable:
    """Our table in one mode. It has the sets and maps, the rules, and the elements for a translation.

    A mode overrides the methods up to `forget`.
    """

    name: str  # family and name
    hairpin = ""  # what a rule matches beside the addresses, to recognise hairpin packets

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        """Yield the sets and maps of *family* that only this mode has."""
        return iter(())

    def chains_of(self, family: Family, timeouts_s: Sequence[int]) -> dict[str, Iterable[RuleLine]]:
        """Return the chains of *family* behind ``translate``, each before its callers."""
        return {}

    def translate(self, family: Family) -> Iterator[RuleLine]:
        """Yield the rules for packets that are neither refused nor dropped."""
        return iter(())

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
        """Yield the rules that refuse more than unserved ports of cluster IPs."""
        return iter(())

    def dynamic(self) -> tuple[Block, ...]:
        """Return the sets and maps that the kernel fills by itself."""
        return ()

    def unmatched(self, values: Set[int]) -> set[RuleLine]:
        """Return the rules that match none of the numbers *values*."""
        found = {rule for number, rule in ((REJECTED, _TO_REFUSE), (DROPPED, _TO_DROP)) if number not in values}
        return found if any(value & MASQUERADED for value in values) else found | {_TO_MASQUERADE}

    def timeout_kind(self, timeout_s: int) -> SetKind | None:
        """Return the set of endpoint sets whose affinity lasts *timeout_s*, or None if this mode needs none."""
        return None

    def number_of(self, portal: Portal, listener: ListenerName, translation: Translation) -> int:
        """Return the number that sends packets to *portal* to the endpoints of *listener*."""
        return OURS

    def mode_elements(self, translation: Translation) -> Elements:
        """Return the elements of *translation* in the sets and maps that only this mode has."""
        return {}

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Release the numbers of *before* that *after* does not need."""

    # ---- sets and maps

    def __init__(self) -> None:
        self._kinds = dict(self._all_kinds())

    def _all_kinds(self) -> Iterator[tuple[str, SetKind]]:
        for family in FAMILIES:
            yield from _portal_kinds(family)
            yield from self.kinds_of(family)
            yield from _address_kinds(family)

    def kind_of(self, name: str) -> SetKind:
        """Return the declaration and types of the set or map *name*."""
        if name.startswith("affinity_"):
            kind = self.timeout_kind(int(name.removeprefix("affinity_")))
            assert kind is not None
            return kind
        return self._kinds[name]

    def set_names(self, timeouts_s: Iterable[int]) -> list[str]:
        """Return the sets and maps that we fill. *timeouts_s*: the durations of affinity in use."""
        return [*self._kinds, *(f"affinity_{t}" for t in sorted(timeouts_s) if self.timeout_kind(t))]

    def elements(self, translation: Translation) -> Elements:
        """Return the elements of one service port."""
        found: Elements = {}
        for portal, sender, to in translation.routes:
            if isinstance(to, Refusal):
                value = REJECTED if to is Refusal.REJECT else DROPPED
            else:
                value = self.number_of(portal, to, translation) | (0 if to.transparent else MASQUERADED)
            name = f"{'node_ports' if portal.is_node_port else 'services'}{portal.family}{SENDERS[sender]}"
            found.setdefault(name, {})[packed_portal(portal)] = packed_number(value)
        for name, own in self.mode_elements(translation).items():
            found.setdefault(name, {}).update(own)
        for portal in internal_portals(translation.service_port):
            found.setdefault(f"cluster_ips{portal.family}", {})[packed_ip(portal.ip)] = b""
        for portal, cidrs in translation.allowed.items():
            if not is_everything(networks := merged(cidrs, portal.family)):
                found.setdefault(f"restricted{portal.family}", {})[packed_portal(portal)] = b""
                found.setdefault(f"allowed{portal.family}", {}).update(packed_ranges(portal, networks))
        return found

    # ---- texts

    def skeleton(self, facts: NodeFacts, timeouts_s: Iterable[int], *, is_there: bool = False) -> str:
        """Return the script that creates our table without elements, or replaces the rules of an existing one.

        Existing elements stay, those that the kernel added, too. *is_there*: the kernel refuses the script if another
        program has removed the table with its elements.
        """
        timeouts_s = sorted(timeouts_s)
        chains = self._chains(facts, timeouts_s)
        empty = (chain._replace(items=()) for chain in chains)
        sets = (set_block(name, self.kind_of(name)) for name in self.set_names(timeouts_s))
        held = f"flush table {self.name}\n" if is_there else ""
        declared = NftTable(self._before, [*sets, *self.dynamic(), *empty]).text()
        return f"{held}{declared}flush table {self.name}\n{NftTable(self._before, chains).text()}"

    def text(self, facts: NodeFacts, translations: Iterable[Translation]) -> str:
        """Return our whole table as one script."""
        return self.rules(facts, translations).text()

    def rules(self, facts: NodeFacts, translations: Iterable[Translation]) -> NftTable:
        """Return the lines of `text`, each with its reason."""
        found, owners = Elements(), dict[tuple[str, bytes], ServicePortName]()
        timeouts_s = set()
        for translation in translations:
            if translation.service_port.affinity_timeout_s is not None:
                timeouts_s.add(translation.service_port.affinity_timeout_s)
            for name, of_set in self.elements(translation).items():
                found.setdefault(name, {}).update(of_set)
                owners.update(((name, key), translation.service_port.name) for key in of_set)
        sets = [self._explained_set(name, found, owners) for name in self.set_names(timeouts_s)]
        numbers = {number for name, of_set in found.items() if leads(name) for number in map(unpacked, of_set.values())}
        blocks = [*sets, *self.dynamic(), *self._chains(facts, sorted(timeouts_s))]
        return NftTable(self._before, blocks, self.unmatched(numbers).__contains__)

    def _explained_set(self, name: str, found: Elements, owners: Mapping[tuple[str, bytes], ServicePortName]) -> Block:
        kind, lines = self.kind_of(name), []
        is_shared = kind.is_shared and not name.startswith("affinity_")
        for key, value in found.get(name, {}).items():
            owner = owners[name, key]
            reason = element_reason(name, kind, key, value, found)
            lines.append(RuleLine(shown(kind, key, value, owner), reason, None if is_shared else owner))
        return set_block(name, kind, lines)

    @property
    def _before(self) -> tuple[RuleLine, ...]:
        return (RuleLine(f"table {self.name} {{", nft_blocks.TABLE_REASON),)

    def removal(self) -> str:
        """Return the script that removes our table. It succeeds if there is none."""
        return f"table {self.name}\ndelete table {self.name}\n"

    def rules_in(self, facts: NodeFacts, timeouts_s: Iterable[int]) -> int:
        """Return the number of rules in the table."""
        return sum(len(chain.items) for chain in self._chains(facts, sorted(timeouts_s)))

    def _chains(self, facts: NodeFacts, timeouts_s: Sequence[int]) -> list[Block]:
        mark, own = f"{MASQUERADE_MARK:#x}", class_id(OURS)
        chains: dict[str, Iterable[RuleLine]] = {"refuse": _REFUSE}
        for family in FAMILIES:
            chains |= self.chains_of(family, timeouts_s) | {
                f"translate{family}": [_TO_REFUSE, _TO_DROP, _TO_MASQUERADE, *self.translate(family)],
                f"node_ports{family}": _lookups("meta l4proto . th dport", f"node_ports{family}", family, facts),
                f"services{family}": _services(family, facts, self.refused(family, facts)),
                f"from_node{family}": _from_node(family, facts),
            }
        services, from_node = (
            [RuleLine(f"meta nfproto ipv{f} jump {to}{f}", f"IPv{f} has rules of its own.") for f in FAMILIES]
            for to in ("services", "from_node")
        )
        chains |= {
            "prerouting": services,
            "output": [*from_node, *services],
            "input": [
                RuleLine(
                    f'iif "lo" meta priority {class_id(REJECTED_AT_INPUT)} reject with icmpx type port-unreachable',
                    "UDP packets of this node to itself that the chain refuse gave this number: ICMP port unreachable.",
                )
            ],
            "forward": [NO_LOOP],
            "postrouting": [
                RuleLine(
                    f"meta priority & {own} == {own} meta priority set none",
                    "The packet is about to leave: clear our number, which traffic shapers (tc) would read as a class.",
                ),
                RuleLine(
                    f"meta mark & {mark} == {mark} meta mark set meta mark & {0xFFFF_FFFF ^ MASQUERADE_MARK:#x}"
                    " masquerade fully-random",
                    f"Packets with the mark {mark}: clear it, and replace the source address with this node's "
                    "(masquerade), at a random port.",
                ),
                *(
                    RuleLine(
                        f"{self.hairpin}{ip} saddr . {ip} daddr @hairpins{family} masquerade fully-random",
                        "Hairpin: an endpoint dialled its own Service and was chosen. With its own source address it "
                        "would reply to itself directly, untranslated.",
                    )
                    for family, ip in IP.items()
                ),
            ],
        }
        hooks = _HOOKS | {"forward": nft_blocks.FORWARD_BLOCK.head[0]}
        return [
            Block("chain", name, _REASONS[name.rstrip("46")], (hooks[name],) if name in hooks else (), list(rules))
            for name, rules in chains.items()
        ]


def add_hairpins(found: Elements, family: Family, ips: Iterable[str]) -> None:
    """Add to *found* the elements for hairpin packets of *ips*, which must be masqueraded."""
    found.setdefault(f"hairpins{family}", {}).update((packed_ip(ip) * 2, b"") for ip in ips)


def endpoints_of(translation: Translation, family: Family, scope: Scope) -> Collection[Endpoint]:
    """Return the endpoints of *translation* in one family and scope."""
    reach = translation.reaches[family]
    return reach.cluster if scope is Scope.CLUSTER else reach.local


def _portal_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address, port = f"ipv{family}_addr", ("inet_proto", "inet_service")
    for sender in reversed(SENDERS):
        for kind, what, key, words in (
            ("services", "addresses of Services", (address, *port), "address . protocol . port"),
            ("node_ports", "node ports", port, "protocol . port"),
        ):
            first = " Looked up before the map for all senders." if SENDERS[sender] else ""
            yield (
                f"{kind}{family}{SENDERS[sender]}",
                SetKind(
                    f"type {' . '.join(key)} : classid",
                    key,
                    ("classid",),
                    f"Packets{SENT[sender]} to {what} (IPv{family}): portal -> a number that says what happens.{first}",
                    f"Key: {words}; value: a number of 32 bits, shown as xxxx:xxxx.",
                    names_owner=True,
                ),
            )


def _address_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address = f"ipv{family}_addr"
    reason = "Hairpin packets: an endpoint dialled its own Service and was chosen."
    parts = "An element is sender . destination, after DNAT."
    pair = (address, address)
    yield f"hairpins{family}", SetKind(f"type {address} . {address}", pair, (), reason, parts, is_shared=True)
    reason, parts = "All cluster IPs, at any port.", "An element is an address."
    yield f"cluster_ips{family}", SetKind(f"type {address}", (address,), (), reason, parts, is_shared=True)
    yield from nft_blocks.restriction_kinds(family)


# ---- rules

_REFUSE = (
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
    f"meta priority & {class_id(MASQUERADED)} == {class_id(MASQUERADED)} "
    f"meta mark set meta mark | {MASQUERADE_MARK:#x}",
    f"The bit {class_id(MASQUERADED)} means masquerade: POSTROUTING replaces the source address of packets with the "
    f"mark {MASQUERADE_MARK:#x}, so that replies come back to this node.",
)


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
