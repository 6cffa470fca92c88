"""One worker process, seen from the control side: started, asked, and replaced when it dies."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import Channel
from userspace_proxy.dataplane.memory import PINS_MAX, PickerMemory, Pin
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import ServiceStats
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName

_RESPAWN_PAUSE_S = 0.5
_EXIT_TIMEOUT_S = 5.0

log = logging.getLogger(__name__)


class Learnt:
    """What the pickers of one worker have told; it is given to the one that takes the worker's place."""

    def __init__(self) -> None:
        self._pins: dict[ServicePortName, dict[str, Pin]] = {}
        self._ejected: dict[ServicePortName, list[tuple[Address, int, float]]] = {}

    @property
    def pins(self) -> int:
        return sum(map(len, self._pins.values()))

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


class WorkerProcess:
    """The worker number ``settings.worker``. *replay* sends it all that it should know, after a replacement."""

    def __init__(
        self,
        settings: wire.WorkerSettings,
        knows: Callable[[ServicePortName], bool],
        replay: Callable[[WorkerProcess], object],
    ) -> None:
        self.settings = settings
        self.learnt = Learnt()
        self.restarts = 0
        self._knows = knows
        self._replay = replay
        self._waiting: deque[asyncio.Future[wire.Answer]] = deque()
        self._told: list[ServiceStats] = []  # parts of stats that are not whole yet
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._respawn: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process; it serves what it is told from then on. Raises OSError."""
        ours, theirs = socket.socketpair()
        settings = msgspec.json.encode(self.settings).decode()
        command = [sys.executable, "-P", "-m", "userspace_proxy.dataplane.worker", str(theirs.fileno()), settings]
        with theirs:
            try:
                # A session of its own: signals from a terminal are for the control process.
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours, self._on_frame, self._on_close)

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        answer = wire.answers.decode(body)
        if isinstance(answer, wire.News):
            for name, memory in answer.memory:
                if self._knows(name):
                    self.learnt.note(name, memory)
        elif isinstance(answer, wire.StatsPart):
            self._told += answer.services
        elif self._waiting:
            if isinstance(answer, wire.Stats):
                answer, self._told = wire.Stats(answer.rest, self._told), []
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(answer)

    def _on_close(self) -> None:
        # Until another worker is there, requests fail at once: one that waited would take that one's first answer.
        self._channel = None
        self._told = []
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(SyncError("the worker process has ended"))
        if not self._closing:
            self._respawn = asyncio.create_task(self._replace(), name="replace the worker")

    async def _replace(self) -> None:
        assert self._process is not None
        code = await asyncio.to_thread(self._process.wait)
        self.restarts += 1
        log.error("the worker process has ended (exit code %s); another one takes its listeners", code)
        if self.restarts > 1:
            await asyncio.sleep(_RESPAWN_PAUSE_S)  # one that dies at once must not be started all the time
        while True:
            try:
                self.start()
                break
            except OSError as error:
                log.error("no worker process can be started, trying again: %s", error)  # noqa: TRY400
                await asyncio.sleep(_RESPAWN_PAUSE_S)
        self._replay(self)

    def send(self, request: wire.Request, descriptors: Sequence[int] = ()) -> asyncio.Future[wire.Answer]:
        """Send *request*; the future has the answer, or SyncError where there is nobody to give one."""
        future: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        if self._channel is None:
            future.set_exception(SyncError("there is no worker process"))
            return future
        self._waiting.append(future)
        future.add_done_callback(_retrieve)
        self._channel.send(wire.encode(request), descriptors)
        return future

    def cut(self) -> None:
        if self._channel is not None:
            self._channel.send(wire.encode(wire.Cut()))

    def leave(self) -> None:
        """Let it serve on alone."""
        self._closing = True
        if self._respawn is not None:
            self._respawn.cancel()
        if self._channel is not None:
            self._channel.close()

    async def close(self, drain_timeout_s: float, *, handed_over: bool) -> None:
        """Let it drain and end."""
        self._closing = True
        if self._respawn is not None:
            self._respawn.cancel()
        with contextlib.suppress(SyncError, TimeoutError):
            async with asyncio.timeout(drain_timeout_s + _EXIT_TIMEOUT_S):
                await self.send(wire.Close(drain_timeout_s, handed_over))
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)


async def answers_to(futures: Iterable[asyncio.Future[wire.Answer]]) -> list[wire.Answer]:
    """Return the answers to several requests; raises SyncError where one is not answered."""
    return await asyncio.gather(*futures)


def _retrieve(future: asyncio.Future[wire.Answer]) -> None:
    """A request that nobody waits for may fail without a word."""
    if not future.cancelled():
        future.exception()
