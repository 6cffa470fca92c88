"""An nftables table as blocks: sets, maps and chains with their elements and rules. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.routes import Sender
from userspace_proxy.modes.rule_line import Reason, RuleLine, Rules
from userspace_proxy.netfilter import nft_text
from userspace_proxy.netfilter.sets import SetKind

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
        """Yield the lines of the block, as nft reads them inside a table."""
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


@dataclass(frozen=True, slots=True)
class NftTable(Rules):
    """A whole table. ``before``: its lines up to the bracket. ``is_dead``: whether a rule can match no packet."""

    before: tuple[RuleLine, ...]
    blocks: Sequence[Block]
    is_dead: IsDead = lambda _: False

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
                return replace(self, blocks=_in_order(blocks))
            blocks = left


def _used(blocks: list[Block]) -> Iterator[Block]:
    """Yield the blocks that are not obviously unused. Without the others, more blocks may be unused."""
    chains, sets = [b for b in blocks if b.is_chain], [b for b in blocks if not b.is_chain]
    rules = [line.text for block in chains for line in block.items]
    empty = {block.name for block in sets if _is_empty(block, rules)}
    used = _used_chains(chains, rules)
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
        if is_useful and block.family in families:  # "", for both families, is in any string
            yield _without(block, lambda rule: is_dead(rule.text))


def _used_chains(chains: Sequence[Block], rules: Sequence[str]) -> set[str]:
    """Return the chains that have an effect and are called, by the kernel or by a rule.

    A goto to an empty chain has an effect, because the packet does not come back from there.
    """
    effective = {chain.name for chain in chains if any(_EFFECT.search(rule.text) for rule in chain.items)}
    effective |= {name for rule in rules for name in _GOTOS.findall(rule)}
    return effective & ({chain.name for chain in chains if chain.head} | set(_CALLS.findall("\n".join(rules))))


def _in_order(blocks: list[Block]) -> list[Block]:
    """Return *blocks* with the chains last, in the order in which packets reach them."""
    chains = {block.name: block for block in blocks if block.is_chain and not block.head}
    found: dict[str, Block] = {}
    left = [block for block in reversed(blocks) if block.is_chain and block.head]
    while left:
        block = left.pop()
        found.setdefault(block.name, block)
        called = [chains[name] for line in block.items for name in _CALLS.findall(line.text)]
        left += [each for each in reversed(called) if each.name not in found]
    return [*(block for block in blocks if not block.is_chain), *found.values()]


def _is_empty(block: Block, rules: Iterable[str]) -> bool:
    """Return whether a set has no elements, and no rule adds any."""
    return not block.items and not any(f"update @{block.name} " in rule for rule in rules)


def _without(block: Block, is_dead: IsDead) -> Block:
    if not block.is_chain:
        return block
    return block._replace(items=[line for line in block.items if not is_dead(line)])


# ---- parts of the tables of several modes

IP: Mapping[Family, str] = {4: "ip", 6: "ip6"}
PORT = ("inet_proto", "inet_service")
# In the order in which their maps are looked up: the end of a map's name, and the packets meant.
SENDERS = {Sender.NODE: "_for_node", Sender.POD: "_for_pods", Sender.ANYBODY: ""}
SENT = {Sender.NODE: " sent by this node itself", Sender.POD: " sent by pods", Sender.ANYBODY: ""}
CHAIN_REASONS = {
    "prerouting": "PREROUTING: packets that arrive from the network (other hosts, and this node's pods).",
    "output": "OUTPUT: packets that processes of this node send. They do not pass PREROUTING.",
    "input": "INPUT: packets to this node itself.",
    "forward": "FORWARD: packets that pass through this node.",
    "node_ports": "Packets to an address of this node: is it a node port?",
}
NO_LOOP = RuleLine(
    nft_text.NO_LOOP,
    "An unserved packet to a cluster IP would leave by lo, where a node without a default route sends it, and come in "
    "again until its TTL ends. Its sender gets ICMP host unreachable instead.",
)
FORWARD_BLOCK = Block(
    "chain",
    "forward",
    CHAIN_REASONS["forward"],
    (RuleLine(nft_text.FORWARD_HOOK, "Called for every packet that passes through."),),
    (NO_LOOP,),
)


def nat_hook(hook: str, priority: int) -> RuleLine:
    """Return the line that attaches a chain to *hook*, before other destination NAT."""
    return RuleLine(
        f"type nat hook {hook} priority {priority}; policy accept;",
        "Called for the first packet of each connection; conntrack treats all later ones the same. "
        f"{priority} is before other NAT (-100). Packets that no rule translates pass (accept).",
    )


def set_block(name: str, kind: SetKind, items: Sequence[RuleLine] = ()) -> Block:
    note = (RuleLine(f'comment "{kind.note}"', "A note for readers of the rules."),) if kind.note else ()
    return Block(kind.word, name, kind.reason, (*note, RuleLine(kind.declared, kind.parts)), items)


def table_start(name: str) -> tuple[RuleLine, ...]:
    reason = "Our table, for IPv4 and IPv6 (inet). It holds everything of ours; other tables stay as they are."
    return (RuleLine(f"table {name} {{", reason),)


# A table without elements drops what its full maps would translate.
ASLEEP = RuleLine("\tflags dormant;", "The kernel does not call the chains yet.")


def restriction_kinds(family: Family) -> Iterator[tuple[str, SetKind]]:
    """Yield the sets of portals that only some clients may dial, and of the networks of these clients."""
    portal, parts = (f"ipv{family}_addr", *PORT), "An element is address . protocol . port"
    reason = "Portals that only some clients may dial (loadBalancerSourceRanges)."
    yield f"restricted{family}", SetKind(portal, (), reason, f"{parts}.", names_owner=True)
    reason = "The clients of these: portal . network."
    yield f"allowed{family}", SetKind((*portal, portal[0]), (), reason, f"{parts} . network.", is_interval=True)


def restriction(family: Family) -> RuleLine:
    """Return the rule that drops packets to restricted portals from other clients."""
    portal = f"{IP[family]} daddr . meta l4proto . th dport"
    return RuleLine(
        f"{portal} @restricted{family} {portal} . {IP[family]} saddr != @allowed{family} drop",
        "A portal in @restricted, and a client in none of the networks in @allowed: dropped without an answer.",
    )


def from_pods(pods: PodDetector | None, family: Family) -> tuple[str, str]:
    """Return the nft match for packets from pods, and its description; both are "" without a pod detector."""
    if pods is None:
        return "", ""
    if pods.interface:
        return f'iifname "{pods.interface}" ', f'that arrive at "{pods.interface}" (pods)'
    if not (cidrs := ", ".join(nft_text.pod_cidrs(pods, family))):
        return "", ""
    return f"{IP[family]} saddr {{ {cidrs} }} ", f"sent from {cidrs} (pods)"
