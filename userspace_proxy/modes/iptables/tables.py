"""kube-proxy's chains as input of iptables-restore, and which of the chains in the kernel belong to us. Pure.

kube-proxy and the kubelet have chains of the same names. An empty chain beside ours (`MARK`) marks a table whose
KUBE-... chains are ours; comments in it record the chains that were there before. An unmarked table is only marked,
never changed otherwise.
"""

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
    ChainRules,
)
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.xtables_script import (
    ChainKey,
    Saved,
    Section,
    block,
    called_chain,
    flushed,
    new_chain,
    parts,
)

MARK = "USERSPACE-PROXY-OWNS-KUBE"
TABLES = ("filter", "nat")

_SHARED = frozenset(SHARED)
# The chains of a service port. Each stands behind those to which its rules jump.
_DEPTHS = ("KUBE-SEP-", "KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-")
# To delete a rule, iptables searches from the top. From this number on, writing the whole chain is cheaper.
_DELETED_MAX = 100


class ForeignChain(NamedTuple):
    """A chain with a name in `SHARED` that was there before ours. Our removal restores this state."""

    name: str
    is_empty: bool
    has_jump: bool

    def __str__(self) -> str:
        state = "empty" if self.is_empty else "filled"
        return f"{self.name} was here before, {state}, {'led to' if self.has_jump else 'not led to'}"


def is_marked(saved: Saved, table: str) -> bool:
    return ChainKey(table, MARK) in saved


def is_ours(chain: ChainKey) -> bool:
    """Return whether *chain* has the name of one of our chains."""
    return chain.name == MARK or chain in _SHARED or (chain.table == "nat" and chain.name.startswith(OWN_PREFIXES))


def foreign(saved: Saved, desired: ChainRules) -> str:
    """Return why our chains cannot be loaded beside those in *saved*, "" if they can. *desired*: rules of `SHARED`."""
    obstacles = (_foreign_in(table, saved, desired) for table in TABLES if not is_marked(saved, table))
    return next(filter(None, obstacles), "")


def _foreign_in(table: str, saved: Saved, desired: ChainRules) -> str:
    services = ChainKey(table, SERVICES.name)
    own = next((c for c in saved if c.table == table and c.name.startswith(OWN_PREFIXES)), None)
    if own is not None or saved.get(services):
        return (
            f"kube-proxy's rules are here ({(own or services).name} in the table {table}): stop it and run "
            "`kube-proxy --cleanup`, or use --proxy-mode nftables"
        )
    for chain in (chain for chain in SHARED if chain.table == table):
        rules = saved.get(chain)
        if rules and rules != desired.get(chain) and not _is_leftover(chain, saved):
            return (
                f"the chain {chain.name} in the table {table} belongs to another program, and its rules differ from "
                f"ours; remove it (`iptables -t {table} -F {chain.name}`), or use --proxy-mode nftables"
            )
    return ""


def _is_leftover(chain: ChainKey, saved: Saved) -> bool:
    """Return whether *chain* is the one that `kube-proxy --cleanup` leaves: it removes only the jumps to it."""
    return chain == FIREWALL and not _is_called(chain, saved)


def _is_called(chain: ChainKey, saved: Saved) -> bool:
    rules = (rule for at, rules in saved.items() if at.table == chain.table for rule in rules)
    return any(called_chain(rule) == chain.name for rule in rules)


# ---- loading


@dataclass(frozen=True, slots=True)
class Tables:
    """The desired rules of one family: those of the node, and those of each service port."""

    node: ChainRules
    services: Mapping[ServicePortName, ChainRules] = field(default_factory=dict)

    def chains(self) -> dict[ChainKey, tuple[str, ...]]:
        """Return the rules of every chain. The node's rules are the last of a chain."""
        gathered: dict[ChainKey, list[str]] = {chain: [] for chain in SHARED}
        for rules in (*self.services.values(), self.node):
            for chain, lines in rules.items():
                gathered.setdefault(chain, []).extend(lines)
        return {chain: tuple(lines) for chain, lines in gathered.items()}


