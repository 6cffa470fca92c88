"""The nftables table of nftables mode, which ipvs mode shares: its sets and maps, rules and elements. Pure.

A look-up of a packet's destination, one for each kind of sender, yields a number. The packet carries it in its
*priority*, which nothing reads before the packet leaves, when it is cleared. The number says whether the packet is
refused, dropped or translated, and whether it is masqueraded.

To translate a packet, the number of its endpoint set with a random slot yields the endpoint in a second look-up. So a
new connection costs the same however many Services there are, and a change of endpoints changes few elements: Maglev's
table leaves most slots as they are. There are slot tables of several sizes, with one rule each; a Service uses the
smallest one that gives its endpoints nearly equal shares.

With affinity, the number of the chosen endpoint is put in the packet's priority, too, and stored as the client's pin.
"""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.maglev import slot_table
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import internal_portals
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import ASLEEP, SENDERS, Block, NftTable, set_block, table_start
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots import rules
from userspace_proxy.modes.slots.element_reasons import element_reason, leads, unpacked
from userspace_proxy.modes.slots.endpoint_numbers import EndpointNumbers, endpoints_of
from userspace_proxy.modes.slots.kinds import PINS, SIZES, address_kinds, portal_kinds, slot_kinds, timeout_kind
from userspace_proxy.modes.slots.packet_number import DROPPED, MASQUERADED, PINNED, REJECTED
from userspace_proxy.netfilter.nft_text import is_everything, merged
from userspace_proxy.netfilter.sets import (
    Elements,
    SetKind,
    packed_ip,
    packed_number,
    packed_port,
    packed_portal,
    packed_ranges,
    shown,
)


