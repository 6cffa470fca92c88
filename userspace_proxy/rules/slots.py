"""Kernel mode nftables: which elements translate which packets, and the table that they stand in. Pure.

A packet's address and port are looked up once and give the number of a set of endpoints; that number and a random
slot are looked up once more and give the endpoint. So a new connection costs the same however many Services there
are, and a change is a change of some elements: one for each portal, and a few of the slots, which are spread so that
most stay where they are (Maglev). A Service has as few slots as do it justice: there are sizes of slot tables,
and one rule for all Services of one size.

Between two look-ups the number is in the packet's *priority* (which nothing reads before the packet leaves, when we
take it away again). With affinity the number of the endpoint that was chosen is put there, too, and kept as the
client's pin.
"""

from __future__ import annotations

import functools
import hashlib
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import FAMILIES, Address, Family, family_of
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Sender
from userspace_proxy.model.service import Portal, internal_portals
from userspace_proxy.rules.nft import comment, merged, pod_cidrs

TABLE = "inet userspace_proxy_nat"

# Slots -> for how many endpoints at most. Ten of them are then met with nearly the same chance.
SIZES: Mapping[int, int] = {16: 8, 256: 128, 4_096: 4_095}
# What is looked up: 32 bits, shown as tc shows them (major:minor).
_MASQUERADED = 0x8000_0000
_OURS = 0x4000_0000  # so that we find our own numbers when the packet leaves
_PINNED = 0x2000_0000
_NUMBER = 0x5FFF_F000  # of the endpoint set, without what is to be done first
_SEAT = 0xFFF  # of the endpoint in it, 0 for none
_REJECTED, _DROPPED = 1, 2
_SETS_MAX = 0x1_FFFF
_PINS_MAX = 262_144
MASQUERADE_MARK = 0x4000

_IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
# A client as pins know it. nft 1.0.6 cannot put more than 16 bytes before a value that is in the packet, too; and its
# declaration has to name another number of 32 bits, as nft cannot show that of a hash.
_HASHES = 0xFFFF_FFFF
_CLIENT: Mapping[Family, str] = {4: "ip saddr", 6: f"jhash ip6 saddr mod {_HASHES} seed 1"}
_SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}
_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}

# Name of a set or map -> key -> what it is mapped to (b"" in a set), as the kernel has them.
Elements = dict[str, dict[bytes, bytes]]


# ---- numbers


