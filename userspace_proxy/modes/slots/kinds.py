"""The sets and maps of a `SlotTable`: their types, and their purpose in words. Pure."""

from collections.abc import Iterator, Mapping

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.modes import nft_blocks
from userspace_proxy.modes.nft_blocks import IP, PORT, SENDERS, SENT, Block
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.netfilter.sets import SetKind

# Slots -> the most endpoints for that number. Even then the chances of endpoints are nearly equal.
SIZES: Mapping[int, int] = {16: 8, 256: 128, 4_096: 4_095}
_PINS_MAX = 262_144

# The key of a client in pins. In nft 1.0.6 at most 16 bytes can stand before a value from the packet, so IPv6 addresses
# are hashed. The declaration names another number of 32 bits, because nft cannot print the type of a hash.
_HASHES = 0xFFFF_FFFF
CLIENT: Mapping[Family, str] = {4: "ip saddr", 6: f"jhash ip6 saddr mod {_HASHES} seed 1"}

_NUMBER = ("classid",)
_SLOTS = (
    "Endpoint set . random number below {size} -> endpoint. Each endpoint has nearly the same share of the {size} "
    "slots (Maglev), in proportion to its weight."
)
_PICKS = (
    "Services with affinity: endpoint set . random number below {size} -> the endpoint's number, which the pin stores. "
    "Each endpoint has nearly the same share of the {size} slots (Maglev), in proportion to its weight."
)


def portal_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    """Yield the maps that lead from portals to numbers."""
    for sender in reversed(SENDERS):
        for kind, what, key, words in (
            ("services", "addresses of Services", (f"ipv{family}_addr", *PORT), "address . protocol . port"),
            ("node_ports", "node ports", PORT, "protocol . port"),
        ):
            first = " Looked up before the map for all senders." if SENDERS[sender] else ""
            reason = f"Packets{SENT[sender]} to {what} (IPv{family}): portal -> a number that says what happens.{first}"
            parts = f"Key: {words}; value: a number of 32 bits, shown as xxxx:xxxx."
            yield f"{kind}{family}{SENDERS[sender]}", SetKind(key, _NUMBER, reason, parts, names_owner=True)


def slot_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    """Yield the maps that lead from numbers to endpoints.

    One map for each protocol: nft 1.0.6 refuses a rule for several protocols over a map that exists already.
    """
    # Name, what is found there, its types, the purpose of the map, and what is found in words.
    sized: list[tuple[str, str, tuple[str, ...], str, str]] = [
        (f"picks{family}", "meta priority", _NUMBER, _PICKS, "the endpoint's number")
    ]
    for protocol in map(str.lower, L4Protocol):
        endpoint, types = f"{IP[family]} daddr . {protocol} dport", (f"ipv{family}_addr", "inet_service")
        sized.append((f"slots{family}_{protocol}", endpoint, types, _SLOTS, "the endpoint's address . port"))
        reason = "The endpoints of pins: an endpoint's number -> its address and port."
        parts = "Key: an endpoint's number; value: address . port."
        yield f"endpoints{family}_{protocol}", SetKind(_NUMBER, types, reason, parts, f"meta priority : {endpoint}")
    for name, target, values, reason, words in sized:
        for size in SIZES:
            parts = f"Key: the set's number . slot; value: {words}."
            typeof = f"meta priority . numgen random mod {size} : {target}"
            yield f"{name}_{size}", SetKind((*_NUMBER, "integer"), values, reason.format(size=size), parts, typeof)


def address_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    """Yield the sets of addresses, and those of restricted portals."""
    address = f"ipv{family}_addr"
    reason = "Hairpin packets: an endpoint dialled its own Service and was chosen."
    parts = "An element is sender . destination, after DNAT."
    yield f"hairpins{family}", SetKind((address, address), (), reason, parts, is_shared=True)
    reason, parts = "All cluster IPs, at any port.", "An element is an address."
    yield f"cluster_ips{family}", SetKind((address,), (), reason, parts, is_shared=True)
    yield from nft_blocks.restriction_kinds(family)


def timeout_kind(timeout_s: int) -> SetKind:
    reason = f"Endpoint sets whose clients keep their endpoint for {timeout_s} s."
    return SetKind(_NUMBER, (), reason, "An element is a set's number.", "meta priority")


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


PINS = (
    _pins(4, "ip saddr", "Key: the client's address . the set's number; value: the endpoint's number."),
    _pins(
        6,
        f"numgen inc mod {_HASHES}",
        "Key: a hash of the client's address (IPv6 addresses are too long for this key) . the set's number.",
    ),
)