class SlotTable:
    """The table of nftables mode. Another mode overrides what differs: the methods up to `other_elements`."""

    name = "inet userspace_proxy_nat"  # family and name
    hairpin = "ct status dnat "  # what a rule matches beside the addresses, to recognise hairpin packets

    def __init__(self) -> None:
        self.numbers = EndpointNumbers()
        self._kinds: dict[str, SetKind] = {}
        for family in FAMILIES:
            self._kinds |= portal_kinds(family)
            self._kinds |= slot_kinds(family)
            self._kinds |= self.other_kinds(family)
            self._kinds |= address_kinds(family)

    def other_kinds(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        """Yield the sets and maps of *family* that only this mode has."""
        return iter(())

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
        """Yield further rules that refuse packets. Every mode refuses unserved ports of cluster IPs."""
        return iter(())

    def translate(self, family: Family) -> Iterator[RuleLine]:
        """Yield the rules for packets that are neither refused nor dropped."""
        return rules.translate(family)

    def number_of(self, route: Route, listener: ListenerName, translation: Translation) -> int:
        """Return the number that sends packets of *route* to the endpoints of *listener*."""
        number = self.numbers.of_set(listener.service_port, listener.scope)
        return number | (0 if translation.service_port.affinity_timeout_s is None else PINNED)

    def translated_routes(self, translation: Translation) -> Iterable[Route]:
        """Return the routes whose packets are translated by slots."""
        return translation.routes

    def other_elements(self, translation: Translation) -> Elements:
        """Return the elements of *translation* in the sets and maps that only this mode has."""
        return {}

    # ---- sets and maps

    def kind_of(self, name: str) -> SetKind:
        """Return the types of the set or map *name*."""
        is_of_timeout = name.startswith("affinity_")
        return timeout_kind(int(name.removeprefix("affinity_"))) if is_of_timeout else self._kinds[name]

    def set_names(self, timeouts_s: Iterable[int]) -> list[str]:
        """Return the sets and maps that we fill. *timeouts_s*: the durations of affinity in use."""
        return [*self._kinds, *(f"affinity_{timeout_s}" for timeout_s in sorted(timeouts_s))]

    def elements(self, translation: Translation) -> Elements:
        """Return the elements of one service port."""
        found: Elements = {}
        for route in translation.routes:
            portal = route.portal
            name = f"{'node_ports' if portal.is_node_port else 'services'}{portal.family}{SENDERS[route.sender]}"
            found.setdefault(name, {})[packed_portal(portal)] = packed_number(self._number(route, translation))
        for name, elements in (*self._slots(translation).items(), *self.other_elements(translation).items()):
            found.setdefault(name, {}).update(elements)
        for portal in internal_portals(translation.service_port):
            found.setdefault(f"cluster_ips{portal.family}", {})[packed_ip(portal.ip)] = b""
        for portal, cidrs in translation.allowed.items():
            if not is_everything(networks := merged(cidrs, portal.family)):
                found.setdefault(f"restricted{portal.family}", {})[packed_portal(portal)] = b""
                found.setdefault(f"allowed{portal.family}", {}).update(packed_ranges(portal, networks))
        return found

    def _number(self, route: Route, translation: Translation) -> int:
        if isinstance(route.to, Refusal):
            return REJECTED if route.to is Refusal.REJECT else DROPPED
        return self.number_of(route, route.to, translation) | (0 if route.to.transparent else MASQUERADED)

    def _slots(self, translation: Translation) -> Elements:
        """Return the elements of all endpoint sets by which packets are translated."""
        found: Elements = {}
        routes = self.translated_routes(translation)
        for family, scope in dict.fromkeys(
            (r.portal.family, r.to.scope) for r in routes if not isinstance(r.to, Refusal)
        ):
            _add_endpoints(found, translation, scope, family, self.numbers)
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Release the numbers of *before* that *after* does not need."""
        self.numbers.forget(before, after)

    # ---- texts

    def skeleton(self, facts: NodeFacts, timeouts_s: Iterable[int], *, is_there: bool) -> str:
        """Return the script that creates our table without elements, or replaces the rules of an existing one.

        *is_there*: existing elements stay, those that the kernel added, too; the kernel refuses the script if there is
        no table. Otherwise the new table is dormant: without its elements it would drop packets that other rules serve.
        """
        chains = self._chains(facts, timeouts_s)
        empty = (chain._replace(items=()) for chain in chains)
        sets = (set_block(name, self.kind_of(name)) for name in self.set_names(timeouts_s))
        held = f"flush table {self.name}\n" if is_there else ""
        before = table_start(self.name) if is_there else (*table_start(self.name), ASLEEP)
        declared = NftTable(before, [*sets, *PINS, *empty]).text()
        return f"{held}{declared}flush table {self.name}\n{NftTable(before, chains).text()}"

    def rules(self, facts: NodeFacts, translations: Iterable[Translation]) -> NftTable:
        """Return our whole table, each line with its reason."""
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
        blocks = [*sets, *PINS, *self._chains(facts, timeouts_s)]
        return NftTable(table_start(self.name), blocks, rules.unmatched(numbers).__contains__)

    def _explained_set(self, name: str, found: Elements, owners: Mapping[tuple[str, bytes], ServicePortName]) -> Block:
        kind, lines = self.kind_of(name), []
        is_shared = kind.is_shared and not name.startswith("affinity_")
        for key, value in found.get(name, {}).items():
            owner = owners[name, key]
            reason = element_reason(name, kind, key, value, found)
            lines.append(RuleLine(shown(kind, key, value, owner), reason, None if is_shared else owner))
        return set_block(name, kind, lines)

    def rules_in(self, facts: NodeFacts, timeouts_s: Iterable[int]) -> int:
        """Return the number of rules in the table."""
        return sum(len(chain.items) for chain in self._chains(facts, timeouts_s))

    def _chains(self, facts: NodeFacts, timeouts_s: Iterable[int]) -> list[Block]:
        timeouts_s = sorted(timeouts_s)
        chains: dict[str, Sequence[RuleLine]] = {"refuse": rules.REFUSE}
        for family in FAMILIES:
            refused, translate = self.refused(family, facts), self.translate(family)
            chains |= rules.chains_of(family, facts, timeouts_s, refused, translate)
        return rules.blocks(chains | rules.hooked_chains(self.hairpin))


# ---- elements


def size_for(endpoints: int) -> int:
    return next((slots for slots, most in SIZES.items() if endpoints <= most), max(SIZES))


def _add_endpoints(
    found: Elements, translation: Translation, scope: Scope, family: Family, numbers: EndpointNumbers
) -> None:
    """Add to *found* the elements of one endpoint set: slots, hairpins, and with affinity its endpoints' numbers."""
    name, timeout_s = translation.service_port.name, translation.service_port.affinity_timeout_s
    endpoints = [e.address for e in endpoints_of(translation, family, scope)][: max(SIZES.values())]
    number = packed_number(numbers.of_set(name, scope))
    weights = dict(translation.service_port.weights)
    size = size_for(sum(weights.get(ip, 1) for ip, _ in endpoints) if weights else len(endpoints))
    packed = {address: packed_ip(address[0]) + packed_port(address[1]) for address in endpoints}
    if timeout_s is None:
        targets, kind = packed, f"slots{family}_{name.protocol.lower()}"
    else:
        of_endpoints = numbers.of_endpoints(name, scope, family, endpoints)
        targets, kind = {a: packed_number(own) for a, own in of_endpoints.items()}, f"picks{family}"
        found.setdefault(f"affinity_{timeout_s}", {})[number] = b""
        by_number = found.setdefault(f"endpoints{family}_{name.protocol.lower()}", {})
        by_number.update((targets[a], packed[a]) for a in endpoints)
    table = zip(_slot_numbers(size), slot_table(endpoints, size, weights), strict=True)
    found.setdefault(f"{kind}_{size}", {}).update((number + slot, targets[a]) for slot, a in table)
    add_hairpins(found, family, (ip for ip, _ in endpoints))


def add_hairpins(found: Elements, family: Family, ips: Iterable[str]) -> None:
    """Add to *found* the elements for hairpin packets of *ips*, which must be masqueraded."""
    found.setdefault(f"hairpins{family}", {}).update((packed_ip(ip) * 2, b"") for ip in ips)


@functools.cache
def _slot_numbers(size: int) -> tuple[bytes, ...]:
    return tuple(map(packed_number, range(size)))