def whole(desired: Tables, saved: Saved, chains_at_once: int | None = None, notes: Iterable[str] = ()) -> str:
    """Return the input that turns our chains in *saved* into *desired*; "" if they are equal.

    Chains that need no change are left out. *notes* are recorded in the mark of the filter table. With
    *chains_at_once*, chains of service ports come in transactions of that size, before the chains that jump to them:
    the time of iptables on nf_tables grows with the square of a transaction's size.
    """
    chains = desired.chains()
    notes = tuple(notes)
    return "".join(
        _whole_table(table, chains, saved, chains_at_once, notes if table == "filter" else ()) for table in TABLES
    )


def _whole_table(table: str, chains: ChainRules, saved: Saved, chains_at_once: int | None, notes: Sequence[str]) -> str:
    is_ready = is_marked(saved, table)
    first = list(_mark_lines(table, saved, notes))
    ours = [c for c in saved if c.table == table and is_ours(c)]
    stale = [c for c in ours if is_ready and c not in chains and c.name != MARK]
    # A chain to which other programs jump cannot be deleted, and would fail the transaction: only flush it.
    kept = set(_used_by_others(ours, saved)) if stale else set()
    to_write = [c for c in chains if c.table == table and not (is_ready and saved.get(c) == chains[c])]
    own = sorted((c for c in to_write if c not in _SHARED), key=_depth)
    *first_parts, last_part = list(parts(own, chains_at_once or len(own) or 1)) or [[]]
    text = ""
    if first_parts:
        # The chain to which all others jump comes first.
        text = block(table, [*first, *_written([c for c in to_write if c == MARK_MASQ], chains)])
        text += "".join(block(table, [*_written(part, chains)]) for part in first_parts)
        first = []
    last = _written([*(c for c in to_write if c in _SHARED), *last_part], chains)
    deleted = (f"-X {chain.name}" for chain in stale if chain not in kept)
    return text + block(table, [*first, *flushed(stale), *last, *_jumps_to_make(saved, table), *deleted])


def _mark_lines(table: str, saved: Saved, notes: Sequence[str]) -> Iterator[str]:
    """Yield the lines that create the mark of *table*, and record in it what was there before and *notes*."""
    if is_ready := is_marked(saved, table):
        to_note = list(notes)
    else:
        yield f":{MARK} - [0:0]"
        to_note = [*map(str, _present_before(saved, table)), *notes]
    held = saved[ChainKey(table, MARK)] if is_ready else ()
    yield from (f"-A {MARK} {rule}" for rule in map(_noted, to_note) if rule not in held)


def section(table: str, rules: Mapping[ChainKey, Sequence[RuleLine]], made: Mapping[ChainKey, RuleLine]) -> Section:
    """Return the text of `whole` for *table* on a host without our chains. *made*: the lines that create chains."""
    mark = "Marks the chains named KUBE-... in this table as this proxy's, not kube-proxy's."
    of_table = [chain for chain in rules if chain.table == table]
    chains = [chain for chain in of_table if chain in _SHARED]
    chains += sorted((chain for chain in of_table if chain not in _SHARED), key=_depth)
    lines = [line._replace(text=f"-A {chain.name} {line.text}") for chain in chains for line in rules[chain]]
    jumps = [RuleLine(f"-I {j.source} {j.rule}", j.reason) for j in JUMPS if j.chain.table == table]
    return Section(table, [new_chain(MARK, mark), *(made[chain] for chain in chains)], [*lines, *jumps])


def counts(rules: ChainRules) -> Counter[str]:
    """Return the number of *rules* in each table."""
    counted = Counter[str]()
    for chain, lines in rules.items():
        counted[chain.table] += len(lines)
    return counted


def written(script: str) -> Counter[str]:
    """Return the number of rules that *script* adds to each table."""
    table = ""
    counted = Counter[str]()
    for line in script.splitlines():
        if line.startswith("*"):
            table = line[1:]
        counted[table] += line.startswith(("-A ", "-I "))
    return counted


def is_loaded(desired: Tables, saved: Saved) -> bool:
    """Return whether *saved* has all of *desired* and no other chains of ours. Services may stand in any order."""
    for chain, rules in desired.chains().items():
        there = saved.get(chain)
        if there == rules:
            continue
        if there is None or chain not in _SHARED or not _is_same(there, rules, desired.node.get(chain, ())):
            return False
    return not any(_jumps_to_make(saved, table) or not is_marked(saved, table) for table in TABLES)


