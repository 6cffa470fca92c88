"""Rules are repaired after changes of other programs; a refusal is logged once and retried with back-off."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from userspace_proxy.errors import SyncError
from userspace_proxy.modes.repairs import RuleRepairer

RETRY_S = 0.02
_BOUND_S = 5.0


class FakeRules:
    """Rules that another program has removed, and a kernel that refuses to load them while ``refusal`` is set."""

    def __init__(self, refusal: str | Exception) -> None:
        self.refusal = refusal
        self._are_there = False
        self._reloads: asyncio.Queue[float] = asyncio.Queue()

    async def reloaded(self) -> float:
        """Wait for the next attempt to load; return its time."""
        return await asyncio.wait_for(self._reloads.get(), _BOUND_S)

    async def is_intact(self) -> bool:
        return self._are_there

    async def reload(self) -> None:
        self._reloads.put_nowait(asyncio.get_running_loop().time())
        if isinstance(self.refusal, Exception):
            raise self.refusal
        if self.refusal:
            raise SyncError(self.refusal)
        self._are_there = True

    async def remove(self) -> None:
        self._are_there = False

    async def watch(self, on_change: Callable[[], None]) -> None:
        on_change()

    def unwatch(self) -> None:
        pass


@contextlib.asynccontextmanager
async def kept(rules: FakeRules, retry_s: float = RETRY_S) -> AsyncIterator[RuleRepairer]:
    repairer = RuleRepairer(rules, retry_s)

    async def repair() -> None:
        await repairer.repair()

    async with asyncio.TaskGroup() as group:
        task = group.create_task(repairer.run(repair))
        yield repairer
        task.cancel()


def said(caplog: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    return [(record.levelname, record.getMessage().rpartition(": ")[2]) for record in caplog.records]


async def test_a_refusal_is_named_once_and_so_is_its_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    rules = FakeRules("no room")
    async with kept(rules) as repairer:
        for _ in range(3):
            await rules.reloaded()
        assert (repairer.error, repairer.failing_since is None) == ("no room", False)
        rules.refusal = "no such module"
        for _ in range(2):
            await rules.reloaded()
        rules.refusal = ""
        await rules.reloaded()
        assert (repairer.error, repairer.failing_since) == ("", None)

    assert said(caplog) == [
        ("WARNING", "our rules were removed or changed by another program; loading them again"),
        ("ERROR", "no room"),
        ("ERROR", "no such module"),
        ("INFO", "our rules are as they were loaded again"),
    ]


async def test_a_bug_in_a_repair_is_logged_with_its_traceback_and_stops_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rules = FakeRules(KeyError("a bug"))
    async with kept(rules) as repairer:
        for _ in range(2):
            await rules.reloaded()
        assert repairer.error == "KeyError('a bug')"
        rules.refusal = ""
        await rules.reloaded()

    (told,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert told.exc_info


async def test_refused_repairs_are_retried_with_back_off() -> None:
    rules = FakeRules("no room")
    async with kept(rules):
        tries_at = [await rules.reloaded() for _ in range(5)]

    pauses_s = [after - before for before, after in itertools.pairwise(tries_at)]
    assert all(pause_s >= RETRY_S * 2**n for n, pause_s in enumerate(pauses_s)), pauses_s


async def test_a_load_that_succeeds_meanwhile_is_looked_at_at_once() -> None:
    rules = FakeRules("no room")
    async with kept(rules, retry_s=60) as repairer:
        await rules.reloaded()
        rules.refusal = ""
        repairer.check_now()
        await rules.reloaded()

        assert repairer.error == ""
