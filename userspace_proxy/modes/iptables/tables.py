"""kube-proxy's chains as input of iptables-restore, and whose they are. Pure.

Others have chains of these names, too: a kube-proxy, a kubelet. So ours are known by a chain beside them that nobody
else has (`MARK`); it says what was there before it. Tables without it are never touched, but to put it there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.iptables.chains import (
    FIREWALL,
    JUMPS,
    MARK_MASQ,
    OWN_PREFIXES,
    POSTROUTING,
    SERVICES,
    SHARED,
    Chain,
    Rules,
)
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.xtables_script import Section, new_chain

MARK = "USERSPACE-PROXY-OWNS-KUBE"
TABLES = ("filter", "nat")

_SHARED = frozenset(SHARED)
# The chains of a service port, from where packets leave it to where they come in.
_INWARDS = ("KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-")
# To delete a rule, iptables looks for it from the top; from so many on it is cheaper to write a chain anew.
_DELETED_MAX = 100

Saved = Mapping[Chain, tuple[str, ...]]
"""What iptables-save printed: the rules of every chain that there is, without ``-A CHAIN``."""


class Found(NamedTuple):
    """A chain of a name in `SHARED` that was there before us, and is to be left as it was."""

    name: str
    empty: bool
    jumped: bool

    def __str__(self) -> str:
        state = "empty" if self.empty else "filled"
        return f"{self.name} was here before, {state}, {'led to' if self.jumped else 'not led to'}"


def read(saved: str) -> Saved:
    """Return the chains and rules in what iptables-save printed."""
    table = ""
    chains: dict[Chain, list[str]] = {}
    for line in saved.splitlines():
        if line.startswith("*"):
            table = line[1:]
        elif line.startswith(":"):
            chains[Chain(table, line[1:].split(" ", 1)[0])] = []
        elif line.startswith("-A "):
            _, name, *rule = line.split(" ", 2)
            chains[Chain(table, name)].append(rule[0] if rule else "")
    return {chain: tuple(rules) for chain, rules in chains.items()}


def is_marked(saved: Saved, table: str) -> bool:
    return Chain(table, MARK) in saved


def is_ours(chain: Chain) -> bool:
    """Return whether *chain* is one that we make; told by its name alone."""
    return chain.name == MARK or chain in _SHARED or (chain.table == "nat" and chain.name.startswith(OWN_PREFIXES))


def foreign(saved: Saved, wanted: Rules) -> str:
    """Return why our chains cannot be loaded beside what is in *saved*, "" where they can. *wanted*: of `SHARED`."""
    for table in TABLES:
        if is_marked(saved, table):
            continue
        services = Chain(table, SERVICES.name)
        own = next((c for c in saved if c.table == table and c.name.startswith(OWN_PREFIXES)), None)
        if own is not None or saved.get(services):
            return (
                f"kube-proxy's rules are here ({(own or services).name} in the table {table}): stop it and run "
                "`kube-proxy --cleanup`, or use --proxy-mode nftables"
            )
        for chain in SHARED:
            rules = saved.get(chain)
            if chain.table == table and rules and rules != wanted.get(chain) and not _is_leftover(chain, saved):
                return (
                    f"the chain {chain.name} in the table {table} is somebody else's, with other rules than ours; "
                    f"remove it (`iptables -t {table} -F {chain.name}`), or use --proxy-mode nftables"
                )
    return ""


def _is_leftover(chain: Chain, saved: Saved) -> bool:
    """Return whether `kube-proxy --cleanup` has left *chain*: it takes the jumps to this one away, not the chain."""
    return chain == FIREWALL and not _referrers(chain, saved)


def _referrers(chain: Chain, saved: Saved) -> list[Chain]:
    return [c for c, rules in saved.items() if c.table == chain.table and any(_target(r) == chain.name for r in rules)]


def _target(rule: str) -> str:
    _, _, target = rule.rpartition("-j ")
    return target.split(" ", 1)[0]


# ---- loading


@dataclass(frozen=True, slots=True)
class Tables:
    """All that is wanted of one family: by whom a rule is wanted, and what."""

    node: Rules
    services: Mapping[ServicePortName, Rules] = field(default_factory=dict)

    def chains(self) -> dict[Chain, tuple[str, ...]]:
        """Return all of it; the node's rules are the last of a chain."""
        gathered: dict[Chain, list[str]] = {chain: [] for chain in SHARED}
        for rules in (*self.services.values(), self.node):
            for chain, lines in rules.items():
                gathered.setdefault(chain, []).extend(lines)
        return {chain: tuple(lines) for chain, lines in gathered.items()}


