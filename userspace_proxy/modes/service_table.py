"""Base of the nftables tables of modes: fixed rules, and sets and maps with elements for each service port. Pure."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from functools import partial

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import ASLEEP, SENDERS, SENT, Block, IsDead, NftTable, set_block, table_start
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.netfilter.nft_text import is_everything, merged
from userspace_proxy.netfilter.sets import Elements, SetKind, packed_portal, packed_ranges, shown


class ServiceTable(ABC):
    """One nftables table. ``name``: its family and name. ``kinds``: its sets and maps, except those that few need.

    Some service ports need more sets or rules than others. *needs* names all that are needed. ``may_need``: those that
    the elements of an unknown process may need.
    """

    name: str
    kinds: dict[str, SetKind]
    filled_by_kernel: tuple[Block, ...] = ()  # maps whose elements rules add
    may_need: frozenset[str] = frozenset()

    @abstractmethod
    def needs(self, translation: Translation) -> Set[str]:
        """Return the names of what *translation* needs and not every service port does."""

    @abstractmethod
    def elements(self, translation: Translation) -> Elements:
        """Return the elements of one service port."""

    @abstractmethod
    def chains(self, facts: NodeFacts, needs: Set[str]) -> list[Block]:
        """Return the chains with their rules."""

    @abstractmethod
    def reason(self, name: str, key: bytes, value: bytes, found: Elements, facts: NodeFacts) -> Reason:
        """Return the reason of an element of the set or map *name*. *found*: all elements of the table."""

    def unmatched(self, found: Elements) -> IsDead:
        """Return what tells whether a rule matches no packet if the table has the elements *found*."""
        return lambda _: False

    def kind_of(self, name: str) -> SetKind:
        """Return the types of the set or map *name*."""
        return self.kinds[name]

    def set_names(self, needs: Set[str]) -> list[str]:
        """Return the sets and maps that we fill."""
        return list(self.kinds)

    def forget(self, before: Translation, after: Translation | None) -> None:  # noqa: B027 - most hold nothing
        """Release what *before* has in this process and *after* does not need."""

    @property
    def before(self) -> tuple[RuleLine, ...]:
        """The lines of the whole table up to its bracket."""
        return table_start(self.name)

    def skeleton(self, facts: NodeFacts, needs: Set[str], *, is_there: bool) -> str:
        """Return the script that creates our table without elements, or replaces the rules of an existing one.

        *is_there*: existing elements stay, those that the kernel added, too; the kernel refuses the script if there is
        no table. Otherwise the new table is dormant: without its elements it would drop packets that other rules serve.
        """
        chains = self.chains(facts, needs)
        empty = (chain._replace(items=()) for chain in chains)
        sets = (set_block(name, self.kind_of(name)) for name in self.set_names(needs))
        held = f"flush table {self.name}\n" if is_there else ""
        before = table_start(self.name) if is_there else (*table_start(self.name), ASLEEP)
        declared = NftTable(before, [*sets, *self.filled_by_kernel, *empty]).text()
        return f"{held}{declared}flush table {self.name}\n{NftTable(before, chains).text()}"

    def rules(self, facts: NodeFacts, translations: Iterable[Translation]) -> NftTable:
        """Return our whole table, each line with its reason."""
        found, owners, needs = Elements(), dict[tuple[str, bytes], ServicePortName](), set[str]()
        for translation in translations:
            needs |= self.needs(translation)
            for name, of_set in self.elements(translation).items():
                found.setdefault(name, {}).update(of_set)
                owners.update(((name, key), translation.service_port.name) for key in of_set)
        sets = [self._explained_set(name, found, owners, facts) for name in self.set_names(needs)]
        blocks = [*sets, *self.filled_by_kernel, *self.chains(facts, needs)]
        return NftTable(self.before, blocks, self.unmatched(found))

    def _explained_set(
        self, name: str, found: Elements, owners: Mapping[tuple[str, bytes], ServicePortName], facts: NodeFacts
    ) -> Block:
        kind, lines = self.kind_of(name), list[RuleLine]()
        for key, value in found.get(name, {}).items():
            owner = owners[name, key]
            reason = self.reason(name, key, value, found, facts)
            lines.append(RuleLine(shown(kind, key, value, owner), reason, None if kind.is_shared else owner))
        return set_block(name, kind, lines)

    def rules_in(self, facts: NodeFacts, needs: Set[str]) -> int:
        """Return the number of rules in the table."""
        return sum(len(chain.items) for chain in self.chains(facts, needs))


def add_restrictions(found: Elements, translation: Translation) -> None:
    """Add to *found* the portals of *translation* that only some clients may dial, and the networks of these."""
    for portal, cidrs in translation.allowed.items():
        if not is_everything(networks := merged(cidrs, portal.family)):
            found.setdefault(f"restricted{portal.family}", {})[packed_portal(portal)] = b""
            found.setdefault(f"allowed{portal.family}", {}).update(packed_ranges(portal, networks))


# ---- reasons

Description = Callable[[PortalNames], str]


def packets_of(name: str, parts: Sequence[str]) -> Description:
    """Return what puts in words the packets to a portal that the map or set *name* has as the key *parts*."""
    sender = next(sender for sender, suffix in SENDERS.items() if name.endswith(suffix))
    return lambda names: f"Packets{SENT[sender]} to {_portal(parts, names)}"


def restriction_reason(name: str, parts: Sequence[str]) -> Reason:
    """Return the reason of an element of the sets of `add_restrictions`."""
    if name.startswith("restricted"):
        return partial(_dialled, parts, "only from the networks in @allowed")
    return partial(_dialled, parts[:-1], f"from {parts[-1]}")


def _dialled(parts: Sequence[str], allowed: str, names: PortalNames) -> str:
    words = _portal(parts, names)
    return f"{words[0].upper()}{words[1:]} may be dialled {allowed}."


def _portal(parts: Sequence[str], names: PortalNames) -> str:
    *address, protocol, port = parts
    return names.portal("".join(address), port, protocol)