def _is_same(there: tuple[str, ...], rules: tuple[str, ...], last: tuple[str, ...]) -> bool:
    return sorted(there) == sorted(rules) and there[len(there) - len(last) :] == last


def _depth(chain: ChainKey) -> int:
    """Return a number that is smaller than those of the chains that jump to *chain*."""
    return next((n for n, prefix in enumerate(_DEPTHS) if chain.name.startswith(prefix)), 0)


def _written(chains: Collection[ChainKey], rules: ChainRules) -> Iterator[str]:
    yield from flushed(chains)
    yield from (f"-A {chain.name} {rule}" for chain in chains for rule in rules[chain])


class _Changes:
    """The lines of `change` for one table: chains to create or flush, then rules, then chains to delete."""

    def __init__(self) -> None:
        self.flushed: list[str] = []
        self.rules: list[str] = []
        self.deleted: list[str] = []

    def rewrite(self, chain: ChainKey, rules: Iterable[str]) -> None:
        self.flushed.append(f":{chain.name} - [0:0]")
        self.rules += (f"-A {chain.name} {rule}" for rule in rules)

    def replace(self, chain: ChainKey, old: Iterable[str], new: Iterable[str]) -> None:
        self.rules += (f"-D {chain.name} {rule}" for rule in old)
        self.rules += (f"-I {chain.name} {rule}" for rule in new)


def change(before: Tables, after: Tables, names: Iterable[ServicePortName]) -> str:
    """Return the input that turns *before*, which is loaded, into *after*; "" if they are equal.

    Apart from the node's rules, only those of the service ports *names* differ.
    """
    changes = {table: _Changes() for table in TABLES}
    shared = _add_own_chains(changes, _differences(before, after, names))
    rewritten = {chain for chain in SHARED if before.node.get(chain) != after.node.get(chain)}
    rewritten |= {chain for chain, (deleted, _) in shared.items() if len(deleted) > _DELETED_MAX}
    chains = after.chains() if rewritten else {}
    for chain in rewritten:
        changes[chain.table].rewrite(chain, chains[chain])
    for chain in shared.keys() - rewritten:
        changes[chain.table].replace(chain, *shared[chain])
    return "".join(block(table, [*c.flushed, *c.rules, *c.deleted]) for table, c in changes.items())


def _add_own_chains(
    changes: Mapping[str, _Changes], differences: Iterable[tuple[ChainKey, tuple[str, ...], tuple[str, ...]]]
) -> dict[ChainKey, tuple[list[str], list[str]]]:
    """Add to *changes* what differs in chains of service ports; return rules to delete and insert in shared ones."""
    shared: dict[ChainKey, tuple[list[str], list[str]]] = {}
    for chain, old, new in differences:
        if chain in _SHARED:
            deleted, inserted = shared.setdefault(chain, ([], []))
            deleted += (rule for rule in old if rule not in new)
            inserted += (rule for rule in new if rule not in old)
        else:
            changes[chain.table].rewrite(chain, new)
            changes[chain.table].deleted += () if new else (f"-X {chain.name}",)
    return shared


def _differences(
    before: Tables, after: Tables, names: Iterable[ServicePortName]
) -> Iterator[tuple[ChainKey, tuple[str, ...], tuple[str, ...]]]:
    """Yield the old and the new rules of one service port in one chain, where they differ."""
    nothing: ChainRules = {}
    for name in names:
        old, new = before.services.get(name, nothing), after.services.get(name, nothing)
        for chain in dict.fromkeys((*old, *new)):
            if old.get(chain) != new.get(chain):
                yield chain, old.get(chain, ()), new.get(chain, ())


def _jumps_to_make(saved: Saved, table: str) -> list[str]:
    """Return the lines that insert missing jumps. A jump that is there keeps its place, as in kube-proxy."""
    jumps = [jump for jump in JUMPS if jump.chain.table == table]
    return [f"-I {j.source} {j.rule}" for j in jumps if j.rule not in saved.get(ChainKey(table, j.source), ())]


