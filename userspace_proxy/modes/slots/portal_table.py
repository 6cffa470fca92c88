"""What nftables does with packets to portals where the kernel leads them on: a table of ours, in whatever mode. Pure.

A packet's address and port are looked up once, by who sends it, and give a number, which it carries in its *priority*
(nothing reads that before the packet leaves, when we take it away again). The number says what becomes of it: refused,
dropped, or led on - and whether its sender's address is to be replaced. How it is led on is a mode's own (`translate`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import ListenerName, ServicePortName
from userspace_proxy.model.routes import Refusal, Sender
from userspace_proxy.model.service import Portal, internal_portals
from userspace_proxy.netfilter.nft_text import FORWARD_HOOK, NO_LOOP, merged, pod_cidrs
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

MASQUERADED = 0x8000_0000
OURS = 0x4000_0000  # so that we find our own numbers when the packet leaves
_REJECTED, _DROPPED = 1, 2
# Sent by this node to itself: rejected at INPUT. Only a process with CAP_NET_ADMIN could give a packet this priority.
_REJECTED_AT_INPUT = 0x1000_0001
MASQUERADE_MARK = 0x4000

IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
_SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}

_HOOKS = {
    # Before foreign NAT at -100, behind the NAT of userspace mode's table, should both be there for a moment.
    "prerouting": "\t\ttype nat hook prerouting priority -104; policy accept;\n",
    "output": "\t\ttype nat hook output priority -104; policy accept;\n",
    "input": "\t\ttype filter hook input priority 0; policy accept;\n",
    "forward": f"\t\t{FORWARD_HOOK}\n",
    "postrouting": "\t\ttype nat hook postrouting priority 99; policy accept;\n",
}


class PortalTable:
    """Our table in one mode: its sets and maps, its rules, and which elements a translation is in it."""

    name: str  # family and name

    # ---- what a mode says

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        """Yield the sets and maps of *family* that are this mode's own."""
        return iter(())

    def chains_of(self, family: Family, timeouts_s: Sequence[int]) -> dict[str, Iterable[str]]:
        """Return the chains of *family* behind ``translate``, each before those that lead to it."""
        return {}

    def translate(self, family: Family) -> Iterator[str]:
        """Yield the rules for packets that are led on."""
        return iter(())

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[str]:
        """Yield the rules for packets to addresses of portals at ports that nobody has, beside cluster IPs."""
        return iter(())

    # What tells packets that were led back to their own sender, beside its address.
    hairpin = ""

    def dynamic(self) -> str:
        """Return the declarations of what the kernel fills by itself."""
        return ""

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
                value = _REJECTED if to is Refusal.REJECT else _DROPPED
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
        declared = "".join(f"\t{self.kind_of(name).header}\n\t}}\n" for name in self.set_names(timeouts_s))
        chains = self._chains(facts, timeouts_s)
        empty = "".join(f"\tchain {name} {{\n{_HOOKS.get(name, '')}\t}}\n" for name in chains)
        full = "".join(_chain(name, rules) for name, rules in chains.items())
        held = f"flush table {self.name}\n" if is_there else ""
        return (
            f"{held}table {self.name} {{\n{declared}{self.dynamic()}{empty}}}\n"
            f"flush table {self.name}\ntable {self.name} {{\n{full}}}\n"
        )

    def text(self, facts: NodeFacts, translations: Iterable[Translation]) -> str:
        """Return our whole table as one script, to be read, or loaded where there is none."""
        found, owners = Elements(), dict[tuple[str, bytes], ServicePortName]()
        timeouts_s = set()
        for translation in translations:
            if translation.service_port.affinity_timeout_s is not None:
                timeouts_s.add(translation.service_port.affinity_timeout_s)
            for name, of_set in self.elements(translation).items():
                found.setdefault(name, {}).update(of_set)
                owners.update(((name, key), translation.service_port.name) for key in of_set)
        text = f"table {self.name} {{\n"
        for name in self.set_names(timeouts_s):
            kind, of_set = self.kind_of(name), found.get(name, {})
            listed = ",\n\t\t\t".join(shown(kind, key, value, owners[name, key]) for key, value in of_set.items())
            text += f"\t{kind.header}\n"
            text += f"\t\telements = {{\n\t\t\t{listed} }}\n" if listed else ""
            text += "\t}\n"
        chains = self._chains(facts, sorted(timeouts_s)).items()
        return text + self.dynamic() + "".join(_chain(name, rules) for name, rules in chains) + "}\n"

    def removal(self) -> str:
        """Return the script that removes our table; it succeeds where there is none."""
        return f"table {self.name}\ndelete table {self.name}\n"

    def rules_in(self, facts: NodeFacts, timeouts_s: Iterable[int]) -> int:
        """Return how many rules the table has."""
        return sum(map(len, self._chains(facts, sorted(timeouts_s)).values()))

    def _chains(self, facts: NodeFacts, timeouts_s: Sequence[int]) -> dict[str, list[str]]:
        mark = f"{MASQUERADE_MARK:#x}"
        chains: dict[str, Iterable[str]] = {
            "refuse": [
                # The reset itself, where this node dials an address of its own: it comes by here, too.
                "tcp flags & rst == rst accept",
                "meta l4proto tcp reject with tcp reset",
                # A reject at OUTPUT makes sendto() fail with EPERM; at INPUT the sender gets ECONNREFUSED.
                f'oif "lo" fib daddr type local meta priority set {class_id(_REJECTED_AT_INPUT)} accept',
                "reject with icmpx type port-unreachable",
            ],
        }
        for family in FAMILIES:
            chains |= self.chains_of(family, timeouts_s) | {
                f"translate{family}": [*_answers(), *self.translate(family)],
                f"node_ports{family}": _lookups("meta l4proto . th dport", f"node_ports{family}", family, facts),
                f"services{family}": _services(family, facts, self.refused(family, facts)),
                f"from_node{family}": _from_node(family, facts),
            }
        services = [f"meta nfproto ipv{family} jump services{family}" for family in FAMILIES]
        hairpins = [
            f"{self.hairpin}{ip} saddr . {ip} daddr @hairpins{family} masquerade fully-random"
            for family, ip in IP.items()
        ]
        chains |= {
            "prerouting": services,
            "output": [*(f"meta nfproto ipv{family} jump from_node{family}" for family in FAMILIES), *services],
            "input": [f'iif "lo" meta priority {class_id(_REJECTED_AT_INPUT)} reject with icmpx type port-unreachable'],
            "forward": [NO_LOOP],
            "postrouting": [
                f"meta priority & {class_id(OURS)} == {class_id(OURS)} meta priority set none",
                f"meta mark & {mark} == {mark} meta mark set meta mark & {0xFFFF_FFFF ^ MASQUERADE_MARK:#x}"
                " masquerade fully-random",
                *hairpins,
            ],
        }
        return {name: list(rules) for name, rules in chains.items()}


