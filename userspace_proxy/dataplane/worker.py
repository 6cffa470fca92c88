"""The worker process: a data plane behind a socketpair. Only `RemotePlane` starts it.

It knows nothing of manifests, rules or Kubernetes, and imports nothing that does. Control work happens in another
process and never delays a packet.
"""

import asyncio
import contextlib
import errno
import gc
import logging
import os
import signal
import socket
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import msgspec

from userspace_proxy.dataplane import rendezvous, wire
from userspace_proxy.dataplane.begin import begin
from userspace_proxy.dataplane.channel import LOST, PING, Channel, close_descriptors
from userspace_proxy.dataplane.handover import (
    VERSION,
    Conversation,
    Incumbent,
    Inherit,
    Present,
    Released,
    TakeOver,
    hand_over,
)
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.sockets import refusal
from userspace_proxy.logs import AccessLog, drop_count, log_lines_dropped, recorder
from userspace_proxy.model.listeners import NO_ROOM

# Period of `News`: a dying worker loses at most this much of what its pickers have learnt.
_NEWS_PERIOD_S = 1.0
# Pause between two requests under traffic: changes of thousands of Services must not occupy a processor.
_PAUSE_S = 0.001

log = logging.getLogger(__name__)


class Worker:
    """Serves one data plane, controlled by frames. If the control process dies, it waits for a successor."""

    def __init__(self, sock: socket.socket, settings: wire.WorkerSettings) -> None:
        self._settings = settings
        self._access_log = AccessLog(settings.access_log, settings.log_format) if settings.access_log else None
        record = recorder(self._access_log, verbose=settings.verbose)
        share = settings.worker, settings.workers
        dropped = drop_count(self._access_log)
        self._plane = LocalPlane(settings.limits, record, splice=settings.splice, lines_dropped=dropped, share=share)
        self._requests: asyncio.Queue[tuple[wire.Request, list[int]] | None] = asyncio.Queue()  # None: no more come
        self._is_replaced = False
        self._has_sigterm = False
        self._name: socket.socket | None = None
        self._member: socket.socket | None = None
        self._channel = Channel(sock, self._on_frame, self._on_close)

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        if body == PING:
            self._channel.send(PING)
            return
        try:
            request = wire.requests.decode(body)
        except msgspec.DecodeError as error:
            close_descriptors(descriptors)
            self._channel.break_off(f"a request is not understood ({error})")
            return
        if isinstance(request, wire.Cut):
            self._plane.cut()
        else:
            self._requests.put_nowait((request, descriptors))

    def _on_close(self) -> None:
        self._is_replaced |= bool(self._channel.broken)  # the control process lives, and starts another worker
        self._requests.put_nowait(None)

    def _on_sigterm(self) -> None:
        """Leave the listeners to another worker. A second SIGTERM cuts the draining connections."""
        if self._has_sigterm:
            self._plane.cut()
        self._has_sigterm = self._is_replaced = True
        self._requests.put_nowait(None)

    async def run(self) -> None:
        """Handle requests until closed, or until the control process is gone and no successor comes."""
        news = asyncio.create_task(self._send_news(), name="news")
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_sigterm)
        try:
            if await self._serve_requests():
                return
            await self._plane.begin([])  # in case the control process died before it sent `Begin`
            member, name = self._member, self._name
            if self._is_replaced:
                await self._make_room()
            elif member and name and self._settings.orphan_timeout_s and self._plane.listeners:
                await Orphan(self._plane, member, name, self._settings).serve_on()
            else:
                log.error("the control process is gone: accepting no new connections, draining open ones")
                self._let_go()
                await self._plane.close(self._settings.drain_timeout_s)
        finally:
            news.cancel()
            self._channel.close()
            if self._access_log is not None:
                self._access_log.close()

    async def _serve_requests(self) -> bool:
        """Handle requests until the control process is gone. Return True if it closed this worker before."""
        while (received := await self._requests.get()) is not None:
            request, descriptors = received
            answer = await self._do(request, descriptors)
            self._channel.send(wire.encode(answer))
            await self._yield_to_traffic()
            if isinstance(request, wire.Stop):
                return True
        return False

    async def _make_room(self) -> None:
        """Leave the listeners to the worker that replaces this one, and drain open connections."""
        why = f" ({self._channel.broken})" if self._channel.broken else ""
        log.warning(
            "worker process %d leaves its listeners to a new worker%s and drains its connections", os.getpid(), why
        )
        self._let_go()
        self._channel.close()
        drain_timeout_s = self._settings.orphan_timeout_s or self._settings.drain_timeout_s
        await self._plane.close(drain_timeout_s, successors=1)

    async def _yield_to_traffic(self) -> None:
        """Let packets be handled first. Under much traffic, the next request also waits for a moment."""
        before = self._plane.messages
        await asyncio.sleep(0)
        if not self._requests.empty() and self._plane.messages != before:
            await asyncio.sleep(_PAUSE_S)

    async def _do(self, request: wire.Request, descriptors: list[int]) -> wire.Done:
        plane = self._plane
        match request:
            case wire.Open():
                return self._open(request, descriptors)
            case wire.Begin(memory):
                await plane.begin(memory)
            case wire.Update(backends):
                await plane.update(dict(backends))
                gc.freeze()  # these stay for long
            case wire.Retire(names):
                await plane.retire(names)
            case wire.GetStats(endpoints):
                await self._send_news_now()
                async for part in plane.take_stats(endpoints=endpoints):
                    self._channel.send(wire.encode(wire.Part(services=part)))
                    await asyncio.sleep(0)
                return wire.Done(totals=replace(plane.totals(), log_lines_dropped=log_lines_dropped()))
            case wire.GetDetails(asked):
                for part_of_details in plane.take_details(asked):
                    self._channel.send(wire.encode(wire.Part(details=[part_of_details])))
                    await asyncio.sleep(0)
            case wire.KeepOn():
                if LOST in descriptors:
                    log.error("this worker will stop if the control process dies: no descriptor is left")
                else:
                    self._keep_on(socket.socket(fileno=descriptors[0]))
            case wire.MakeWay(since, handed_over):
                if handed_over:
                    self._is_replaced = True
                    await plane.stop_accepting()
                return wire.Done(memory=await plane.pinned_since(since))
            case wire.Stop(drain_timeout_s, handed_over):
                self._let_go()
                await plane.close(drain_timeout_s, successors=int(handed_over))
        return wire.Done()

    def _keep_on(self, name: socket.socket) -> None:
        """Get ready to serve on without the control process."""
        self._name = name
        try:
            # Join early, so that the group has a member even while the control process dies.
            self._member = rendezvous.join(rendezvous.Role.SERVES_ON)
        except OSError as error:
            log.error("this worker will stop if the control process dies: %s", error)  # noqa: TRY400

    def _let_go(self) -> None:
        """Leave the group of members: no successor shall find this worker."""
        for sock in (self._member, self._name):
            if sock is not None:
                sock.close()

    def _open(self, request: wire.Open, descriptors: list[int]) -> wire.Done:
        refused = []
        backends, memory = dict(request.backends), dict(request.memory)
        for spec, descriptor in zip(request.specs[: request.new], descriptors, strict=True):
            if descriptor == LOST:
                refused.append((spec.name, f"{NO_ROOM}: {os.strerror(errno.EMFILE)}"))
                continue
            if spec.name in self._plane.listeners:  # refused at first, and opened since by another request
                close_descriptors([descriptor])
                continue
            try:
                sock = socket.socket(fileno=descriptor)
                state = backends.get(spec.name), memory.get(spec.name.service_port)
                self._plane.serve(spec, sock, *state, waits=request.waits)
            except OSError as error:
                refused.append((spec.name, refusal(spec.proxy_port, error)))
        for spec in request.specs[request.new :]:
            self._plane.configure(spec)
        gc.freeze()  # these stay for long
        return wire.Done(refused)

    async def _send_news(self) -> None:
        while True:
            await asyncio.sleep(_NEWS_PERIOD_S)
            await self._channel.sent()  # until a control process that is stopped reads on, pickers gather the news
            await self._send_news_now()

    async def _send_news_now(self) -> None:
        for news in self._plane.take_news():
            for part in wire.fitting(news, len(news) or 1, wire.News):
                self._channel.send(wire.encode(part))
            await asyncio.sleep(0)