def whole(wanted: Tables, saved: Saved, chains_at_once: int | None = None, notes: Iterable[str] = ()) -> str:
    """Return the input that makes our chains those of *wanted*, whatever of ours is in *saved*; "" where that is so.

    *notes* are written beside our mark in the filter table. What is as it should be is left alone. With
    *chains_at_once* the chains of service ports come in transactions of so many, before those that lead to them:
    iptables on nf_tables takes a time that grows with the square of what is in one.
    """
    chains = wanted.chains()
    text = ""
    for table in TABLES:
        marked = is_marked(saved, table)
        first = [] if marked else [f":{MARK} - [0:0]"]
        said = [*(() if marked else map(str, _find(saved, table))), *(notes if table == "filter" else ())]
        first += (f"-A {MARK} {rule}" for rule in map(_noted, said) if rule not in saved.get(Chain(table, MARK), ()))
        stale = [c for c in saved if marked and c.table == table and is_ours(c) and c not in chains and c.name != MARK]
        # To where others lead by now cannot be deleted, and would keep all else from being loaded: it is emptied.
        led_to = set(_used_by_others([c for c in saved if c.table == table and is_ours(c)], saved)) if stale else set()
        anew = [c for c in chains if c.table == table and not (marked and saved.get(c) == chains[c])]
        own = sorted((c for c in anew if c not in _SHARED), key=_depth)
        parts = [own] if chains_at_once is None else list(_parts(own, chains_at_once))
        if len(parts) > 1:
            # The end of all ways stands before those that lead there.
            text += _block(table, [*first, *_written([c for c in anew if c == MARK_MASQ], chains)])
            text += "".join(_block(table, [*_written(part, chains)]) for part in parts[:-1])
            first, parts = [], parts[-1:]
        last = [*(c for c in anew if c in _SHARED), *itertools.chain(*parts)]
        lines = [*first, *(f":{c.name} - [0:0]" for c in stale), *_written(last, chains), *_jumps_to_make(saved, table)]
        text += _block(table, [*lines, *(f"-X {chain.name}" for chain in stale if chain not in led_to)])
    return text


def section(table: str, rules: Mapping[Chain, Sequence[RuleLine]], made: Mapping[Chain, RuleLine]) -> Section:
    """Return what `whole` writes of *table* where nothing is yet. *made*: the lines that make chains."""
    mark = "Says by being there that the chains named KUBE-... in this table are ours, and no kube-proxy's."
    of_table = [chain for chain in rules if chain.table == table]
    chains = [chain for chain in of_table if chain in _SHARED]
    chains += sorted((chain for chain in of_table if chain not in _SHARED), key=_depth)
    lines = [line._replace(text=f"-A {chain.name} {line.text}") for chain in chains for line in rules[chain]]
    jumps = [RuleLine(f"-I {j.source} {j.rule}", j.reason) for j in JUMPS if j.chain.table == table]
    return Section(table, [new_chain(MARK, mark), *(made[chain] for chain in chains)], [*lines, *jumps])


def counts(rules: Rules) -> Counter[str]:
    """Return how many *rules* there are in each table."""
    counted = Counter[str]()
    for chain, lines in rules.items():
        counted[chain.table] += len(lines)
    return counted


