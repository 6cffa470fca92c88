"""Kernel mode nftables: which elements translate which packets, and the table that they stand in. Pure.

A packet's portal gives the number of a set of endpoints (portal_table.py); that number and a random slot are looked up
once more and give the endpoint. So a new connection costs the same however many Services there are, and a change is a
change of some elements: one for each portal, and a few of the slots, which are spread so that most stay where they are
(Maglev). A Service has as few slots as do it justice: there are sizes of slot tables, and one rule for all Services of
one size.

With affinity the number of the endpoint that was chosen is put in the packet's priority, too, and kept as the client's
pin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Translation
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import FAMILIES, Address, Family
from userspace_proxy.model.maglev import slot_table
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.nft_blocks import Block
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.packet_number import ENDPOINT_SET, OURS, PINNED, SEAT
from userspace_proxy.modes.slots.portal_table import IP, PortalTable, add_hairpins
from userspace_proxy.netfilter.sets import Elements, SetKind, class_id, packed_ip, packed_number, packed_port

# Slots -> for how many endpoints at most. Ten of them are then met with nearly the same chance.
SIZES: Mapping[int, int] = {16: 8, 256: 128, 4_096: 4_095}
_SETS_MAX = 0x1_FFFF
_PINS_MAX = 262_144

# A client as pins know it. nft 1.0.6 cannot put more than 16 bytes before a value that is in the packet, too; and its
# declaration has to name another number of 32 bits, as nft cannot show that of a hash.
_HASHES = 0xFFFF_FFFF
_CLIENT: Mapping[Family, str] = {4: "ip saddr", 6: f"jhash ip6 saddr mod {_HASHES} seed 1"}


_SLOTS = (
    "Set of endpoints . a number below {size} drawn by chance -> endpoint. Each endpoint has nearly as many of the "
    "{size} slots, so all are met with nearly the same chance (Maglev)."
)
_PICKS = (
    "Services with affinity: set of endpoints . a number below {size} drawn by chance -> the endpoint's own number, "
    "which the pin remembers. Each endpoint has nearly as many of the {size} slots (Maglev)."
)


def _pins(family: Family, client: str, key: str) -> Block:
    return Block(
        "map",
        f"pins{family}",
        "The pins of clients (affinity): client . set of endpoints -> the endpoint's number. The kernel fills it by "
        "itself.",
        (
            RuleLine(f"typeof {client} . meta priority : meta priority", key),
            RuleLine(
                f"size {_PINS_MAX}; flags dynamic,timeout; timeout 3h",
                f"Rules may add to it (dynamic), up to {_PINS_MAX} pins; each ends by itself (timeout).",
            ),
        ),
    )


_PINS = (
    _pins(4, "ip saddr", "Key: the client's address . the set's number; value: the endpoint's."),
    _pins(
        6,
        f"numgen inc mod {_HASHES}",
        "Key: a hash of the client's address (IPv6 addresses are too long for this key) . the set's number.",
    ),
)


class SlotTable(PortalTable):
    """The table of mode nftables. ``numbers``: as far as can be, the same after a restart."""

    name = "inet userspace_proxy_nat"
    hairpin = "ct status dnat "

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers()

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        address, ip = f"ipv{family}_addr", IP[family]
        # Of each protocol by itself: nft 1.0.6 lets no rule for several lead to what is in a map that is there already.
        kinds: list[tuple[str, str, tuple[str, ...], str, str]] = [
            (f"picks{family}", "meta priority", ("classid",), _PICKS, "the endpoint's number")
        ]
        for protocol in L4Protocol:
            endpoint, made_of = f"{ip} daddr . {protocol.lower()} dport", (address, "inet_service")
            name = f"slots{family}_{protocol.lower()}"
            kinds.append((name, endpoint, made_of, _SLOTS, "the endpoint's address . port"))
            yield (
                f"endpoints{family}_{protocol.lower()}",
                SetKind(
                    f"typeof meta priority : {endpoint}",
                    ("classid",),
                    made_of,
                    "The endpoints that pins lead to: an endpoint's number -> its address and port.",
                    "Key: an endpoint's number; value: address . port.",
                ),
            )
        for kind, value, of, reason, value_words in kinds:
            for size in SIZES:
                declared = f"typeof meta priority . numgen random mod {size} : {value}"
                parts = f"Key: the set's number . slot; value: {value_words}."
                yield f"{kind}_{size}", SetKind(declared, ("classid", "integer"), of, reason.format(size=size), parts)

    def timeout_kind(self, timeout_s: int) -> SetKind:
        reason = f"Sets of endpoints whose clients keep their endpoint for {timeout_s} s."
        parts = "An element is a set's number."
        return SetKind("typeof meta priority", ("classid",), (), reason, parts, is_shared=True)

    def dynamic(self) -> tuple[Block, ...]:
        return _PINS

    def unmatched(self, values: Set[int]) -> set[RuleLine]:
        no_pins = not any(value & PINNED for value in values)
        return super().unmatched(values) | ({_to_pinned(family) for family in FAMILIES} if no_pins else set())

    def chains_of(self, family: Family, timeouts_s: Sequence[int]) -> dict[str, Iterable[RuleLine]]:
        return {f"remembered{family}": _remembered(family, timeouts_s), f"pinned{family}": _pinned(family)}

    def translate(self, family: Family) -> Iterator[RuleLine]:
        yield _to_pinned(family)
        yield RuleLine(
            f"meta priority set meta priority & {class_id(ENDPOINT_SET)}",
            "Leave only the set's number of what the packet carries: that is what is looked up next.",
        )
        for protocol in L4Protocol:
            for size in SIZES:
                slot = f"meta priority . numgen random mod {size} map @slots{family}_{protocol.lower()}_{size}"
                yield RuleLine(
                    f"meta l4proto {protocol.lower()} dnat {IP[family]} to {slot}",
                    f"{protocol}: draw a slot below {size} and look up set . slot: the endpoint found becomes the "
                    "packet's destination (DNAT). A set that is not in this map has another size: the next rule.",
                )

    def number_of(self, portal: Portal, listener: ListenerName, translation: Translation) -> int:
        number = self.numbers.of_set(listener.service_port, listener.scope)
        return number | (0 if translation.service_port.affinity_timeout_s is None else PINNED)

    def mode_elements(self, translation: Translation) -> Elements:
        return self.slots_for(translation, translation.routes)

    def slots_for(self, translation: Translation, routes: Iterable[Route]) -> Elements:
        """Return the slots of all sets of endpoints that somebody is led to by *routes*."""
        found: Elements = {}
        used = [(r.portal.family, r.to.scope) for r in routes if not isinstance(r.to, Refusal)]
        for family, scope in dict.fromkeys(used):
            _add_endpoints(found, translation, scope, family, self.numbers)
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        self.numbers.forget(before, after)


# ---- numbers


class Numbers:
    """The numbers of endpoint sets, and of pinned endpoints in them: as far as can be, the same after a restart."""

    def __init__(self) -> None:
        self._sets = Allocator(_SETS_MAX)
        self._seats: dict[tuple[str, Family], Allocator] = {}

    def of_set(self, name: ServicePortName, scope: Scope) -> int:
        number = self._sets.allocate(ListenerName(name, scope).key)
        if number is None:
            raise SyncError(f"more than {_SETS_MAX} sets of endpoints")
        return OURS | (number + 1) << 12

    def of_endpoints(
        self, name: ServicePortName, scope: Scope, family: Family, endpoints: Sequence[Address]
    ) -> dict[Address, int]:
        """Return the numbers of *endpoints*, up to `SEAT` of one *family*; who is none of them makes room at need."""
        of_set, wanted = self.of_set(name, scope), {endpoint: str(endpoint) for endpoint in endpoints}
        seats = self._seats.setdefault((ListenerName(name, scope).key, family), Allocator(SEAT))
        found = {}
        for endpoint, key in wanted.items():
            if (seat := seats.allocate(key)) is None:
                for other in seats.memory().keys() - wanted.values():
                    seats.release(other)
                seat = seats.allocate(key)
            assert seat is not None, "there are no more of them than seats"
            found[endpoint] = of_set | seat + 1
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Free what *before* had and *after* has not."""
        name = before.service_port.name
        for scope in Scope:
            key = ListenerName(name, scope).key
            had, has = _addresses(before, scope), set(_addresses(after, scope)) if after else set()
            if not has:
                self._sets.release(key)
            for family in FAMILIES:
                if not has:
                    self._seats.pop((key, family), None)
                elif (seats := self._seats.get((key, family))) is not None:
                    for endpoint in had:
                        if endpoint not in has:
                            seats.release(str(endpoint))


