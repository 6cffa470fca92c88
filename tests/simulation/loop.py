"""asyncio's own loop on the simulated clock: when nothing is ready, time jumps to the next event or timer."""

from __future__ import annotations

import asyncio
import heapq
from typing import Any, Protocol

from tests.simulation.kernel import Kernel, Stream

# What a turn of the loop costs, so that events happen between two turns.
_TURN_S = 20e-6
# How late a timer may be.
_LATE_S = 200e-6
_PAIR = 2
_NEVER = float("inf")


class Source(Protocol):
    """What a callback waits for. ``ready``: true if it can be called."""

    ready: Any


class SimulatedLoop(asyncio.BaseEventLoop):
    """An event loop whose readers are epolls and unix sockets of the model."""

    _ready: Any
    _scheduled: Any
    _stopping: bool
    _add_callback: Any

    def __init__(self, kernel: Kernel) -> None:
        super().__init__()
        self._kernel = kernel
        self._selector = self
        self._clock_resolution = 1e-6
        # By descriptor, and by its complement if the callback waits for room.
        self._readers: dict[int, tuple[Source, asyncio.Handle]] = {}

    def time(self) -> float:
        return self._kernel.now

    def add_reader(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        source: Any = self._kernel.descriptors[fd]
        self._readers[fd] = source, asyncio.Handle(callback, args, self)

    def remove_reader(self, fd: Any) -> bool:
        return self._readers.pop(fd, None) is not None

    def add_writer(self, fd: Any, callback: Any, *args: Any) -> None:  # type: ignore[override]
        source: Any = self._kernel.descriptors[fd]
        self._readers[~fd] = source.writable, asyncio.Handle(callback, args, self)

    def remove_writer(self, fd: Any) -> bool:
        return self._readers.pop(~fd, None) is not None

    def add_signal_handler(self, sig: int, callback: Any, *args: Any) -> None:  # type: ignore[override]
        pass

    def _run_once(self) -> None:
        """Run one turn as asyncio does, in less time."""
        ready, scheduled, kernel = self._ready, self._scheduled, self._kernel
        while scheduled and scheduled[0]._cancelled:
            heapq.heappop(scheduled)._scheduled = False
        timeout = None
        if ready or self._stopping:
            timeout = 0.0
        elif scheduled:
            timeout = max(0.0, scheduled[0]._when - kernel.now)
        ready.extend(self.select(timeout))
        until = kernel.now + self._clock_resolution
        while scheduled and scheduled[0]._when < until:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)
        for _ in range(len(ready)):
            handle = ready.popleft()
            if not handle._cancelled:
                handle._run()

    def select(self, timeout: float | None) -> list[asyncio.Handle]:
        """Return the readers that are ready, in any order.

        Without any, let time pass until there is one or *timeout* is over.
        """
        kernel, readers = self._kernel, self._readers.values()
        events = kernel.events
        kernel.begin_turn(_TURN_S)
        until = _NEVER if timeout is None else kernel.now + timeout
        while True:
            if kernel.has_woken or self._ready:
                kernel.has_woken = False
                ready = [handle for source, handle in readers if source.ready]
                if ready or self._ready:
                    if len(ready) == _PAIR:
                        if kernel.random.random() < 0.5:
                            ready.reverse()
                    elif ready:
                        kernel.random.shuffle(ready)
                    return ready
            if not events or events[0][0] > until:
                assert until != _NEVER, "nothing will ever happen again"
                kernel.now = max(kernel.now, until + kernel.random.random() * _LATE_S)
                return []
            when, _, step = heapq.heappop(events)
            if when > kernel.now:
                kernel.now = when
            kernel.steps += 1
            step()

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
