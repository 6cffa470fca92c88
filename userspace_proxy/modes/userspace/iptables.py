"""Redirects as input of iptables-restore, for nodes without nftables. Pure.

Our own chains hold every rule; each built-in chain gets one jump. iptables tries rules one by one, so a new connection
costs more with more Services.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.redirects import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture, Redirects
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes import xtables_script
from userspace_proxy.modes.portal_names import PortalNames, host
from userspace_proxy.modes.rule_line import Reason, RuleLine, text_of
from userspace_proxy.modes.userspace.nft import node_port_addresses, restricted
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
    read,
)
from userspace_proxy.netfilter.nft_text import pod_cidrs
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


def restore(redirects: Redirects, family: Family, saved: str) -> str:
    """Return the input for ``iptables-restore --noflush`` (4) or ``ip6tables-restore`` (6).

    *saved* is the output of iptables-save. A jump that is there is not added again. One that is not the first rule of
    its chain is moved there.
    """
    return "".join(text_of(section.lines()) for section in _sections(redirects, family, saved))


def rules(redirects: Redirects) -> XtablesScript:
    """Return what a first load writes for *redirects*, for the tools of both families."""
    tools = zip(FAMILIES, xtables_script.TOOLS, strict=True)
    return XtablesScript([(tool, _sections(redirects, family, "")) for family, tool in tools])


def _sections(redirects: Redirects, family: Family, saved: str) -> list[Section]:
    before = read(saved)
    rules = {
        "mangle": (*_arriving(redirects), *_ranges(redirects, family), *_drops(redirects, family)),
        "nat": tuple(_redirects(redirects, family)),
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


def _redirects(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield the rules of the NAT table."""
    address = ""
    if redirects.capture is Capture.ADDRESS:
        address = LOCAL_ADDRESS4 if family == 4 else f"[{LOCAL_ADDRESS6}]"
    return _by_portal(redirects, family, CHAIN, partial(_redirects_of, redirects, address))


def _redirects_of(redirects: Redirects, address: str, portal: Portal) -> Iterator[tuple[str, Reason]]:
    name = redirects.names.get(portal)
    comment = f' -m comment --comment "{name}"' if name else ""
    for sender, port in _ports(redirects, portal):
        if port != DROPPED:
            verdict = f"-j DNAT --to-destination {address}:{port}" if address else f"-j REDIRECT --to-ports {port}"
            reason = partial(_led, portal, sender, port, address, port == redirects.refuse_port)
            yield f"{_match(portal, sender)}{comment} {verdict}", reason


def _led(portal: Portal, sender: _SenderMatch, port: int, address: str, is_refused: bool, names: PortalNames) -> str:
    there = f"{address}, an address of ours on lo, at " if address else ""
    packets = f"{_packets(portal, sender, names)} go to {there}"
    if is_refused:
        return f"{packets}port {port}, which has no listener: there are no endpoints, and the kernel refuses."
    return f"{packets}our proxy port {port}."


def _packets(portal: Portal, sender: _SenderMatch, names: PortalNames) -> str:
    return f"Packets to {names.of(portal)}{sender.words}"


def _arriving(redirects: Redirects) -> Iterator[RuleLine]:
    yield RuleLine(f"-A {CHAIN} {_NEW} -j {DROP}", "Packets of a new connection: are they dropped?")
    if redirects.transparent:
        yield RuleLine(
            f"-A {CHAIN} -m socket --transparent -j MARK --set-xmark {TRANSPARENT_MARK:#x}/{TRANSPARENT_MARK:#x}",
            "A reply to a client whose address one of our sockets uses. The mark has it routed to this node instead of "
            "the client.",
        )


