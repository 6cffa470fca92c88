"""Allocations are written to disk, and again after a failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.control.state_writer import StateWriter

REMEMBERED = {"default/web:/TCP": 12_345}


class Remembering(Allocations):
    """Has a value that must be saved."""

    changes = 1

    def memory(self) -> SavedAllocations:
        return SavedAllocations(node_ports=REMEMBERED)


@contextlib.asynccontextmanager
async def saving(folder: Path, retry_after_s: float) -> AsyncIterator[StateWriter]:
    saver = StateWriter(StateDir(folder), Remembering(), ProxyPorts(11_000, 12_000, {}), retry_after_s)
    task = asyncio.create_task(saver.run())
    try:
        yield saver
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_failed_save_is_repeated_until_it_succeeds(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with saving(folder, 0.01) as saver, asyncio.timeout(20):
        folder.rmdir()
        saver.save_soon()
        await asyncio.sleep(0.05)
        folder.mkdir()
        while not (folder / "allocations.json").exists():
            await asyncio.sleep(0.01)

    assert StateDir(folder).load().node_ports == REMEMBERED


async def test_a_failed_save_is_repeated_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    async with saving(folder, 1_000) as saver:
        folder.rmdir()
        saver.save_soon()
        await asyncio.sleep(0.05)
        folder.mkdir()
    saver.save()

    assert StateDir(folder).load().node_ports == REMEMBERED


async def test_before_the_first_sync_nothing_is_written(tmp_path: Path) -> None:
    async with saving(tmp_path, 1) as saver:
        saver.save()

    assert not list(tmp_path.iterdir())
