"""Input of iptables-restore: what a rule matches and does, and what is of no use. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from userspace_proxy.modes.reasons.lines import Line
from userspace_proxy.netfilter.xtables import OUT_BY_LO

# What a match or target takes, and under which name it is kept; a flag takes nothing.
_VALUES = {
    "-d": "destination",
    "-s": "source",
    "-i": "interface",
    "-o": "out interface",
    "-p": "protocol",
    "--comment": "comment",
    "--dport": "port",
    "--dports": "ports",
    "--mark": "mark",
    "--ctstate": "state",
    "--dst-type": "destination type",
    "--src-type": "source type",
    "--probability": "probability",
    "--mode": "mode",
    "--seconds": "seconds",
    "--name": "list",
    "--mask": "mask",
    "-j": "target",
    "--to-ports": "to",
    "--to-destination": "to",
    "--set-xmark": "set mark",
    "--reject-with": "answer",
}
_NEGATED = {"destination", "destination type", "source", "interface", "mark", "state"}
_FLAGS = {"--rcheck", "--reap", "--rsource", "--set", "--transparent", "--random-fully"}
_MATCHES = {"tcp", "udp", "comment", "mark", "conntrack", "addrtype", "statistic", "recent", "multiport", "socket"}
# In the order in which a packet meets them.
BUILT_IN = ("PREROUTING", "INPUT", "FORWARD", "OUTPUT", "POSTROUTING")


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule in its table and chain. ``words``: what it asks for and does; ``negated``: which of these with ``!``."""

    table: str
    chain: str
    words: dict[str, str]
    negated: frozenset[str] = frozenset()
    flags: frozenset[str] = frozenset()

    def get(self, word: str) -> str:
        """Return the value of *word*; "" where the rule has none, or negates it."""
        return "" if word in self.negated else self.words.get(word, "")

    @property
    def target(self) -> str:
        return self.words.get("target", "")

    @property
    def asks(self) -> set[str]:
        """What it asks for, other than by words that only say or do something."""
        return set(self.words) - {"comment", "target", "to", "set mark", "answer", "mode", "mask", "list"}


def parse_rule(table: str, line: str) -> Rule | None:
    """Return what *line* says; None where it has a word that is not known here, or is not a rule."""
    try:
        given = shlex.split(line)
    except ValueError:
        return None
    if len(given) < 2 or given[0] not in ("-A", "-I", "-D"):
        return None
    chain, rest = given[1], given[2:]
    if rest and rest[0].isdigit():
        rest = rest[1:]  # where it is inserted
    words: dict[str, str] = {}
    negated, flags = set[str](), set[str]()
    at, is_negated = 0, False
    while at < len(rest):
        word = rest[at]
        value = rest[at + 1] if at + 1 < len(rest) else None
        if word == "!":
            is_negated = True
            at += 1
            continue
        if word == "-m" and value in _MATCHES:
            at += 2
            continue
        if word in _FLAGS and not is_negated:
            flags.add(word)
            at += 1
            continue
        if word not in _VALUES or value is None or _VALUES[word] in words:
            return None
        words[_VALUES[word]] = value
        if is_negated:
            if _VALUES[word] not in _NEGATED:
                return None
            negated.add(_VALUES[word])
        is_negated = False
        at += 2
    return Rule(table, chain, words, frozenset(negated), frozenset(flags))


@dataclass(slots=True)
class Section:
    """A table of one family: its chains, then its rules, then COMMIT."""

    name: str
    chains: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Family:
    """What one tool reads; ``tool`` is the comment that says which."""

    tool: str
    sections: list[Section] = field(default_factory=list)

    def section(self, name: str) -> Section:
        return next((section for section in self.sections if section.name == name), Section(name))


def parse(text: str) -> list[Family]:
    families: list[Family] = []
    for line in text.splitlines():
        if line.startswith("#"):
            families.append(Family(line))
        elif line.startswith("*"):
            families[-1].sections.append(Section(line[1:]))
        elif line.startswith(":"):
            families[-1].sections[-1].chains.append(line)
        elif line.startswith("-"):
            families[-1].sections[-1].rules.append(line)
    return families


# Of which family, in which table (None: outside of any), and the line; returns what it does, and whose it is.
Explainer = Callable[[Family, Section | None, str], tuple[str, str]]


def write(families: Iterable[Family], explain: Explainer) -> Iterator[Line]:
    """Yield *families* as their tools read them, with what *explain* says of each line."""
    for family in families:
        yield Line(family.tool, *explain(family, None, family.tool))
        for section in family.sections:
            for line in (f"*{section.name}", *section.chains, *section.rules, "COMMIT"):
                yield Line(line, *explain(family, section, line))


def without_the_useless(families: Iterable[Family], is_kept: Callable[[str], bool]) -> list[Family]:
    """Return *families* without what no packet that is served is changed by: empty chains, and rules that lead there.

    What is left stands in the order in which packets meet it.
    *is_kept*: of chains that say something by being there. A family in which nothing is served goes.
    """
    left = []
    for family in families:
        sections = [_useful(section, is_kept) for section in family.sections]
        if any(_serves(rule) for section in sections for rule in section.rules):
            left.append(Family(family.tool, [section for section in sections if section.rules]))
    return left


def _useful(section: Section, is_kept: Callable[[str], bool]) -> Section:
    chains, rules = section.chains, [rule for rule in section.rules if f" {OUT_BY_LO} " not in rule]
    while True:
        filled = {rule.split()[1] for rule in rules}
        empty = {name for line in chains if (name := line[1:].split()[0]) not in filled}
        led_to = [rule for rule in rules if target(rule) not in empty]
        callers = {*(target(rule) for rule in led_to), *BUILT_IN}
        left = [rule for rule in led_to if rule.split()[1] in callers]
        if left == rules:
            break
        rules = left
    order = {name: number for number, name in enumerate(_called(rules))}
    used = [line for line in chains if (name := line[1:].split()[0]) not in empty or is_kept(name)]
    used.sort(key=lambda line: order.get(line[1:].split()[0], -1))
    return Section(section.name, used, sorted(rules, key=lambda rule: order[rule.split()[1]]))


def _called(rules: Sequence[str]) -> list[str]:
    """Return the chains in the order in which packets come to them; what is one chain's stays in its order."""
    calls: dict[str, list[str]] = {}
    for rule in rules:
        calls.setdefault(rule.split()[1], []).append(target(rule))
    found: dict[str, None] = dict.fromkeys(name for name in BUILT_IN if name in calls)
    left = list(reversed(found))
    while left:
        chain = left.pop()
        found.setdefault(chain)
        left += [to for to in reversed(calls[chain]) if to in calls and to not in found]
    return list(found)


def target(rule: str) -> str:
    return rule.rpartition(" -j ")[2].split()[0] if " -j " in rule else ""


def _serves(rule: str) -> bool:
    """Return whether *rule* is about a port of a Service."""
    return re.search(r"--dport \d+", rule) is not None
