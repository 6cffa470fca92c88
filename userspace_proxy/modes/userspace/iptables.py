"""Redirects as input of iptables-restore, for nodes without nftables. Pure.

Our own chains hold every rule; each built-in chain gets one jump. iptables tries rules one by one, so a new connection
costs more with more Services.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.redirects import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes import xtables_script
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.portal_names import PortalNames, host
from userspace_proxy.modes.rule_line import Reason, RuleLine, text_of
from userspace_proxy.modes.userspace.nft import node_port_addresses
from userspace_proxy.modes.xtables_script import (
    BUILT_IN,
    ChainKey,
    Saved,
    Section,
    XtablesScript,
    block,
    called_chain,
    flushed,
    new_chain,
    parts,
    read,
)
from userspace_proxy.netfilter.nft_text import is_everything, merged, pod_cidrs
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO

CHAIN = "USERSPACE-PROXY"
NODE_PORTS = "USERSPACE-PROXY-NODE-PORTS"
DROP = "USERSPACE-PROXY-DROP"
RANGES = "USERSPACE-PROXY-RANGES"
GUARD = "USERSPACE-PROXY-GUARD"
LOOPS = "USERSPACE-PROXY-LOOPS"

# The chains of each table. The table nat may not drop, so packets are dropped in mangle, which comes before.
_CHAINS = {
    "mangle": {
        CHAIN: "Packets that arrive from the network.",
        RANGES: "Portals that only some clients may dial (loadBalancerSourceRanges).",
        DROP: "New connections that are dropped.",
        NODE_PORTS: "Node ports that are dropped, for all senders or for some.",
    },
    "nat": {
        CHAIN: "Packets to Services. Rules are tried one by one, so a connection costs more with more Services.",
        NODE_PORTS: "Packets to an address of this node: is it a node port?",
    },
    "filter": {
        GUARD: "Guards our proxy ports, which are only reached through portals.",
        LOOPS: xtables_script.LOOPS_REASON,
    },
}
_OURS = frozenset(name for chains in _CHAINS.values() for name in chains)
_FROM_OTHERS = f"-m mark ! --mark {OWN_MARK:#x}/{OWN_MARK:#x}"
_NOT_OWN = ", except for packets that our proxy has marked: a dial to an endpoint never comes back to the proxy"
_NEW = "-m conntrack --ctstate NEW"
_NEW_ONLY = "; new connections only"
# Table -> built-in chain -> the jump to ours, as iptables-save prints it behind the chain's name, and its description.
_JUMPS = {
    "mangle": {
        "PREROUTING": (f"-j {CHAIN}", CHAIN),
        "OUTPUT": (f"{_FROM_OTHERS} {_NEW} -j {DROP}", f"{DROP}{_NOT_OWN}{_NEW_ONLY}"),
    },
    "nat": {
        "PREROUTING": (f"-j {CHAIN}", CHAIN),
        "OUTPUT": (f"{_FROM_OTHERS} -j {CHAIN}", f"{CHAIN}{_NOT_OWN}"),
    },
    "filter": {
        "INPUT": (f"{_NEW} -j {GUARD}", f"{GUARD}{_NEW_ONLY}"),
        "FORWARD": (f"{OUT_BY_LO} -j {LOOPS}", f"{LOOPS}, if they would leave by lo"),
    },
}
_PORTS_A_MATCH = 15  # the limit of -m multiport


def restore(translations: Iterable[Translation], facts: NodeFacts, family: Family, saved: str) -> str:
    """Return the input for ``iptables-restore --noflush`` (4) or ``ip6tables-restore`` (6).

    *saved* is the output of iptables-save. A jump that is there is not added again. One that is not the first rule of
    its chain is moved there.
    """
    return "".join(text_of(section.lines()) for section in _sections(_redirects_of(translations, facts), family, saved))


def rules(translations: Iterable[Translation], facts: NodeFacts) -> XtablesScript:
    """Return what a first load writes for *translations*, for the tools of both families."""
    redirects, tools = _redirects_of(translations, facts), zip(FAMILIES, xtables_script.TOOLS, strict=True)
    return XtablesScript([(tool, _sections(redirects, family, "")) for family, tool in tools])


class _Redirect(NamedTuple):
    """What happens to packets to one portal. ``ports``: by sender. ``allowed``: the CIDRs that may dial it."""

    owner: ServicePortName
    ports: dict[Sender, int]
    allowed: tuple[str, ...]


class _Redirects(NamedTuple):
    """The redirects of all portals."""

    of: Mapping[Portal, _Redirect]
    facts: NodeFacts


def _redirects_of(translations: Iterable[Translation], facts: NodeFacts) -> _Redirects:
    found: dict[Portal, _Redirect] = {}
    for made in translations:
        for (portal, sender, _), port in zip(made.routes, made.ports, strict=True):
            if portal not in found:
                found[portal] = _Redirect(made.service_port.name, {}, made.allowed.get(portal, ()))
            found[portal].ports[sender] = port
    return _Redirects(found, facts)


def _sections(redirects: _Redirects, family: Family, saved: str) -> list[Section]:
    before = read(saved)
    rules = {
        "mangle": (*_arriving(redirects.facts), *_ranges(redirects, family), *_drops(redirects, family)),
        "nat": tuple(_nat(redirects, family)),
        "filter": (*_guards(redirects, family), *_no_loops(family)),
    }
    return [
        Section(table, list(map(new_chain, chains, chains.values())), [*_missing_jumps(table, before), *rules[table]])
        for table, chains in _CHAINS.items()
    ]


def removal(saved: str) -> str:
    """Return the input that removes every chain and jump of ours in *saved*; "" if there is none."""
    chains, script = read(saved), ""
    jumps = [(chain, rule) for chain, rule in _our_rules(chains) if chain.name not in _OURS]
    for table in _CHAINS:
        own = [chain for chain in chains if chain.table == table and chain.name in _OURS]
        deleted = (f"-D {chain.name} {rule}" for chain, rule in jumps if chain.table == table)
        script += block(table, [*flushed(own), *deleted, *(f"-X {chain.name}" for chain in own)])
    return script


def ours(saved: str) -> list[tuple[ChainKey, str]]:
    """Return our rules and jumps in *saved*. A later result differs if another program has changed them."""
    return list(_our_rules(read(saved)))


def _our_rules(chains: Saved) -> Iterator[tuple[ChainKey, str]]:
    for chain, rules in chains.items():
        yield from ((chain, rule) for rule in rules if chain.name in _OURS or called_chain(rule) in _OURS)


def rules_in(script: str) -> int:
    """Return the number of rules that `ours` finds once *script* (from `restore`) is loaded."""
    jumps = sum(len(chains) for chains in _JUMPS.values())
    return jumps + sum(line.startswith("-A ") and line.split()[1] in _OURS for line in script.splitlines())


def _missing_jumps(table: str, saved: Saved) -> Iterator[RuleLine]:
    for chain, (jump, where) in _JUMPS[table].items():
        rules = saved.get(ChainKey(table, chain), ())
        if rules[:1] != (jump,):
            yield from [RuleLine(f"-D {chain} {jump}")] * rules.count(jump)
            yield RuleLine(f"-I {chain} 1 {jump}", f"{BUILT_IN[chain]}: first (-I ... 1) the chain {where}.")


def _nat(redirects: _Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield the rules of the NAT table."""
    facts = redirects.facts
    address = ""
    if facts.capture is Capture.ADDRESS:
        address = LOCAL_ADDRESS4 if family == 4 else f"[{LOCAL_ADDRESS6}]"

    def rules(portal: Portal, redirect: _Redirect) -> Iterator[tuple[str, Reason]]:
        for sender, port in _ports(facts, portal, redirect):
            if port != DROPPED:
                verdict = f"-j DNAT --to-destination {address}:{port}" if address else f"-j REDIRECT --to-ports {port}"
                reason = partial(_led, portal, sender, port, address, port == facts.refuse_port)
                yield f'{_match(portal, sender)} -m comment --comment "{redirect.owner}" {verdict}', reason

    return _by_portal(redirects, family, CHAIN, rules)


