"""The worker process: a plane behind a socketpair. Started by `RemotePlane`, never by a person.

It knows nothing of manifests, rules or Kubernetes, and imports nothing that does: control work, however long,
happens in another process and stands in no packet's way.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import sys
from collections import deque
from dataclasses import replace

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import Channel
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.logs import AccessLog, configure_logging, recorder

# At most so much of what pickers learn is lost with a worker.
_NEWS_PERIOD_S = 1.0
# What open connections get when the control process is gone.
_ORPHAN_DRAIN_S = 5.0

log = logging.getLogger(__name__)


class Worker:
    """One plane, told what to do by frames."""

    def __init__(self, sock: socket.socket, settings: wire.WorkerSettings) -> None:
        self._access_log = AccessLog(settings.access_log, settings.log_format) if settings.access_log else None
        record = recorder(self._access_log, verbose=settings.verbose)
        self._plane = LocalPlane(settings.limits, record, splice=settings.splice)
        self._requests: deque[tuple[wire.Request, list[int]]] = deque()
        self._asked = asyncio.Event()
        self._alone = False
        self._channel = Channel(sock, self._on_frame, self._on_close)

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        request = wire.requests.decode(body)
        if isinstance(request, wire.Cut):
            self._plane.cut()
            return
        self._requests.append((request, descriptors))
        self._asked.set()

    def _on_close(self) -> None:
        self._alone = True
        self._asked.set()

    async def run(self) -> None:
        """Do what is asked until told to close, or until nobody is left who could ask."""
        news = asyncio.create_task(self._tell_news(), name="news")
        try:
            while not self._alone:
                await self._asked.wait()
                self._asked.clear()
                while self._requests:
                    request, descriptors = self._requests.popleft()
                    answer = await self._do(request, descriptors)
                    self._channel.send(wire.encode(answer))
                    await asyncio.sleep(0)  # packets first
                    if isinstance(request, wire.Close):
                        return
            log.error("the control process is gone: no new connections, %.3g s for open ones", _ORPHAN_DRAIN_S)
            await self._plane.close(_ORPHAN_DRAIN_S)
        finally:
            news.cancel()
            self._channel.close()
            if self._access_log is not None:
                self._access_log.close()

    async def _do(self, request: wire.Request, descriptors: list[int]) -> wire.Answer:
        plane = self._plane
        match request:
            case wire.Open():
                return self._open(request, descriptors)
            case wire.Update(backends):
                await plane.update(dict(backends))
            case wire.Retire(names):
                await plane.retire(names)
            case wire.TellStats():
                stats = await plane.stats()
                dropped = self._access_log.dropped if self._access_log else 0
                return wire.Stats(
                    list(stats.services.items()), replace(stats, services={}, access_lines_dropped=dropped)
                )
            case wire.Close(drain_timeout_s):
                await plane.close(drain_timeout_s)
        return wire.Done()

    def _open(self, request: wire.Open, descriptors: list[int]) -> wire.Done:
        refused = []
        backends, memory = dict(request.backends), dict(request.memory)
        for spec, descriptor in zip(request.specs[: request.new], descriptors, strict=True):
            try:
                self._plane.serve(
                    spec, socket.socket(fileno=descriptor), backends.get(spec.name), memory.get(spec.name)
                )
            except OSError as error:
                refused.append((spec.name, f"port {spec.proxy_port}: {error.strerror}"))
        for spec in request.specs[request.new :]:
            self._plane.configure(spec)
        return wire.Done(refused)

    async def _tell_news(self) -> None:
        while True:
            await asyncio.sleep(_NEWS_PERIOD_S)
            if news := self._plane.take_news():
                self._channel.send(wire.encode(wire.News(list(news.items()))))


def main() -> None:
    descriptor, settings_json = sys.argv[1:]
    settings = msgspec.json.decode(settings_json, type=wire.WorkerSettings)
    configure_logging(settings.log_format, verbose=settings.verbose)
    # Ctrl-C in a terminal is for the control process, which then tells us.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    factory = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    gc.freeze()

    async def run() -> None:
        await Worker(socket.socket(fileno=int(descriptor)), settings).run()

    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(run())


if __name__ == "__main__":
    main()
