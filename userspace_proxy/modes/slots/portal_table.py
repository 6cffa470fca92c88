"""What nftables does with packets to portals where the kernel leads them on: a table of ours, in whatever mode. Pure.

A packet's address and port are looked up once, by who sends it, and give a number, which it carries in its *priority*
(nothing reads that before the packet leaves, when we take it away again). The number says what becomes of it: refused,
dropped, or led on - and whether its sender's address is to be replaced. How it is led on is a mode's own (`translate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import ListenerName, ServicePortName
from userspace_proxy.model.routes import Refusal, Sender
from userspace_proxy.model.service import Portal, internal_portals
from userspace_proxy.modes.nft_blocks import (
    CHAIN_REASONS,
    FORWARD_TYPE,
    NO_LOOP,
    RESTRICTED_REASON,
    SENT,
    TABLE_REASON,
    Block,
    NftTable,
    from_pods,
)
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.element_reasons import element_reason, leads, unpacked
from userspace_proxy.modes.slots.packet_number import DROPPED, MASQUERADED, OURS, REJECTED, REJECTED_AT_INPUT
from userspace_proxy.netfilter.nft_text import merged
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

IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
_SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}

_NAT_REASON = (
    "Called for the first packet of each connection only; conntrack does the same to all later ones. -104 is before "
    "other NAT (-100). Accept: what no rule leads elsewhere goes its usual way."
)
_HOOKS = {
    # Before foreign NAT at -100, behind the NAT of userspace mode's table, should both be there for a moment.
    "prerouting": RuleLine("type nat hook prerouting priority -104; policy accept;", _NAT_REASON),
    "output": RuleLine("type nat hook output priority -104; policy accept;", _NAT_REASON),
    "input": RuleLine(
        "type filter hook input priority 0; policy accept;", "Called for every packet that is for this node itself."
    ),
    "forward": FORWARD_TYPE,
    "postrouting": RuleLine(
        "type nat hook postrouting priority 99; policy accept;",
        "Called for the first packet of each connection only, before other source NAT (100).",
    ),
}
_REASONS = CHAIN_REASONS | {
    "refuse": "Packets that nobody may serve: an answer at once, so that clients need not wait.",
    "remembered": "Keeps the pin, and leads to the endpoint whose number the packet has.",
    "pinned": "Services with affinity: the endpoint of the client's pin, else one by chance.",
    "translate": "What becomes of a packet whose number was found.",
    "services": "Packets to Services, in the order in which they are looked up.",
    "from_node": "What goes before the rest for processes of this node itself.",
    "postrouting": "POSTROUTING: what is about to leave, after routing; here senders' addresses are replaced.",
}


class PortalTable:
    """Our table in one mode: its sets and maps, its rules, and which elements a translation is in it."""

    name: str  # family and name

    # ---- what a mode says

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        """Yield the sets and maps of *family* that are this mode's own."""
        return iter(())

    def chains_of(self, family: Family, timeouts_s: Sequence[int]) -> dict[str, Iterable[RuleLine]]:
        """Return the chains of *family* behind ``translate``, each before those that lead to it."""
        return {}

    def translate(self, family: Family) -> Iterator[RuleLine]:
        """Yield the rules for packets that are led on."""
        return iter(())

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
        """Yield the rules for packets to addresses of portals at ports that nobody has, beside cluster IPs."""
        return iter(())

    # What tells packets that were led back to their own sender, beside its address.
    hairpin = ""

    def dynamic(self) -> tuple[Block, ...]:
        """Return the declarations of what the kernel fills by itself."""
        return ()

    def unmatched(self, values: Set[int]) -> set[RuleLine]:
        """Return the rules that match none of the numbers *values*."""
        found = {rule for number, rule in ((REJECTED, _TO_REFUSE), (DROPPED, _TO_DROP)) if number not in values}
        return found if any(value & MASQUERADED for value in values) else found | {_TO_MASQUERADE}

    def timeout_kind(self, timeout_s: int) -> SetKind | None:
        """Return what holds whose affinity lasts for *timeout_s*, None where that is no business of this table."""
        return None

    def number_of(self, portal: Portal, listener: ListenerName, translation: Translation) -> int:
        """Return the number that leads packets to *portal* to the endpoints that *listener* stands for."""
        return OURS

    def mode_elements(self, translation: Translation) -> Elements:
        """Return the elements of *translation* that are this mode's own."""
        return {}

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Free the numbers that *before* had and *after* has not."""

    # ---- sets and maps

    def __init__(self) -> None:
        self._kinds = dict(self._all_kinds())

    def _all_kinds(self) -> Iterator[tuple[str, SetKind]]:
        for family in FAMILIES:
            yield from _portal_kinds(family)
            yield from self.kinds_of(family)
            yield from _address_kinds(family)

    def kind_of(self, name: str) -> SetKind:
        """Return how the set or map *name* is written down."""
        if name.startswith("affinity_"):
            kind = self.timeout_kind(int(name.removeprefix("affinity_")))
            assert kind is not None
            return kind
        return self._kinds[name]

    def set_names(self, timeouts_s: Iterable[int]) -> list[str]:
        """Return the sets and maps whose elements are ours to add, where affinity may last for *timeouts_s*."""
        return [*self._kinds, *(f"affinity_{t}" for t in sorted(timeouts_s) if self.timeout_kind(t))]

    def elements(self, translation: Translation) -> Elements:
        """Return what is looked up for one service port."""
        found: Elements = {}
        for portal, sender, to in translation.routes:
            if isinstance(to, Refusal):
                value = REJECTED if to is Refusal.REJECT else DROPPED
            else:
                value = self.number_of(portal, to, translation) | (0 if to.transparent else MASQUERADED)
            kind = "node_ports" if portal.is_node_port else "services"
            found.setdefault(f"{kind}{portal.family}{_SENDERS[sender]}", {})[packed_portal(portal)] = packed_number(
                value
            )
        for name, own in self.mode_elements(translation).items():
            found.setdefault(name, {}).update(own)
        for portal in internal_portals(translation.service_port):
            found.setdefault(f"cluster_ips{portal.family}", {})[packed_ip(portal.ip)] = b""
        for portal, cidrs in translation.allowed.items():
            networks = merged(cidrs, portal.family)
            if networks not in (("0.0.0.0/0",), ("::/0",)):
                found.setdefault(f"restricted{portal.family}", {})[packed_portal(portal)] = b""
                found.setdefault(f"allowed{portal.family}", {}).update(packed_ranges(portal, networks))
        return found

    # ---- texts

    def skeleton(self, facts: NodeFacts, timeouts_s: Iterable[int], *, is_there: bool = False) -> str:
        """Return the script that makes our table without elements, or replaces the rules of one that is there.

        What stands in its sets and maps stays there, what the kernel put in among it. *is_there*: it is refused where
        the table is not, as somebody has removed it with what stood in it.
        """
        timeouts_s = sorted(timeouts_s)
        chains = self._chains(facts, timeouts_s)
        empty = (chain._replace(items=()) for chain in chains)
        sets = (self._block(name) for name in self.set_names(timeouts_s))
        held = f"flush table {self.name}\n" if is_there else ""
        declared = NftTable(self._before, [*sets, *self.dynamic(), *empty]).text()
        return f"{held}{declared}flush table {self.name}\n{NftTable(self._before, chains).text()}"

    def text(self, facts: NodeFacts, translations: Iterable[Translation]) -> str:
        """Return our whole table as one script, to be read, or loaded where there is none."""
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
        sets = []
        for name in self.set_names(timeouts_s):
            kind, lines = self.kind_of(name), []
            for key, value in found.get(name, {}).items():
                owner = None if kind.is_shared and not name.startswith("affinity_") else owners[name, key]
                text = shown(kind, key, value, owners[name, key])
                lines.append(RuleLine(text, element_reason(name, kind, key, value, found), owner))
            sets.append(self._block(name)._replace(items=lines))
        numbers = {number for name, of_set in found.items() if leads(name) for number in map(unpacked, of_set.values())}
        blocks = [*sets, *self.dynamic(), *self._chains(facts, sorted(timeouts_s))]
        return NftTable(self._before, blocks, self.unmatched(numbers).__contains__)

    @property
    def _before(self) -> tuple[RuleLine, ...]:
        return (RuleLine(f"table {self.name} {{", TABLE_REASON),)

    def _block(self, name: str) -> Block:
        """Return the declaration of the set or map *name*."""
        kind = self.kind_of(name)
        return Block(kind.word, name, kind.reason, (RuleLine(kind.declared, kind.parts),))

    def removal(self) -> str:
        """Return the script that removes our table; it succeeds where there is none."""
        return f"table {self.name}\ndelete table {self.name}\n"

    def rules_in(self, facts: NodeFacts, timeouts_s: Iterable[int]) -> int:
        """Return how many rules the table has."""
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
                    "The number that the chain refuse gives what this node sends to itself: ICMP port unreachable.",
                )
            ],
            "forward": [NO_LOOP],
            "postrouting": [
                RuleLine(
                    f"meta priority & {own} == {own} meta priority set none",
                    "The packet is about to leave: take our number away again, lest a traffic shaper (tc) reads it as "
                    "a class.",
                ),
                RuleLine(
                    f"meta mark & {mark} == {mark} meta mark set meta mark & {0xFFFF_FFFF ^ MASQUERADE_MARK:#x}"
                    " masquerade fully-random",
                    f"Marked with {mark}: take the mark away, and replace the sender's address by this node's "
                    "(masquerade), at a port drawn by chance.",
                ),
                *(
                    RuleLine(
                        f"{self.hairpin}{ip} saddr . {ip} daddr @hairpins{family} masquerade fully-random",
                        "An endpoint that dialled its own Service and met itself: without another sender's address it "
                        "would answer itself directly, past us, and not know the answer.",
                    )
                    for family, ip in IP.items()
                ),
            ],
        }
        return [
            Block("chain", name, _REASONS[name.rstrip("46")], (_HOOKS[name],) if name in _HOOKS else (), list(rules))
            for name, rules in chains.items()
        ]


def add_hairpins(found: Elements, family: Family, ips: Iterable[str]) -> None:
    """Add to *found* that who is led back to himself is masqueraded: he would not know the answer for one."""
    found.setdefault(f"hairpins{family}", {}).update((packed_ip(ip) * 2, b"") for ip in ips)


def _portal_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address, port = f"ipv{family}_addr", ("inet_proto", "inet_service")
    for sender in reversed(_SENDERS):
        for kind, what, key, words in (
            ("services", "addresses of Services", (address, *port), "address . protocol . port"),
            ("node_ports", "node ports", port, "protocol . port"),
        ):
            first = " Asked before the map for everybody." if _SENDERS[sender] else ""
            yield (
                f"{kind}{family}{_SENDERS[sender]}",
                SetKind(
                    f"type {' . '.join(key)} : classid",
                    key,
                    ("classid",),
                    f"Packets{SENT[sender]} to {what} (IPv{family}): portal -> a number that says what becomes of the "
                    f"packet.{first}",
                    f"Key: {words}; value: a number of 32 bits, shown as xxxx:xxxx.",
                    names_owner=True,
                ),
            )


def _address_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address, portal = f"ipv{family}_addr", (f"ipv{family}_addr", "inet_proto", "inet_service")
    reason = "Endpoints beside themselves: who dials its own Service and is chosen itself."
    parts = "An element is sender . destination, after DNAT."
    pair = (address, address)
    yield f"hairpins{family}", SetKind(f"type {address} . {address}", pair, (), reason, parts, is_shared=True)
    reason, parts = "All cluster IPs, whatever the port.", "An element is an address."
    yield f"cluster_ips{family}", SetKind(f"type {address}", (address,), (), reason, parts, is_shared=True)
    parts = "An element is address . protocol . port."
    declared = f"type {' . '.join(portal)}"
    yield f"restricted{family}", SetKind(declared, portal, (), RESTRICTED_REASON, parts, names_owner=True)
    reason = "From where these may be dialled: portal . addresses of senders."
    parts = "An element is address . protocol . port . addresses of senders, from - to."
    declared = f"{declared} . {address}; flags interval"
    yield f"allowed{family}", SetKind(declared, (*portal, address), (), reason, parts, is_interval=True)


# ---- rules

_REFUSE = (
    # The reset itself, where this node dials an address of its own: it comes by here, too.
    RuleLine(
        "tcp flags & rst == rst accept",
        "The reset itself, where this node refuses what it dialled at an address of its own: let it pass.",
    ),
    RuleLine("meta l4proto tcp reject with tcp reset", "TCP: a reset; the client sees `connection refused`."),
    # A reject at OUTPUT makes sendto() fail with EPERM; at INPUT the sender gets ECONNREFUSED.
    RuleLine(
        f'oif "lo" fib daddr type local meta priority set {class_id(REJECTED_AT_INPUT)} accept',
        "UDP from this node to an address of its own: let it pass with this number, which INPUT rejects. Rejected "
        "here, its sender would see `operation not permitted` in place of `connection refused`.",
    ),
    RuleLine("reject with icmpx type port-unreachable", "Else (UDP): ICMP port unreachable."),
)
# What a packet's number says first, in every mode.
_TO_REFUSE = RuleLine(
    f"meta priority {class_id(REJECTED)} goto refuse",
    f"The number {class_id(REJECTED)} says: no endpoint is there. Refused at once.",
)
_TO_DROP = RuleLine(
    f"meta priority {class_id(DROPPED)} drop",
    f"The number {class_id(DROPPED)} says: the traffic policy wants endpoints of this node, and it has none. Dropped.",
)
_TO_MASQUERADE = RuleLine(
    f"meta priority & {class_id(MASQUERADED)} == {class_id(MASQUERADED)} "
    f"meta mark set meta mark | {MASQUERADE_MARK:#x}",
    f"The bit {class_id(MASQUERADED)} says: the sender's address is to be replaced by this node's, so that answers "
    f"come back here. Marked with {MASQUERADE_MARK:#x}; POSTROUTING does it.",
)


def _services(family: Family, facts: NodeFacts, refused: Iterable[RuleLine]) -> Iterator[RuleLine]:
    ip = IP[family]
    yield _restricts(family)
    yield from _lookups(f"{ip} daddr . meta l4proto . th dport", f"services{family}", family, facts)
    # The other ports of a cluster IP are nobody's, nor is an address that no Service has.
    yield RuleLine(
        f"{ip} daddr @cluster_ips{family} goto refuse",
        "A cluster IP at a port that no Service has there: refused at once.",
    )
    yield from refused
    if cidrs := ", ".join(merged(facts.service_cidrs, family)):
        yield RuleLine(
            f"{ip} daddr {{ {cidrs} }} fib daddr type != local drop",
            f"An address out of {cidrs}, where cluster IPs come from, that no Service has: dropped, unless it is "
            "this node's own, as that of cluster DNS is.",
        )
    match, words = _at_node_ports(family, facts)
    yield RuleLine(f"{match} jump node_ports{family}", f"Packets to {words}: see whether it is a node port.")


def _restricts(family: Family) -> RuleLine:
    ip = IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    return RuleLine(
        f"{portal} @restricted{family} {portal} . {ip} saddr != @allowed{family} drop",
        "Is the portal one of @restricted, and the sender none of @allowed? Dropped, without an answer.",
    )


def _from_node(family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
    """Yield what goes before the rest for processes of the node itself."""
    yield _restricts(family)
    yield _lookup("", f"{IP[family]} daddr . meta l4proto . th dport", f"services{family}_for_node", family, "")
    match, words = _at_node_ports(family, facts)
    yield _lookup(f"{match} ", "meta l4proto . th dport", f"node_ports{family}_for_node", family, f" to {words}")


def _at_node_ports(family: Family, facts: NodeFacts) -> tuple[str, str]:
    """Return what matches the node's own addresses with node ports, and that in words.

    Never loopback, which the kernel does not route.
    """
    ip, loopback = IP[family], {4: "127.0.0.0/8", 6: "::1"}[family]
    here = f"fib daddr type local {ip} daddr != {loopback}"
    networks = merged(facts.node_ports_on, family)
    if networks in ((), ("0.0.0.0/0",), ("::/0",)):
        return here, "an address of this node (but loopback)"
    on = ", ".join(networks)
    return f"{ip} daddr {{ {on} }} {here}", f"an address of this node that is one of {on}"


def _lookups(key: str, name: str, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
    match, words = from_pods(facts.pods, family)
    if match:
        yield _lookup(match, key, f"{name}_for_pods", family, f" {words}")
    yield _lookup("", key, name, family, "")


def _lookup(match: str, key: str, name: str, family: Family, which: str) -> RuleLine:
    return RuleLine(
        f"{match}meta priority set {key} map @{name} goto translate{family}",
        f"Packets{which} whose portal is in @{name} take the number that stands there (into their priority, which is "
        "free until the packet leaves), and go on with it to the chain translate. Others: the next rule.",
    )
