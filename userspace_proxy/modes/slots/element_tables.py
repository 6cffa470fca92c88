"""A `PortalTable` in the kernel: its rules by the nft tool, which they are for life; its elements by netlink."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import in_thread, is_installed, run_tool
from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.freshness import FAMILY_NAMES
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.kernel_metrics import refused_loads
from userspace_proxy.modes.slots.portal_table import PortalTable
from userspace_proxy.netfilter.elements import Channel, Transaction, element
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.nft_text import comment
from userspace_proxy.netfilter.notices import RuleNotices, quiet
from userspace_proxy.netfilter.sets import Elements, SetKind

# More changes than this are sent in a thread: the kernel takes its time.
_AT_ONCE_MAX = 50

log = logging.getLogger(__name__)


class ElementTables:
    """Holds the translations of *mode* that *table* has in the kernel, and brings it to others."""

    def __init__(self, mode: str, table: PortalTable) -> None:
        self.mode = mode
        self.table = table
        self._loads = Loads()
        self.loads: Mapping[str, Loads] = dict.fromkeys(FAMILY_NAMES, self._loads)  # one transaction is for both
        self._held: dict[ServicePortName, Translation] = {}
        self._channel = Channel()
        self._uses: Counter[tuple[str, bytes]] = Counter()  # of elements that several service ports may have
        self._facts: NodeFacts | None = None  # None: it is not known what the kernel has
        self._timeouts_s: frozenset[int] = frozenset()
        self._notices: RuleNotices | None = None
        self._on_change: Callable[[], None] | None = None
        self._touched = False
        self._is_loading = False

    def metrics(self) -> Iterator[Metric]:
        yield refused_loads("nftables_sync_failures", self.loads)

    async def prepare(self) -> None:
        if not is_installed("nft"):
            raise SyncError(f"--proxy-mode {self.mode} needs nft; install the package nftables")

    async def load(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        self._is_loading = True
        with quiet(self._notices):
            try:
                if self._facts is None or self._touched:
                    await self._load_all(translations, facts)
                else:
                    with self._loads.of(everything=False):
                        await self._load_changes(translations, changed, facts)
            except SyncError as error:
                if self._facts is None:
                    raise
                log.warning("the change was refused (%s); loading the whole table", error)
                await self._load_all(translations, facts)
            finally:
                self._is_loading = False
        if self._on_change is not None:
            self._on_change()  # have a look soon: nothing was heard while we loaded

    async def _load_all(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> None:
        self._touched = True  # until all of it is there
        timeouts_s = _timeouts_s(translations)
        script = self.table.skeleton(facts, timeouts_s)
        with self._loads.of(everything=True):
            try:
                await run_tool("nft", "-f", "-", stdin=script)
            except SyncError as error:
                log.debug("a table is there that cannot be made ours (%s)", error)
                await run_tool("nft", "-f", "-", stdin=self.table.removal() + script)
            await in_thread(self._send_all, translations, timeouts_s)
        for name, before in self._held.items():
            if (after := translations.get(name)) is not before:
                self.table.forget(before, after)
        self._held = dict(translations)
        self._timeouts_s = timeouts_s
        self._facts = facts
        self._touched = False

    def _send_all(self, translations: Mapping[ServicePortName, Translation], timeouts_s: frozenset[int]) -> None:
        transaction, uses = Transaction(self.table.name), Counter[tuple[str, bytes]]()
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
        for name, of_set in packed.items():
            transaction.flush(name)
            transaction.add(name, of_set)
        transaction.commit(self._channel)
        self._uses = uses

    async def _load_changes(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        timeouts_s = self._timeouts_s | _timeouts_s({n: translations[n] for n in changed if n in translations})
        transaction = Transaction(self.table.name)
        if facts != self._facts or timeouts_s != self._timeouts_s:
            await run_tool("nft", "-f", "-", stdin=self.table.skeleton(facts, timeouts_s, is_there=True))
            held = self.table.set_names(self._timeouts_s)
            for new in set(self.table.set_names(timeouts_s)).difference(held):
                transaction.flush(new)  # it may be there from the process before
            self._facts, self._timeouts_s = facts, timeouts_s
        more_uses = self._fill(transaction, translations, changed)
        if len(changed) > _AT_ONCE_MAX:
            await in_thread(transaction.commit, self._channel)
        else:
            transaction.commit(self._channel)
        for key, more in more_uses.items():
            self._uses[key] += more
            if not self._uses[key]:
                del self._uses[key]
        for name in changed:
            before, after = self._held.pop(name, None), translations.get(name)
            if after is not None:
                self._held[name] = after
            if before is not None:
                self.table.forget(before, after)

    def _fill(
        self,
        transaction: Transaction,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
    ) -> Counter[tuple[str, bytes]]:
        """Have *transaction* make *translations* true, first all that goes; return how much more each is shared."""
        gone: dict[str, list[bytes]] = {}
        came: dict[str, list[bytes]] = {}
        uses = Counter[tuple[str, bytes]]()
        for owner in changed:
            before, after = self._elements(self._held.get(owner)), self._elements(translations.get(owner))
            for name in {**before, **after}:
                old, new, kind = before.get(name, {}), after.get(name, {}), self.table.kind_of(name)
                if kind.is_shared:
                    uses.subtract((name, key) for key in old)
                    uses.update((name, key) for key in new)
                    continue
                differ = {key: value for key, value in old.items() if new.get(key) != value}
                gone.setdefault(name, []).extend(_packed(kind, dict.fromkeys(differ, b"")))
                differ = {key: value for key, value in new.items() if old.get(key) != value}
                came.setdefault(name, []).extend(_packed(kind, differ, owner))
        for (name, key), more in uses.items():
            had = self._uses[name, key]
            if not had and more > 0:
                came.setdefault(name, []).append(element(key))
            elif had and had + more == 0:
                gone.setdefault(name, []).append(element(key))
        for name, elements in gone.items():
            transaction.delete(name, elements)
        for name, elements in came.items():
            transaction.add(name, elements)
        return uses

    def _elements(self, translation: Translation | None) -> Elements:
        return {} if translation is None else self.table.elements(translation)

    async def reload(self) -> None:
        if self._facts is not None:
            self._touched = True
            await self.load(self._held, (), self._facts)

    async def remove(self) -> None:
        self._facts, self._held = None, {}
        self._channel.close()
        if is_installed("nft"):
            with quiet(self._notices):
                await run_tool("nft", "-f", "-", stdin=self.table.removal())

    async def is_intact(self) -> bool:
        """Return whether our rules are as they were loaded; of elements that others change a notice comes."""
        if self._touched or self._facts is None:
            return False
        try:
            return count_rules(self.table.name) == self.table.rules_in(self._facts, self._timeouts_s)
        except OSError as error:
            log.debug("our rules could not be counted: %s", error)
            return False

    async def watch(self, on_change: Callable[[], None]) -> None:
        def on_notice() -> None:
            self._touched = True
            on_change()

        self._on_change = on_change
        self._notices = RuleNotices({self.table.name.split()[1]}, on_notice)

    def unwatch(self) -> None:
        self._on_change = None
        if not self._is_loading:  # a thread may be sending; then `remove` closes it
            self._channel.close()
        if self._notices is not None:
            self._notices.close()
            self._notices = None


def _packed(kind: SetKind, found: Mapping[bytes, bytes], owner: ServicePortName | None = None) -> list[bytes]:
    said = comment(owner) if owner is not None and kind.names_owner else ""
    return [element(key, value, said, is_interval=kind.is_interval) for key, value in found.items()]


def _timeouts_s(translations: Mapping[ServicePortName, Translation]) -> frozenset[int]:
    found = {translation.service_port.affinity_timeout_s for translation in translations.values()}
    return frozenset(timeout_s for timeout_s in found if timeout_s is not None)