def _addresses(translation: Translation, scope: Scope) -> list[Address]:
    there = translation.reaches.values()
    return [e.address for reach in there for e in (reach.cluster if scope is Scope.CLUSTER else reach.local)]


def size_for(endpoints: int) -> int:
    return next((slots for slots, most in SIZES.items() if endpoints <= most), max(SIZES))


# ---- elements


def _add_endpoints(found: Elements, translation: Translation, scope: Scope, family: Family, numbers: Numbers) -> None:
    name, timeout_s = translation.service_port.name, translation.service_port.affinity_timeout_s
    reach = translation.reaches[family]
    endpoints = [e.address for e in (reach.cluster if scope is Scope.CLUSTER else reach.local)][: max(SIZES.values())]
    number = packed_number(numbers.of_set(name, scope))
    weights = dict(translation.service_port.weights)
    size = size_for(sum(weights.get(ip, 1) for ip, _ in endpoints) if weights else len(endpoints))
    packed = {address: packed_ip(address[0]) + packed_port(address[1]) for address in endpoints}
    if timeout_s is None:
        leads, kind = packed, f"slots{family}_{name.protocol.lower()}"
    else:
        seats = numbers.of_endpoints(name, scope, family, endpoints)
        leads, kind = {a: packed_number(seat) for a, seat in seats.items()}, f"picks{family}"
        found[f"affinity_{timeout_s}"] = {**found.get(f"affinity_{timeout_s}", {}), number: b""}
        found.setdefault(f"endpoints{family}_{name.protocol.lower()}", {}).update(
            (leads[a], packed[a]) for a in endpoints
        )
    table = zip(_slot_numbers(size), slot_table(endpoints, size, weights), strict=True)
    found.setdefault(f"{kind}_{size}", {}).update((number + slot, leads[address]) for slot, address in table)
    add_hairpins(found, family, (ip for ip, _ in endpoints))


