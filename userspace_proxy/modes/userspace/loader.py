"""Load the rules of userspace mode into the kernel: one class for each rule language.

Each class compares the new rules with those it holds. After a refused load the rules in the kernel are unknown, so the
next load writes all of them.
"""

import logging

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, load_nft
from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.redirects import Redirects
from userspace_proxy.modes.userspace import iptables, nft, transparent_replies
from userspace_proxy.modes.watched_rules import NftRules, XtablesRules, all_or_first_error
from userspace_proxy.modes.xtables_script import ChainKey
from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.nft_text import removal

log = logging.getLogger(__name__)


class NftKernel(NftRules):
    """Rules loaded by ``nft -f``, in one transaction for both families."""

    language = "nftables"

    def __init__(self) -> None:
        super().__init__(nft.TABLE)
        self._held: Redirects | None = None
        self._replies = _ReplyRoutes()

    async def load(self, redirects: Redirects) -> None:
        held, self._held = self._held, None  # unknown until the kernel has accepted the load
        with self._watch.quiet():
            await self._replies.add(redirects, again=held is None or self._watch.is_touched)
            if self._watch.is_touched:
                await load_nft(nft.table(redirects))
            elif held is None:
                try:
                    await load_nft(nft.in_place(redirects))
                except SyncError as error:
                    log.debug("the table in the kernel cannot be changed into ours (%s); replacing it", error)
                    await load_nft(nft.table(redirects))
            elif script := nft.change(held, redirects):
                try:
                    await load_nft(script)
                except SyncError as error:
                    log.warning("the change was refused (%s); loading the whole table", error)
                    await load_nft(nft.table(redirects))
            await self._replies.remove_unused(redirects)
        self._held = redirects
        self._watch.is_touched = False
        self._watch.check_after(0)

    async def reload(self) -> None:
        if (held := self._held) is not None:
            self._watch.is_touched = True
            try:
                await self.load(held)
            except SyncError:
                self._held = held
                raise

    async def remove(self) -> None:
        await self.remove_rules()
        await self._replies.remove()

    async def remove_rules(self) -> None:
        self._held = None
        await self._remove_table()

    def _has_all_rules(self) -> bool:
        held = self._held
        return held is not None and self._count() == nft.rules_in(held) and _is_bridge_table_intact(held)


class IptablesKernel(XtablesRules):
    """Rules loaded by ``iptables-restore``, in one transaction for each table of each family."""

    language = "iptables"

    def __init__(self) -> None:
        super().__init__(("mangle", "nat", "filter"))
        self._held: Redirects | None = None
        self._replies = _ReplyRoutes()
        self._loaded: dict[int, list[tuple[ChainKey, str]]] = {}

    async def load(self, redirects: Redirects) -> None:
        if redirects == self._held:
            return
        held, self._held = self._held, None
        with self._watch.quiet():
            await self._replies.add(redirects, again=held is None)
            try:
                await all_or_first_error(self._load_family(redirects, *each) for each in xtables.families())
            finally:
                await self._replies.remove_unused(redirects)
        self._held = redirects
        self._check_later()

    async def _load_family(self, redirects: Redirects, family: Family, tool: str) -> None:
        script = iptables.restore(redirects, family, await xtables.save(tool))
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
            for _, tool in xtables.installed_families():
                await xtables.restore(tool, iptables.removal(await xtables.save(tool)))

    async def _are_loaded(self) -> bool:
        for family, tool in xtables.families():
            if iptables.ours(await xtables.save(tool)) != self._loaded.get(family):
                return False
        return True


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

    async def add(self, redirects: Redirects, *, again: bool) -> None:
        """Add them before the rules of *redirects* are loaded. *again*: another program may have removed them."""
        if not redirects.transparent or (self._are_there and not again):
            return
        await transparent_replies.add_transparent_routes()
        for errors in (True, False):
            try:
                await load_nft(transparent_replies.bridge_table(errors=errors))
                break
            except SyncError as error:  # a host without bridges needs none
                what = "send ICMP errors to" if errors else "answer"
                log.warning("backends on the same bridge as a transparent client cannot %s it: %s", what, error)
        self._are_there = True

    async def remove_unused(self, redirects: Redirects) -> None:
        """Remove them if the loaded rules of *redirects* do not need them."""
        if not redirects.transparent and self._are_there is not False:
            await self.remove()

    async def remove(self) -> None:
        await transparent_replies.remove_transparent_routes()
        if is_installed("nft"):
            try:
                await load_nft(removal(transparent_replies.BRIDGE_TABLE))
            except SyncError as error:
                log.debug("this kernel has no bridge rules to remove: %s", error)
        self._are_there = False


def _is_bridge_table_intact(redirects: Redirects) -> bool:
    """Return whether the bridge table is complete, or absent because the kernel refused it."""
    rules, errors = transparent_replies.BRIDGE_RULES, transparent_replies.BRIDGE_ERROR_RULES
    return not redirects.transparent or count_rules(transparent_replies.BRIDGE_TABLE) in (0, rules, rules + errors)