def written(script: str) -> Counter[str]:
    """Return how many rules *script* adds to each table."""
    table = ""
    counted = Counter[str]()
    for line in script.splitlines():
        if line.startswith("*"):
            table = line[1:]
        counted[table] += line.startswith(("-A ", "-I "))
    return counted


def is_loaded(wanted: Tables, saved: Saved) -> bool:
    """Return whether all of *wanted* is in *saved*, and nothing else of ours; rules of services may be in any order."""
    chains = wanted.chains()
    for chain, rules in chains.items():
        there = saved.get(chain)
        if there is None or (
            there != rules and not (chain in _SHARED and _is_same(there, rules, wanted.node.get(chain, ())))
        ):
            return False
    return not any(_jumps_to_make(saved, table) or not is_marked(saved, table) for table in TABLES)


def _is_same(there: tuple[str, ...], rules: tuple[str, ...], last: tuple[str, ...]) -> bool:
    return sorted(there) == sorted(rules) and there[len(there) - len(last) :] == last


def _depth(chain: Chain) -> int:
    """Return a number that is smaller than that of the chains from which rules lead to *chain*."""
    return next((n for n, prefix in enumerate(_INWARDS) if chain.name.startswith(prefix)), 0)


def _parts(chains: list[Chain], most: int) -> Iterator[list[Chain]]:
    for start in range(0, len(chains), most):
        yield chains[start : start + most]


def _written(chains: Collection[Chain], rules: Rules) -> Iterator[str]:
    yield from (f":{chain.name} - [0:0]" for chain in chains)
    yield from (f"-A {chain.name} {rule}" for chain in chains for rule in rules[chain])


def change(before: Tables, after: Tables, names: Iterable[ServicePortName]) -> str:
    """Return the input that makes *before*, which is loaded, *after*; "" where there is nothing to do.

    Only service ports in *names* differ, and perhaps the node.
    """
    lines: dict[str, tuple[list[str], list[str]]] = {table: ([], []) for table in TABLES}

    def rewrite(chain: Chain, rules: Iterable[str]) -> None:
        flushed, made = lines[chain.table]
        flushed.append(f":{chain.name} - [0:0]")
        made.extend(f"-A {chain.name} {rule}" for rule in rules)

    gone: list[Chain] = []
    removed: dict[Chain, list[str]] = {}
    added: dict[Chain, list[str]] = {}
    for chain, old, new in _differences(before, after, names):
        if chain in _SHARED:
            removed.setdefault(chain, []).extend(rule for rule in old if rule not in new)
            added.setdefault(chain, []).extend(rule for rule in new if rule not in old)
        elif new:
            rewrite(chain, new)
        else:
            rewrite(chain, ())
            gone.append(chain)
    anew = {c for c in SHARED if before.node.get(c) != after.node.get(c) or len(removed.get(c, ())) > _DELETED_MAX}
    chains = after.chains() if anew else {}
    for chain in anew:
        rewrite(chain, chains[chain])
    for chain in removed.keys() - anew:
        _, made = lines[chain.table]
        made.extend(f"-D {chain.name} {rule}" for rule in removed[chain])
        made.extend(f"-I {chain.name} {rule}" for rule in added[chain])
    for chain in gone:
        lines[chain.table][1].append(f"-X {chain.name}")
    return "".join(_block(table, [*flushed, *made]) for table, (flushed, made) in lines.items())


def _differences(
    before: Tables, after: Tables, names: Iterable[ServicePortName]
) -> Iterator[tuple[Chain, tuple[str, ...], tuple[str, ...]]]:
    """Yield what one service port wanted of a chain, and what it wants, where that is not the same."""
    nothing: Rules = {}
    for name in names:
        old, new = before.services.get(name, nothing), after.services.get(name, nothing)
        for chain in dict.fromkeys((*old, *new)):
            if old.get(chain) != new.get(chain):
                yield chain, old.get(chain, ()), new.get(chain, ())


