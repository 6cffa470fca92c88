"""Load the rules of userspace mode into the kernel: one class for each rule language.

nft loads what changed, iptables-restore all rules. After a refused load the rules in the kernel are unknown.
"""

import logging
from collections.abc import Callable

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, load_nft
from userspace_proxy.model.endpoint import Family
from userspace_proxy.modes.element_tables import ElementTables
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate
from userspace_proxy.modes.userspace import iptables, nft, transparent_replies
from userspace_proxy.modes.watched_rules import WatchedRules, XtablesRules, all_or_first_error
from userspace_proxy.modes.xtables_script import ChainKey
from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.nft_text import removal
from userspace_proxy.netfilter.notices import RoutingRuleNotices

log = logging.getLogger(__name__)


class _WithReplyRoutes(WatchedRules):
    """Watches the reply routes, too. It comes before the loader among the bases of a class."""

    _replies: "_ReplyRoutes"

    async def watch(self, on_change: Callable[[], None]) -> None:
        await super().watch(on_change)
        self._replies.watch(on_change)

    def unwatch(self) -> None:
        self._replies.unwatch()
        super().unwatch()


class NftKernel(_WithReplyRoutes, ElementTables):
    """Rules in one nftables table, with reply routes while a listener needs them."""

    def __init__(self) -> None:
        super().__init__("userspace", nft.RedirectTable())
        self._replies = _ReplyRoutes()

    async def load(self, update: RuleUpdate) -> None:
        with self._watch.quiet():
            await self._replies.add(update.facts, again=self._facts is None or self._watch.is_touched)
            await super().load(update)
            await self._replies.remove_unused(update.facts)

    async def remove(self) -> None:
        await self.remove_rules()
        await self._replies.remove()

    async def remove_rules(self) -> None:
        await super().remove()

    async def is_intact(self) -> bool:
        return await super().is_intact() and await self._replies.are_intact()

    def _has_all_rules(self) -> bool:
        return super()._has_all_rules() and (self._facts is None or _is_bridge_table_intact(self._facts))


class IptablesKernel(_WithReplyRoutes, XtablesRules):
    """Rules loaded by ``iptables-restore``, in one transaction for each table of each family."""

    def __init__(self) -> None:
        super().__init__(("mangle", "nat", "filter"))
        self._held: RuleUpdate | None = None  # None: the rules in the kernel are unknown
        self._replies = _ReplyRoutes()
        self._loaded: dict[int, list[tuple[ChainKey, str]]] = {}

    async def load(self, update: RuleUpdate) -> None:
        held, self._held = self._held, None
        with self._watch.quiet():
            await self._replies.add(update.facts, again=held is None)
            try:
                await all_or_first_error(self._load_family(update, *each) for each in xtables.families())
            finally:
                await self._replies.remove_unused(update.facts)
        self._held = update._replace(translations=dict(update.translations))
        self._check_later()

    async def _load_family(self, update: RuleUpdate, family: Family, tool: str) -> None:
        script = iptables.restore(update.translations.values(), update.facts, family, await xtables.save(tool))
        await xtables.restore(tool, script)
        loaded = iptables.ours(await xtables.save(tool))
        if len(loaded) != iptables.rules_in(script):
            raise SyncError(f"{tool}: another program changed rules while ours were loaded")
        self._loaded[family] = loaded

    async def reload(self) -> None:
        if (held := self._held) is not None:
            self._held = None
            try:
                await self.load(held)
            except SyncError:
                self._held = held
                raise

    async def remove(self) -> None:
        await self.remove_rules()
        with self._watch.quiet():
            await self._replies.remove()

    async def remove_rules(self) -> None:
        self._held = None
        self._loaded = {}
        with self._watch.quiet():
            for _, tool in xtables.families_in_use():
                await xtables.restore(tool, iptables.removal(await xtables.save(tool)))

    async def _are_loaded(self) -> bool:
        for family, tool in xtables.families():
            if iptables.ours(await xtables.save(tool)) != self._loaded.get(family):
                return False
        return await self._replies.are_intact()


KERNELS: dict[str, type[NftKernel | IptablesKernel]] = {"nftables": NftKernel, "iptables": IptablesKernel}
_TOOLS = {"nftables": "nft", "iptables": "iptables-restore"}


def choose_language(asked: str) -> str:
    """Return the rule language to use: *asked*, or for "auto" nftables if it is installed, else iptables.

    Raises:
        SyncError: its tool is not installed; the message names the package.
    """
    if asked in _TOOLS:
        if not is_installed(_TOOLS[asked]):
            raise SyncError(f"--rules {asked} needs {_TOOLS[asked]}; install the package {asked}")
        return asked
    for language, tool in _TOOLS.items():
        if is_installed(tool):
            return language
    raise SyncError("neither nft nor iptables-restore is installed; install the package nftables")


class _ReplyRoutes:
    """Routes and bridge rules that bring replies to clients' own addresses to this node, as long as they are needed."""

    def __init__(self) -> None:
        self._are_there: bool | None = None  # None: unknown
        self._families: list[Family] = []  # that have them
        self._notices: RoutingRuleNotices | None = None

    def watch(self, on_change: Callable[[], None]) -> None:
        """Call *on_change* when another program may have removed them, until `unwatch`."""
        self._notices = RoutingRuleNotices(lambda: on_change() if self._are_there else None)

    def unwatch(self) -> None:
        if self._notices is not None:
            self._notices.close()
            self._notices = None

    async def are_intact(self) -> bool:
        """Return whether the routes are there, as far as they were added."""
        return not self._are_there or await transparent_replies.has_transparent_routes(self._families)

    async def add(self, facts: NodeFacts, *, again: bool) -> None:
        """Add them before the rules are loaded. *again*: another program may have removed them."""
        if not facts.transparent or (self._are_there and not again):
            return
        self._families = await transparent_replies.add_transparent_routes()
        for errors in (True, False):
            try:
                await load_nft(transparent_replies.bridge_table(errors=errors))
                break
            except SyncError as error:  # a host without bridges needs none
                what = "send ICMP errors to" if errors else "answer"
                log.warning("backends on the same bridge as a transparent client cannot %s it: %s", what, error)
        self._are_there = True

    async def remove_unused(self, facts: NodeFacts) -> None:
        """Remove them if the loaded rules do not need them."""
        if not facts.transparent and self._are_there is not False:
            await self.remove()

    async def remove(self) -> None:
        await transparent_replies.remove_transparent_routes()
        if is_installed("nft"):
            try:
                await load_nft(removal(transparent_replies.BRIDGE_TABLE))
            except SyncError as error:
                log.debug("this kernel has no bridge rules to remove: %s", error)
        self._are_there = False


def _is_bridge_table_intact(facts: NodeFacts) -> bool:
    """Return whether the bridge table is complete, or absent because the kernel refused it."""
    rules, errors = transparent_replies.BRIDGE_RULES, transparent_replies.BRIDGE_ERROR_RULES
    return not facts.transparent or count_rules(transparent_replies.BRIDGE_TABLE) in (0, rules, rules + errors)