# ---- chains that were there before ours


def _noted(text: str) -> str:
    """Return the rule that records *text* in our mark."""
    return f'-m comment --comment "{text}"'


def is_noted(text: str, saved: Saved) -> bool:
    """Return whether *text* is recorded in our mark."""
    return any(_noted(text) in saved.get(ChainKey(table, MARK), ()) for table in TABLES)


def _present_before(saved: Saved, table: str) -> Iterator[ForeignChain]:
    """Yield the chains of other programs in *saved* whose names are in `SHARED`."""
    for chain in SHARED:
        if chain.table == table and chain in saved:
            is_empty = not saved[chain] or _is_leftover(chain, saved)
            yield ForeignChain(chain.name, is_empty, _is_called(chain, saved))


def _recorded(saved: Saved, table: str) -> dict[str, ForeignChain]:
    """Return the chains that were there before ours, as our mark records them."""
    found = {}
    for rule in saved.get(ChainKey(table, MARK), ()):
        name, _, text = rule.partition('"')[2].partition(" ")
        if text.startswith("was here before"):
            found[name] = ForeignChain(name, ", empty," in text, not text.endswith('not led to"'))
    return found


def removal(saved: Saved, chains_at_once: int | None = None) -> str:
    """Return the input that removes everything of ours in *saved*; "" if there is nothing.

    A chain that was there before ours gets its earlier state back. A chain to which other programs jump stays, with
    its rules. *chains_at_once* as in `whole`.
    """
    return "".join(_removal_from(table, saved, chains_at_once) for table in TABLES if is_marked(saved, table))


def _removal_from(table: str, saved: Saved, chains_at_once: int | None) -> str:
    recorded = _recorded(saved, table)
    mine = [chain for chain in saved if chain.table == table and is_ours(chain)]
    mark = ChainKey(table, MARK)
    kept = {c for c in mine if c.name in recorded} | set(_used_by_others(mine, saved))
    unchanged = {c for c in kept & {MARK_MASQ, POSTROUTING} if c.name not in recorded or not recorded[c.name].is_empty}
    shared = [chain for chain in mine if chain in _SHARED]
    own = sorted((c for c in mine if c not in _SHARED and c != mark), key=_depth, reverse=True)
    # 1. Shared chains and jumps to them. 2. Chains of service ports, from the outside in. 3. Chains without callers.
    emptied = flushed(c for c in shared if c not in unchanged and c != MARK_MASQ)
    text = block(table, [*emptied, *_jumps_to_remove(saved, table, recorded)])
    for part in parts(own, chains_at_once or len(own) or 1):
        text += block(table, [*flushed(part), *(f"-X {c.name}" for c in part)])
    emptied = flushed(c for c in (MARK_MASQ, mark) if c in mine and c not in unchanged)
    return text + block(table, [*emptied, *(f"-X {chain.name}" for chain in (*shared, mark) if chain not in kept)])


def _jumps_to_remove(saved: Saved, table: str, recorded: Mapping[str, ForeignChain]) -> Iterator[str]:
    """Yield the lines that delete our jumps, except those that were there before ours."""
    for jump in (jump for jump in JUMPS if jump.chain.table == table):
        before = recorded.get(jump.chain.name)
        if before is None or not before.has_jump:
            there = saved.get(ChainKey(table, jump.source), ())
            yield from [f"-D {jump.source} {jump.rule}"] * there.count(jump.rule)


def _used_by_others(mine: Collection[ChainKey], saved: Saved) -> Iterator[ChainKey]:
    """Yield those of *mine*, chains of one table, to which rules of other programs jump."""
    jumps = {(ChainKey(jump.chain.table, jump.source), jump.rule) for jump in JUMPS}
    by_name = {chain.name: chain for chain in mine}
    table = next((chain.table for chain in mine), "")
    others = ((c, rules) for c, rules in saved.items() if c.table == table and c.name not in by_name)
    for source, rule in ((source, rule) for source, rules in others for rule in rules):
        if (chain := by_name.get(called_chain(rule))) is not None and (source, rule) not in jumps:
            yield chain