@functools.cache
def _slot_numbers(size: int) -> tuple[bytes, ...]:
    return tuple(map(packed_number, range(size)))


# ---- rules


def _to_pinned(family: Family) -> RuleLine:
    bit = class_id(PINNED)
    return RuleLine(
        f"meta priority & {bit} == {bit} goto pinned{family}",
        f"The bit {bit} says: the Service has affinity. On to the chain pinned.",
    )


def _pinned(family: Family) -> Iterator[RuleLine]:
    """Yield how a client that has a pin comes to its endpoint, and one that has none, or no more, to another."""
    number, seat = f"meta priority & {class_id(ENDPOINT_SET)}", f"meta priority & {class_id(SEAT)}"
    client = f"{_CLIENT[family]} . {number}"
    to_number = RuleLine(
        f"meta priority set {number}",
        "Leave only the set's number of what the packet carries: that is what is looked up next.",
    )
    yield to_number
    yield RuleLine(
        f"meta priority set {_CLIENT[family]} . meta priority map @pins{family} jump remembered{family}",
        "Has this client a pin in this set? Then take the endpoint's number from it, renew the pin, and go there.",
    )
    yield RuleLine(
        f"{seat} != 0:0 delete @pins{family} {{ {client} : meta priority }}",
        "Came back although there was a pin: its endpoint is gone. So is the pin, now.",
    )
    yield to_number
    for size in SIZES:
        slot = f"meta priority . numgen random mod {size} map @picks{family}_{size}"
        yield RuleLine(
            f"{seat} == 0:0 meta priority set {slot} goto remembered{family}",
            f"No pin was found: draw a slot below {size}, look up the endpoint's number, and have it remembered. A set "
            "that is not in this map has another size: the next rule.",
        )


def _remembered(family: Family, timeouts_s: Iterable[int]) -> Iterator[RuleLine]:
    """Yield how a pin is made, or lasts from now on again, and its endpoint is met if it is still there."""
    number = f"meta priority & {class_id(ENDPOINT_SET)}"
    for timeout_s in timeouts_s:
        element = f"{_CLIENT[family]} . {number} timeout {timeout_s}s : meta priority"
        yield RuleLine(
            f"{number} @affinity_{timeout_s} update @pins{family} {{ {element} }}",
            f"For a set in @affinity_{timeout_s}: make the client's pin, or renew it. It lasts for {timeout_s} s from "
            "this connection on.",
        )
    for protocol in L4Protocol:
        yield RuleLine(
            f"meta l4proto {protocol.lower()} dnat {IP[family]} to meta priority map "
            f"@endpoints{family}_{protocol.lower()}",
            f"{protocol}: the address and port of the endpoint with this number become the packet's destination "
            "(DNAT).",
        )
