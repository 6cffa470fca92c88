"""One worker process, seen from the control process, and what its replacement has to know."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.child import ChildProcess
from userspace_proxy.dataplane.memory import PINS_MAX, PickerMemory, Pin
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ListenerName, ServicePortName

# Pause before listeners that a new worker had no room for are retried.
_ROOM_PAUSE_S = 1.0
_EXIT_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class Learnt:
    """Pins and ejections that the pickers of one worker have reported, kept for its replacement."""

    def __init__(self) -> None:
        self._pins: dict[ServicePortName, dict[str, Pin]] = {}
        self._ejected: dict[ServicePortName, list[tuple[Address, int, float]]] = {}

    def note(self, name: ServicePortName, memory: PickerMemory) -> None:
        self._ejected[name] = memory.ejected
        pins = self._pins.setdefault(name, {})
        for client_ip, pin in memory.pins:
            pins.pop(client_ip, None)
            pins[client_ip] = pin
        while len(pins) > PINS_MAX:
            del pins[next(iter(pins))]

    def memory_of(self, name: ServicePortName) -> PickerMemory:
        return PickerMemory(list(self._pins.get(name, {}).items()), self._ejected.get(name, []))

    def forget(self, name: ServicePortName) -> None:
        self._pins.pop(name, None)
        self._ejected.pop(name, None)


class WorkerProcess(ChildProcess[wire.Done]):
    """The worker with index ``settings.worker``.

    *replay* sends a worker its whole state, or that of some listeners. It returns those that the worker has no room
    for, with reasons. ``unserved`` has these until there is room.
    """

    def __init__(
        self,
        settings: wire.WorkerSettings,
        serves: Callable[[ServicePortName], bool],
        replay: Callable[[WorkerProcess, Collection[ListenerName] | None], Awaitable[Mapping[ListenerName, str]]],
    ) -> None:
        super().__init__("worker", "userspace_proxy.dataplane.worker", settings)
        self.settings = settings
        self.learnt = Learnt()
        self.unserved: Mapping[ListenerName, str] = {}
        self._serves = serves
        self._replay = replay
        self._parts: list[wire.Part] = []  # until the answer is complete

    def read_answer(self, body: bytes) -> wire.Done | None:
        answer: wire.Answer = wire.answers.decode(body)
        if isinstance(answer, wire.News):
            for name, memory in answer.memory:
                if self._serves(name):
                    self.learnt.note(name, memory)
            return None
        if isinstance(answer, wire.Part):
            self._parts.append(answer)
            return None
        parts, self._parts = self._parts, []
        services = [service for part in parts for service in part.services]
        details = [of_port for part in parts for of_port in part.details]
        return msgspec.structs.replace(answer, services=services, details=details)

    def forget_parts(self) -> None:
        self._parts = []

    async def replay(self) -> None:
        self.unserved = await self._replay(self, None)
        self.failing = ""
        if self.unserved:
            why = next(iter(self.unserved.values()))
            log.error("no room for %d listeners (%s); retrying", len(self.unserved), why)
            while self.unserved:
                await asyncio.sleep(_ROOM_PAUSE_S)
                self.unserved = await self._replay(self, list(self.unserved))
            log.info("all listeners are served again")

    def cut(self) -> None:
        self.notify(wire.Cut())
        for process in self._replaced:
            process.kill()

    async def close(self, drain_timeout_s: float, *, handed_over: bool) -> None:
        """Let this worker, and the replaced ones that still run, drain and exit."""
        await asyncio.gather(
            self.end(wire.Stop(drain_timeout_s, handed_over), drain_timeout_s + _EXIT_TIMEOUT_S, _EXIT_TIMEOUT_S),
            *(self.await_exit(process, drain_timeout_s) for process in self._replaced),
        )


async def answers_to(futures: Iterable[asyncio.Future[wire.Done]]) -> list[wire.Done]:
    """Return the answers to several requests; raises SyncError if one is not answered."""
    return await asyncio.gather(*futures)
