"""Base of the classes that hold iptables rules in the kernel: finding changes of other programs, and both families."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.notices import RuleWatch

# The pause between two checks of iptables-legacy, which sends no notices, and between a load and the check after it.
# A check takes at most this share of the time: with many rules it is long.
_POLL_S, _POLL_SHARE = 0.7, 0.05


class XtablesRules:
    """Rules in *tables*. Subclasses load them, and say in `_are_loaded` whether the kernel still has them."""

    def __init__(self, tables: Iterable[str]) -> None:
        self._tables = tuple(tables)
        self._watch = RuleWatch()
        self._check_s = 0.0

    async def watch(self, on_change: Callable[[], None]) -> None:
        if await xtables.is_legacy():
            self._watch.poll(self._pause_s, on_change)
        else:
            self._watch.listen(self._tables, on_change)
            self._check_later()

    def unwatch(self) -> None:
        self._watch.stop()

    async def is_intact(self) -> bool:
        began = time.monotonic()
        is_intact = await self._are_loaded()
        self._check_s = time.monotonic() - began
        return is_intact

    async def _are_loaded(self) -> bool:
        raise NotImplementedError

    def _check_later(self) -> None:
        self._watch.check_after(self._pause_s())

    def _pause_s(self) -> float:
        return max(_POLL_S, self._check_s / _POLL_SHARE)


async def all_or_first_error(loads: Iterable[Awaitable[None]]) -> None:
    """Wait for every one of *loads*; then raise the first error, if there is one."""
    for error in filter(None, await asyncio.gather(*loads, return_exceptions=True)):
        raise error