def _jumps_to_make(saved: Saved, table: str) -> list[str]:
    """Return what puts our jumps where they belong; one that is there stays where it is, as kube-proxy does."""
    jumps = [jump for jump in JUMPS if jump.chain.table == table]
    return [f"-I {j.source} {j.rule}" for j in jumps if j.rule not in saved.get(Chain(table, j.source), ())]


# ---- what was there before


def _noted(text: str) -> str:
    """Return the rule beside our mark that says *text*."""
    return f'-m comment --comment "{text}"'


def is_noted(text: str, saved: Saved) -> bool:
    """Return whether *text* was one of the notes that were loaded."""
    return any(_noted(text) in saved.get(Chain(table, MARK), ()) for table in TABLES)


def _find(saved: Saved, table: str) -> Iterator[Found]:
    """Yield what is in *saved* that is not ours, though it has such a name."""
    for chain in SHARED:
        if chain.table == table and chain in saved:
            is_empty = not saved[chain] or _is_leftover(chain, saved)
            yield Found(chain.name, is_empty, bool(_referrers(chain, saved)))


def _found(saved: Saved, table: str) -> dict[str, Found]:
    """Return what our mark says that was there before it."""
    found = {}
    for rule in saved.get(Chain(table, MARK), ()):
        name, _, said = rule.partition('"')[2].partition(" ")
        if said.startswith("was here before"):
            found[name] = Found(name, ", empty," in said, not said.endswith('not led to"'))
    return found


def removal(saved: Saved, chains_at_once: int | None = None) -> str:
    """Return the input that takes away all that is ours in *saved*; "" where nothing is.

    What was there before us stays as it was then; and so does, with its rules, what somebody else leads to by now.
    *chains_at_once* as in `whole`.
    """
    text = ""
    for table in TABLES:
        if not is_marked(saved, table):
            continue
        found = _found(saved, table)
        mine = [chain for chain in saved if chain.table == table and is_ours(chain)]
        kept = {c for c in mine if c.name in found} | set(_used_by_others(mine, saved))
        as_is = {c for c in kept & {MARK_MASQ, POSTROUTING} if c.name not in found or not found[c.name].empty}
        shared = [chain for chain in mine if chain in _SHARED]
        lines = [f":{chain.name} - [0:0]" for chain in shared if chain not in as_is and chain != MARK_MASQ]
        for jump in JUMPS:
            was = found.get(jump.chain.name)
            if jump.chain.table == table and not (was is not None and was.jumped):
                there = saved.get(Chain(table, jump.source), ())
                lines += [f"-D {jump.source} {jump.rule}"] * there.count(jump.rule)
        text += _block(table, lines)
        own = sorted((c for c in mine if c not in _SHARED and c.name != MARK), key=_depth, reverse=True)
        for part in _parts(own, chains_at_once or len(own) or 1):
            text += _block(table, [*(f":{c.name} - [0:0]" for c in part), *(f"-X {c.name}" for c in part)])
        last = [c for c in (*shared, Chain(table, MARK)) if c not in kept]
        flushed = [c for c in (MARK_MASQ, Chain(table, MARK)) if c in mine and c not in as_is]
        text += _block(table, [*(f":{c.name} - [0:0]" for c in flushed), *(f"-X {chain.name}" for chain in last)])
    return text


def _used_by_others(mine: Collection[Chain], saved: Saved) -> Iterator[Chain]:
    """Yield those of *mine*, chains of one table, to which rules lead that are not ours."""
    jumps = {(Chain(jump.chain.table, jump.source), jump.rule) for jump in JUMPS}
    by_name = {chain.name: chain for chain in mine}
    table = next((chain.table for chain in mine), "")
    for source, rules in saved.items():
        if source.table == table and source.name not in by_name:
            for rule in rules:
                if (chain := by_name.get(_target(rule))) is not None and (source, rule) not in jumps:
                    yield chain


def _block(table: str, lines: Sequence[str]) -> str:
    """Return *lines* as a transaction; "" where there are none."""
    return "".join(f"{line}\n" for line in (f"*{table}", *lines, "COMMIT")) if lines else ""
