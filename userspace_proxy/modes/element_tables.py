"""Load a `ServiceTable` into the kernel: the rules, which rarely change, by the nft tool; the elements by netlink."""

import contextlib
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Set

from prometheus_client.core import Metric

from userspace_proxy.errors import NotRunError, SyncError
from userspace_proxy.host.tool import in_thread, is_installed, load_nft
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.sync_health import FAMILY_NAMES
from userspace_proxy.modes.kernel_metrics import refused_loads
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.modes.service_table import ServiceTable
from userspace_proxy.modes.watched_rules import NftRules
from userspace_proxy.netfilter.elements import NftSocket, Transaction, element
from userspace_proxy.netfilter.nfnetlink import is_dormant
from userspace_proxy.netfilter.nft_text import comment, removal
from userspace_proxy.netfilter.sets import SetKind

# More changed service ports than this are sent from a thread, because the kernel takes a while.
_AT_ONCE_MAX = 50

log = logging.getLogger(__name__)

# Name of a set -> the key of an element that several service ports may share -> the number of these.
_Uses = defaultdict[str, Counter[bytes]]


class ElementTables(NftRules):
    """The rules of a mode that consist of one nftables *table*."""

    def __init__(self, mode: str, table: ServiceTable) -> None:
        super().__init__(table.name)
        self._mode = mode
        self.table = table
        self._loads = Loads()
        self.loads: Mapping[str, Loads] = dict.fromkeys(FAMILY_NAMES, self._loads)  # one transaction for both families
        self._held: dict[ServicePortName, Translation] = {}
        self._socket = NftSocket()
        self._uses = _Uses(Counter)
        self._facts: NodeFacts | None = None  # None: the content of the kernel's table is unknown
        self._needs = table.may_need  # of the elements in the kernel
        self._is_loading = False

    def rules(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> Rules:
        return self.table.rules(facts, translations.values())

    def metrics(self) -> Iterator[Metric]:
        yield refused_loads("nftables_sync_failures", self.loads)

    async def prepare(self) -> None:
        if not is_installed("nft"):
            raise SyncError(f"--proxy-mode {self._mode} needs nft; install the package nftables")

    async def load(self, update: RuleUpdate) -> None:
        self._is_loading = True
        with self._watch.quiet():
            try:
                if self._facts is None or self._watch.is_touched:
                    await self._load_all(update)
                else:
                    with self._loads.of(everything=False):
                        await self._load_changes(update)
            except SyncError as error:
                if self._facts is None:
                    raise
                log.warning("the change was refused (%s); loading the whole table", error)
                await self._load_all(update)
            finally:
                self._is_loading = False
        self._watch.check_after(0)

    async def _load_all(self, update: RuleUpdate) -> None:
        self._watch.is_touched = True  # until everything is loaded
        translations, _, facts = update
        needs = frozenset[str]().union(*map(self.table.needs, translations.values()))
        with self._loads.of(everything=True):
            try:
                await self._remove_unfinished()
                self._needs |= needs  # the former elements stay for a moment, with the rules that they need
                await load_nft(self.table.skeleton(facts, self._needs, is_there=True))
            except NotRunError:
                raise
            except SyncError as error:
                log.debug("the kernel has no table that can be changed into ours (%s); creating it", error)
                self._needs = needs
                await load_nft(removal(self.table.name) + await in_thread(self._creation, translations, facts, needs))
            await in_thread(self._replace_elements, translations, self._needs)
            if self._needs != needs:
                await load_nft(self.table.skeleton(facts, needs, is_there=True))
            else:
                await load_nft(f"table {self.table.name}\n")  # no longer dormant
        for name, before in self._held.items():
            if (after := translations.get(name)) is not before:
                self.table.forget(before, after)
        self._held = dict(translations)
        self._facts, self._needs = facts, needs
        self._watch.is_touched = False

    async def _remove_unfinished(self) -> None:
        """Remove the table if a load ended before its elements came. Without them, it must not awake."""
        with contextlib.suppress(OSError):  # what the kernel refuses now, it refuses at the load
            if is_dormant(self.table.name):
                await load_nft(removal(self.table.name))

    def _creation(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts, needs: Set[str]) -> str:
        """Return the script of a new table: with all elements, if it replaces one in force.

        nft needs long for many elements, but there would be no rules until these come by netlink.
        """
        with contextlib.suppress(OSError):
            if self._count():
                return self.rules(translations, facts).text()
        return self.table.skeleton(facts, needs, is_there=False)

    def _replace_elements(self, translations: Mapping[ServicePortName, Translation], needs: Set[str]) -> None:
        changes = _Changes(self.table, _Uses(Counter))
        for owner, translation in translations.items():
            changes.add(owner, None, translation)
        transaction = Transaction(self.table.name)
        for name in self.table.set_names(needs):
            transaction.flush(name)
        changes.write(transaction)
        transaction.commit(self._socket)
        self._uses = changes.uses

    async def _load_changes(self, update: RuleUpdate) -> None:
        translations, changed, facts = update
        needs = self._needs.union(*(self.table.needs(translations[name]) for name in changed if name in translations))
        transaction = Transaction(self.table.name)
        if facts != self._facts or needs != self._needs:
            await load_nft(self.table.skeleton(facts, needs, is_there=True))
            held = self.table.set_names(self._needs)
            for new in set(self.table.set_names(needs)).difference(held):
                transaction.flush(new)  # the previous process may have left it
            self._facts, self._needs = facts, needs
        changes = _Changes(self.table, self._uses)
        for owner in changed:
            changes.add(owner, self._held.get(owner), translations.get(owner))
        changes.write(transaction)
        if len(changed) > _AT_ONCE_MAX:
            await in_thread(transaction.commit, self._socket)
        else:
            transaction.commit(self._socket)
        self._note_loaded(update, changes.uses)

    def _note_loaded(self, update: RuleUpdate, uses: _Uses) -> None:
        self._add_uses(uses)
        for owner in update.changed:
            before, after = self._held.pop(owner, None), update.translations.get(owner)
            if after is not None:
                self._held[owner] = after
            if before is not None:
                self.table.forget(before, after)

    def _add_uses(self, uses: _Uses) -> None:
        for name, of_set in uses.items():
            held = self._uses[name]
            for key, more in of_set.items():
                held[key] += more
                if not held[key]:
                    del held[key]

    async def reload(self) -> None:
        if self._facts is not None:
            self._watch.is_touched = True
            await self.load(RuleUpdate(self._held, (), self._facts))

    async def remove(self) -> None:
        self._facts, self._held = None, {}
        self._socket.close()
        await self._remove_table()

    def _has_all_rules(self) -> bool:
        """Changed elements are known by their notices."""
        return self._facts is not None and self._count() == self.table.rules_in(self._facts, self._needs)

    def unwatch(self) -> None:
        if not self._is_loading:  # a thread may be sending; `remove` closes the socket then
            self._socket.close()
        super().unwatch()


class _Changes:
    """The elements to delete and to add. ``uses``: the change of the number of uses of each shared element."""

    def __init__(self, table: ServiceTable, uses: _Uses) -> None:
        """*uses*: those before the changes."""
        self._table = table
        self._held_uses = uses
        self._deleted: defaultdict[str, list[bytes]] = defaultdict(list)
        self._added: defaultdict[str, list[bytes]] = defaultdict(list)
        self.uses = _Uses(Counter)

    def add(self, owner: ServicePortName, before: Translation | None, after: Translation | None) -> None:
        """Add what differs between the translations *before* and *after* of *owner*."""
        old, new = ({} if each is None else self._table.elements(each) for each in (before, after))
        for name in {**old, **new}:
            gone, came, kind = old.get(name, {}), new.get(name, {}), self._table.kind_of(name)
            if kind.is_shared:
                self.uses[name].subtract(gone.keys())
                self.uses[name].update(came.keys())
            else:
                self._deleted[name] += _packed(kind, dict.fromkeys(_other(gone, came), b""))
                self._added[name] += _packed(kind, _other(came, gone), owner)

    def write(self, transaction: Transaction) -> None:
        """Add everything to *transaction*, deletions first."""
        for name, of_set in self.uses.items():
            self._write_uses(name, of_set)
        for name, elements in self._deleted.items():
            transaction.delete(name, elements)
        for name, elements in self._added.items():
            transaction.add(name, elements)

    def _write_uses(self, name: str, of_set: Mapping[bytes, int]) -> None:
        """Add the elements of the set *name* that are used now, and delete those that are no longer."""
        for key, more in of_set.items():
            uses = self._held_uses[name][key]
            if bool(uses) != bool(uses + more):
                (self._deleted if uses else self._added)[name].append(element(key))


def _other(these: Mapping[bytes, bytes], those: Mapping[bytes, bytes]) -> Mapping[bytes, bytes]:
    """Return the elements of *these* that differ from those of the same key in *those*."""
    if not those:
        return these
    return {key: value for key, value in these.items() if those.get(key) != value}


def _packed(kind: SetKind, found: Mapping[bytes, bytes], owner: ServicePortName | None = None) -> list[bytes]:
    text = comment(owner) if owner is not None and kind.names_owner else ""
    return [element(key, value, text, is_interval=kind.is_interval) for key, value in found.items()]