def _led(portal: Portal, sender: _SenderMatch, port: int, address: str, is_refused: bool, names: PortalNames) -> str:
    there = f"{address}, an address of ours on lo, at " if address else ""
    packets = f"{_packets(portal, sender, names)} go to {there}"
    if is_refused:
        return f"{packets}port {port}, which has no listener: there are no endpoints, and the kernel refuses."
    return f"{packets}our proxy port {port}."


def _packets(portal: Portal, sender: _SenderMatch, names: PortalNames) -> str:
    return f"Packets to {names.of(portal)}{sender.words}"


def _arriving(facts: NodeFacts) -> Iterator[RuleLine]:
    yield RuleLine(f"-A {CHAIN} {_NEW} -j {DROP}", "Packets of a new connection: are they dropped?")
    if facts.transparent:
        yield RuleLine(
            f"-A {CHAIN} -m socket --transparent -j MARK --set-xmark {TRANSPARENT_MARK:#x}/{TRANSPARENT_MARK:#x}",
            "A reply to a client whose address one of our sockets uses. The mark has it routed to this node instead of "
            "the client.",
        )


def _drops(redirects: _Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield the rules for portals whose packets are dropped, for all senders or for some."""
    dropped = {portal for portal, redirect in redirects.of.items() if DROPPED in redirect.ports.values()}
    # A Service's own address may be this node's: packets to it must not match the node port of the same number.
    at_node_ports = {(portal.protocol, portal.port) for portal in dropped if portal.is_node_port}

    def rules(portal: Portal, redirect: _Redirect) -> Iterator[tuple[str, Reason]]:
        if portal not in dropped and (portal.protocol, portal.port) not in at_node_ports:
            return
        for sender, port in _ports(redirects.facts, portal, redirect):
            is_dropped = port == DROPPED
            verdict = "DROP" if is_dropped else "RETURN"
            yield f"{_match(portal, sender)} -j {verdict}", partial(_judged, portal, sender, is_dropped, "")

    yield RuleLine(f"-A {DROP} -j {RANGES}", "First: may the sender dial this portal?")
    yield from _by_portal(redirects, family, DROP, rules)


def _judged(portal: Portal, sender: _SenderMatch, is_dropped: bool, why: str, names: PortalNames) -> str:
    packets = _packets(portal, sender, names)
    if is_dropped:
        return f"{packets} are dropped without an answer.{why}"
    return f"{packets} are not dropped: return to the calling chain."


def _ranges(redirects: _Redirects, family: Family) -> Iterator[RuleLine]:
    why = " Packets of allowed clients have left this chain by the rules above."
    for portal, redirect in redirects.of.items():
        if (
            portal.family != family
            or not redirect.allowed
            or is_everything(networks := merged(redirect.allowed, family))
        ):
            continue
        for sender in (*(_SenderMatch(source=network) for network in networks), _ANY_SENDER):
            is_dropped = sender == _ANY_SENDER
            rule = f"-A {RANGES} {_match(portal, sender)} -j {'DROP' if is_dropped else 'RETURN'}"
            yield RuleLine(rule, partial(_judged, portal, sender, is_dropped, why), redirect.owner)


class _SenderMatch(NamedTuple):
    """Matches a sender: by its network, by the interface at which its packets arrive, or as this node itself."""

    source: str = ""
    interface: str = ""
    is_node: bool = False

    @property
    def words(self) -> str:
        if self.source:
            return f" from {host(self.source)}"
        if self.interface:
            return f" that arrive at {self.interface}"
        return " from this node itself" if self.is_node else ""


_ANY_SENDER = _SenderMatch()


def _by_portal(
    redirects: _Redirects,
    family: Family,
    name: str,
    rules: Callable[[Portal, _Redirect], Iterator[tuple[str, Reason]]],
) -> Iterator[RuleLine]:
    """Yield the *rules* of each portal for the chain *name*. It ends with a jump to the rules of node ports."""
    of_family = [(portal, redirect) for portal, redirect in redirects.of.items() if portal.family == family]

    def lines(chain: str, *, at_node_ports: bool) -> Iterator[RuleLine]:
        for portal, redirect in of_family:
            if portal.is_node_port is at_node_ports:
                for rule, reason in rules(portal, redirect):
                    yield RuleLine(f"-A {chain} {rule}", reason, redirect.owner)

    yield from lines(name, at_node_ports=False)
    for network in node_port_addresses(redirects.facts, family) or ("",):
        yield RuleLine(
            f"-A {name} {f'-d {network} ' if network else ''}-m addrtype --dst-type LOCAL -j {NODE_PORTS}",
            f"{xtables_script.at_own_address(network)}: is it a node port? Services' own addresses take precedence.",
        )
    yield from lines(NODE_PORTS, at_node_ports=True)


def _ports(facts: NodeFacts, portal: Portal, redirect: _Redirect) -> Iterator[tuple[_SenderMatch, int]]:
    """Yield the port for each sender's packets to *portal*. The first match decides."""
    ports, pods = redirect.ports, facts.pods
    if (port := ports.get(Sender.NODE)) is not None:
        yield _SenderMatch(is_node=True), port
    if pods is not None and (port := ports.get(Sender.POD)) is not None:
        if pods.interface:
            yield _SenderMatch(interface=pods.interface.replace("*", "+")), port
        for cidr in pod_cidrs(pods, portal.family):
            yield _SenderMatch(source=cidr), port
    if (port := ports.get(Sender.ANYBODY)) is not None:
        yield _ANY_SENDER, port


def _match(portal: Portal, sender: _SenderMatch) -> str:
    """Return what matches packets of *sender* to *portal*, as iptables-save prints it."""
    protocol = portal.protocol.lower()
    source = f"-s {sender.source} " if sender.source else ""
    where = "" if portal.is_node_port else f"-d {portal.ip}/{32 if portal.family == 4 else 128} "
    interface = f"-i {sender.interface} " if sender.interface else ""
    match = "-m addrtype --src-type LOCAL " if sender.is_node else ""
    return f"{source}{where}{interface}-p {protocol} {match}-m {protocol} --dport {portal.port}"


def _guards(redirects: _Redirects, family: int) -> Iterator[RuleLine]:
    yield RuleLine(
        f"-A {GUARD} -m conntrack --ctstate DNAT -j RETURN",
        "Packets whose destination was translated may pass: they came through a portal.",
    )
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    for protocol, answer in ((L4Protocol.TCP, "tcp-reset"), (L4Protocol.UDP, unreachable)):
        ports = (redirect.ports.values() for portal, redirect in redirects.of.items() if portal.protocol is protocol)
        held = sorted({*itertools.chain.from_iterable(ports)} - {DROPPED})
        for part in parts(held, _PORTS_A_MATCH):
            numbers = ",".join(map(str, part))
            yield RuleLine(
                f"-A {GUARD} -p {protocol.lower()} -m multiport --dports {numbers} -j REJECT --reject-with {answer}",
                f"Packets sent directly to the {protocol} port{'s' if len(part) > 1 else ''} "
                f"{', '.join(map(str, part))} are refused with {xtables_script.ANSWERS[answer]}.",
            )


def _no_loops(family: Family) -> Iterator[RuleLine]:
    if family == 4:
        yield RuleLine(f"-A {LOOPS} {NO_LOOP}", xtables_script.NO_LOOP_REASON)
