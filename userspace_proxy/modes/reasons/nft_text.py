"""Our nftables tables as blocks: what is in them, without what is of no use. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from userspace_proxy.modes.reasons.lines import Line
from userspace_proxy.netfilter.nft_text import NO_LOOP

_OPENS = re.compile(r"(set|map|chain) (\w+) \{")
_FAMILY = re.compile(r"[a-z]([46])(?:_|$)")
_LOOK_UPS = re.compile(r"(?<!!= )@(\w+)")
_NAMES = re.compile(r"@(\w+)")  # one that holds nothing tells something by `!=`
_JUMPS, _GOES = re.compile(r"jump (\w+)"), re.compile(r"goto (\w+)")
_CALLS = re.compile(r"(?:jump|goto) (\w+)")
_FOR_FAMILY = re.compile(r"nfproto ipv([46])")
_EFFECT = re.compile(
    r"\b(?:drop|accept|reject|dnat|redirect|masquerade|jump|goto|return|update|notrack|(?:meta|ct) mark set"
    r"|priority set none)\b"
)


@dataclass(frozen=True, slots=True)
class Block:
    """A set, map or chain: how it is declared, and its elements or rules."""

    kind: str
    name: str
    head: tuple[str, ...] = ()
    items: tuple[str, ...] = ()

    @property
    def is_chain(self) -> bool:
        return self.kind == "chain"

    @property
    def family(self) -> str:
        """4 or 6; "" for what is for both."""
        match = _FAMILY.search(self.name)
        return match[1] if match else ""


@dataclass(slots=True)
class Table:
    """A table: the lines up to its bracket, and what is in it."""

    before: list[str] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)


class Said(NamedTuple):
    """What a line does, and whose it is."""

    explanation: str
    service: str = ""


# In which block (None: outside of any), and the line without the blanks and commas around it.
Explainer = Callable[[Block | None, str], Said]


def parse(text: str) -> Table:
    """Return what `nft.table` or `slots.table` rendered."""
    table = Table()
    opening: re.Match[str] | None = None
    head: list[str] = []
    items: list[str] = []
    is_in_elements = False
    for line in map(str.strip, text.splitlines()):
        if opening is None:
            if opening := _OPENS.fullmatch(line):
                head, items = [], []
            elif line != "}":
                table.before.append(line)
        elif is_in_elements:
            items.append(line.removesuffix(" }").rstrip(","))
            is_in_elements = not line.endswith(" }")
        elif line == "elements = {":
            is_in_elements = True
        elif line == "}":
            table.blocks.append(Block(opening[1], opening[2], tuple(head), tuple(items)))
            opening = None
        elif opening[1] != "chain" or line.startswith("type "):
            head.append(line)
        else:
            items.append(line)
    return table


def write(table: Table, explain: Explainer) -> Iterator[Line]:
    """Yield *table* as nft reads it, with what *explain* says of each line."""
    for line in table.before:
        yield Line(line, *explain(None, line))
    for block in table.blocks:
        opening = f"{block.kind} {block.name} {{"
        yield Line(f"\t{opening}", *explain(None, opening))
        for line in block.head:
            yield Line(f"\t\t{line}", *explain(block, line))
        if block.is_chain:
            for line in block.items:
                yield Line(f"\t\t{line}", *explain(block, line))
        elif block.items:
            yield Line("\t\telements = {")
            for number, line in enumerate(block.items, 1):
                end = "," if number < len(block.items) else " }"
                yield Line(f"\t\t\t{line}{end}", *explain(block, line))
        yield Line("\t}")
    yield Line("}")


def without_the_useless(table: Table, is_dead: Callable[[str], bool] = lambda _: False) -> Table:
    """Return *table* without what no packet that is served is changed by: empty sets, rules that look there, chains
    without rules.

    *is_dead*: of rules that cannot match for another reason.
    """
    blocks = [_without(block, lambda rule: rule == NO_LOOP or is_dead(rule)) for block in table.blocks]
    while True:
        left = list(_once(blocks))
        if left == blocks:
            return Table(table.before, _in_order(blocks))
        blocks = left


def _once(blocks: list[Block]) -> Iterator[Block]:
    """Yield *blocks* without what is seen at once to be useless; then more may be."""
    rules = [line for block in blocks if block.is_chain for line in block.items]
    sets = [block for block in blocks if not block.is_chain]
    empty = {block.name for block in sets if _is_empty(block, rules)}
    # Who goes to a chain without rules is done: that is an effect. Who jumps there comes back.
    used = {block.name for block in blocks if block.is_chain and any(map(_EFFECT.search, block.items))}
    used |= {name for rule in rules for name in _GOES.findall(rule)}
    used &= {block.name for block in blocks if block.is_chain and block.head} | set(_CALLS.findall("\n".join(rules)))
    families = "".join({block.family for block in sets if block.items})

    def is_dead(rule: str) -> bool:
        return (
            any(name in empty for name in _LOOK_UPS.findall(rule))
            or any(name not in used for name in _JUMPS.findall(rule))
            or any(family not in families for family in _FOR_FAMILY.findall(rule))
        )

    named = set(_NAMES.findall("\n".join(rule for rule in rules if not is_dead(rule))))
    for block in blocks:
        is_useful = block.name in used if block.is_chain else block.name not in empty or block.name in named
        if is_useful and block.family in families:  # "", which is for both, is in any
            yield _without(block, is_dead)


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
        called = [chains[name] for name in _CALLS.findall("\n".join(block.items))]
        left += [each for each in reversed(called) if each.name not in found]
    return ordered


def _is_empty(block: Block, rules: Iterable[str]) -> bool:
    """Return whether there is nothing in a set, and no rule that puts something there."""
    return not block.items and not any(f"update @{block.name} " in rule for rule in rules)


def _without(block: Block, is_dead: Callable[[str], bool]) -> Block:
    if not block.is_chain:
        return block
    return replace(block, items=tuple(line for line in block.items if not is_dead(line)))
