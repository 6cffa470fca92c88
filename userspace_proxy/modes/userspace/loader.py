"""Our rules in the kernel: one class a rule language. Loads are all or nothing.

A Kernel compares with *what it holds*, so a load that was refused can simply be asked for again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, run_tool
from userspace_proxy.interfaces import Redirects
from userspace_proxy.model.endpoint import Family
from userspace_proxy.modes.userspace import iptables, nft
from userspace_proxy.modes.userspace import transparent_replies as answers
from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.notices import LaterLook, RuleNotices, call_often, quiet

# How often iptables-legacy is looked at, which sends no notices.
_POLL_S = 0.7
_LOOK_AFTER_S = 1.0

log = logging.getLogger(__name__)


class NftKernel:
    """Rules through ``nft -f``: one transaction for both families."""

    language = "nftables"

    def __init__(self) -> None:
        self._held: Redirects | None = None
        self._answers = _Answers()
        self._notices: RuleNotices | None = None
        self._on_change: Callable[[], None] | None = None
        self._touched = False

    async def load(self, redirects: Redirects) -> None:
        held, self._held = self._held, None  # unknown until the kernel has said yes
        with quiet(self._notices):
            await self._answers.before(redirects, anew=held is None or self._touched)
            if held is None or self._touched:
                await run_tool("nft", "-f", "-", stdin=nft.table(redirects))
            elif script := nft.change(held, redirects):
                try:
                    await run_tool("nft", "-f", "-", stdin=script)
                except SyncError as error:
                    log.warning("the change was refused (%s); loading the whole table", error)
                    await run_tool("nft", "-f", "-", stdin=nft.table(redirects))
            await self._answers.after(redirects)
        self._held = redirects
        self._touched = False
        if self._on_change is not None:
            self._on_change()  # have a look soon: nothing was heard while we loaded

    async def reload(self) -> None:
        if (held := self._held) is not None:
            self._touched = True
            try:
                await self.load(held)
            except SyncError:
                self._held = held
                raise

    async def remove(self) -> None:
        await self.remove_rules()
        await self._answers.let_pass()

    async def remove_rules(self) -> None:
        self._held = None
        if is_installed("nft"):
            with quiet(self._notices):
                await run_tool("nft", "-f", "-", stdin=nft.removal())

    async def is_intact(self) -> bool:
        if self._touched or self._held is None:
            return False
        try:
            return count_rules(nft.TABLE) == nft.rules_in(self._held) and _is_bridge_table_intact(self._held)
        except OSError as error:
            log.debug("our rules could not be counted: %s", error)
            return False

    async def watch(self, on_change: Callable[[], None]) -> None:
        def on_notice() -> None:
            self._touched = True
            on_change()

        self._on_change = on_change
        self._notices = RuleNotices({nft.TABLE.split()[1]}, on_notice)

    def unwatch(self) -> None:
        self._on_change = None
        if self._notices is not None:
            self._notices.close()
            self._notices = None


class IptablesKernel:
    """Rules through ``iptables-restore``: one transaction for each table of each family."""

    language = "iptables"

    def __init__(self) -> None:
        self._held: Redirects | None = None
        self._answers = _Answers()
        self._loaded: dict[int, tuple[str, ...]] = {}
        self._look = LaterLook()
        self._notices: RuleNotices | None = None
        self._poll: asyncio.Task[None] | None = None

    async def load(self, redirects: Redirects) -> None:
        if redirects == self._held:
            return
        held, self._held = self._held, None
        with quiet(self._notices):
            await self._answers.before(redirects, anew=held is None)
            done = await asyncio.gather(
                *(self._load_family(redirects, family, prefix) for family, prefix in xtables.families()),
                return_exceptions=True,
            )
            await self._answers.after(redirects)
        for error in filter(None, done):
            raise error
        self._held = redirects
        self._look.after(_LOOK_AFTER_S)

    async def _load_family(self, redirects: Redirects, family: Family, prefix: str) -> None:
        saved = await xtables.save(prefix)
        script = iptables.restore(redirects, family, saved)
        await xtables.restore(prefix, script)
        loaded = iptables.ours(await xtables.save(prefix))
        if len(loaded) != iptables.rules_in(script):
            raise SyncError(f"{prefix}: somebody else changed rules while ours were loaded")
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
        with quiet(self._notices):
            await self._answers.let_pass()

    async def remove_rules(self) -> None:
        self._held = None
        self._loaded = {}
        with quiet(self._notices):
            for _, prefix in xtables.families():
                if not is_installed(f"{prefix}-save"):
                    continue
                script = iptables.removal(await xtables.save(prefix))
                await xtables.restore(prefix, script)

    async def is_intact(self) -> bool:
        for family, prefix in xtables.families():
            if iptables.ours(await xtables.save(prefix)) != self._loaded.get(family):
                return False
        return True

    async def watch(self, on_change: Callable[[], None]) -> None:
        if await xtables.is_legacy():
            self._poll = asyncio.create_task(call_often(lambda: _POLL_S, on_change), name="rules-poll")
        else:
            self._notices = RuleNotices({"mangle", "nat", "filter"}, on_change)
            self._look.begin(on_change)
            self._look.after(_LOOK_AFTER_S)

    def unwatch(self) -> None:
        self._look.end()
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None


KERNELS: dict[str, type[NftKernel | IptablesKernel]] = {"nftables": NftKernel, "iptables": IptablesKernel}
_TOOLS = {"nftables": "nft", "iptables": "iptables-restore"}


def choose_language(asked: str) -> str:
    """Return the rule language to use: *asked*, or for "auto" nftables where it is installed, else iptables.

    Raises:
        SyncError: its tool is not installed; says which package has it.
    """
    if asked in _TOOLS:
        if not is_installed(_TOOLS[asked]):
            raise SyncError(f"--rules {asked} needs {_TOOLS[asked]}; install the package {asked}")
        return asked
    for language, tool in _TOOLS.items():
        if is_installed(tool):
            return language
    raise SyncError("neither nft nor iptables-restore is installed; install the package nftables")


class _Answers:
    """What backends answer to clients' own addresses: brought to this node, or passed by, whatever was before us."""

    def __init__(self) -> None:
        self._are_brought: bool | None = None

    async def before(self, redirects: Redirects, *, anew: bool) -> None:
        """See to it before rules are loaded that no answer is lost; *anew*: somebody else may have changed it."""
        if not redirects.transparent or (self._are_brought and not anew):
            return
        await answers.add_transparent_routes()
        for errors in (True, False):
            try:
                await run_tool("nft", "-f", "-", stdin=answers.bridge_table(errors=errors))
                break
            except SyncError as error:  # a host without bridges can do without it
                what = "tell of errors to" if errors else "answer"
                log.warning("backends on a bridge cannot %s transparent clients beside them: %s", what, error)
        self._are_brought = True

    async def after(self, redirects: Redirects) -> None:
        """Take away what is not needed with the rules that are loaded now."""
        if not redirects.transparent and self._are_brought is not False:
            await self.let_pass()

    async def let_pass(self) -> None:
        await answers.remove_transparent_routes()
        if is_installed("nft"):
            try:
                await run_tool("nft", "-f", "-", stdin=answers.bridge_removal())
            except SyncError as error:
                log.debug("this kernel has no rules for bridges to remove: %s", error)
        self._are_brought = False


def _is_bridge_table_intact(redirects: Redirects) -> bool:
    """Return whether it is as it should be; not there at all where this kernel refused it, which was said."""
    rules, errors = answers.BRIDGE_RULES, answers.BRIDGE_ERROR_RULES
    return not redirects.transparent or count_rules(answers.BRIDGE_TABLE) in (0, rules, rules + errors)