def _drops(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield the rules for portals whose packets are dropped, for all senders or for some."""
    dropped = {portal for portal, port in _all_ports(redirects) if port == DROPPED}
    # A Service's own address may be this node's: packets to it must not match the node port of the same number.
    at_node_ports = {(portal.protocol, portal.port) for portal in dropped if portal.is_node_port}

    def rules(portal: Portal) -> Iterator[tuple[str, Reason]]:
        if portal not in dropped and (portal.protocol, portal.port) not in at_node_ports:
            return
        for sender, port in _ports(redirects, portal):
            is_dropped = port == DROPPED
            verdict = "DROP" if is_dropped else "RETURN"
            yield f"{_match(portal, sender)} -j {verdict}", partial(_judged, portal, sender, is_dropped, "")

    yield RuleLine(f"-A {DROP} -j {RANGES}", "First: may the sender dial this portal?")
    yield from _by_portal(redirects, family, DROP, rules)


def _all_ports(redirects: Redirects) -> Iterator[tuple[Portal, int]]:
    return itertools.chain.from_iterable(ports.items() for ports in (redirects.ports, *redirects.exceptions.values()))


def _judged(portal: Portal, sender: _SenderMatch, is_dropped: bool, why: str, names: PortalNames) -> str:
    packets = _packets(portal, sender, names)
    if is_dropped:
        return f"{packets} are dropped without an answer.{why}"
    return f"{packets} are not dropped: return to the calling chain."


def _ranges(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    why = " Packets of allowed clients have left this chain by the rules above."
    for portal, networks in restricted(redirects, family):
        name = redirects.names.get(portal)
        for sender in (*(_SenderMatch(source=network) for network in networks), _SenderMatch()):
            is_dropped = not sender.source
            rule = f"-A {RANGES} {_match(portal, sender)} -j {'DROP' if is_dropped else 'RETURN'}"
            yield RuleLine(rule, partial(_judged, portal, sender, is_dropped, why), name)


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


def _by_portal(
    redirects: Redirects,
    family: Family,
    name: str,
    rules: Callable[[Portal], Iterator[tuple[str, Reason]]],
) -> Iterator[RuleLine]:
    """Yield the *rules* of each portal for the chain *name*. It ends with a jump to the rules of node ports."""
    portals = dict.fromkeys(portal for portal, _ in _all_ports(redirects) if portal.family == family)

    def lines(chain: str, *, at_node_ports: bool) -> Iterator[RuleLine]:
        for portal in portals:
            if portal.is_node_port is at_node_ports:
                owner = redirects.names.get(portal)
                yield from (RuleLine(f"-A {chain} {rule}", reason, owner) for rule, reason in rules(portal))

    yield from lines(name, at_node_ports=False)
    for network in node_port_addresses(redirects, family) or ("",):
        yield RuleLine(
            f"-A {name} {f'-d {network} ' if network else ''}-m addrtype --dst-type LOCAL -j {NODE_PORTS}",
            f"{xtables_script.at_own_address(network)}: is it a node port? Services' own addresses take precedence.",
        )
    yield from lines(NODE_PORTS, at_node_ports=True)


def _ports(redirects: Redirects, portal: Portal) -> Iterator[tuple[_SenderMatch, int]]:
    """Yield the port for each sender's packets to *portal*. The first match decides."""
    exceptions = redirects.exceptions
    if (port := exceptions.get(Sender.NODE, {}).get(portal)) is not None:
        yield _SenderMatch(is_node=True), port
    pods = redirects.pods
    if pods is not None and (port := exceptions.get(Sender.POD, {}).get(portal)) is not None:
        if pods.interface:
            yield _SenderMatch(interface=pods.interface.replace("*", "+")), port
        for cidr in pod_cidrs(pods, portal.family):
            yield _SenderMatch(source=cidr), port
    if (port := redirects.ports.get(portal)) is not None:
        yield _ANY_SENDER, port


_ANY_SENDER = _SenderMatch()


def _match(portal: Portal, sender: _SenderMatch) -> str:
    """Return what matches packets of *sender* to *portal*, as iptables-save prints it."""
    protocol = portal.protocol.lower()
    source = f"-s {sender.source} " if sender.source else ""
    where = "" if portal.is_node_port else f"-d {portal.ip}/{32 if portal.family == 4 else 128} "
    interface = f"-i {sender.interface} " if sender.interface else ""
    match = "-m addrtype --src-type LOCAL " if sender.is_node else ""
    return f"{source}{where}{interface}-p {protocol} {match}-m {protocol} --dport {portal.port}"


def _guards(redirects: Redirects, family: int) -> Iterator[RuleLine]:
    yield RuleLine(
        f"-A {GUARD} -m conntrack --ctstate DNAT -j RETURN",
        "Packets whose destination was translated may pass: they came through a portal.",
    )
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    for protocol, answer in ((L4Protocol.TCP, "tcp-reset"), (L4Protocol.UDP, unreachable)):
        held = {port for portal, port in _all_ports(redirects) if portal.protocol is protocol and port != DROPPED}
        for part in _parts(sorted(held)):
            numbers = ",".join(map(str, part))
            yield RuleLine(
                f"-A {GUARD} -p {protocol.lower()} -m multiport --dports {numbers} -j REJECT --reject-with {answer}",
                f"Packets sent directly to the {protocol} port{'s' if len(part) > 1 else ''} "
                f"{', '.join(map(str, part))} are refused with {xtables_script.ANSWERS[answer]}.",
            )


def _no_loops(family: Family) -> Iterator[RuleLine]:
    if family == 4:
        yield RuleLine(f"-A {LOOPS} {NO_LOOP}", xtables_script.NO_LOOP_REASON)


def _parts(ports: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ports), _PORTS_A_MATCH):
        yield ports[start : start + _PORTS_A_MATCH]
