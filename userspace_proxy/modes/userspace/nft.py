"""The nftables table of userspace mode: its sets and maps, rules and elements. Pure.

Maps lead from portals to proxy ports, looked up in one step however many Services there are, hooked before other NAT
(priority -105 runs before -100). Senders that are treated differently have maps and sets of their own, which are looked
up first. A change of some portals changes some elements, and nothing else.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from functools import partial

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.redirects import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import node_portal
from userspace_proxy.modes import nft_blocks
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import IP, PORT, SENDERS, SENT, Block
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.service_table import (
    Description,
    ServiceTable,
    add_restrictions,
    packets_of,
    restriction_reason,
)
from userspace_proxy.modes.userspace.transparent_replies import REPLY_RULE
from userspace_proxy.netfilter.nft_text import is_everything, merged
from userspace_proxy.netfilter.sets import Elements, SetKind, key_fields, packed_lone_port, packed_portal

TABLE = "inet userspace_proxy"
_LOCAL_ADDRESSES: Mapping[Family, str] = {4: LOCAL_ADDRESS4, 6: LOCAL_ADDRESS6}
_RESTRICTED = "restricted"
_PORT_WORDS = "protocol . port"


class RedirectTable(ServiceTable):
    """Redirects packets to portals to our proxy ports. *needs* has senders' suffixes, and "restricted"."""

    name = TABLE
    may_need = frozenset((*SENDERS.values(), _RESTRICTED))

    def __init__(self) -> None:
        self.kinds = {name: kind for family in FAMILIES for name, kind in _kinds(family)}
        self.kinds["proxy_ports"] = SetKind(
            PORT,
            reason="The local ports at which our proxy listens.",
            parts=f"An element is {_PORT_WORDS}.",
            is_shared=True,
            note="reached through the maps only, never directly",
        )

    @property
    def before(self) -> tuple[RuleLine, ...]:
        return (
            RuleLine(f"table {TABLE}", "Creates our table if it is missing, so that the next line can delete it."),
            RuleLine(f"delete table {TABLE}", "Deletes the old rules. nft applies everything here as one transaction."),
            *super().before,
        )

    def needs(self, translation: Translation) -> Set[str]:
        restricted = {_RESTRICTED} if translation.allowed else set()
        return {SENDERS[route.sender] for route in translation.routes} | restricted

    def elements(self, translation: Translation) -> Elements:
        found: Elements = {}
        for (portal, sender, _), port in zip(translation.routes, translation.ports, strict=True):
            key = packed_portal(portal)
            name = f"{'node_ports' if portal.is_node_port else 'service_ips'}{portal.family}{SENDERS[sender]}"
            if port == DROPPED:
                found.setdefault(f"dropped_{name}", {})[key] = b""
            else:
                found.setdefault(name, {})[key] = packed_lone_port(port)
                proxy_port = packed_portal(node_portal(4, port, portal.protocol))
                found.setdefault("proxy_ports", {})[proxy_port] = b""
        add_restrictions(found, translation)
        return found

    def reason(self, name: str, key: bytes, value: bytes, found: Elements, facts: NodeFacts) -> Reason:
        parts = key_fields(self.kinds[name], key)
        if name == "proxy_ports":
            is_refusing = parts[-1] == str(facts.refuse_port)
            return "The port without a listener." if is_refusing else "A proxy port: not to be dialled directly."
        if name.startswith((_RESTRICTED, "allowed")):
            return restriction_reason(name, parts)
        port = int.from_bytes(value)
        return partial(_redirected, packets_of(name, parts), port, port == facts.refuse_port)

    def chains(self, facts: NodeFacts, needs: Set[str]) -> list[Block]:
        rules: dict[str, Iterable[RuleLine]] = {
            "services": [
                RuleLine(f"meta nfproto ipv{family} jump services{family}", f"IPv{family} has rules of its own.")
                for family in FAMILIES
            ],
            **{f"services{family}": _services(facts, needs, family) for family in FAMILIES},
            "replies": [_REPLY] if facts.transparent else [],
            **{
                f"node_ports{family}": _lookups(facts, needs, family, "meta l4proto . th dport", f"node_ports{family}")
                for family in FAMILIES
            },
        }
        return [*_HOOKED_CHAINS, *(_chain(name, list(of_chain)) for name, of_chain in rules.items())]


def _redirected(describe: Description, port: int, is_refused: bool, names: PortalNames) -> str:
    packets = describe(names)
    if port == DROPPED:
        return f"{packets} are dropped."
    if is_refused:
        return f"{packets} go to port {port}, which has no listener: there are no endpoints, and the kernel refuses."
    return f"{packets} go to our proxy port {port}."


