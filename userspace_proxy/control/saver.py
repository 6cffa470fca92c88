"""When the memory is written: shortly after it changed, and once more at the end."""

from __future__ import annotations

import asyncio

import msgspec

from userspace_proxy.control.allotments import Allotting
from userspace_proxy.control.memory import Memory, StateDir
from userspace_proxy.proxiers.proxy_ports import ProxyPorts


class Saver:
    """Writes what the next process should remember, shortly after it changed, in a thread."""

    def __init__(self, state_dir: StateDir | None, allotting: Allotting, ports: ProxyPorts) -> None:
        self._state_dir = state_dir
        self._allotting = allotting
        self._ports = ports
        self._saved = (-1, -1)
        self._wanted = asyncio.Event()

    def _changes(self) -> tuple[int, int]:
        return self._allotting.changes, self._ports.changes

    def save_soon(self) -> None:
        if self._changes() != self._saved:
            self._wanted.set()

    def _take(self) -> Memory:
        self._saved = self._changes()
        return msgspec.structs.replace(self._allotting.memory(), proxy_ports=self._ports.memory())

    def save(self) -> None:
        if self._state_dir is not None and self._saved != (-1, -1) and self._changes() != self._saved:
            self._state_dir.save(self._take())

    async def run(self) -> None:
        while self._state_dir is not None:
            await self._wanted.wait()
            self._wanted.clear()
            await asyncio.to_thread(self._state_dir.save, self._take())