@dataclass
class Orphan:
    """A worker without a control process: serves its last state until a successor takes over."""

    _plane: LocalPlane
    _member: socket.socket
    _name: socket.socket
    _settings: wire.WorkerSettings
    _ending: asyncio.Event = field(default_factory=asyncio.Event)
    _is_handed_over: bool = False
    _is_succeeded: bool = False
    _is_unwanted: bool = False
    _has_sigterm: bool = False

    async def serve_on(self) -> None:
        settings = self._settings
        log.error(
            "the control process is gone: serving on with the last known state, for up to %.6g s;"
            " `userspace-proxy run` takes over, `userspace-proxy cleanup` ends it",
            settings.orphan_timeout_s,
        )
        _let_go_of_pipes()
        present = Present(VERSION, os.getpid(), orphan=True, worker=settings.worker, workers=settings.workers)
        incumbent = Incumbent(self._member, present, self._hand_over, self._end)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._on_sigterm)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(settings.orphan_timeout_s):
                await self._ending.wait()
        incumbent.close()
        self._name.close()
        if self._is_handed_over:
            log.info("another process has taken over; open connections go on here")
            await self._plane.close(settings.orphan_timeout_s, successors=int(self._is_succeeded))
        else:
            log.info("ending: no more connections")
            await self._plane.close(0 if self._is_unwanted else settings.drain_timeout_s)

    def _on_sigterm(self) -> None:
        """End within the drain timeout, also after a hand-over. A second SIGTERM cuts the draining connections."""
        if self._has_sigterm:
            self._plane.cut()
        self._has_sigterm = True
        self._ending.set()
        asyncio.get_running_loop().call_later(self._settings.drain_timeout_s, self._plane.cut)

    async def _hand_over(self, asked: TakeOver, conversation: Conversation) -> None:
        since = time.monotonic()
        await hand_over(conversation, self._inheritance(), self._name)
        self._is_handed_over = True
        self._is_succeeded = self._settings.worker < asked.workers
        if self._is_succeeded:
            # Once the successor is ready, its endpoints count, not those of this process.
            await self._plane.stop_accepting()
        conversation.send(Released(await self._plane.pinned_since(since)))
        self._ending.set()

    async def _end(self) -> None:
        self._is_unwanted = True
        self._ending.set()
        await asyncio.Event().wait()  # the peer waits for the end of this process

    def _inheritance(self) -> Iterator[tuple[Inherit, list[int]]]:
        listeners = self._plane.listeners
        specs = [listener.spec for listener in listeners.values()]
        backends = {name: listener.backends for name, listener in listeners.items() if listener.backends is not None}
        for opening in wire.openings(specs, backends, self._plane.memory_of):
            descriptors = [listeners[spec.name].sock.fileno() for spec in opening.specs]
            yield Inherit(self._settings.worker, opening), descriptors


def _let_go_of_pipes() -> None:
    """Replace stdout and stderr by /dev/null if they are pipes, so that their readers see an end. Keep files."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - for its descriptor
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
                    os.dup2(nowhere.fileno(), descriptor)


if __name__ == "__main__":
    # Ctrl-C in a terminal is for the control process, which then sends `Stop`.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    begin(wire.WorkerSettings, lambda sock, settings: Worker(sock, settings).run())