# ---- chains

_REASONS = nft_blocks.CHAIN_REASONS | {
    "replies": "Arriving packets before conntrack's NAT: replies of endpoints to clients' own addresses.",
    "services": "Packets to Services, in the order of the look-ups. The first rule that matches decides.",
}
_HOOKED_CHAINS = (
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


def _services(facts: NodeFacts, needs: Set[str], family: Family) -> Iterator[RuleLine]:
    ip = IP[family]
    if _RESTRICTED in needs:
        yield nft_blocks.restriction(family)
    yield from _lookups(facts, needs, family, f"{ip} daddr . meta l4proto . th dport", f"service_ips{family}")
    on = ", ".join(node_port_addresses(facts, family))
    yield RuleLine(
        f"{f'{ip} daddr {{ {on} }} ' if on else ''}fib daddr type local jump node_ports{family}",
        f"Packets to {f'one of {on}' if on else 'an address'} of this node: is it a node port? Services' own addresses "
        "take precedence, because one of them may be this node's.",
    )
    if facts.refuse_port:
        guarded = "meta l4proto { tcp, udp } meta l4proto . th dport @proxy_ports"
        yield RuleLine(
            f"fib daddr type local {guarded} {_redirect(facts, family)}{facts.refuse_port}",
            f"Packets sent directly to a proxy port of this node go to port {facts.refuse_port}. It has no "
            "listener, so the kernel refuses them: proxy ports are only reached through portals.",
        )


def _lookups(facts: NodeFacts, needs: Set[str], family: Family, key: str, name: str) -> Iterator[RuleLine]:
    """Yield the rules that look up *key* for each sender.

    A drop in a NAT chain is enough, as the packet is the first of its connection. `meta l4proto` has to be matched in
    the rule that translates.
    """
    here = "this node"
    if facts.capture is Capture.ADDRESS:
        here = f"{_LOCAL_ADDRESSES[family]}, an address of ours on lo,"
    for sender, suffix in SENDERS.items():
        for match, which in _matches(sender, facts, family) if not suffix or suffix in needs else ():
            yield RuleLine(
                f"{match}{key} @dropped_{name}{suffix} drop",
                f"Packets{f' {which}' if which else ''} to a portal in @dropped_{name}{suffix}: dropped without an "
                "answer.",
            )
            yield RuleLine(
                f"{match}meta l4proto {{ tcp, udp }} {_redirect(facts, family)}{key} map @{name}{suffix}",
                f"{f'Packets {which}' if which else 'TCP and UDP packets'} whose destination, protocol and port are in "
                f"@{name}{suffix} go to {here} at the proxy port found there. Others: the next rule.",
            )


def _matches(sender: Sender, facts: NodeFacts, family: Family) -> Iterator[tuple[str, str]]:
    """Yield what matches packets of *sender*, and the same in words; nothing if no packets are known to be of it."""
    if sender is Sender.ANYBODY:
        yield "", ""
    elif sender is Sender.NODE:
        yield "fib saddr type local ", "sent by this node itself"
    elif (pods := nft_blocks.from_pods(facts.pods, family))[0]:
        yield pods


def _redirect(facts: NodeFacts, family: Family) -> str:
    if facts.capture is Capture.ADDRESS:
        return f"dnat {IP[family]} to {_LOCAL_ADDRESSES[family]} :"
    return "redirect to :"


def _chain(name: str, rules: Sequence[RuleLine]) -> Block:
    reason = _REASONS[name.rstrip("46")] if name != "services" else "Packets to Services, from either hook."
    return Block("chain", name, reason, items=rules)


# ---- shared with iptables.py


def node_port_addresses(facts: NodeFacts, family: Family) -> tuple[str, ...]:
    """Return the networks of node addresses that serve node ports; empty for all."""
    networks = merged(facts.node_ports_on, family)
    return () if is_everything(networks) else networks


# ---- sets and maps


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
            yield (
                f"{name}{suffix}",
                SetKind(key, PORT[1:], reason, f"Key: {key_words}; value: the proxy port.", names_owner=True),
            )
            reason = (
                f"{packets} to these {what} (IPv{family}) are dropped: the traffic policy is Local, and this "
                "node has no endpoint."
            )
            yield f"dropped_{name}{suffix}", SetKind(key, (), reason, f"An element is {key_words}.", names_owner=True)
    yield from nft_blocks.restriction_kinds(family)
