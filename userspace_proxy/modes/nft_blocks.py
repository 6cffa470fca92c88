"""A table of nftables as blocks: sets, maps and chains with their elements and rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from userspace_proxy.interfaces import PodDetector
from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.routes import Sender
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.netfilter.nft_text import FORWARD_HOOK, pod_cidrs
from userspace_proxy.netfilter.nft_text import NO_LOOP as _NO_LOOP

_FAMILY = re.compile(r"[a-z]([46])(?:_|$)")
_LOOKUPS = re.compile(r"(?<!!= )@(\w+)")
_NAMES = re.compile(r"@(\w+)")  # an empty set still matters where a rule looks it up with `!=`
_JUMPS, _GOTOS = re.compile(r"jump (\w+)"), re.compile(r"goto (\w+)")
_CALLS = re.compile(r"(?:jump|goto) (\w+)")
_FOR_FAMILY = re.compile(r"nfproto ipv([46])")
_EFFECT = re.compile(
    r"\b(?:drop|accept|reject|dnat|redirect|masquerade|jump|goto|return|update|notrack|(?:meta|ct) mark set"
    r"|priority set none)\b"
)

IsDead = Callable[[RuleLine], bool]


class Block(NamedTuple):
    """A set, map or chain. ``head`` declares it; ``items`` are its elements or rules."""

    kind: str
    name: str
    reason: Reason = ""
    head: tuple[RuleLine, ...] = ()
    items: Sequence[RuleLine] = ()

    @property
    def is_chain(self) -> bool:
        return self.kind == "chain"

    @property
    def family(self) -> str:
        """4 or 6; "" for a block of both families."""
        match = _FAMILY.search(self.name)
        return match[1] if match else ""

    def lines(self) -> Iterator[RuleLine]:
        """Yield the block as nft reads it inside a table."""
        yield RuleLine(f"\t{self.kind} {self.name} {{", self.reason)
        for line in self.head:
            yield line.indented("\t\t")
        if self.is_chain:
            for line in self.items:
                yield line.indented("\t\t")
        elif self.items:
            yield RuleLine("\t\telements = {")
            for line in self.items[:-1]:
                yield line.indented("\t\t\t", ",")
            yield self.items[-1].indented("\t\t\t", " }")
        yield RuleLine("\t}")

    def text(self) -> str:
        """Return what `lines` yields as one text; a loader needs no reasons."""
        separator = "\n\t\t" if self.is_chain else ",\n\t\t\t"
        items = separator.join(line.text for line in self.items)
        if items:
            items = f"\t\t{items}\n" if self.is_chain else f"\t\telements = {{\n\t\t\t{items} }}\n"
        head = "".join(f"\t\t{line.text}\n" for line in self.head)
        return f"\t{self.kind} {self.name} {{\n{head}{items}\t}}\n"


class NftTable(NamedTuple):
    """A whole table. ``before``: its lines up to its bracket. ``is_dead``: whether no packet can match a rule."""

    before: tuple[RuleLine, ...]
    blocks: Sequence[Block]
    is_dead: IsDead = lambda _: False

    def text(self) -> str:
        return "".join((*(f"{line.text}\n" for line in self.before), *(block.text() for block in self.blocks), "}\n"))

    def lines(self) -> Iterator[RuleLine]:
        yield from self.before
        for block in self.blocks:
            yield from block.lines()
        yield RuleLine("}")

    def without_unused(self) -> NftTable:
        """Return the table without empty sets, rules that look them up, and chains without rules."""
        blocks = [_without(block, lambda rule: rule == NO_LOOP or self.is_dead(rule)) for block in self.blocks]
        while True:
            left = list(_used(blocks))
            if left == blocks:
                return self._replace(blocks=_in_order(blocks))
            blocks = left


def _used(blocks: list[Block]) -> Iterator[Block]:
    """Yield the blocks that are not plainly unused. Their removal may make others unused."""
    rules = [line.text for block in blocks if block.is_chain for line in block.items]
    sets = [block for block in blocks if not block.is_chain]
    empty = {block.name for block in sets if _is_empty(block, rules)}
    # A packet that goes to a chain without rules is done: that is an effect. After a jump it comes back.
    used = {block.name for block in blocks if block.is_chain and any(_EFFECT.search(rule.text) for rule in block.items)}
    used |= {name for rule in rules for name in _GOTOS.findall(rule)}
    used &= {block.name for block in blocks if block.is_chain and block.head} | set(_CALLS.findall("\n".join(rules)))
    families = "".join({block.family for block in sets if block.items})

    def is_dead(rule: str) -> bool:
        return (
            any(name in empty for name in _LOOKUPS.findall(rule))
            or any(name not in used for name in _JUMPS.findall(rule))
            or any(family not in families for family in _FOR_FAMILY.findall(rule))
        )

    named = set(_NAMES.findall("\n".join(rule for rule in rules if not is_dead(rule))))
    for block in blocks:
        is_useful = block.name in used if block.is_chain else block.name not in empty or block.name in named
        if is_useful and block.family in families:  # "", which is for both, is in any
            yield _without(block, lambda rule: is_dead(rule.text))


def _in_order(blocks: list[Block]) -> list[Block]:
    """Return *blocks*, chains behind all else and in the order in which packets come to them."""
    chains = {block.name: block for block in blocks if block.is_chain and not block.head}
    found: dict[str, None] = {}
    left = [block for block in reversed(blocks) if block.is_chain and block.head]
    ordered = [block for block in blocks if not block.is_chain]
    while left:
        block = left.pop()
        if block.name not in found or block.head:
            ordered.append(block)
        found.setdefault(block.name)
        called = [chains[name] for line in block.items for name in _CALLS.findall(line.text)]
        left += [each for each in reversed(called) if each.name not in found]
    return ordered


def _is_empty(block: Block, rules: Iterable[str]) -> bool:
    """Return whether a set has no element, and no rule that adds one."""
    return not block.items and not any(f"update @{block.name} " in rule for rule in rules)


def _without(block: Block, is_dead: IsDead) -> Block:
    if not block.is_chain:
        return block
    return block._replace(items=[line for line in block.items if not is_dead(line)])


# ---- what the tables of several modes have in common

# Whose packets are meant, by Sender.
SENT = {Sender.NODE: " sent by this node itself", Sender.POD: " sent by pods", Sender.ANYBODY: ""}
CHAIN_REASONS = {
    "prerouting": "PREROUTING: what comes in by the network (from other hosts, and from this node's pods).",
    "output": "OUTPUT: what processes of this node itself send; this never passes PREROUTING.",
    "input": "INPUT: what is for this node itself.",
    "forward": "FORWARD: what passes through this node.",
    "node_ports": "Packets to an address of this node: is it a node port?",
}
TABLE_REASON = (
    "Our table, for IPv4 and IPv6 (inet). All that is ours stands in it; other tables of the node are left alone."
)
RESTRICTED_REASON = "Portals that not everybody may dial (loadBalancerSourceRanges)."
FORWARD_TYPE = RuleLine(FORWARD_HOOK, "Called for every packet that passes through.")
NO_LOOP = RuleLine(
    _NO_LOOP,
    "A packet to a cluster IP that nobody serves, about to leave by lo, where a node without a default route sends it: "
    "it would come in again, round after round, until its TTL is used up. Its sender is told that nobody is there.",
)


def from_pods(pods: PodDetector | None, family: Family) -> tuple[str, str]:
    """Return what matches packets of pods, and that in words; twice "" where pods cannot be told from others."""
    if pods is None:
        return "", ""
    if pods.interface:
        return f'iifname "{pods.interface}" ', f'that come in by "{pods.interface}" (pods)'
    if not (cidrs := ", ".join(pod_cidrs(pods, family))):
        return "", ""
    return f"{'ip' if family == 4 else 'ip6'} saddr {{ {cidrs} }} ", f"sent from {cidrs} (pods)"
