"""DataPlane for the control side: the same calls, sent to a worker process.

This side opens the listeners and keeps a duplicate of each, with all that the worker was told. So a worker that
dies is replaced by one that serves at once at the same sockets: only its own open connections are lost, and
clients that were waiting to be accepted never notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import Channel
from userspace_proxy.dataplane.picker import PINS_MAX, PickerMemory, Pin
from userspace_proxy.dataplane.sockets import open_listener, reserve_refusing_port
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Backends, ListenerSpec, PlaneStats
from userspace_proxy.model.names import ServicePortName

# So much at once that no packet waits for more than a few milliseconds while the worker takes it in.
_A_FRAME = 100
_OPENED_A_FRAME = 50
_RESPAWN_PAUSE_S = 0.5
_EXIT_TIMEOUT_S = 5.0

Item = TypeVar("Item")

log = logging.getLogger(__name__)


class RemotePlane:
    """One worker process, and what is needed to replace it. Make it inside the running event loop, then `start`."""

    def __init__(self, settings: wire.WorkerSettings) -> None:
        self._settings = settings
        self._sockets: dict[ServicePortName, socket.socket] = {}
        self._specs: dict[ServicePortName, ListenerSpec] = {}
        self._backends: dict[ServicePortName, Backends] = {}
        self._pins: dict[ServicePortName, dict[str, Pin]] = {}
        self._ejected: dict[ServicePortName, list[tuple[tuple[str, int], int, float]]] = {}
        self._reserved: tuple[socket.socket, ...] = ()
        self._waiting: deque[asyncio.Future[wire.Answer]] = deque()
        self._channel: Channel | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closing = False
        self._respawn: asyncio.Task[None] | None = None
        self.restarts = 0

    # ---- the process

    def start(self) -> None:
        """Start the worker; it serves what it is told from then on."""
        ours, theirs = socket.socketpair()
        settings = msgspec.json.encode(self._settings).decode()
        command = [sys.executable, "-m", "userspace_proxy.dataplane.worker", str(theirs.fileno()), settings]
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
            self._note(answer)
        elif self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_result(answer)

    def _on_close(self) -> None:
        # Until another worker is there, requests fail at once: one that waited would take that one's first answer.
        self._channel = None
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(SyncError("the worker process has ended"))
        if not self._closing:
            self._respawn = asyncio.create_task(self._replace_worker(), name="replace the worker")

    async def _replace_worker(self) -> None:
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
        for part in _parts(list(self._specs.values()), _OPENED_A_FRAME):
            names = [spec.name for spec in part]
            known = wire.Open(
                part,
                len(part),
                [(name, self._backends[name]) for name in names if name in self._backends],
                [(name, self._memory_of(name)) for name in names],
            )
            self._send(known, [self._sockets[name].fileno() for name in names])

    def _memory_of(self, name: ServicePortName) -> PickerMemory:
        return PickerMemory(list(self._pins.get(name, {}).items()), self._ejected.get(name, []))

    def _send(self, request: wire.Request, descriptors: Sequence[int] = ()) -> asyncio.Future[wire.Answer]:
        future: asyncio.Future[wire.Answer] = asyncio.get_running_loop().create_future()
        if self._channel is None:
            future.set_exception(SyncError("there is no worker process"))
            return future
        self._waiting.append(future)
        future.add_done_callback(_retrieve)
        self._channel.send(wire.encode(request), descriptors)
        return future

    # ---- DataPlane

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ServicePortName, str]:
        refused: dict[ServicePortName, str] = {}
        limit_s = self._settings.limits.dead_peer_timeout_s
        new, known = [], []
        for count, spec in enumerate(specs, 1):
            if spec.name in self._sockets:
                known.append(spec)
                continue
            try:
                self._sockets[spec.name] = open_listener(spec.name.protocol, spec.proxy_port, limit_s)
                new.append(spec)
            except OSError as error:
                refused[spec.name] = f"port {spec.proxy_port}: {error.strerror}"
            if not count % _A_FRAME:
                await asyncio.sleep(0)
        self._specs.update({spec.name: spec for spec in (*new, *known)})
        sent = [
            self._send(wire.Open(part, len(part)), [self._sockets[spec.name].fileno() for spec in part])
            for part in _parts(new, _OPENED_A_FRAME)
        ]
        sent += [self._send(wire.Open(part, 0)) for part in _parts(known)]
        for answer in await asyncio.gather(*sent):
            if isinstance(answer, wire.Done):
                refused.update(answer.refused)
        for name in refused:
            self._forget(name)
        return refused

    async def reserve(self, port: int) -> str:
        try:
            self._reserved += reserve_refusing_port(port)
        except OSError as error:
            return f"port {port}: {error.strerror}"
        return ""

    async def update(self, backends: Mapping[ServicePortName, Backends]) -> None:
        self._backends.update({name: given for name, given in backends.items() if name in self._specs})
        await asyncio.gather(*(self._send(wire.Update(part)) for part in _parts(backends.items())))

    async def retire(self, names: Sequence[ServicePortName]) -> None:
        for name in names:
            self._forget(name)
        await asyncio.gather(*(self._send(wire.Retire(part)) for part in _parts(list(names))))

    def _forget(self, name: ServicePortName) -> None:
        for known in (self._specs, self._backends, self._pins, self._ejected):
            known.pop(name, None)
        if (sock := self._sockets.pop(name, None)) is not None:
            sock.close()

    async def stats(self) -> PlaneStats:
        with contextlib.suppress(SyncError):
            answer = await self._send(wire.TellStats())
            if isinstance(answer, wire.Stats):
                return replace(answer.rest, services=dict(answer.services), worker_restarts=self.restarts)
        return PlaneStats({}, worker_restarts=self.restarts)

    def cut(self) -> None:
        if self._channel is not None:
            self._channel.send(wire.encode(wire.Cut()))

    async def close(self, drain_timeout_s: float) -> None:
        """Let the worker drain and end."""
        self._closing = True
        if self._respawn is not None:
            self._respawn.cancel()
        for sock in (*self._sockets.values(), *self._reserved):
            sock.close()
        with contextlib.suppress(SyncError, TimeoutError):
            async with asyncio.timeout(drain_timeout_s + _EXIT_TIMEOUT_S):
                await self._send(wire.Close(drain_timeout_s))
        if self._channel is not None:
            self._channel.close()
        if self._process is not None:
            try:
                await asyncio.to_thread(self._process.wait, _EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                await asyncio.to_thread(self._process.wait)

    # ---- what pickers learn

    @property
    def known_pins(self) -> int:
        """How many clients stay where they are if the worker dies now."""
        return sum(map(len, self._pins.values()))

    def _note(self, news: wire.News) -> None:
        for name, memory in news.memory:
            if name not in self._specs:
                continue
            self._ejected[name] = memory.ejected
            pins = self._pins.setdefault(name, {})
            for client_ip, pin in memory.pins:
                pins.pop(client_ip, None)
                pins[client_ip] = pin
            while len(pins) > PINS_MAX:
                del pins[next(iter(pins))]


def _parts(items: Iterable[Item], size: int = _A_FRAME) -> Iterator[list[Item]]:
    listed = list(items)
    for start in range(0, len(listed), size):
        yield listed[start : start + size]


def _retrieve(future: asyncio.Future[wire.Answer]) -> None:
    """A request that nobody waits for may fail without a word."""
    if not future.cancelled():
        future.exception()
