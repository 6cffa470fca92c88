"""Redirects as nftables text. Pure.

One table of ours holds everything: maps from portal to proxy port, looked up in one step however many services
there are, hooked before other NAT (priority -105 runs before -100). For each sender that is told from others there
are maps of its own, and sets of what is dropped, before those for everybody.
A change of some portals is a change of some elements; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.interfaces import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture, Redirects
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
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
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.userspace.transparent_replies import REPLY_RULE
from userspace_proxy.netfilter.nft_text import comment, is_everything, merged

TABLE = "inet userspace_proxy"
_BASE_RULES = 3  # the jumps of the chains that the kernel calls, and NO_LOOP
_IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
_LOCAL_ADDRESSES: Mapping[Family, str] = {4: LOCAL_ADDRESS4, 6: LOCAL_ADDRESS6}
# In the order in which they are asked for; what their sets are called.
_SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}


def table(redirects: Redirects) -> str:
    """Return the script that replaces our table, whole, whether or not there is one."""
    return rules(redirects).text()


def rules(redirects: Redirects) -> NftTable:
    """Return the lines of `table`, each with its reason."""
    sets = _sets(redirects)
    chains = _chains(redirects)
    return NftTable(
        _BEFORE,
        [
            *(block._replace(items=list(sets.get(name, {}).values())) for name, block in _SETS.items()),
            *_BASE_CHAINS,
            *(_block(name, rules) for name, rules in chains.items()),
        ],
    )


def change(old: Redirects, new: Redirects) -> str:
    """Return the script that makes *new* of *old*, at the cost of what differs; "" where nothing does."""
    lines = []
    old_chains = _chains(old)
    for name, rules in _chains(new).items():
        if rules != old_chains[name]:
            lines += [f"flush chain {TABLE} {name}", f"table {TABLE} {{", _block(name, rules).text() + "}"]
    gone, came = _difference(old, new)
    lines += [f"delete element {TABLE} {name} {{ {key} }}" for name, keys in gone.items() for key in keys]
    lines += [f"add element {TABLE} {name} {{ {e.text} }}" for name, keys in came.items() for e in keys.values()]
    return "\n".join([*lines, ""]) if lines else ""


def rules_in(redirects: Redirects) -> int:
    """Return how many rules our table has once *redirects* are loaded."""
    return _BASE_RULES + sum(map(len, _chains(redirects).values()))


def removal() -> str:
    """Return the script that removes our table; it succeeds where there is none."""
    return f"table {TABLE}\ndelete table {TABLE}\n"


# ---- chains


_NAT_REASON = (
    "Called for the first packet of each connection only; conntrack does the same to all later ones. -105 is before "
    "other NAT (-100). Accept: what no rule leads elsewhere goes its usual way."
)
_BEFORE = (
    RuleLine(f"table {TABLE}", "Makes sure that our table is there, so that the next line has one to delete."),
    RuleLine(
        f"delete table {TABLE}",
        "Away with what it held: nft applies all of this as one transaction, so no packet meets a gap.",
    ),
    RuleLine(f"table {TABLE} {{", TABLE_REASON),
)
_REASONS = CHAIN_REASONS | {
    "replies": "Packets that come in, before conntrack's NAT: answers that endpoints give to clients' own addresses.",
    "services": "Packets to Services, in the order in which they are looked up; the first rule that matches ends it.",
}


def _base_chain(name: str, hook: str, reason: str, *rules: RuleLine) -> Block:
    return Block("chain", name, _REASONS[name], (RuleLine(hook, reason),), rules)


# The chains that the kernel calls. Their rules do not depend on redirects.
_BASE_CHAINS = (
    _base_chain(
        "prerouting",
        "type nat hook prerouting priority -105; policy accept;",
        _NAT_REASON,
        RuleLine("jump services", "On to the chain services."),
    ),
    _base_chain(
        "output",
        "type nat hook output priority -105; policy accept;",
        _NAT_REASON,
        RuleLine(
            f"meta mark & {OWN_MARK:#x} == 0 jump services",
            "On to the chain services, but not for what our proxy itself sends: its sockets mark their packets with "
            f"{OWN_MARK:#x}, so a dial to an endpoint never comes back to us.",
        ),
    ),
    _base_chain(
        "replies",
        "type filter hook prerouting priority -150; policy accept;",
        "Called for every packet that comes in, before NAT.",
    ),
    Block("chain", "forward", _REASONS["forward"], (FORWARD_TYPE,), (NO_LOOP,)),
)
_REPLY = RuleLine(
    REPLY_RULE,
    "An answer (or ICMP error) to a client whose address a socket of ours speaks with: marked with "
    f"{TRANSPARENT_MARK:#x}, by which routing brings it to this node instead of to the client.",
)


def _chains(redirects: Redirects) -> dict[str, list[RuleLine]]:
    """Return the rules that depend on *redirects*. A NAT chain sees the first packet of a connection, and no other."""
    return {
        "services": [
            RuleLine(f"meta nfproto ipv{family} jump services{family}", f"IPv{family} has rules of its own.")
            for family in FAMILIES
        ],
        **{f"services{family}": list(_services(redirects, family)) for family in FAMILIES},
        "replies": [_REPLY] if redirects.transparent else [],
        **{f"node_ports{family}": list(_node_ports(redirects, family)) for family in FAMILIES},
    }


def _services(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    ip = _IP[family]
    portal = f"{ip} daddr . meta l4proto . th dport"
    if redirects.allowed:
        yield RuleLine(
            f"{portal} @restricted{family} {portal} . {ip} saddr != @allowed{family} drop",
            "Is the portal one of @restricted, and the sender in none of the networks of @allowed? "
            "Dropped, without an answer.",
        )
    yield from _lookups(redirects, family, portal, f"service_ips{family}")
    # Behind the services' own addresses, as one of these may be this node's.
    on = ", ".join(node_port_addresses(redirects, family))
    yield RuleLine(
        f"{f'{ip} daddr {{ {on} }} ' if on else ''}fib daddr type local jump node_ports{family}",
        f"Packets to {f'one of {on}' if on else 'an address'} of this node: see whether it is a node port. Behind the "
        "Services' own addresses.",
    )
    if redirects.refuse_port:
        # What comes to a proxy port itself is led to where nobody listens, and the kernel refuses it.
        guarded = "meta l4proto { tcp, udp } meta l4proto . th dport @proxy_ports"
        yield RuleLine(
            f"fib daddr type local {guarded} {_leads(redirects, family)}{redirects.refuse_port}",
            f"Who dials a proxy port of this node directly is led to port {redirects.refuse_port}, at which nobody "
            "listens, so that the kernel refuses: a proxy port is reached by its portals only.",
        )


def _node_ports(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    yield from _lookups(redirects, family, "meta l4proto . th dport", f"node_ports{family}")


def _lookups(redirects: Redirects, family: Family, key: str, name: str) -> Iterator[RuleLine]:
    """Yield the rules that look *key* up for each sender; a NAT chain drops for good, as nothing else sees the packet.

    `meta l4proto` has to be matched in the rule that translates.
    """
    here = "this node itself"
    if redirects.capture is Capture.ADDRESS:
        here = f"{_LOCAL_ADDRESSES[family]}, an address of ours on lo,"
    for sender, suffix in _SENDERS.items():
        for match, who in _matches(sender, redirects, family):
            yield RuleLine(
                f"{match}{key} @dropped_{name}{suffix} drop",
                f"Packets{f' {who}' if who else ''} to a portal in @dropped_{name}{suffix} are dropped, without an "
                "answer.",
            )
            yield RuleLine(
                f"{match}meta l4proto {{ tcp, udp }} {_leads(redirects, family)}{key} map @{name}{suffix}",
                f"{f'Packets {who}' if who else 'TCP and UDP packets'} whose destination, protocol and port are a key "
                f"of @{name}{suffix} go to {here} at the proxy port that stands there. What is not found goes on to "
                "the next rule.",
            )


def _matches(sender: Sender, redirects: Redirects, family: Family) -> Iterator[tuple[str, str]]:
    """Yield what matches *sender*, and that in words; nothing where it meets what everybody meets."""
    if sender is Sender.ANYBODY:
        yield "", ""
    elif not redirects.exceptions.get(sender):
        return
    elif sender is Sender.NODE:
        yield "fib saddr type local ", "sent by this node itself"
    elif (pods := from_pods(redirects.pods, family))[0]:
        yield pods


def _leads(redirects: Redirects, family: Family) -> str:
    if redirects.capture is Capture.ADDRESS:
        return f"dnat {_IP[family]} to {_LOCAL_ADDRESSES[family]} :"
    return "redirect to :"


def _block(name: str, rules: Sequence[RuleLine]) -> Block:
    reason = _REASONS[name.rstrip("46")] if name != "services" else "The Services, for whatever comes in or leaves."
    return Block("chain", name, reason, items=rules)


# ---- what iptables.py needs too


def node_port_addresses(redirects: Redirects, family: Family) -> tuple[str, ...]:
    """Return the networks of own addresses at which node ports are served; empty for all."""
    networks = merged(redirects.node_ports_on, family)
    return () if is_everything(networks) else networks


def restricted(redirects: Redirects, family: Family) -> Iterator[tuple[Portal, tuple[str, ...]]]:
    """Yield the portals that not everybody may dial, and the networks from which they may be dialled."""
    for portal, cidrs in redirects.allowed.items():
        if portal.family == family and not is_everything(networks := merged(cidrs, family)):
            yield portal, networks


# ---- sets and maps


def _set_blocks() -> Iterator[Block]:
    port, port_words = "inet_proto . inet_service", "protocol . port"
    for family in FAMILIES:
        address = f"ipv{family}_addr"
        address_words = f"address . {port_words}"
        for name, what, key, key_words in (
            (f"service_ips{family}", "addresses of Services", f"{address} . {port}", address_words),
            (f"node_ports{family}", "node ports", port, port_words),
        ):
            for sender in reversed(_SENDERS):
                suffix, sent = _SENDERS[sender], SENT[sender]
                first = " Asked before the map for everybody." if suffix else ""
                yield Block(
                    "map",
                    f"{name}{suffix}",
                    f"Where packets{sent} to {what} (IPv{family}) go: portal -> proxy port. One look-up, however many "
                    f"Services there are.{first}",
                    (RuleLine(f"type {key} : inet_service", f"Key: {key_words}; value: the proxy port."),),
                )
                yield Block(
                    "set",
                    f"dropped_{name}{suffix}",
                    f"Packets{sent} to these {what} (IPv{family}) are dropped: their traffic policy wants endpoints of "
                    "this node, and it has none.",
                    (RuleLine(f"type {key}", f"An element is {key_words}."),),
                )
        declared = RuleLine(f"type {address} . {port}", f"An element is {address_words}.")
        yield Block("set", f"restricted{family}", RESTRICTED_REASON, (declared,))
        declared = RuleLine(
            f"type {address} . {port} . {address}; flags interval",
            f"An element is {address_words} . network of the sender.",
        )
        reason = "From where these may be dialled: portal . network of the sender."
        yield Block("set", f"allowed{family}", reason, (declared,))
    yield Block(
        "set",
        "proxy_ports",
        "The local ports at which our proxy listens.",
        (
            RuleLine(
                'comment "reached through the maps only, never directly"',
                "A note for who reads the rules in the kernel.",
            ),
            RuleLine(f"type {port}", f"An element is {port_words}."),
        ),
    )


_SETS = {block.name: block for block in _set_blocks()}

# Name of a set -> key -> the element.
_Sets = dict[str, dict[str, RuleLine]]


def _sets(redirects: Redirects) -> _Sets:
    return _difference(Redirects(), redirects)[1]


def _difference(old: Redirects, new: Redirects) -> tuple[_Sets, _Sets]:
    """Return the elements that are in *old* only, and those in *new* only."""
    gone: _Sets = {}
    came: _Sets = {}
    for sender in _SENDERS:
        before, after = _ports(old, sender), _ports(new, sender)
        # An element that differs in its comment alone is replaced too: the comment says whose it is.
        for elements, redirects, ports, others, other_names in (
            (gone, old, before, after, new.names),
            (came, new, after, before, old.names),
        ):
            names = redirects.names
            for portal, port in ports.items():
                name = names.get(portal)
                if others.get(portal) != port or name != other_names.get(portal):
                    said = f' comment "{comment(name)}"' if name else ""
                    value = f" : {port}" if port != DROPPED else ""
                    key = _key(portal)
                    reason = partial(_redirected, portal, sender, port, redirects.refuse_port)
                    elements.setdefault(_place(sender, portal, port), {})[key] = RuleLine(
                        f"{key}{said}{value}", reason, name
                    )
    for elements_of in (_ranges, _guarded):
        sets_before, sets_after = elements_of(old), elements_of(new)
        for place in {**sets_before, **sets_after}:
            keys_before, keys_after = sets_before.get(place, {}), sets_after.get(place, {})
            for elements, keys, other_keys in ((gone, keys_before, keys_after), (came, keys_after, keys_before)):
                elements[place] = {key: RuleLine(key, *keys[key]) for key in keys if key not in other_keys}
    return gone, came


def _ports(redirects: Redirects, sender: Sender) -> Mapping[Portal, int]:
    return redirects.ports if sender is Sender.ANYBODY else redirects.exceptions.get(sender, {})


def _place(sender: Sender, portal: Portal, port: int) -> str:
    name = f"{'node_ports' if portal.is_node_port else 'service_ips'}{portal.family}{_SENDERS[sender]}"
    return f"dropped_{name}" if port == DROPPED else name


def _key(portal: Portal) -> str:
    port = f"{portal.protocol.lower()} . {portal.port}"
    return port if portal.is_node_port else f"{portal.ip} . {port}"


def _redirected(portal: Portal, sender: Sender, port: int, refuse_port: int, known: Known) -> str:
    packets = f"Packets{SENT[sender]} to {known.portal_words(portal)}"
    if port == DROPPED:
        return f"{packets} are dropped."
    if port == refuse_port:
        return (
            f"{packets} are led to port {port}, at which nobody listens: no endpoint is there, and the kernel refuses "
            "at once."
        )
    return f"{packets} are led to our proxy port {port}."


# Name of a set -> key -> its reason, and whose it is.
_Keys = dict[str, dict[str, tuple[Reason, ServicePortName | None]]]


def _ranges(redirects: Redirects) -> _Keys:
    sets: _Keys = {}
    for family in FAMILIES:
        for portal, networks in restricted(redirects, family):
            key, name = _key(portal), redirects.names.get(portal)
            reason = partial(_dialled, portal, "the networks in @allowed only")
            sets.setdefault(f"restricted{family}", {})[key] = reason, name
            allowed = {f"{key} . {network}": (partial(_dialled, portal, network), name) for network in networks}
            sets.setdefault(f"allowed{family}", {}).update(allowed)
    return sets


def _dialled(portal: Portal, source: str, known: Known) -> str:
    words = known.portal_words(portal)
    return f"{words[0].upper()}{words[1:]} may be dialled from {source}."


def _guarded(redirects: Redirects) -> _Keys:
    levels = (_ports(redirects, sender) for sender in reversed(_SENDERS))
    ports = {(portal.protocol, port): None for level in levels for portal, port in level.items() if port != DROPPED}
    reason, refused = "A proxy port: it may not be dialled directly.", "The port at which nobody listens."
    return {
        "proxy_ports": {
            f"{protocol.lower()} . {port}": (refused if port == redirects.refuse_port else reason, None)
            for protocol, port in ports
        }
    }