def add_hairpins(found: Elements, family: Family, ips: Iterable[str]) -> None:
    """Add to *found* that who is led back to himself is masqueraded: he would not know the answer for one."""
    found.setdefault(f"hairpins{family}", {}).update((packed_ip(ip) * 2, b"") for ip in ips)


def _portal_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address, port = f"ipv{family}_addr", ("inet_proto", "inet_service")
    for suffix in reversed(_SENDERS.values()):
        for name, key in ((f"services{family}{suffix}", (address, *port)), (f"node_ports{family}{suffix}", port)):
            header = f"map {name} {{\n\t\ttype {' . '.join(key)} : classid"
            yield name, SetKind(header, key, ("classid",), names_owner=True)


def _address_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    address, port = f"ipv{family}_addr", ("inet_proto", "inet_service")
    name = f"hairpins{family}"
    yield name, SetKind(f"set {name} {{\n\t\ttype {address} . {address}", (address, address), is_shared=True)
    name = f"cluster_ips{family}"
    yield name, SetKind(f"set {name} {{\n\t\ttype {address}", (address,), is_shared=True)
    name = f"restricted{family}"
    header = f"set {name} {{\n\t\ttype {address} . inet_proto . inet_service"
    yield name, SetKind(header, (address, *port), names_owner=True)
    name = f"allowed{family}"
    header = f"set {name} {{\n\t\ttype {address} . inet_proto . inet_service . {address}; flags interval"
    yield name, SetKind(header, (address, *port, address), is_interval=True)


# ---- rules


def _services(family: Family, facts: NodeFacts, refused: Iterable[str]) -> Iterator[str]:
    ip = IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    yield _restricts(family)
    yield from _lookups(portal, f"services{family}", family, facts)
    # The other ports of a cluster IP are nobody's, nor is an address that no Service has.
    yield f"{ip} daddr @cluster_ips{family} goto refuse"
    yield from refused
    if cidrs := merged(facts.service_cidrs, family):
        yield f"{ip} daddr {{ {', '.join(cidrs)} }} drop"
    if (own := _at_node_ports(family, facts)) is not None:
        yield f"{own} jump node_ports{family}"


def _restricts(family: Family) -> str:
    ip = IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    return f"{portal} @restricted{family} {portal} . {ip} saddr != @allowed{family} drop"


def _from_node(family: Family, facts: NodeFacts) -> Iterator[str]:
    """Yield what goes before the rest for processes of the node itself."""
    ip = IP[family]
    leads = f"goto translate{family}"
    yield _restricts(family)
    yield f"meta priority set {ip} daddr . meta l4proto . th dport map @services{family}_for_node {leads}"
    if (own := _at_node_ports(family, facts)) is not None:
        yield f"{own} meta priority set meta l4proto . th dport map @node_ports{family}_for_node {leads}"


def _at_node_ports(family: Family, facts: NodeFacts) -> str | None:
    """Return what matches the node's own addresses with node ports; never loopback, which the kernel does not route."""
    ip, loopback = IP[family], {4: "127.0.0.0/8", 6: "::1"}[family]
    here = f"fib daddr type local {ip} daddr != {loopback}"
    networks = merged(facts.node_ports_on, family)
    if networks in ((), ("0.0.0.0/0",), ("::/0",)):
        return here
    return f"{ip} daddr {{ {', '.join(networks)} }} {here}"


def _lookups(key: str, name: str, family: Family, facts: NodeFacts) -> Iterator[str]:
    leads = f"goto translate{family}"
    if facts.pods is not None:
        who = ""
        if facts.pods.interface:
            who = f'iifname "{facts.pods.interface}"'
        elif cidrs := pod_cidrs(facts.pods, family):
            who = f"{IP[family]} saddr {{ {', '.join(cidrs)} }}"
        if who:
            yield f"{who} meta priority set {key} map @{name}_for_pods {leads}"
    yield f"meta priority set {key} map @{name} {leads}"


def _answers() -> Iterator[str]:
    """Yield what a packet's number says first, in every mode."""
    yield f"meta priority {class_id(_REJECTED)} goto refuse"
    yield f"meta priority {class_id(_DROPPED)} drop"
    yield (
        f"meta priority & {class_id(MASQUERADED)} == {class_id(MASQUERADED)} "
        f"meta mark set meta mark | {MASQUERADE_MARK:#x}"
    )


def _chain(name: str, rules: Iterable[str]) -> str:
    return f"\tchain {name} {{\n{_HOOKS.get(name, '')}" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"
