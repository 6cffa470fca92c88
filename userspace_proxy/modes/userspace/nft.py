"""Redirects as nftables text. Pure.

One table of ours holds everything: maps from portal to proxy port, looked up in one step however many services there
are, hooked before other NAT (priority -105 runs before -100). Senders that are treated differently have maps and sets
of their own, which are looked up first. A change of some portals changes some elements, and nothing else.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.redirects import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture, Redirects
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes import nft_blocks
from userspace_proxy.modes.nft_blocks import IP, PORT, SENDERS, SENT, Block, NftTable, set_block
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import RuleLine, text_of
from userspace_proxy.modes.userspace.transparent_replies import REPLY_RULE
from userspace_proxy.netfilter.nft_text import comment, is_everything, merged
from userspace_proxy.netfilter.sets import SetKind

TABLE = "inet userspace_proxy"
_BASE_RULES = 3  # those of _BASE_CHAINS
_LOCAL_ADDRESSES: Mapping[Family, str] = {4: LOCAL_ADDRESS4, 6: LOCAL_ADDRESS6}


def table(redirects: Redirects) -> str:
    """Return the script that creates our table or replaces it."""
    return rules(redirects).text()


def in_place(redirects: Redirects) -> str:
    """Return the script that replaces the content of our table, or creates it; no packet finds a map empty.

    After a table is deleted, a packet that is between two of its rules finds no element, though a new table stands by.
    The kernel refuses the script if another version of ours has left a set or map of another type.
    """
    new = rules(redirects)
    emptied = [f"flush {block.kind} {TABLE} {block.name}" for block in new.blocks]
    empty = replace(new, before=_START, blocks=[block._replace(items=()) for block in new.blocks])
    return "".join((empty.text(), *(f"{line}\n" for line in emptied), replace(new, before=_START).text()))


def rules(redirects: Redirects) -> NftTable:
    """Return the lines of `table`, each with its reason."""
    sets = _difference(Redirects(), redirects)[1]
    return NftTable(
        _BEFORE,
        [
            *(block._replace(items=list(sets.get(name, {}).values())) for name, block in _SETS.items()),
            *_BASE_CHAINS,
            *(_chain(name, rules) for name, rules in _chains(redirects).items()),
        ],
    )


def change(old: Redirects, new: Redirects) -> str:
    """Return the script that turns *old* into *new*; "" if they are equal. The cost follows the differences."""
    lines = []
    old_chains = _chains(old)
    for name, rules in _chains(new).items():
        if rules != old_chains[name]:
            lines += [f"flush chain {TABLE} {name}", f"table {TABLE} {{", text_of(_chain(name, rules).lines()) + "}"]
    gone, came = _difference(old, new)
    lines += [f"delete element {TABLE} {name} {{ {key} }}" for name, keys in gone.items() for key in keys]
    lines += [f"add element {TABLE} {name} {{ {e.text} }}" for name, keys in came.items() for e in keys.values()]
    return "\n".join([*lines, ""]) if lines else ""


def rules_in(redirects: Redirects) -> int:
    """Return the number of rules in our table once *redirects* are loaded."""
    return _BASE_RULES + sum(map(len, _chains(redirects).values()))


# ---- chains


_START = nft_blocks.table_start(TABLE)
_BEFORE = (
    RuleLine(f"table {TABLE}", "Creates our table if it is missing, so that the next line can delete it."),
    RuleLine(f"delete table {TABLE}", "Deletes the old rules. nft applies everything here as one transaction."),
    *_START,
)
_REASONS = nft_blocks.CHAIN_REASONS | {
    "replies": "Arriving packets before conntrack's NAT: replies of endpoints to clients' own addresses.",
    "services": "Packets to Services, in the order of the look-ups. The first rule that matches decides.",
}
_BASE_CHAINS = (
    Block(
        "chain",
        "prerouting",
        _REASONS["prerouting"],
        (nft_blocks.nat_hook("prerouting", -105),),
        (RuleLine("jump services", "On to the chain services."),),
    ),
    Block(
        "chain",
        "output",
        _REASONS["output"],
        (nft_blocks.nat_hook("output", -105),),
        (
            RuleLine(
                f"meta mark & {OWN_MARK:#x} == 0 jump services",
                "On to the chain services, except for packets of our proxy. Its sockets mark them with "
                f"{OWN_MARK:#x}, so that a dial to an endpoint never comes back to the proxy.",
            ),
        ),
    ),
    Block(
        "chain",
        "replies",
        _REASONS["replies"],
        (
            RuleLine(
                "type filter hook prerouting priority -150; policy accept;",
                "Called for every packet that arrives, before NAT.",
            ),
        ),
    ),
    nft_blocks.FORWARD_BLOCK,
)
_REPLY = RuleLine(
    REPLY_RULE,
    "A reply (or ICMP error) to a client whose address one of our sockets uses. The mark "
    f"{TRANSPARENT_MARK:#x} has it routed to this node instead of the client.",
)


def _chains(redirects: Redirects) -> dict[str, list[RuleLine]]:
    """Return the rules that depend on *redirects*."""
    return {
        "services": [
            RuleLine(f"meta nfproto ipv{family} jump services{family}", f"IPv{family} has rules of its own.")
            for family in FAMILIES
        ],
        **{f"services{family}": list(_services(redirects, family)) for family in FAMILIES},
        "replies": [_REPLY] if redirects.transparent else [],
        **{
            f"node_ports{family}": list(_lookups(redirects, family, "meta l4proto . th dport", f"node_ports{family}"))
            for family in FAMILIES
        },
    }


def _services(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    ip = IP[family]
    if redirects.allowed:
        yield nft_blocks.restriction(family)
    yield from _lookups(redirects, family, f"{ip} daddr . meta l4proto . th dport", f"service_ips{family}")
    on = ", ".join(node_port_addresses(redirects, family))
    yield RuleLine(
        f"{f'{ip} daddr {{ {on} }} ' if on else ''}fib daddr type local jump node_ports{family}",
        f"Packets to {f'one of {on}' if on else 'an address'} of this node: is it a node port? Services' own addresses "
        "take precedence, because one of them may be this node's.",
    )
    if redirects.refuse_port:
        guarded = "meta l4proto { tcp, udp } meta l4proto . th dport @proxy_ports"
        yield RuleLine(
            f"fib daddr type local {guarded} {_redirect(redirects, family)}{redirects.refuse_port}",
            f"Packets sent directly to a proxy port of this node go to port {redirects.refuse_port}. It has no "
            "listener, so the kernel refuses them: proxy ports are only reached through portals.",
        )


def _lookups(redirects: Redirects, family: Family, key: str, name: str) -> Iterator[RuleLine]:
    """Yield the rules that look up *key* for each sender.

    A drop in a NAT chain is enough, as the packet is the first of its connection. `meta l4proto` has to be matched in
    the rule that translates.
    """
    here = "this node"
    if redirects.capture is Capture.ADDRESS:
        here = f"{_LOCAL_ADDRESSES[family]}, an address of ours on lo,"
    for sender, suffix in SENDERS.items():
        for match, which in _matches(sender, redirects, family):
            yield RuleLine(
                f"{match}{key} @dropped_{name}{suffix} drop",
                f"Packets{f' {which}' if which else ''} to a portal in @dropped_{name}{suffix}: dropped without an "
                "answer.",
            )
            yield RuleLine(
                f"{match}meta l4proto {{ tcp, udp }} {_redirect(redirects, family)}{key} map @{name}{suffix}",
                f"{f'Packets {which}' if which else 'TCP and UDP packets'} whose destination, protocol and port are in "
                f"@{name}{suffix} go to {here} at the proxy port found there. Others: the next rule.",
            )


def _matches(sender: Sender, redirects: Redirects, family: Family) -> Iterator[tuple[str, str]]:
    """Yield what matches packets of *sender*, and the same in words; nothing if it has no maps of its own."""
    if sender is Sender.ANYBODY:
        yield "", ""
    elif not redirects.exceptions.get(sender):
        return
    elif sender is Sender.NODE:
        yield "fib saddr type local ", "sent by this node itself"
    elif (pods := nft_blocks.from_pods(redirects.pods, family))[0]:
        yield pods


def _redirect(redirects: Redirects, family: Family) -> str:
    if redirects.capture is Capture.ADDRESS:
        return f"dnat {IP[family]} to {_LOCAL_ADDRESSES[family]} :"
    return "redirect to :"


def _chain(name: str, rules: Sequence[RuleLine]) -> Block:
    reason = _REASONS[name.rstrip("46")] if name != "services" else "Packets to Services, from either hook."
    return Block("chain", name, reason, items=rules)


# ---- shared with iptables.py


def node_port_addresses(redirects: Redirects, family: Family) -> tuple[str, ...]:
    """Return the networks of node addresses that serve node ports; empty for all."""
    networks = merged(redirects.node_ports_on, family)
    return () if is_everything(networks) else networks


def restricted(redirects: Redirects, family: Family) -> Iterator[tuple[Portal, tuple[str, ...]]]:
    """Yield the portals that only some clients may dial, and the networks of these clients."""
    for portal, cidrs in redirects.allowed.items():
        if portal.family == family and not is_everything(networks := merged(cidrs, family)):
            yield portal, networks


# ---- sets and maps

_PORT_WORDS = "protocol . port"


def _kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    for name, what, key, key_words in (
        (f"service_ips{family}", "addresses of Services", (f"ipv{family}_addr", *PORT), f"address . {_PORT_WORDS}"),
        (f"node_ports{family}", "node ports", PORT, _PORT_WORDS),
    ):
        for sender in reversed(SENDERS):
            suffix, packets = SENDERS[sender], f"Packets{SENT[sender]}"
            first = " Looked up before the map for all senders." if suffix else ""
            reason = (
                f"{packets} to {what} (IPv{family}): portal -> proxy port. One look-up, however many Services "
                f"there are.{first}"
            )
            yield f"{name}{suffix}", SetKind(key, PORT[1:], reason, f"Key: {key_words}; value: the proxy port.")
            reason = (
                f"{packets} to these {what} (IPv{family}) are dropped: the traffic policy is Local, and this "
                "node has no endpoint."
            )
            yield f"dropped_{name}{suffix}", SetKind(key, (), reason, f"An element is {key_words}.")
    yield from nft_blocks.restriction_kinds(family)


_PROXY_PORTS = set_block(
    "proxy_ports",
    SetKind(PORT, (), "The local ports at which our proxy listens.", f"An element is {_PORT_WORDS}."),
)
_NOTE = RuleLine('comment "reached through the maps only, never directly"', "A note for readers of the rules.")
_SETS = {name: set_block(name, kind) for family in FAMILIES for name, kind in _kinds(family)}
_SETS["proxy_ports"] = _PROXY_PORTS._replace(head=(_NOTE, *_PROXY_PORTS.head))

# Name of a set -> key -> the element.
_Sets = dict[str, dict[str, RuleLine]]


def _difference(old: Redirects, new: Redirects) -> tuple[_Sets, _Sets]:
    """Return the elements that are in *old* only, and those in *new* only."""
    gone: _Sets = {}
    came: _Sets = {}
    for sender in SENDERS:
        _add_other_ports(gone, old, new, sender)
        _add_other_ports(came, new, old, sender)
    before, after = _ranges(old), _ranges(new)
    for name in {**before, **after}:
        gone[name] = _other(before.get(name, {}), after.get(name, {}))
        came[name] = _other(after.get(name, {}), before.get(name, {}))
    gone["proxy_ports"] = _other_proxy_ports(old, new)
    came["proxy_ports"] = _other_proxy_ports(new, old)
    return gone, came


def _add_other_ports(elements: _Sets, these: Redirects, those: Redirects, sender: Sender) -> None:
    """Add the elements for ports in *these* that are not in *those*, or have another owner, which the comment names."""
    others = _ports(those, sender)
    for portal, port in _ports(these, sender).items():
        name = these.names.get(portal)
        if others.get(portal) != port or name != those.names.get(portal):
            text = f' comment "{comment(name)}"' if name else ""
            value = f" : {port}" if port != DROPPED else ""
            key = _key(portal)
            reason = partial(_redirected, portal, sender, port, these.refuse_port)
            elements.setdefault(_set_name(sender, portal, port), {})[key] = RuleLine(
                f"{key}{text}{value}", reason, name
            )


def _other(these: Mapping[str, RuleLine], those: Mapping[str, RuleLine]) -> dict[str, RuleLine]:
    return {key: line for key, line in these.items() if key not in those}


def _ports(redirects: Redirects, sender: Sender) -> Mapping[Portal, int]:
    return redirects.ports if sender is Sender.ANYBODY else redirects.exceptions.get(sender, {})


def _set_name(sender: Sender, portal: Portal, port: int) -> str:
    name = f"{'node_ports' if portal.is_node_port else 'service_ips'}{portal.family}{SENDERS[sender]}"
    return f"dropped_{name}" if port == DROPPED else name


def _key(portal: Portal) -> str:
    port = f"{portal.protocol.lower()} . {portal.port}"
    return port if portal.is_node_port else f"{portal.ip} . {port}"


def _redirected(portal: Portal, sender: Sender, port: int, refuse_port: int, names: PortalNames) -> str:
    packets = f"Packets{SENT[sender]} to {names.of(portal)}"
    if port == DROPPED:
        return f"{packets} are dropped."
    if port == refuse_port:
        return f"{packets} go to port {port}, which has no listener: there are no endpoints, and the kernel refuses."
    return f"{packets} go to our proxy port {port}."


def _ranges(redirects: Redirects) -> _Sets:
    sets: _Sets = {}
    for family in FAMILIES:
        for portal, networks in restricted(redirects, family):
            key, name = _key(portal), redirects.names.get(portal)
            line = _dialled(key, portal, "the networks in @allowed only", name)
            sets.setdefault(f"restricted{family}", {})[key] = line
            allowed = sets.setdefault(f"allowed{family}", {})
            for network in networks:
                allowed[f"{key} . {network}"] = _dialled(f"{key} . {network}", portal, network, name)
    return sets


def _dialled(text: str, portal: Portal, source: str, name: ServicePortName | None) -> RuleLine:
    def reason(names: PortalNames) -> str:
        words = names.of(portal)
        return f"{words[0].upper()}{words[1:]} may be dialled from {source}."

    return RuleLine(text, reason, name)


def _other_proxy_ports(these: Redirects, those: Redirects) -> dict[str, RuleLine]:
    """Return the elements of the set of proxy ports that are in *these* but not in *those*."""
    others, elements = _proxy_ports(those), {}
    for protocol, port in _proxy_ports(these):
        if (protocol, port) not in others:
            is_refusing = port == these.refuse_port
            reason = "The port without a listener." if is_refusing else "A proxy port: not to be dialled directly."
            key = f"{protocol.lower()} . {port}"
            elements[key] = RuleLine(key, reason)
    return elements


def _proxy_ports(redirects: Redirects) -> dict[tuple[L4Protocol, int], None]:
    levels = (_ports(redirects, sender) for sender in reversed(SENDERS))
    return {(portal.protocol, port): None for level in levels for portal, port in level.items() if port != DROPPED}
