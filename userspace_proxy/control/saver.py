"""Saves allocations: shortly after a change, again after a failure, and once when the process ends."""

from __future__ import annotations

import asyncio

import msgspec

from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.proxy_ports import ProxyPorts


class Saver:
    """Writes the allocations that the next process needs, in a thread, shortly after they change."""

    def __init__(
        self, state_dir: StateDir | None, allocations: Allocations, ports: ProxyPorts, retry_after_s: float = 2.0
    ) -> None:
        self._state_dir = state_dir
        self._allocations = allocations
        self._ports = ports
        self._retry_after_s = retry_after_s
        self._saved = (-1, -1)  # the counts of changes that the file contains
        self._is_asked = False
        self._wanted = asyncio.Event()

    def _changes(self) -> tuple[int, int]:
        return self._allocations.changes, self._ports.changes

    def save_soon(self) -> None:
        self._is_asked = True
        if self._changes() != self._saved:
            self._wanted.set()

    def _memory(self) -> SavedAllocations:
        return msgspec.structs.replace(self._allocations.memory(), proxy_ports=self._ports.memory())

    def save(self) -> None:
        if self._state_dir is not None and self._is_asked and self._changes() != self._saved:
            self._state_dir.save(self._memory())

    async def run(self) -> None:
        while self._state_dir is not None:
            await self._wanted.wait()
            self._wanted.clear()
            changes = self._changes()
            if await asyncio.to_thread(self._state_dir.save, self._memory()):
                self._saved = changes
            else:  # for example a full disk
                await asyncio.sleep(self._retry_after_s)
                self._wanted.set()
