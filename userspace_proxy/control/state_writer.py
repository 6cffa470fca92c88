"""Writes allocations to the state folder: after a change, again after a failure, and when the process ends."""

import asyncio

import msgspec

from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.memory import SavedAllocations, StateDir
from userspace_proxy.control.proxy_ports import ProxyPorts


class StateWriter:
    """Writes the allocations to the state folder, in a thread, shortly after they change."""

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
        """Let `run` save the allocations, if they have changed since the last save."""
        self._is_asked = True
        if self._changes() != self._saved:
            self._wanted.set()

    def _memory(self) -> SavedAllocations:
        return msgspec.structs.replace(self._allocations.memory(), proxy_ports=self._ports.memory())

    def save(self) -> None:
        """Save the allocations now if they have changed. Do nothing if `save_soon` was never called."""
        if self._state_dir is not None and self._is_asked and self._changes() != self._saved:
            self._state_dir.save(self._memory())

    async def run(self) -> None:
        """Save after each change until cancelled; repeat a failed save."""
        while self._state_dir is not None:
            await self._wanted.wait()
            self._wanted.clear()
            changes = self._changes()
            if await asyncio.to_thread(self._state_dir.save, self._memory()):
                self._saved = changes
            else:  # for example a full disk
                await asyncio.sleep(self._retry_after_s)
                self._wanted.set()