class Numbers:
    """The numbers of endpoint sets, and of pinned endpoints in them: as far as can be, the same after a restart."""

    def __init__(self) -> None:
        self._sets = Allocator(_SETS_MAX)
        self._seats: dict[str, Allocator] = {}

    def of_set(self, name: ServicePortName, scope: Scope) -> int:
        number = self._sets.allocate(ListenerName(name, scope).key)
        if number is None:
            raise OverflowError(f"more than {_SETS_MAX} sets of endpoints")
        return _OURS | (number + 1) << 12

    def of_endpoint(self, name: ServicePortName, scope: Scope, endpoint: Address) -> int:
        seats = self._seats.setdefault(ListenerName(name, scope).key, Allocator(_SEAT))
        seat = seats.allocate(str(endpoint))
        if seat is None:
            raise OverflowError(f"more than {_SEAT} endpoints of {name} with affinity")
        return self.of_set(name, scope) | seat + 1

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Free what *before* had and *after* has not."""
        name = before.service_port.name
        for scope in Scope:
            key = ListenerName(name, scope).key
            had, has = _addresses(before, scope), set(_addresses(after, scope)) if after else set()
            if not has:
                self._sets.release(key)
                self._seats.pop(key, None)
            elif (seats := self._seats.get(key)) is not None:
                for endpoint in had:
                    if endpoint not in has:
                        seats.release(str(endpoint))


def _addresses(translation: Translation, scope: Scope) -> list[Address]:
    there = translation.reaches.values()
    return [e.address for reach in there for e in (reach.cluster if scope is Scope.CLUSTER else reach.local)]


def spread(endpoints: Sequence[Address], slots: int) -> list[Address]:
    """Return which endpoint each of *slots* (a power of two) leads to.

    Each endpoint asks for slots in an order of its own, in turns (Maglev's table): so all have nearly as many, and when
    one comes or goes few of the others' slots change hands.
    """
    orders = [_order(endpoint, slots) for endpoint in endpoints]
    table: list[Address | None] = [None] * slots
    left = slots
    while True:
        for index, (endpoint, (at, step)) in enumerate(zip(endpoints, orders, strict=True)):
            while table[at] is not None:
                at = (at + step) % slots
            table[at] = endpoint
            left -= 1
            if not left:
                return table  # type: ignore[return-value]  # every slot is taken
            orders[index] = (at, step)


@functools.lru_cache(100_000)
def _order(endpoint: Address, slots: int) -> tuple[int, int]:
    """Return the first slot that *endpoint* asks for, and how far the next one is: odd, so that it comes to all."""
    first, step = struct.unpack("=II", hashlib.blake2b(repr(endpoint).encode(), digest_size=8).digest())
    return first % slots, step % slots | 1


def size_for(endpoints: int) -> int:
    return next((slots for slots, most in SIZES.items() if endpoints <= most), max(SIZES))


# ---- elements


def elements(translation: Translation, numbers: Numbers) -> Elements:
    """Return what is looked up for one service port."""
    found: Elements = {}
    used: dict[Family, set[Scope]] = {}
    for portal, sender, to in translation.routes:
        if isinstance(to, Refusal):
            value = _REJECTED if to is Refusal.REJECT else _DROPPED
        else:
            used.setdefault(portal.family, set()).add(to.scope)
            value = numbers.of_set(translation.service_port.name, to.scope)
            value |= 0 if to.transparent else _MASQUERADED
            value |= 0 if translation.service_port.affinity_timeout_s is None else _PINNED
        kind = "node_ports" if portal.is_node_port else "services"
        found.setdefault(f"{kind}{portal.family}{_SENDERS[sender]}", {})[_key(portal)] = _number(value)
    for family, scopes in used.items():
        for scope in scopes:
            _add_endpoints(found, translation, scope, family, numbers)
    for portal in internal_portals(translation.service_port):
        found.setdefault(f"cluster_ips{portal.family}", {})[_packed(portal.ip)] = b""
    for portal, cidrs in translation.allowed.items():
        networks = merged(cidrs, portal.family)
        if networks not in (("0.0.0.0/0",), ("::/0",)):
            found.setdefault(f"restricted{portal.family}", {})[_key(portal)] = b""
            found.setdefault(f"allowed{portal.family}", {}).update(_ranges(portal, networks))
    return found


def _add_endpoints(found: Elements, translation: Translation, scope: Scope, family: Family, numbers: Numbers) -> None:
    name, timeout_s = translation.service_port.name, translation.service_port.affinity_timeout_s
    reach = translation.reaches[family]
    endpoints = [e.address for e in (reach.cluster if scope is Scope.CLUSTER else reach.local)][: max(SIZES.values())]
    number = _number(numbers.of_set(name, scope))
    size = size_for(len(endpoints))
    packed = {address: _packed(address[0]) + _port(address[1]) for address in endpoints}
    if timeout_s is None:
        leads, kind = packed, f"slots{family}_{name.protocol.lower()}"
    else:
        leads, kind = {a: _number(numbers.of_endpoint(name, scope, a)) for a in endpoints}, f"picks{family}"
        found[f"affinity_{timeout_s}"] = {**found.get(f"affinity_{timeout_s}", {}), number: b""}
        found.setdefault(f"endpoints{family}_{name.protocol.lower()}", {}).update(
            (leads[a], packed[a]) for a in endpoints
        )
    slots = {number + slot: leads[a] for slot, a in zip(_slot_numbers(size), spread(endpoints, size), strict=True)}
    found.setdefault(f"{kind}_{size}", {}).update(slots)
    hairpins = found.setdefault(f"hairpins{family}", {})
    hairpins.update((_packed(ip) * 2, b"") for ip, _ in endpoints)


@functools.cache
def _slot_numbers(size: int) -> tuple[bytes, ...]:
    return tuple(map(_number, range(size)))


_number = struct.Struct("=I").pack


def _port(port: int) -> bytes:
    return struct.pack("!H2x", port)


@functools.lru_cache(100_000)
def _packed(ip: str) -> bytes:
    return socket.inet_pton(socket.AF_INET if family_of(ip) == 4 else socket.AF_INET6, ip)


def _key(portal: Portal) -> bytes:
    port = struct.pack("=B3x", _PROTOCOLS[portal.protocol]) + _port(portal.port)
    return port if portal.is_node_port else _packed(portal.ip) + port


def _ranges(portal: Portal, networks: Iterable[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield keys of an interval set: its first and its last, one behind the other."""
    key = _key(portal)
    for text in networks:
        network = ipaddress.ip_network(text)
        yield key + network[0].packed + key + network[-1].packed, b""


# ---- the table


@dataclass(frozen=True, slots=True)
class SetKind:
    """How one set or map is written down: its declaration, and what its keys and values are made of."""

    header: str
    key: tuple[str, ...]
    value: tuple[str, ...] = ()
    is_interval: bool = False
    names_owner: bool = False  # its elements are commented with the service port's name
    is_shared: bool = False  # several service ports may have the same element


def _kinds() -> Iterator[tuple[str, SetKind]]:
    port = ("inet_proto", "inet_service")
    for family in FAMILIES:
        address, ip = f"ipv{family}_addr", _IP[family]
        for suffix in reversed(_SENDERS.values()):
            for name, key in ((f"services{family}{suffix}", (address, *port)), (f"node_ports{family}{suffix}", port)):
                header = f"map {name} {{\n\t\ttype {' . '.join(key)} : classid"
                yield name, SetKind(header, key, ("classid",), names_owner=True)
        # Of each protocol by itself: nft 1.0.6 lets no rule for several lead to what is in a map that is there already.
        kinds: list[tuple[str, str, tuple[str, ...]]] = [(f"picks{family}", "meta priority", ("classid",))]
        for protocol in L4Protocol:
            endpoint, made_of = f"{ip} daddr . {protocol.lower()} dport", (address, port[1])
            kinds.append((f"slots{family}_{protocol.lower()}", endpoint, made_of))
            name = f"endpoints{family}_{protocol.lower()}"
            yield name, SetKind(f"map {name} {{\n\t\ttypeof meta priority : {endpoint}", ("classid",), made_of)
        for kind, value, of in kinds:
            for size in SIZES:
                name = f"{kind}_{size}"
                header = f"map {name} {{\n\t\ttypeof meta priority . numgen random mod {size} : {value}"
                yield name, SetKind(header, ("classid", "integer"), of)
        name = f"hairpins{family}"
        header = f"set {name} {{\n\t\ttype {address} . {address}"
        yield name, SetKind(header, (address, address), is_shared=True)
        name = f"cluster_ips{family}"
        yield name, SetKind(f"set {name} {{\n\t\ttype {address}", (address,), is_shared=True)
        name = f"restricted{family}"
        header = f"set {name} {{\n\t\ttype {address} . inet_proto . inet_service"
        yield name, SetKind(header, (address, *port), names_owner=True)
        name = f"allowed{family}"
        header = f"set {name} {{\n\t\ttype {address} . inet_proto . inet_service . {address}; flags interval"
        yield name, SetKind(header, (address, *port, address), is_interval=True)


_KINDS = dict(_kinds())


def kind_of(name: str) -> SetKind:
    """Return how the set or map *name* is written down."""
    if name.startswith("affinity_"):
        return SetKind(f"set {name} {{\n\t\ttypeof meta priority", ("classid",), is_shared=True)
    return _KINDS[name]


def set_names(timeouts_s: Iterable[int]) -> list[str]:
    """Return the sets and maps whose elements are ours to add, where affinity may last for *timeouts_s*."""
    return [*_KINDS, *(f"affinity_{timeout_s}" for timeout_s in sorted(timeouts_s))]


def skeleton(facts: NodeFacts, timeouts_s: Iterable[int]) -> str:
    """Return the script that makes our table without elements, or replaces the rules of one that is there.

    What stands in its sets and maps stays there, the clients' pins among it.
    """
    timeouts_s = sorted(timeouts_s)
    declared = "".join(f"\t{kind_of(name).header}\n\t}}\n" for name in set_names(timeouts_s))
    chains = _chains(facts, timeouts_s)
    empty = "".join(f"\tchain {name} {{\n{_HOOKS.get(name, '')}\t}}\n" for name in chains)
    full = "".join(_chain(name, rules) for name, rules in chains.items())
    return f"table {TABLE} {{\n{declared}{_pins()}{empty}}}\nflush table {TABLE}\ntable {TABLE} {{\n{full}}}\n"


def table(facts: NodeFacts, translations: Iterable[Translation]) -> str:
    """Return our whole table as one script, to be read, or loaded where there is none."""
    numbers, found, owners = Numbers(), Elements(), dict[tuple[str, bytes], ServicePortName]()
    timeouts_s = set()
    for translation in translations:
        if translation.service_port.affinity_timeout_s is not None:
            timeouts_s.add(translation.service_port.affinity_timeout_s)
        for name, of_set in elements(translation, numbers).items():
            found.setdefault(name, {}).update(of_set)
            owners.update(((name, key), translation.service_port.name) for key in of_set)
    text = f"table {TABLE} {{\n"
    for name in set_names(timeouts_s):
        kind, of_set = kind_of(name), found.get(name, {})
        listed = ",\n\t\t\t".join(shown(kind, key, value, owners[name, key]) for key, value in of_set.items())
        text += f"\t{kind.header}\n"
        text += f"\t\telements = {{\n\t\t\t{listed} }}\n" if listed else ""
        text += "\t}\n"
    chains = _chains(facts, sorted(timeouts_s)).items()
    return text + _pins() + "".join(_chain(name, rules) for name, rules in chains) + "}\n"


def removal() -> str:
    """Return the script that removes our table; it succeeds where there is none."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


def rules_in(facts: NodeFacts, timeouts_s: Iterable[int]) -> int:
    """Return how many rules the table has."""
    return sum(map(len, _chains(facts, sorted(timeouts_s)).values()))


# ---- chains

_HOOKS = {
    # Before foreign NAT at -100, behind the NAT of userspace mode's table, should both be there for a moment.
    "prerouting": "\t\ttype nat hook prerouting priority -104; policy accept;\n",
    "output": "\t\ttype nat hook output priority -104; policy accept;\n",
    "postrouting": "\t\ttype nat hook postrouting priority 99; policy accept;\n",
}


def _chains(facts: NodeFacts, timeouts_s: Sequence[int]) -> dict[str, list[str]]:
    mark = f"{MASQUERADE_MARK:#x}"
    chains = {
        "refuse": ["meta l4proto tcp reject with tcp reset", "reject with icmpx type port-unreachable"],
    }
    for family in FAMILIES:
        chains |= {
            f"remembered{family}": list(_remembered(family, timeouts_s)),
            f"pinned{family}": list(_pinned(family)),
            f"translate{family}": list(_translate(family)),
            f"node_ports{family}": list(_lookups("meta l4proto . th dport", f"node_ports{family}", family, facts)),
            f"services{family}": list(_services(family, facts)),
            f"from_node{family}": list(_from_node(family, facts)),
        }
    services = [f"meta nfproto ipv{family} jump services{family}" for family in FAMILIES]
    hairpins = [
        f"ct status dnat {ip} saddr . {ip} daddr @hairpins{family} masquerade fully-random"
        for family, ip in _IP.items()
    ]
    return chains | {
        "prerouting": services,
        "output": [*(f"meta nfproto ipv{family} jump from_node{family}" for family in FAMILIES), *services],
        "postrouting": [
            f"meta priority & {_shown(_OURS)} == {_shown(_OURS)} meta priority set none",
            f"meta mark & {mark} == {mark} meta mark set meta mark & {0xFFFF_FFFF ^ MASQUERADE_MARK:#x}"
            " masquerade fully-random",
            *hairpins,
        ],
    }


def _services(family: Family, facts: NodeFacts) -> Iterator[str]:
    ip = _IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    yield _restricts(family)
    yield from _lookups(portal, f"services{family}", family, facts)
    # The other ports of a cluster IP are nobody's, nor is an address that no Service has.
    yield f"{ip} daddr @cluster_ips{family} goto refuse"
    if cidrs := merged(facts.service_cidrs, family):
        yield f"{ip} daddr {{ {', '.join(cidrs)} }} drop"
    if (own := _at_node_ports(family, facts)) is not None:
        yield f"{own} jump node_ports{family}"


def _restricts(family: Family) -> str:
    ip = _IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    return f"{portal} @restricted{family} {portal} . {ip} saddr != @allowed{family} drop"


def _from_node(family: Family, facts: NodeFacts) -> Iterator[str]:
    """Yield what goes before the rest for processes of the node itself."""
    ip = _IP[family]
    leads = f"goto translate{family}"
    yield _restricts(family)
    yield f"meta priority set {ip} daddr . meta l4proto . th dport map @services{family}_for_node {leads}"
    if (own := _at_node_ports(family, facts)) is not None:
        yield f"{own} meta priority set meta l4proto . th dport map @node_ports{family}_for_node {leads}"


def _at_node_ports(family: Family, facts: NodeFacts) -> str | None:
    """Return what matches the node's own addresses with node ports; never loopback, which the kernel does not route."""
    ip, loopback = _IP[family], {4: "127.0.0.0/8", 6: "::1"}[family]
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
            who = f"{_IP[family]} saddr {{ {', '.join(cidrs)} }}"
        if who:
            yield f"{who} meta priority set {key} map @{name}_for_pods {leads}"
    yield f"meta priority set {key} map @{name} {leads}"


def _translate(family: Family) -> Iterator[str]:
    """Yield what becomes of a packet whose number was found."""
    yield f"meta priority {_shown(_REJECTED)} goto refuse"
    yield f"meta priority {_shown(_DROPPED)} drop"
    yield (
        f"meta priority & {_shown(_MASQUERADED)} == {_shown(_MASQUERADED)} "
        f"meta mark set meta mark | {MASQUERADE_MARK:#x}"
    )
    yield f"meta priority & {_shown(_PINNED)} == {_shown(_PINNED)} goto pinned{family}"
    yield f"meta priority set meta priority & {_shown(_NUMBER)}"
    for protocol in map(str.lower, L4Protocol):
        for size in SIZES:
            slot = f"meta priority . numgen random mod {size} map @slots{family}_{protocol}_{size}"
            yield f"meta l4proto {protocol} dnat {_IP[family]} to {slot}"


def _pinned(family: Family) -> Iterator[str]:
    """Yield how a client that has a pin comes to its endpoint, and one that has none, or no more, to another."""
    number, seat = f"meta priority & {_shown(_NUMBER)}", f"meta priority & {_shown(_SEAT)}"
    client = f"{_CLIENT[family]} . {number}"
    yield f"meta priority set {number}"
    yield f"meta priority set {_CLIENT[family]} . meta priority map @pins{family} jump remembered{family}"
    yield f"{seat} != 0:0 delete @pins{family} {{ {client} : meta priority }}"
    yield f"meta priority set {number}"
    for size in SIZES:
        slot = f"meta priority . numgen random mod {size} map @picks{family}_{size}"
        yield f"{seat} == 0:0 meta priority set {slot} goto remembered{family}"


def _remembered(family: Family, timeouts_s: Iterable[int]) -> Iterator[str]:
    """Yield how a pin is made, or lasts from now on again, and its endpoint is met if it is still there."""
    number = f"meta priority & {_shown(_NUMBER)}"
    for timeout_s in timeouts_s:
        element = f"{_CLIENT[family]} . {number} timeout {timeout_s}s : meta priority"
        yield f"{number} @affinity_{timeout_s} update @pins{family} {{ {element} }}"
    for protocol in map(str.lower, L4Protocol):
        yield f"meta l4proto {protocol} dnat {_IP[family]} to meta priority map @endpoints{family}_{protocol}"


def _pins() -> str:
    return "".join(
        f"\tmap pins{family} {{\n\t\ttypeof {of} . meta priority : meta priority\n"
        f"\t\tsize {_PINS_MAX}; flags dynamic,timeout; timeout 3h\n\t}}\n"
        for family, of in {4: "ip saddr", 6: f"numgen inc mod {_HASHES}"}.items()
    )


def _chain(name: str, rules: Iterable[str]) -> str:
    return f"\tchain {name} {{\n{_HOOKS.get(name, '')}" + "".join(f"\t\t{rule}\n" for rule in rules) + "\t}\n"


# ---- elements as text


def shown(kind: SetKind, key: bytes, value: bytes, owner: ServicePortName) -> str:
    """Return an element as nft writes it."""
    said = f' comment "{comment(owner)}"' if kind.names_owner else ""
    if kind.is_interval:
        half = len(key) // 2
        first, last = _fields(kind.key, key[:half]), _fields(kind.key, key[half:])
        return " . ".join(a if a == b else f"{a}-{b}" for a, b in zip(first, last, strict=True))
    text = " . ".join(_fields(kind.key, key)) + said
    return f"{text} : {' . '.join(_fields(kind.value, value))}" if value else text


def _fields(types: Iterable[str], packed: bytes) -> list[str]:
    texts, at = [], 0
    for field in types:
        size = 16 if field == "ipv6_addr" else 4
        part = packed[at : at + size]
        at += size
        match field:
            case "ipv4_addr" | "ipv6_addr":
                texts.append(socket.inet_ntop(socket.AF_INET if size == 4 else socket.AF_INET6, part))
            case "inet_proto":
                texts.append({number: str(protocol).lower() for protocol, number in _PROTOCOLS.items()}[part[0]])
            case "inet_service":
                texts.append(str(int.from_bytes(part[:2])))
            case "classid":
                texts.append(_shown(struct.unpack("=I", part)[0]))
            case _:
                texts.append(str(struct.unpack("=I", part)[0]))
    return texts


def _shown(number: int) -> str:
    return f"{number >> 16:x}:{number & 0xFFFF:x}"
