"""Redirects as iptables-restore text, for nodes without nftables. Pure.

Chains of ours hold every rule; the built-in chains get one jump each. iptables matches rule by rule, so a
new connection costs more the more services there are: that is the language, not a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from userspace_proxy.host.network import LOCAL_ADDRESS4, LOCAL_ADDRESS6
from userspace_proxy.interfaces import DROPPED, OWN_MARK, TRANSPARENT_MARK, Capture, Redirects
from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.userspace.nft import node_port_addresses, restricted
from userspace_proxy.netfilter.nft_text import pod_cidrs
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO

CHAIN = "USERSPACE-PROXY"
NODE_PORTS = "USERSPACE-PROXY-NODE-PORTS"
DROP = "USERSPACE-PROXY-DROP"
RANGES = "USERSPACE-PROXY-RANGES"
GUARD = "USERSPACE-PROXY-GUARD"
LOOPS = "USERSPACE-PROXY-LOOPS"

# The chains of each table. A NAT table may not drop, so what is dropped meets its end in mangle, before.
_CHAINS = {"mangle": (CHAIN, RANGES, DROP, NODE_PORTS), "nat": (CHAIN, NODE_PORTS), "filter": (GUARD, LOOPS)}
_OURS = frozenset(chain for chains in _CHAINS.values() for chain in chains)
_FROM_OTHERS = f"-m mark ! --mark {OWN_MARK:#x}/{OWN_MARK:#x}"
_NEW = "-m conntrack --ctstate NEW"
# Table -> built-in chain -> the jump to ours, as iptables-save prints it behind the chain's name.
_JUMPS = {
    "mangle": {
        "PREROUTING": f"-j {CHAIN}",
        "OUTPUT": f"{_FROM_OTHERS} {_NEW} -j {DROP}",
    },
    "nat": {
        "PREROUTING": f"-j {CHAIN}",
        "OUTPUT": f"{_FROM_OTHERS} -j {CHAIN}",
    },
    "filter": {
        "INPUT": f"{_NEW} -j {GUARD}",
        "FORWARD": f"{OUT_BY_LO} -j {LOOPS}",
    },
}
_PORTS_A_MATCH = 15  # as many as -m multiport takes


def restore(redirects: Redirects, family: Family, saved: str) -> str:
    """Return the input for ``iptables-restore --noflush`` (4) or ``ip6tables-restore`` (6).

    *saved* is what iptables-save printed: a jump that is there already is not added again, one that is
    not the first of its chain is moved there.
    """
    rules = {
        "mangle": (*_arriving(redirects), *_ranges(redirects, family), *_drops(redirects, family)),
        "nat": tuple(_redirects(redirects, family)),
        "filter": (*_guards(redirects, family), *_no_loops(family)),
    }
    return "".join(
        "".join((f"*{table}\n", *_flushed(chains), *_lines((*_missing_jumps(table, saved), *rules[table])), "COMMIT\n"))
        for table, chains in _CHAINS.items()
    )


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


def _missing_jumps(table: str, saved: str) -> Iterator[str]:
    lines = list(_section(saved, table))
    for chain, jump in _JUMPS[table].items():
        rules = [line for line in lines if line.startswith(f"-A {chain} ")]
        wanted = f"-A {chain} {jump}"
        if rules[:1] == [wanted]:
            continue
        yield from (f"-D {chain} {jump}" for line in rules if line == wanted)
        yield f"-I {chain} 1 {jump}"


def _redirects(redirects: Redirects, family: Family) -> Iterator[str]:
    """Yield the rules of the NAT table."""

    def rules(portal: Portal) -> Iterator[str]:
        name = redirects.names.get(portal)
        said = f' -m comment --comment "{name}"' if name else ""
        for who, port in _ports(redirects, portal):
            if port == DROPPED:
                continue
            verdict = f"-j REDIRECT --to-ports {port}"
            if redirects.capture is Capture.ADDRESS:
                address = LOCAL_ADDRESS4 if family == 4 else f"[{LOCAL_ADDRESS6}]"
                verdict = f"-j DNAT --to-destination {address}:{port}"
            yield f"{_match(portal, who)}{said} {verdict}"

    yield from _by_portal(redirects, family, CHAIN, rules)


def _arriving(redirects: Redirects) -> Iterator[str]:
    yield f"-A {CHAIN} {_NEW} -j {DROP}"
    if redirects.transparent:
        # An answer to a client's own address; see answers.py.
        yield f"-A {CHAIN} -m socket --transparent -j MARK --set-xmark {TRANSPARENT_MARK:#x}/{TRANSPARENT_MARK:#x}"


def _drops(redirects: Redirects, family: Family) -> Iterator[str]:
    """Yield what ends packets to portals that are dropped, be it for some senders only."""
    levels = (redirects.ports, *redirects.exceptions.values())
    dropped = {portal for level in levels for portal, port in level.items() if port == DROPPED}
    at_node_ports = {(portal.protocol, portal.port) for portal in dropped if portal.is_node_port}

    def rules(portal: Portal) -> Iterator[str]:
        # A service's own address may be this node's: its port is not the node port of the same number.
        if portal in dropped or (portal.protocol, portal.port) in at_node_ports:
            for who, port in _ports(redirects, portal):
                yield f"{_match(portal, who)} -j {'DROP' if port == DROPPED else 'RETURN'}"

    yield f"-A {DROP} -j {RANGES}"
    yield from _by_portal(redirects, family, DROP, rules)


def _ranges(redirects: Redirects, family: Family) -> Iterator[str]:
    for portal, networks in restricted(redirects, family):
        for network in networks:
            yield f"-A {RANGES} {_match(portal, _Who(source=f'-s {network} '))} -j RETURN"
        yield f"-A {RANGES} {_match(portal, _Who())} -j DROP"


class _Who(NamedTuple):
    """What matches a sender, in the order in which iptables-save prints it."""

    source: str = ""
    interface: str = ""
    match: str = ""


def _by_portal(
    redirects: Redirects, family: Family, name: str, rules: Callable[[Portal], Iterator[str]]
) -> Iterator[str]:
    """Yield the *rules* of each portal for the chain *name*; those of node ports stand in one that it ends with."""
    levels = (redirects.ports, *redirects.exceptions.values())
    portals = [portal for portal in dict.fromkeys(itertools.chain(*levels)) if portal.family == family]
    yield from (f"-A {name} {rule}" for portal in portals if not portal.is_node_port for rule in rules(portal))
    for network in node_port_addresses(redirects, family) or ("",):
        where = f"-d {network} " if network else ""
        yield f"-A {name} {where}-m addrtype --dst-type LOCAL -j {NODE_PORTS}"
    yield from (f"-A {NODE_PORTS} {rule}" for portal in portals if portal.is_node_port for rule in rules(portal))


def _ports(redirects: Redirects, portal: Portal) -> Iterator[tuple[_Who, int]]:
    """Yield where each sender's packets to *portal* go; the first that matches counts."""
    exceptions = redirects.exceptions
    if (port := exceptions.get(Sender.NODE, {}).get(portal)) is not None:
        yield _Who(match="-m addrtype --src-type LOCAL "), port
    pods = redirects.pods
    if pods is not None and (port := exceptions.get(Sender.POD, {}).get(portal)) is not None:
        if pods.interface:
            yield _Who(interface=f"-i {pods.interface.replace('*', '+')} "), port
        for cidr in pod_cidrs(pods, portal.family):
            yield _Who(source=f"-s {cidr} "), port
    if (port := redirects.ports.get(portal)) is not None:
        yield _Who(), port


