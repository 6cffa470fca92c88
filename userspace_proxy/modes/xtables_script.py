"""Input of iptables-restore as tables with chains and rules, and the reasons that several modes use. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.portal_names import host
from userspace_proxy.modes.rule_line import Reason, RuleLine, Rules
from userspace_proxy.netfilter.xtables import OUT_BY_LO

_Item = TypeVar("_Item")

TOOLS = ("# iptables-restore --noflush", "# ip6tables-restore --noflush")
_TABLES = {
    "mangle": "The table mangle, before NAT: packets are dropped here, because iptables forbids that in NAT.",
    "nat": "The table nat: rules see the first packet of a connection; conntrack treats all later ones the same.",
    "filter": "The table filter: which packets may pass.",
}
_MAKES = " (A line with a colon creates a chain, or empties it.)"
_COMMIT = RuleLine("COMMIT", "The end of this table: the kernel applies all of it at once, or nothing.")

# In the order in which a packet passes them.
BUILT_IN = {
    "PREROUTING": "PREROUTING (packets from the network, before routing)",
    "INPUT": "INPUT (packets to this node itself)",
    "FORWARD": "FORWARD (packets that pass through this node)",
    "OUTPUT": "OUTPUT (packets that processes of this node send)",
    "POSTROUTING": "POSTROUTING (packets about to leave, after routing)",
}
ANSWERS = {
    "tcp-reset": "a TCP reset: `connection refused`",
    "icmp-port-unreachable": "ICMP port unreachable: `connection refused`",
    "icmp6-port-unreachable": "ICMPv6 port unreachable",
}
LOOPS_REASON = (
    "Unserved packets to cluster IPs that would leave by lo, where a node without a default route sends them."
)
NO_LOOP_REASON = "They would come in again until their TTL ends. Reject with ICMP host unreachable: `no route to host`."


class ChainKey(NamedTuple):
    """A chain in its table."""

    table: str
    name: str


Saved = Mapping[ChainKey, tuple[str, ...]]
"""The output of iptables-save: the rules of every chain, without ``-A CHAIN``."""


def read(saved: str) -> Saved:
    """Return the chains and rules in the output of iptables-save."""
    table = ""
    chains: dict[ChainKey, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chains[ChainKey(table, line[1:].split(" ", 1)[0])] = []
        elif line.startswith("-A "):
            _, name, *rule = line.split(" ", 2)
            chains.setdefault(ChainKey(table, name), []).append(rule[0] if rule else "")
    return {chain: tuple(rules) for chain, rules in chains.items()}


def called_chain(rule: str) -> str:
    """Return the chain to which *rule* jumps, or its other target. Comments do not count."""
    words = rule.split()
    return words[-1] if words[-2:-1] in (["-j"], ["-g"]) else ""


def block(table: str, lines: Sequence[str]) -> str:
    """Return *lines* as one transaction; "" if there are none."""
    return "".join(f"{line}\n" for line in (f"*{table}", *lines, "COMMIT")) if lines else ""


def parts(items: Sequence[_Item], size: int) -> Iterator[Sequence[_Item]]:
    """Yield *items* in parts of at most *size*."""
    return (items[start : start + size] for start in range(0, len(items), size))


def flushed(chains: Iterable[ChainKey]) -> Iterator[str]:
    """Yield the lines that create *chains*, or empty them."""
    return (f":{chain.name} - [0:0]" for chain in chains)


def new_chain(name: str, reason: Reason = "", service: ServicePortName | None = None) -> RuleLine:
    """Return the line that creates the chain *name*, or empties it."""
    return RuleLine(f":{name} - [0:0]", reason, service)


class Section(NamedTuple):
    """A table of one family: its chains, then its rules, then COMMIT."""

    table: str
    chains: Sequence[RuleLine]
    rules: Sequence[RuleLine]

    def lines(self) -> Iterator[RuleLine]:
        yield RuleLine(f"*{self.table}", _TABLES[self.table])
        for number, line in enumerate(self.chains):
            yield line if number else line._replace(reason=_and_makes(line.reason))
        yield from self.rules
        yield _COMMIT


def _and_makes(reason: Reason) -> Reason:
    if isinstance(reason, str):
        return f"{reason}{_MAKES if reason else ''}"
    return lambda names: f"{reason(names)}{_MAKES}"


@dataclass(frozen=True, slots=True)
class XtablesScript(Rules):
    """Input for iptables-restore and ip6tables-restore.

    ``is_dead``: whether a rule can match no packet. ``is_kept``: whether a chain without rules is needed.
    """

    families: Sequence[tuple[str, Sequence[Section]]]  # the comment that names the tool, and its input
    is_dead: Callable[[RuleLine], bool] = lambda _: False
    is_kept: Callable[[str], bool] = lambda _: False

    def lines(self) -> Iterator[RuleLine]:
        for tool, sections in self.families:
            yield RuleLine(tool, f"IPv{6 if '6' in tool else 4}. --noflush: other rules in these tables stay.")
            for section in sections:
                yield from section.lines()

    def without_unused(self) -> XtablesScript:
        """Return the script without empty chains and rules that jump there, and without families that serve nothing.

        The rest is in the order in which packets reach it.
        """
        left = []
        for tool, given in self.families:
            sections = [self._used(section) for section in given]
            if any(_serves(rule.text) for section in sections for rule in section.rules):
                left.append((tool, [section for section in sections if section.rules]))
        return replace(self, families=left)

    def _used(self, section: Section) -> Section:
        rules = [rule for rule in section.rules if f" {OUT_BY_LO} " not in rule.text and not self.is_dead(rule)]
        names = {line.text[1:].split()[0]: line for line in section.chains}
        while True:
            empty = names.keys() - {_chain_of(rule) for rule in rules}
            led_to = [rule for rule in rules if _target(rule) not in empty]
            callers = {*map(_target, led_to), *BUILT_IN}
            left = [rule for rule in led_to if _chain_of(rule) in callers]
            if left == rules:
                break
            rules = left
        order = {name: number for number, name in enumerate(_called(rules))}
        used = [name for name in names if name not in empty or self.is_kept(name)]
        used.sort(key=lambda name: order.get(name, -1))
        rules.sort(key=lambda rule: order[_chain_of(rule)])
        return Section(section.table, [names[name] for name in used], rules)


def _called(rules: Sequence[RuleLine]) -> list[str]:
    """Return the chains in the order in which packets reach them."""
    calls: dict[str, list[str]] = {}
    for rule in rules:
        calls.setdefault(_chain_of(rule), []).append(_target(rule))
    found: dict[str, None] = dict.fromkeys(name for name in BUILT_IN if name in calls)
    left = list(reversed(found))
    while left:
        name = left.pop()
        found.setdefault(name)
        left += [to for to in reversed(calls[name]) if to in calls and to not in found]
    return list(found)


def _chain_of(rule: RuleLine) -> str:
    return rule.text.split(maxsplit=2)[1]


def _target(rule: RuleLine) -> str:
    return rule.text.rpartition(" -j ")[2].split()[0] if " -j " in rule.text else ""


def _serves(rule: str) -> bool:
    """Return whether *rule* is about a port of a Service."""
    return re.search(r"--dport \d+", rule) is not None


# ---- words


def at_own_address(network: str = "") -> str:
    """Return "Packets to an address of this node", or to those in *network*."""
    return f"Packets to an address of this node{f' in {host(network)}' if network else ''}"
