"""Load a `PortalTable` into the kernel: the rules, which rarely change, by the nft tool; the elements by netlink."""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import in_thread, is_installed, load_nft
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.sync_health import FAMILY_NAMES
from userspace_proxy.modes.kernel_metrics import refused_loads
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.modes.slots.portal_table import PortalTable
from userspace_proxy.netfilter.elements import NftSocket, Transaction, element
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.nft_text import comment
from userspace_proxy.netfilter.notices import RuleWatch
from userspace_proxy.netfilter.sets import Elements, SetKind

# More changed service ports than this are sent from a thread, because the kernel takes a while.
_AT_ONCE_MAX = 50

log = logging.getLogger(__name__)

_Element = tuple[str, bytes]  # the name of its set, and its key


class ElementTables:
    """The rules of a kernel mode that consist of one nftables *table*."""

    def __init__(self, mode: str, table: PortalTable) -> None:
        self.mode = mode
        self.table = table
        self._loads = Loads()
        self.loads: Mapping[str, Loads] = dict.fromkeys(FAMILY_NAMES, self._loads)  # one transaction for both families
        self._held: dict[ServicePortName, Translation] = {}
        self._socket = NftSocket()
        self._uses: Counter[_Element] = Counter()  # of elements that several service ports may share
        self._facts: NodeFacts | None = None  # None: the content of the kernel's table is unknown
        self._timeouts_s: frozenset[int] = frozenset()
        self._watch = RuleWatch()
        self._is_loading = False

    def rules(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> Rules:
        return self.table.rules(facts, translations.values())

    def metrics(self) -> Iterator[Metric]:
        yield refused_loads("nftables_sync_failures", self.loads)

    async def prepare(self) -> None:
        if not is_installed("nft"):
            raise SyncError(f"--proxy-mode {self.mode} needs nft; install the package nftables")

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
        timeouts_s = _timeouts_s(update.translations.values())
        script = self.table.skeleton(update.facts, timeouts_s)
        with self._loads.of(everything=True):
            try:
                await load_nft(script)
            except SyncError as error:
                log.debug("the table in the kernel cannot be changed into ours (%s); replacing it", error)
                await load_nft(self.table.removal() + script)
            await in_thread(self._send_all, update.translations, timeouts_s)
        for name, before in self._held.items():
            if (after := update.translations.get(name)) is not before:
                self.table.forget(before, after)
        self._held = dict(update.translations)
        self._timeouts_s = timeouts_s
        self._facts = update.facts
        self._watch.is_touched = False

    def _send_all(self, translations: Mapping[ServicePortName, Translation], timeouts_s: frozenset[int]) -> None:
        uses = Counter[_Element]()
        packed: dict[str, list[bytes]] = {name: [] for name in self.table.set_names(timeouts_s)}
        kinds = {name: self.table.kind_of(name) for name in packed}
        for owner, translation in translations.items():
            for name, found in self.table.elements(translation).items():
                if kinds[name].is_shared:
                    uses.update((name, key) for key in found)
                else:
                    packed[name] += _packed(kinds[name], found, owner)
        for name, key in uses:
            packed[name].append(element(key))
        transaction = Transaction(self.table.name)
        for name, elements in packed.items():
            transaction.flush(name)
            transaction.add(name, elements)
        transaction.commit(self._socket)
        self._uses = uses

    async def _load_changes(self, update: RuleUpdate) -> None:
        translations, changed, facts = update
        timeouts_s = self._timeouts_s | _timeouts_s(translations[n] for n in changed if n in translations)
        transaction = Transaction(self.table.name)
        if facts != self._facts or timeouts_s != self._timeouts_s:
            await load_nft(self.table.skeleton(facts, timeouts_s, is_there=True))
            held = self.table.set_names(self._timeouts_s)
            for new in set(self.table.set_names(timeouts_s)).difference(held):
                transaction.flush(new)  # the previous process may have left it
            self._facts, self._timeouts_s = facts, timeouts_s
        uses = self._add_changes(transaction, translations, changed)
        if len(changed) > _AT_ONCE_MAX:
            await in_thread(transaction.commit, self._socket)
        else:
            transaction.commit(self._socket)
        for key, more in uses.items():
            self._uses[key] += more
            if not self._uses[key]:
                del self._uses[key]
        for name in changed:
            before, after = self._held.pop(name, None), translations.get(name)
            if after is not None:
                self._held[name] = after
            if before is not None:
                self.table.forget(before, after)

    def _add_changes(
        self,
        transaction: Transaction,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
    ) -> Counter[_Element]:
        """Add the changes of *changed* to *transaction*, deletions first. Return the change of each shared use."""
        deleted: defaultdict[str, list[bytes]] = defaultdict(list)
        added: defaultdict[str, list[bytes]] = defaultdict(list)
        uses = Counter[_Element]()
        for owner in changed:
            before, after = self._elements(self._held.get(owner)), self._elements(translations.get(owner))
            for name in {**before, **after}:
                old, new, kind = before.get(name, {}), after.get(name, {}), self.table.kind_of(name)
                if kind.is_shared:
                    uses.subtract((name, key) for key in old)
                    uses.update((name, key) for key in new)
                else:
                    deleted[name] += _packed(kind, dict.fromkeys(_other(old, new), b""))
                    added[name] += _packed(kind, _other(new, old), owner)
        for (name, key), more in uses.items():
            had = self._uses[name, key]
            if bool(had) != bool(had + more):
                (deleted if had else added)[name].append(element(key))
        for name, elements in deleted.items():
            transaction.delete(name, elements)
        for name, elements in added.items():
            transaction.add(name, elements)
        return uses

    def _elements(self, translation: Translation | None) -> Elements:
        return {} if translation is None else self.table.elements(translation)

    async def reload(self) -> None:
        if self._facts is not None:
            self._watch.is_touched = True
            await self.load(RuleUpdate(self._held, (), self._facts))

    async def remove(self) -> None:
        self._facts, self._held = None, {}
        self._socket.close()
        if is_installed("nft"):
            with self._watch.quiet():
                await load_nft(self.table.removal())

    async def is_intact(self) -> bool:
        """Return whether the kernel has the rules that were loaded. Changed elements are known by their notices."""
        if self._watch.is_touched or self._facts is None:
            return False
        try:
            return count_rules(self.table.name) == self.table.rules_in(self._facts, self._timeouts_s)
        except OSError as error:
            log.debug("our rules could not be counted: %s", error)
            return False

    async def watch(self, on_change: Callable[[], None]) -> None:
        self._watch.listen({self.table.name.split()[1]}, on_change)

    def unwatch(self) -> None:
        if not self._is_loading:  # a thread may be sending; `remove` closes the socket then
            self._socket.close()
        self._watch.stop()


def _other(these: Mapping[bytes, bytes], those: Mapping[bytes, bytes]) -> dict[bytes, bytes]:
    """Return what of *these* is not the same in *those*."""
    return {key: value for key, value in these.items() if those.get(key) != value}


def _packed(kind: SetKind, found: Mapping[bytes, bytes], owner: ServicePortName | None = None) -> list[bytes]:
    text = comment(owner) if owner is not None and kind.names_owner else ""
    return [element(key, value, text, is_interval=kind.is_interval) for key, value in found.items()]


def _timeouts_s(translations: Iterable[Translation]) -> frozenset[int]:
    timeouts_s = (translation.service_port.affinity_timeout_s for translation in translations)
    return frozenset(timeout_s for timeout_s in timeouts_s if timeout_s is not None)
