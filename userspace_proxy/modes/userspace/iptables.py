"""Redirects as iptables-restore text, for nodes without nftables. Pure.

Chains of ours hold every rule; the built-in chains get one jump each. iptables matches rule by rule, so a
new connection costs more the more services there are: that is the language, not a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.interfaces import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture, Redirects
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.reasons.known import Known, host
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.userspace.nft import node_port_addresses, restricted
from userspace_proxy.modes.xtables_script import (
    ANSWERS,
    BUILT_IN,
    LOOPS_REASON,
    NO_LOOP_REASON,
    TOOLS,
    Section,
    XtablesScript,
    at_own_address,
    new_chain,
)
from userspace_proxy.netfilter.nft_text import pod_cidrs
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO

CHAIN = "USERSPACE-PROXY"
NODE_PORTS = "USERSPACE-PROXY-NODE-PORTS"
DROP = "USERSPACE-PROXY-DROP"
RANGES = "USERSPACE-PROXY-RANGES"
GUARD = "USERSPACE-PROXY-GUARD"
LOOPS = "USERSPACE-PROXY-LOOPS"

# The chains of each table. A NAT table may not drop, so what is dropped meets its end in mangle, before.
_CHAINS = {
    "mangle": {
        CHAIN: "What comes in by the network.",
        RANGES: "Portals that not everybody may dial (loadBalancerSourceRanges).",
        DROP: "New connections that are to be dropped.",
        NODE_PORTS: "Node ports: which of them are dropped, and for whom.",
    },
    "nat": {
        CHAIN: "Packets to Services. Asked rule by rule, so a connection costs more the more Services there are.",
        NODE_PORTS: "Packets to an address of this node: is it a node port?",
    },
    "filter": {GUARD: "Guards our proxy ports: they are reached by their portals only.", LOOPS: LOOPS_REASON},
}
_OURS = frozenset(name for chains in _CHAINS.values() for name in chains)
_FROM_OTHERS = f"-m mark ! --mark {OWN_MARK:#x}/{OWN_MARK:#x}"
_NOT_OWN = (
    ", but not for what our proxy itself sends: its sockets mark their packets, so a dial to an endpoint never comes "
    "back to us"
)
_NEW = "-m conntrack --ctstate NEW"
_NEW_ONLY = "; new connections only"
# Table -> built-in chain -> the jump to ours, as iptables-save prints it behind the chain's name, and when it is taken.
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
        "FORWARD": (f"{OUT_BY_LO} -j {LOOPS}", f"{LOOPS}, where they are to leave by lo"),
    },
}
_PORTS_A_MATCH = 15  # as many as -m multiport takes


def restore(redirects: Redirects, family: Family, saved: str) -> str:
    """Return the input for ``iptables-restore --noflush`` (4) or ``ip6tables-restore`` (6).

    *saved* is what iptables-save printed: a jump that is there already is not added again, one that is
    not the first of its chain is moved there.
    """
    return "".join(section.text() for section in _sections(redirects, family, saved))


def rules(redirects: Redirects) -> XtablesScript:
    """Return what is loaded for *redirects* where nothing is yet, for the tools of both families."""
    return XtablesScript([(tool, _sections(redirects, f, "")) for f, tool in zip(FAMILIES, TOOLS, strict=True)])


def _sections(redirects: Redirects, family: Family, saved: str) -> list[Section]:
    rules = {
        "mangle": (*_arriving(redirects), *_ranges(redirects, family), *_drops(redirects, family)),
        "nat": tuple(_redirects(redirects, family)),
        "filter": (*_guards(redirects, family), *_no_loops(family)),
    }
    return [
        Section(table, list(map(new_chain, chains, chains.values())), [*_missing_jumps(table, saved), *rules[table]])
        for table, chains in _CHAINS.items()
    ]


def removal(saved: str) -> str:
    """Return the input that removes every chain and jump of ours that *saved* shows; "" where there is none."""
    text = ""
    for table in _CHAINS:
        ours = [line for line in _section(saved, table) if is_ours(line)]
        if not ours:
            continue
        chains = [line.split()[0][1:] for line in ours if line.startswith(":")]
        jumps = [line.replace("-A ", "-D ", 1) for line in ours if line.split()[1] not in _OURS and line[0] == "-"]
        deleted = [f"-X {chain}" for chain in chains]
        text += "".join((f"*{table}\n", *_flushed(chains), *_lines((*jumps, *deleted)), "COMMIT\n"))
    return text


def is_ours(line: str) -> bool:
    """Return whether *line* of iptables-save is a chain, rule or jump of ours; a comment that names us is not."""
    words = line.split()
    if line.startswith(":"):
        return words[0][1:] in _OURS
    return words[:1] == ["-A"] and (words[1] in _OURS or (words[-1] in _OURS and words[-2] in ("-j", "-g")))


def ours(saved: str) -> tuple[str, ...]:
    """Return our rules and jumps in *saved*, without counters: equal before and after means intact."""
    return tuple(line for line in saved.splitlines() if line.startswith("-A") and is_ours(line))


def rules_in(script: str) -> int:
    """Return how many lines `ours` has to find once *script* (made by `restore`) is loaded."""
    jumps = sum(len(chains) for chains in _JUMPS.values())
    return jumps + sum(line.startswith("-A ") and line.split()[1] in _OURS for line in script.splitlines())


def _section(saved: str, table: str) -> Iterator[str]:
    inside = False
    for line in saved.splitlines():
        if line.startswith("*"):
            inside = line == f"*{table}"
        elif inside:
            yield line


def _missing_jumps(table: str, saved: str) -> Iterator[RuleLine]:
    lines = list(_section(saved, table))
    for chain, (jump, where) in _JUMPS[table].items():
        rules = [line for line in lines if line.startswith(f"-A {chain} ")]
        wanted = f"-A {chain} {jump}"
        if rules[:1] == [wanted]:
            continue
        yield from (RuleLine(f"-D {chain} {jump}") for line in rules if line == wanted)
        yield RuleLine(f"-I {chain} 1 {jump}", f"{BUILT_IN[chain]}: first of all (-I ... 1) on to {where}.")


def _redirects(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield the rules of the NAT table."""
    address = ""
    if redirects.capture is Capture.ADDRESS:
        address = LOCAL_ADDRESS4 if family == 4 else f"[{LOCAL_ADDRESS6}]"

    def rules(portal: Portal) -> Iterator[tuple[str, Reason]]:
        name = redirects.names.get(portal)
        said = f' -m comment --comment "{name}"' if name else ""
        for who, port in _ports(redirects, portal):
            if port == DROPPED:
                continue
            verdict = f"-j DNAT --to-destination {address}:{port}" if address else f"-j REDIRECT --to-ports {port}"
            is_refused = port == redirects.refuse_port
            yield f"{_match(portal, who)}{said} {verdict}", partial(_led, portal, who, port, address, is_refused)

    yield from _by_portal(redirects, family, CHAIN, rules)


