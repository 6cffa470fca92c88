"""The nftables table of nftables mode: which elements translate which packets. Pure.

A packet's portal yields the number of an endpoint set (portal_table.py). That number with a random slot yields the
endpoint in a second look-up. So a new connection costs the same however many Services there are, and a change of
endpoints changes few elements: Maglev's table leaves most slots as they are. There are slot tables of several sizes,
with one rule each; a Service uses the smallest one that gives its endpoints nearly equal shares.

With affinity, the number of the chosen endpoint is put in the packet's priority, too, and stored as the client's pin.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set

from userspace_proxy.errors import SyncError
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import FAMILIES, Address, Family
from userspace_proxy.model.maglev import slot_table
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.kernel_rules import Translation
from userspace_proxy.modes.nft_blocks import IP, Block
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.packet_number import ENDPOINT, ENDPOINT_SET, OURS, PINNED
from userspace_proxy.modes.slots.portal_table import PortalTable, add_hairpins, endpoints_of
from userspace_proxy.netfilter.sets import Elements, SetKind, class_id, packed_ip, packed_number, packed_port

# Slots -> the most endpoints for that number. Even then the chances of endpoints are nearly equal.
SIZES: Mapping[int, int] = {16: 8, 256: 128, 4_096: 4_095}
_SETS_MAX = 0x1_FFFF
_PINS_MAX = 262_144

# The key of a client in pins. In nft 1.0.6 at most 16 bytes can stand before a value from the packet, so IPv6 addresses
# are hashed. The declaration names another number of 32 bits, because nft cannot print the type of a hash.
_HASHES = 0xFFFF_FFFF
_CLIENT: Mapping[Family, str] = {4: "ip saddr", 6: f"jhash ip6 saddr mod {_HASHES} seed 1"}


_SLOTS = (
    "Endpoint set . random number below {size} -> endpoint. Each endpoint has nearly the same share of the {size} "
    "slots (Maglev), in proportion to its weight."
)
_PICKS = (
    "Services with affinity: endpoint set . random number below {size} -> the endpoint's number, which the pin stores. "
    "Each endpoint has nearly the same share of the {size} slots (Maglev), in proportion to its weight."
)


def _pins(family: Family, client: str, key: str) -> Block:
    return Block(
        "map",
        f"pins{family}",
        "The pins of clients (affinity): client . endpoint set -> the endpoint's number. The kernel fills this map.",
        (
            RuleLine(f"typeof {client} . meta priority : meta priority", key),
            RuleLine(
                f"size {_PINS_MAX}; flags dynamic,timeout; timeout 3h",
                f"Rules add up to {_PINS_MAX} pins (dynamic), and each expires by itself (timeout).",
            ),
        ),
    )


_PINS = (
    _pins(4, "ip saddr", "Key: the client's address . the set's number; value: the endpoint's number."),
    _pins(
        6,
        f"numgen inc mod {_HASHES}",
        "Key: a hash of the client's address (IPv6 addresses are too long for this key) . the set's number.",
    ),
)


class SlotTable(PortalTable):
    """The table of nftables mode."""

    name = "inet userspace_proxy_nat"
    hairpin = "ct status dnat "

    def __init__(self) -> None:
        super().__init__()
        self.numbers = EndpointNumbers()

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        address, ip = f"ipv{family}_addr", IP[family]
        # One map for each protocol: nft 1.0.6 refuses a rule for several protocols over a map that exists already.
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
                    "The endpoints of pins: an endpoint's number -> its address and port.",
                    "Key: an endpoint's number; value: address . port.",
                ),
            )
        for kind, value, of, reason, value_words in kinds:
            for size in SIZES:
                declared = f"typeof meta priority . numgen random mod {size} : {value}"
                parts = f"Key: the set's number . slot; value: {value_words}."
                yield f"{kind}_{size}", SetKind(declared, ("classid", "integer"), of, reason.format(size=size), parts)

    def timeout_kind(self, timeout_s: int) -> SetKind:
        reason = f"Endpoint sets whose clients keep their endpoint for {timeout_s} s."
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
            "Keep only the set's number in the packet's priority, for the next look-up.",
        )
        for protocol in L4Protocol:
            for size in SIZES:
                slot = f"meta priority . numgen random mod {size} map @slots{family}_{protocol.lower()}_{size}"
                yield RuleLine(
                    f"meta l4proto {protocol.lower()} dnat {IP[family]} to {slot}",
                    f"{protocol}: a random slot below {size}; the endpoint found for set . slot becomes the packet's "
                    "destination (DNAT). A set that is not in this map has another size: the next rule.",
                )

    def number_of(self, portal: Portal, listener: ListenerName, translation: Translation) -> int:
        number = self.numbers.of_set(listener.service_port, listener.scope)
        return number | (0 if translation.service_port.affinity_timeout_s is None else PINNED)

    def mode_elements(self, translation: Translation) -> Elements:
        return self.slots_for(translation, translation.routes)

    def slots_for(self, translation: Translation, routes: Iterable[Route]) -> Elements:
        """Return the slots of all endpoint sets that *routes* use."""
        found: Elements = {}
        used = [(r.portal.family, r.to.scope) for r in routes if not isinstance(r.to, Refusal)]
        for family, scope in dict.fromkeys(used):
            _add_endpoints(found, translation, scope, family, self.numbers)
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        self.numbers.forget(before, after)


# ---- numbers


class EndpointNumbers:
    """The numbers of endpoint sets, and of endpoints in sets with affinity.

    They depend on names where possible, so that a restart changes few of them.
    """

    def __init__(self) -> None:
        self._sets = Allocator(_SETS_MAX)
        self._endpoints: dict[tuple[str, Family], Allocator] = {}

    def of_set(self, name: ServicePortName, scope: Scope) -> int:
        number = self._sets.allocate(ListenerName(name, scope).key)
        if number is None:
            raise SyncError(f"more than {_SETS_MAX} endpoint sets")
        return OURS | (number + 1) << 12

    def of_endpoints(
        self, name: ServicePortName, scope: Scope, family: Family, endpoints: Sequence[Address]
    ) -> dict[Address, int]:
        """Return the numbers of *endpoints*, of which there are at most `ENDPOINT` in one *family*.

        Numbers of other endpoints are released if there are not enough.
        """
        of_set, desired = self.of_set(name, scope), {endpoint: str(endpoint) for endpoint in endpoints}
        numbers = self._endpoints.setdefault((ListenerName(name, scope).key, family), Allocator(ENDPOINT))
        found = {}
        for endpoint, key in desired.items():
            if (number := numbers.allocate(key)) is None:
                for other in numbers.memory().keys() - desired.values():
                    numbers.release(other)
                number = numbers.allocate(key)
            assert number is not None, "more endpoints than numbers"
            found[endpoint] = of_set | number + 1
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Release the numbers of *before* that *after* does not need."""
        for scope in Scope:
            key = ListenerName(before.service_port.name, scope).key
            desired = _addresses(after, scope) if after else set()
            if not desired:
                self._sets.release(key)
                for family in FAMILIES:
                    self._endpoints.pop((key, family), None)
            gone = _addresses(before, scope) - desired
            for numbers in filter(None, (self._endpoints.get((key, family)) for family in FAMILIES)):
                for endpoint in gone:
                    numbers.release(str(endpoint))


