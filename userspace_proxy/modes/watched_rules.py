"""Bases of the classes that hold rules in the kernel: they find changes of other programs."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterable

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, load_nft
from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.nfnetlink import count_rules
from userspace_proxy.netfilter.nft_text import removal
from userspace_proxy.netfilter.notices import RuleWatch

# The pause between two checks of iptables-legacy, which sends no notices, and between a load and the check after it.
# A check takes at most this share of the time: with many rules it is long.
_POLL_S, _POLL_SHARE = 0.7, 0.05

log = logging.getLogger(__name__)


class WatchedRules:
    """Rules in *tables*, by their names without family."""

    def __init__(self, tables: Iterable[str]) -> None:
        self._tables = tuple(tables)
        self._watch = RuleWatch()

    async def watch(self, on_change: Callable[[], None]) -> None:
        self._watch.listen(self._tables, on_change)

    def unwatch(self) -> None:
        self._watch.stop()


class NftRules(WatchedRules):
    """Rules in one nftables *table* (``family name``). Subclasses load them."""

    def __init__(self, table: str) -> None:
        super().__init__((table.split()[1],))
        self._table = table

    async def is_intact(self) -> bool:
        if self._watch.is_touched:
            return False
        try:
            return self._has_all_rules()
        except OSError as error:
            log.debug("our rules could not be counted: %s", error)
            return False

    def _has_all_rules(self) -> bool:
        """Return whether rules are loaded, and the kernel has their number. Raises OSError."""
        raise NotImplementedError

    def _count(self) -> int:
        return count_rules(self._table)

    async def _remove_table(self) -> None:
        """Remove the table, if it is there. Packets that other rules serve by now are not refused meanwhile.

        A packet may be between two rules while the kernel deletes the table. It then finds no element in a map any
        more, and the rules after the look-up refuse it. So the chains are first taken off their hooks (`dormant`), and
        the kernel waits until no packet is in them: it does so at the end of a dry run (`synchronize_rcu` in
        `__nf_tables_abort`, net/netfilter/nf_tables_api.c).

        Raises:
            SyncError: the kernel refused the removal.
        """
        if is_installed("nft"):
            with self._watch.quiet():
                with contextlib.suppress(OSError, SyncError):  # the removal fails for the same reason, or succeeds
                    if count_rules(self._table):
                        await load_nft(f"table {self._table} {{ flags dormant; }}\n")
                        await load_nft(removal(self._table), is_dry_run=True)
                await load_nft(removal(self._table))


class XtablesRules(WatchedRules):
    """Rules of iptables in several tables. Subclasses load them, and look for them in `_are_loaded`."""

    def __init__(self, tables: Iterable[str]) -> None:
        super().__init__(tables)
        self._check_s = 0.0

    async def watch(self, on_change: Callable[[], None]) -> None:
        if await xtables.is_legacy():
            self._watch.poll(self._pause_s, on_change)
        else:
            await super().watch(on_change)
            self._check_later()

    async def is_intact(self) -> bool:
        began = time.monotonic()
        is_intact = await self._are_loaded()
        self._check_s = time.monotonic() - began
        return is_intact

    async def _are_loaded(self) -> bool:
        """Return whether the kernel still has the rules."""
        raise NotImplementedError

    def _check_later(self) -> None:
        self._watch.check_after(self._pause_s())

    def _pause_s(self) -> float:
        return max(_POLL_S, self._check_s / _POLL_SHARE)


async def all_or_first_error(loads: Iterable[Awaitable[None]]) -> None:
    """Wait for every one of *loads*; then raise the first error, if there is one."""
    for error in filter(None, await asyncio.gather(*loads, return_exceptions=True)):
        raise error
