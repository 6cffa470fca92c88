"""Maps rule handles, which trace messages contain, to the text of each rule on this host. Pure.

nft 1.0 omits parts of rules that iptables wrote. Their text is taken from iptables-save, which lists the same rules of
a chain in the same order.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

_TABLE = re.compile(r"table (\S+) (\S+) \{")
_CHAIN = re.compile(r"\tchain (\S+) \{")
_BASE = re.compile(r"\t\ttype (\S+) hook (\S+) (?:device \S+ )?priority ([^;]+); policy (\S+);")
_RULE = re.compile(r"\t\t(.*) # handle (\d+)$")
_APPENDED = re.compile(r"-A (\S+) .*")
_COUNTERS = re.compile(r"counter packets \d+ bytes \d+ ")


@dataclass(frozen=True, slots=True)
class ChainRules:
    """One chain: rule handle -> text, in order; a base chain also has its type, hook and priority."""

    family: str
    table: str
    name: str
    rules: Mapping[int, str]
    kind: str = ""
    hook: str = ""
    priority: str = ""


class Rulebook:
    """All chains of a host, from ``nft --handle --terse list ruleset`` and, by family, iptables-save."""

    def __init__(self, nft: str, saved: Mapping[str, str]) -> None:
        words = {family: _saved_rules(text) for family, text in saved.items()}
        self._chains = {
            (chain.family, chain.table, chain.name): _in_words(chain, words.get(chain.family, {}))
            for chain in _chains(nft)
        }

    def chain(self, family: str, table: str, name: str) -> ChainRules:
        """Return a chain; an unknown chain is empty."""
        return self._chains.get((family, table, name), ChainRules(family, table, name, {}))


def _chains(nft: str) -> list[ChainRules]:
    found: list[ChainRules] = []
    rules: dict[int, str] = {}
    family = table = ""
    for line in nft.splitlines():
        if begins := _TABLE.match(line):
            family, table = begins[1], begins[2]
        elif begins := _CHAIN.match(line):
            rules = {}
            found.append(ChainRules(family, table, begins[1], rules))
        elif base := _BASE.match(line):
            found[-1] = replace(found[-1], kind=base[1], hook=base[2], priority=base[3])
        elif found and (rule := _RULE.match(line)):
            rules[int(rule[2])] = " ".join(_COUNTERS.sub("", rule[1]).split())
    return found


def _saved_rules(text: str) -> dict[tuple[str, str], list[str]]:
    """Return the rules in the output of iptables-save, by table and chain."""
    found: dict[tuple[str, str], list[str]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif rule := _APPENDED.match(line):
            found.setdefault((table, rule[1]), []).append(rule[0])
    return found


def _in_words(chain: ChainRules, saved: Mapping[tuple[str, str], list[str]]) -> ChainRules:
    words = saved.get((chain.table, chain.name), [])
    if not words or len(words) != len(chain.rules):
        return chain
    return replace(chain, rules=dict(zip(chain.rules, words, strict=True)))