def _addresses(translation: Translation, scope: Scope) -> set[Address]:
    return {e.address for family in translation.reaches for e in endpoints_of(translation, family, scope)}


def size_for(endpoints: int) -> int:
    return next((slots for slots, most in SIZES.items() if endpoints <= most), max(SIZES))


# ---- elements


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
        found[f"affinity_{timeout_s}"] = {**found.get(f"affinity_{timeout_s}", {}), number: b""}
        by_number = found.setdefault(f"endpoints{family}_{name.protocol.lower()}", {})
        by_number.update((targets[a], packed[a]) for a in endpoints)
    table = zip(_slot_numbers(size), slot_table(endpoints, size, weights), strict=True)
    found.setdefault(f"{kind}_{size}", {}).update((number + slot, targets[a]) for slot, a in table)
    add_hairpins(found, family, (ip for ip, _ in endpoints))


@functools.cache
def _slot_numbers(size: int) -> tuple[bytes, ...]:
    return tuple(map(packed_number, range(size)))


# ---- rules


def _to_pinned(family: Family) -> RuleLine:
    bit = class_id(PINNED)
    return RuleLine(
        f"meta priority & {bit} == {bit} goto pinned{family}",
        f"The bit {bit} means affinity: continue in the chain pinned.",
    )


def _pinned(family: Family) -> Iterator[RuleLine]:
    """Yield the rules for affinity: to the endpoint of the client's pin, else to a random one."""
    of_set, of_endpoint = f"meta priority & {class_id(ENDPOINT_SET)}", f"meta priority & {class_id(ENDPOINT)}"
    client = f"{_CLIENT[family]} . {of_set}"
    keep_set = RuleLine(
        f"meta priority set {of_set}", "Keep only the set's number in the packet's priority, for the next look-up."
    )
    yield keep_set
    yield RuleLine(
        f"meta priority set {_CLIENT[family]} . meta priority map @pins{family} jump remembered{family}",
        "Has the client a pin in this set? Then take the endpoint's number from it, renew the pin, and go there.",
    )
    yield RuleLine(
        f"{of_endpoint} != 0:0 delete @pins{family} {{ {client} : meta priority }}",
        "The packet came back, so the endpoint of the pin is gone: delete the pin.",
    )
    yield keep_set
    for size in SIZES:
        slot = f"meta priority . numgen random mod {size} map @picks{family}_{size}"
        yield RuleLine(
            f"{of_endpoint} == 0:0 meta priority set {slot} goto remembered{family}",
            f"No pin: a random slot below {size} yields an endpoint's number, which the chain remembered stores. A set "
            "that is not in this map has another size: the next rule.",
        )


def _remembered(family: Family, timeouts_s: Iterable[int]) -> Iterator[RuleLine]:
    """Yield the rules that store or renew a pin, and translate to its endpoint if that still exists."""
    of_set = f"meta priority & {class_id(ENDPOINT_SET)}"
    for timeout_s in timeouts_s:
        element = f"{_CLIENT[family]} . {of_set} timeout {timeout_s}s : meta priority"
        yield RuleLine(
            f"{of_set} @affinity_{timeout_s} update @pins{family} {{ {element} }}",
            f"For a set in @affinity_{timeout_s}: store the client's pin, or renew it, for {timeout_s} s from now.",
        )
    for protocol in L4Protocol:
        endpoints = f"@endpoints{family}_{protocol.lower()}"
        yield RuleLine(
            f"meta l4proto {protocol.lower()} dnat {IP[family]} to meta priority map {endpoints}",
            f"{protocol}: the endpoint with this number becomes the packet's destination (DNAT).",
        )
