"""One worker process, seen from the control process: start it, send requests, and replace it if it dies or hangs."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import Channel, close_descriptors
from userspace_proxy.dataplane.memory import PINS_MAX, PickerMemory, Pin
from userspace_proxy.dataplane.watchdog import LOOK_EVERY_S, Watchdog, activity_of
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import ServiceStats
from userspace_proxy.model.details import Details
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ListenerName, ServicePortName

_RESPAWN_PAUSE_S = 0.5
# Pause before listeners that a new worker had no room for are retried.
_ROOM_PAUSE_S = 1.0
_EXIT_TIMEOUT_S = 5.0
# A dying process closes its sockets a moment before its exit is visible; a killed one exits soon.
_END_SEEN_S = 0.3
_KILLED_S = 2.0
_LOOK_FIRST_S, _LOOK_LAST_S = 0.002, 0.1

log = logging.getLogger(__name__)


class Learnt:
    """Pins and ejections that the pickers of one worker have reported, kept for its replacement."""

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
    """The worker with index ``settings.worker``, replaced when it dies, hangs or breaks its channel.

    *replay* tells a worker its whole state, or that of some listeners. It returns those that the worker has no room
    for, with reasons. ``unserved`` has these until there is room. ``failing``: why nothing is served, "" if it is.
    """

    def __init__(
        self,
        settings: wire.WorkerSettings,
        knows: Callable[[ServicePortName], bool],
        replay: Callable[[WorkerProcess, Collection[ListenerName] | None], Awaitable[Mapping[ListenerName, str]]],
    ) -> None:
        self.settings = settings
        self.learnt = Learnt()
        self.restarts = 0
        self.failing = ""
        self.unserved: Mapping[ListenerName, str] = {}
        self._knows = knows
        self._replay = replay
        self._waiting: deque[asyncio.Future[wire.Answer]] = deque()
        self._told: list[ServiceStats] = []  # parts of stats until the answer is complete
        self._details: list[Details] = []  # parts of details, too
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._replaced: list[subprocess.Popen[bytes]] = []  # replaced processes that have not exited yet
        self._closing = False
        self._respawn: asyncio.Task[None] | None = None
        self._watchdog = Watchdog()
        self._owes_answer = False
        self._watch: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process, which then accepts requests; raises OSError."""
        ours, theirs = socket.socketpair()
        settings = msgspec.json.encode(self.settings).decode()
        module = "userspace_proxy.dataplane.worker"
        command = [sys.executable, "-P", "-m", module, str(theirs.fileno()), settings]
        with theirs:
            try:
                # Its own session: signals from a terminal are for the control process.
                self._process = subprocess.Popen(
                    command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
                )
            except BaseException:
                ours.close()
                raise
        self._channel = Channel(ours, self._on_frame, self._on_close)
        self._watchdog = Watchdog()
        self._owes_answer = False
        if self._watch is None:
            self._watch = asyncio.create_task(self._watch_over(), name="watch the worker")

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        close_descriptors(descriptors)  # workers send none
        try:
            answer = wire.answers.decode(body)
        except msgspec.DecodeError as error:
            if self._channel is not None:
                self._channel.break_off(f"sent an invalid answer ({error})")
            return
        if isinstance(answer, wire.Pong):
            self._owes_answer = False
            self._watchdog.note_answer()
        elif isinstance(answer, wire.News):
            for name, memory in answer.memory:
                if self._knows(name):
                    self.learnt.note(name, memory)
        elif isinstance(answer, wire.ToldPart):
            self._details.append(answer.details)
        elif isinstance(answer, wire.StatsPart):
            self._told += answer.services
        elif self._waiting:
            if isinstance(answer, wire.Stats):
                answer, self._told = wire.Stats(answer.rest, self._told), []
            elif isinstance(answer, wire.Told):
                answer, self._details = wire.Told(self._details), []
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(answer)

    async def _watch_over(self) -> None:
        """Replace the worker if it hangs."""
        while True:
            await asyncio.sleep(LOOK_EVERY_S)
            self._replaced = [process for process in self._replaced if process.poll() is None]
            if self._channel is None or self._process is None:
                continue
            if not self._owes_answer:
                self._owes_answer = True
                self._channel.send(wire.encode(wire.Ping()))
            elif why := self._watchdog.note_silence(activity_of(self.pid)):
                self._process.kill()
                self._channel.break_off(why)

    def _on_close(self) -> None:
        # Until there is another worker, requests fail at once: a waiting one would take that worker's first answer.
        channel, self._channel = self._channel, None
        self._told = []
        self._details = []
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(SyncError("the worker process has ended"))
        if not self._closing and self._process is not None:
            broken = channel.broken if channel is not None else ""
            if broken:
                # Before the worker notices the closed channel: it lives, and must not take this process for dead.
                self._process.terminate()
            self.failing = f"worker process {self.pid} {broken or 'has ended'}"
            self._respawn = asyncio.create_task(self._replace(self._process, broken), name="replace the worker")

    async def _replace(self, process: subprocess.Popen[bytes], broken: str) -> None:
        """Start a worker in place of *process*, even if that does not exit: its channel is closed."""
        if not broken:
            code = await exit_code(process, _END_SEEN_S)
            broken = "has closed its channel" if code is None else f"has ended (exit code {code})"
            if code is None:
                process.terminate()
        if process.poll() is None:
            self._replaced.append(process)
        self.restarts += 1
        log.error("worker process %d %s; another one takes its listeners", process.pid, broken)
        if self.restarts > 1:
            await asyncio.sleep(_RESPAWN_PAUSE_S)  # back off, in case workers die at once
        told = ""
        while True:
            try:
                self.start()
                break
            except OSError as error:
                if told != (told := str(error)):
                    log.error("no worker process can be started, trying again: %s", error)  # noqa: TRY400
                await asyncio.sleep(_RESPAWN_PAUSE_S)
        with contextlib.suppress(SyncError):  # the new worker has ended, too, and is being replaced
            await self._tell_all()

    async def _tell_all(self) -> None:
        self.unserved = await self._replay(self, None)
        self.failing = ""
        if self.unserved:
            why = next(iter(self.unserved.values()))
            log.error("no room for %d listeners (%s); retrying", len(self.unserved), why)
            while self.unserved:
                await asyncio.sleep(_ROOM_PAUSE_S)
                self.unserved = await self._replay(self, list(self.unserved))
            log.info("all listeners are served again")

    def send(self, request: wire.Request, descriptors: Sequence[int] = ()) -> asyncio.Future[wire.Answer]:
        """Send *request*. The returned future gets the answer, or SyncError if there is no worker."""
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
        for process in self._replaced:
            process.kill()

    def leave(self) -> None:
        """Let the worker serve alone."""
        self.end_tasks()
        if self._channel is not None:
            self._channel.close()

    def end_tasks(self) -> None:
        """Stop watching, replacing and replaying."""
        self._closing = True
        for task in (self._respawn, self._watch):
            if task is not None:
                task.cancel()

    async def sent(self) -> None:
        """Wait until the kernel has accepted all that was sent, with its descriptors."""
        if self._channel is not None:
            await self._channel.sent()

    async def close(self, drain_timeout_s: float, *, handed_over: bool) -> None:
        """Let this worker, and the replaced ones that still run, drain and exit."""
        await asyncio.gather(
            self._close(drain_timeout_s, handed_over=handed_over),
            *(_end(process, drain_timeout_s) for process in self._replaced),
        )

    async def _close(self, drain_timeout_s: float, *, handed_over: bool) -> None:
        with contextlib.suppress(SyncError, TimeoutError):
            async with asyncio.timeout(drain_timeout_s + _EXIT_TIMEOUT_S):
                await self.send(wire.Close(drain_timeout_s, handed_over))
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            await _end(self._process, _EXIT_TIMEOUT_S)


async def exit_code(process: subprocess.Popen[bytes], timeout_s: float) -> int | None:
    """Return the exit code of *process*, or None if it still runs: SIGKILL does not end uninterruptible sleep."""
    give_up_at = time.monotonic() + timeout_s
    pause_s = _LOOK_FIRST_S
    while (code := process.poll()) is None and time.monotonic() < give_up_at:
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LOOK_LAST_S)
    return code


async def _end(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    """Wait for *process* to exit; kill it after *timeout_s*."""
    if await exit_code(process, timeout_s) is None:
        process.kill()
        if await exit_code(process, _KILLED_S) is None:
            log.error("worker process %d has been killed but does not exit", process.pid)


async def answers_to(futures: Iterable[asyncio.Future[wire.Answer]]) -> list[wire.Answer]:
    """Return the answers to several requests; raises SyncError if one is not answered."""
    return await asyncio.gather(*futures)


def _retrieve(future: asyncio.Future[wire.Answer]) -> None:
    """Mark the future's exception as seen: a request without a waiting caller may fail silently."""
    if not future.cancelled():
        future.exception()
