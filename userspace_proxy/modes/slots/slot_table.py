"""The nftables table of the modes nftables and ipvs: its sets and maps, rules and elements. Pure.

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
from collections.abc import Iterable, Iterator, Sequence, Set

from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.maglev import slot_table
from userspace_proxy.model.names import ListenerName, Scope
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import internal_portals
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import SENDERS, Block, IsDead
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.service_table import ServiceTable, add_restrictions
from userspace_proxy.modes.slots import rules
from userspace_proxy.modes.slots.element_reasons import element_reason, leads, unpacked
from userspace_proxy.modes.slots.endpoint_numbers import EndpointNumbers, endpoints_of
from userspace_proxy.modes.slots.kinds import PINS, SIZES, address_kinds, portal_kinds, slot_kinds, timeout_kind
from userspace_proxy.modes.slots.packet_number import DROPPED, MASQUERADED, PINNED, REJECTED
from userspace_proxy.netfilter.sets import Elements, SetKind, packed_ip, packed_number, packed_port, packed_portal


class SlotTable(ServiceTable):
    """The table of nftables mode. Another mode's is a subclass.

    It has a `name` of its own, and overrides what differs: the methods up to `other_elements`.
    """

    name = "inet userspace_proxy_nat"  # family and name
    filled_by_kernel = PINS
    hairpin = "ct status dnat "  # what a rule matches beside the addresses, to recognise hairpin packets

    def __init__(self) -> None:
        self.numbers = EndpointNumbers()
        self.kinds = {}
        for family in FAMILIES:
            self.kinds |= portal_kinds(family)
            self.kinds |= slot_kinds(family)
            self.kinds |= self.other_kinds(family)
            self.kinds |= address_kinds(family)

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

    def needs(self, translation: Translation) -> Set[str]:
        """Return the name of the set for its duration of affinity."""
        timeout_s = translation.service_port.affinity_timeout_s
        return set() if timeout_s is None else {f"affinity_{timeout_s}"}

    def kind_of(self, name: str) -> SetKind:
        return timeout_kind(_timeout_s(name)) if name.startswith("affinity_") else self.kinds[name]

    def set_names(self, needs: Set[str]) -> list[str]:
        return [*self.kinds, *sorted(needs, key=_timeout_s)]

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
        add_restrictions(found, translation)
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
        self.numbers.forget(before, after)

    # ---- texts

    def reason(self, name: str, key: bytes, value: bytes, found: Elements, facts: NodeFacts) -> Reason:
        return element_reason(name, self.kind_of(name), key, value, found)

    def unmatched(self, found: Elements) -> IsDead:
        numbers = {number for name, of_set in found.items() if leads(name) for number in map(unpacked, of_set.values())}
        return rules.unmatched(numbers).__contains__

    def chains(self, facts: NodeFacts, needs: Set[str]) -> list[Block]:
        timeouts_s = sorted(map(_timeout_s, needs))
        chains: dict[str, Sequence[RuleLine]] = {"refuse": rules.REFUSE}
        for family in FAMILIES:
            refused, translate = self.refused(family, facts), self.translate(family)
            chains |= rules.chains_of(family, facts, timeouts_s, refused, translate)
        return rules.blocks(chains | rules.hooked_chains(self.hairpin))


# ---- elements


def _timeout_s(name: str) -> int:
    """Return the duration of affinity of which *name* is the set."""
    return int(name.removeprefix("affinity_"))


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
    size = size_for(sum(weights.get(ip, 1) for ip, _ in endpoints) or len(endpoints))
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