def _led(portal: Portal, who: _Who, port: int, address: str, is_refused: bool, known: Known) -> str:
    there = f"{address}, an address of ours on lo, at " if address else ""
    led = f"{_packets(portal, who, known)} are led to {there}"
    if is_refused:
        return f"{led}port {port}, at which nobody listens: no endpoint is there, and the kernel refuses at once."
    return f"{led}our proxy port {port}."


def _packets(portal: Portal, who: _Who, known: Known) -> str:
    return f"Packets to {known.portal_words(portal)}{who.words}"


def _arriving(redirects: Redirects) -> Iterator[RuleLine]:
    yield RuleLine(f"-A {CHAIN} {_NEW} -j {DROP}", "Packets of a new connection: see whether they are to be dropped.")
    if redirects.transparent:
        # An answer to a client's own address; see transparent_replies.py.
        yield RuleLine(
            f"-A {CHAIN} -m socket --transparent -j MARK --set-xmark {TRANSPARENT_MARK:#x}/{TRANSPARENT_MARK:#x}",
            "An answer to a client whose address a socket of ours speaks with: marked, by which routing brings it to "
            "this node instead of to the client.",
        )


def _drops(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    """Yield what ends packets to portals that are dropped, be it for some senders only."""
    levels = (redirects.ports, *redirects.exceptions.values())
    dropped = {portal for level in levels for portal, port in level.items() if port == DROPPED}
    at_node_ports = {(portal.protocol, portal.port) for portal in dropped if portal.is_node_port}

    def rules(portal: Portal) -> Iterator[tuple[str, Reason]]:
        # A service's own address may be this node's: its port is not the node port of the same number.
        if portal in dropped or (portal.protocol, portal.port) in at_node_ports:
            for who, port in _ports(redirects, portal):
                is_dropped = port == DROPPED
                verdict = "DROP" if is_dropped else "RETURN"
                yield f"{_match(portal, who)} -j {verdict}", partial(_judged, portal, who, is_dropped, "")

    yield RuleLine(f"-A {DROP} -j {RANGES}", "First: may the sender dial this portal at all?")
    yield from _by_portal(redirects, family, DROP, rules)


def _judged(portal: Portal, who: _Who, is_dropped: bool, why: str, known: Known) -> str:
    packets = _packets(portal, who, known)
    if is_dropped:
        return f"{packets} are dropped, without an answer.{why}"
    return f"{packets} are not dropped: back to where this chain was called."


def _ranges(redirects: Redirects, family: Family) -> Iterator[RuleLine]:
    why = " All who may dial it have left this chain by the rules above."
    for portal, networks in restricted(redirects, family):
        name = redirects.names.get(portal)
        for who in (*(_Who(source=network) for network in networks), _Who()):
            is_dropped = not who.source
            rule = f"-A {RANGES} {_match(portal, who)} -j {'DROP' if is_dropped else 'RETURN'}"
            yield RuleLine(rule, partial(_judged, portal, who, is_dropped, why), name)


class _Who(NamedTuple):
    """What tells a sender: its network, the interface that it comes in by, or that it is this node itself."""

    source: str = ""
    interface: str = ""
    is_node: bool = False

    @property
    def words(self) -> str:
        if self.source:
            return f" from {host(self.source)}"
        if self.interface:
            return f" that come in by {self.interface}"
        return " from this node itself" if self.is_node else ""


def _by_portal(
    redirects: Redirects,
    family: Family,
    name: str,
    rules: Callable[[Portal], Iterator[tuple[str, Reason]]],
) -> Iterator[RuleLine]:
    """Yield the *rules* of each portal for the chain *name*; those of node ports stand in one that it ends with."""
    levels = (redirects.ports, *redirects.exceptions.values())
    portals = [portal for portal in dict.fromkeys(itertools.chain(*levels)) if portal.family == family]

    def lines(chain: str, *, at_node_ports: bool) -> Iterator[RuleLine]:
        for portal in portals:
            if portal.is_node_port is at_node_ports:
                owner = redirects.names.get(portal)
                yield from (RuleLine(f"-A {chain} {rule}", reason, owner) for rule, reason in rules(portal))

    yield from lines(name, at_node_ports=False)
    for network in node_port_addresses(redirects, family) or ("",):
        yield RuleLine(
            f"-A {name} {f'-d {network} ' if network else ''}-m addrtype --dst-type LOCAL -j {NODE_PORTS}",
            f"{at_own_address(network)}: see whether it is a node port. Behind the Services' own addresses.",
        )
    yield from lines(NODE_PORTS, at_node_ports=True)


def _ports(redirects: Redirects, portal: Portal) -> Iterator[tuple[_Who, int]]:
    """Yield where each sender's packets to *portal* go; the first that matches counts."""
    exceptions = redirects.exceptions
    if (port := exceptions.get(Sender.NODE, {}).get(portal)) is not None:
        yield _Who(is_node=True), port
    pods = redirects.pods
    if pods is not None and (port := exceptions.get(Sender.POD, {}).get(portal)) is not None:
        if pods.interface:
            yield _Who(interface=pods.interface.replace("*", "+")), port
        for cidr in pod_cidrs(pods, portal.family):
            yield _Who(source=cidr), port
    if (port := redirects.ports.get(portal)) is not None:
        yield _ANYBODY, port


_ANYBODY = _Who()


def _match(portal: Portal, who: _Who) -> str:
    """Return what matches packets of *who* to *portal*, in the order in which iptables-save prints it."""
    protocol = portal.protocol.lower()
    source = f"-s {who.source} " if who.source else ""
    where = "" if portal.is_node_port else f"-d {portal.ip}/{32 if portal.family == 4 else 128} "
    interface = f"-i {who.interface} " if who.interface else ""
    match = "-m addrtype --src-type LOCAL " if who.is_node else ""
    return f"{source}{where}{interface}-p {protocol} {match}-m {protocol} --dport {portal.port}"


def _guards(redirects: Redirects, family: int) -> Iterator[RuleLine]:
    yield RuleLine(
        f"-A {GUARD} -m conntrack --ctstate DNAT -j RETURN",
        "Packets whose destination was translated may pass: they did not dial a proxy port directly.",
    )
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    for protocol, answer in ((L4Protocol.TCP, "tcp-reset"), (L4Protocol.UDP, unreachable)):
        levels = (redirects.ports, *redirects.exceptions.values())
        held = {port for level in levels for portal, port in level.items() if portal.protocol is protocol}
        ports = sorted(held - {DROPPED})
        for part in _parts(ports):
            numbers = ",".join(map(str, part))
            yield RuleLine(
                f"-A {GUARD} -p {protocol.lower()} -m multiport --dports {numbers} -j REJECT --reject-with {answer}",
                f"Packets to the {protocol} port{'s' if len(part) > 1 else ''} {', '.join(map(str, part))}, which "
                f"nobody dials by a portal, are refused with {ANSWERS[answer]}.",
            )


def _no_loops(family: Family) -> Iterator[RuleLine]:
    if family == 4:
        yield RuleLine(f"-A {LOOPS} {NO_LOOP}", NO_LOOP_REASON)


def _parts(ports: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ports), _PORTS_A_MATCH):
        yield ports[start : start + _PORTS_A_MATCH]


def _lines(rules: Iterable[str]) -> Iterator[str]:
    return (f"{rule}\n" for rule in rules)


def _flushed(chains: Iterable[str]) -> Iterator[str]:
    return _lines(f":{chain} - [0:0]" for chain in chains)