def _match(portal: Portal, who: _Who) -> str:
    protocol = portal.protocol.lower()
    where = "" if portal.is_node_port else f"-d {portal.ip}/{32 if portal.family == 4 else 128} "
    return f"{who.source}{where}{who.interface}-p {protocol} {who.match}-m {protocol} --dport {portal.port}"


def _guards(redirects: Redirects, family: int) -> Iterator[str]:
    yield f"-A {GUARD} -m conntrack --ctstate DNAT -j RETURN"
    unreachable = "icmp-port-unreachable" if family == 4 else "icmp6-port-unreachable"
    for protocol, answer in ((L4Protocol.TCP, "tcp-reset"), (L4Protocol.UDP, unreachable)):
        levels = (redirects.ports, *redirects.exceptions.values())
        held = {port for level in levels for portal, port in level.items() if portal.protocol is protocol}
        ports = sorted(held - {DROPPED})
        for part in _parts(ports):
            numbers = ",".join(map(str, part))
            name = protocol.lower()
            yield f"-A {GUARD} -p {name} -m multiport --dports {numbers} -j REJECT --reject-with {answer}"


def _no_loops(family: Family) -> Iterator[str]:
    if family == 4:
        yield f"-A {LOOPS} {NO_LOOP}"


def _parts(ports: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(ports), _PORTS_A_MATCH):
        yield ports[start : start + _PORTS_A_MATCH]


def _lines(rules: Iterable[str]) -> Iterator[str]:
    return (f"{rule}\n" for rule in rules)


def _flushed(chains: Iterable[str]) -> Iterator[str]:
    return _lines(f":{chain} - [0:0]" for chain in chains)
