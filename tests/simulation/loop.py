"""asyncio's own loop on the simulated clock: when nothing is ready, time jumps to the next event or timer."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.simulation.kernel import Epoll, Kernel, Stream

# What a turn of the loop costs, so that events happen between two turns.
_TURN_S = 20e-6
_NEVER = float("inf")


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop whose readers are epolls of the model."""

    _ready: Any
    _add_callback: Any

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel
        self._selector = self
        self._clock_resolution = 1e-6
        self._readers: dict[int, tuple[Epoll, asyncio.Handle]] = {}

    def time(self) -> float:
        return self._kernel.now

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        epoll = self._kernel.descriptors[fd]
        assert isinstance(epoll, Epoll)
        self._readers[fd] = epoll, asyncio.Handle(callback, args, self)

    def remove_reader(self, fd: Any) -> bool:
        return self._readers.pop(fd, None) is not None

    def select(self, timeout: float | None) -> list[asyncio.Handle]:
        """Return the readers that are ready, in any order.

        Without any, let time pass until there is one or *timeout* is over.
        """
        kernel, readers = self._kernel, self._readers.values()
        kernel.begin_turn(_TURN_S)
        until = _NEVER if timeout is None else kernel.now + timeout
        while True:
            if kernel.has_woken or self._ready:
                kernel.has_woken = False
                ready = [handle for epoll, handle in readers if epoll.ready]
                if ready or self._ready:
                    if len(ready) > 1:
                        kernel.random.shuffle(ready)
                    return ready
            if kernel.next_at > until or kernel.next_at == _NEVER:
                assert until != _NEVER, "nothing will ever happen again"
                kernel.now = max(kernel.now, until)
                return []
            kernel.step()

    def _process_events(self, event_list: list[asyncio.Handle]) -> None:
        self._ready.extend(event_list)

    def _write_to_self(self) -> None:
        pass

    # ---- far ends, for tests that are written for real sockets

    async def sock_sendall(self, sock: Any, data: Any) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[sock.send(left) :]
            except BlockingIOError:
                await self._event(sock)

    async def sock_recv(self, sock: Any, nbytes: int) -> bytes:
        while True:
            try:
                data: bytes = sock.recv(nbytes)
            except BlockingIOError:
                await self._event(sock)
            else:
                return data

    async def _event(self, sock: Stream) -> None:
        happened: asyncio.Future[None] = self.create_future()
        before = sock.on_events

        def tell() -> None:
            if before is not None:
                before()
            if not happened.done():
                happened.set_result(None)

        sock.on_events = tell
        sock.poll()  # an event comes when there is room again
        try:
            await happened
        finally:
            sock.on_events = before if sock.on_events is tell else sock.on_events
