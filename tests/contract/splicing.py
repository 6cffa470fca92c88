"""The parts that both splicer suites share: the engines, and one spliced connection."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import AsyncIterator, Callable

from tests.ends import End, tcp_pair, until
from userspace_proxy.dataplane.pipes import PipePool
from userspace_proxy.dataplane.poller import WRITE, Poller
from userspace_proxy.dataplane.splice.copy import CopySplicer
from userspace_proxy.dataplane.splice.pipe import PipeSplicer
from userspace_proxy.interfaces import OnUnused, Splice, Splicer

# What each side sends, from its beginning.
STREAM = random.Random(3).randbytes(4_000_000)

MakeSplicer = Callable[[Poller, asyncio.AbstractEventLoop, PipePool], Splicer]

# Another engine is another line here.
ENGINES: dict[str, MakeSplicer] = {"copy": CopySplicer, "pipe": PipeSplicer}


def difference(received: bytes | bytearray, expected: bytes) -> str:
    """Return where *received* leaves *expected*, "" when it does not.

    One line: pytest's own words for a difference in megabytes take minutes.
    """
    if received == expected:
        return ""
    pairs = enumerate(zip(received, expected, strict=False))
    same = next((at for at, (got, meant) in pairs if got != meant), min(len(received), len(expected)))
    return f"{len(received)} bytes instead of {len(expected)}, and right are the first {same}"


class Writer:
    """Sends the stream from its beginning."""

    def __init__(self, end: End) -> None:
        self._end = end
        self.sent = 0

    def push(self, count: int) -> int:
        """Send up to *count* more bytes, as much as the kernel takes; return how much was sent since the beginning."""
        self.sent += self._end.send_now(STREAM[self.sent : self.sent + count])
        return self.sent


class Spliced:
    """A client's end and a backend's end, with an engine between them."""

    def __init__(
        self,
        poller: Poller,
        splicer: Splicer,
        client_buffer_bytes: int | None,
        backend_buffer_bytes: int | None,
        family: socket.AddressFamily = socket.AF_INET,
    ) -> None:
        client, self.client_socket = tcp_pair(client_buffer_bytes, family)
        self.backend_socket, backend = tcp_pair(backend_buffer_bytes, family)
        for sock in (self.client_socket, self.backend_socket):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)  # as listeners and dials have it
        self.client, self.backend = End(client), End(backend)
        self.endings: list[str] = []
        self._poller, self._splicer = poller, splicer
        self._splice: Splice | None = None

    def start(self, on_unused: OnUnused | None = None, events: int | None = None) -> None:
        """Let the engine take over. *events*: those of the backend's socket, if the poller watches it already."""
        ends = self.client_socket, self.backend_socket
        if events is None:
            self._poller.watch(self.backend_socket, lambda _: None)
            events = WRITE
        self._splice = self._splicer.start(*ends, self.endings.append, events, on_unused)

    @property
    def splice(self) -> Splice:
        assert self._splice is not None
        return self._splice

    @property
    def counters(self) -> tuple[int, int]:
        """Bytes to the backend, bytes to the client."""
        return self.splice.bytes_to_backend, self.splice.bytes_to_client

    async def ended(self) -> str:
        """Wait for the end of the connection; return how it ended."""
        await until(lambda: bool(self.endings), "the connection ends")
        await until(
            lambda: self.client_socket.fileno() == self.backend_socket.fileno() == -1, "both descriptors are closed"
        )
        (how,) = self.endings
        return how

    def ends(self, side: str) -> tuple[End, End]:
        """Return the end of *side*, and the other one."""
        return (self.client, self.backend) if side == "client" else (self.backend, self.client)

    def close(self) -> None:
        for sock in (self.client_socket, self.backend_socket, self.client.sock, self.backend.sock):
            sock.close()


class Workshop:
    """A poller with an engine on it; makes connections and takes them away."""

    def __init__(self, make: MakeSplicer) -> None:
        loop = asyncio.get_running_loop()
        self.poller = Poller(loop)
        self._pipes = PipePool()
        self.splicer = make(self.poller, loop, self._pipes)
        self._made: list[Spliced] = []

    def splice(
        self,
        *,
        buffer_bytes: int | None = None,
        client_buffer_bytes: int | None = None,
        family: socket.AddressFamily = socket.AF_INET,
        start: bool = True,
    ) -> Spliced:
        made = Spliced(self.poller, self.splicer, client_buffer_bytes or buffer_bytes, buffer_bytes, family)
        self._made.append(made)
        if start:
            made.start()
        return made

    def close(self) -> None:
        for made in self._made:
            if not made.endings:
                made.splice.cut("the test is over")
        self.poller.stop()
        for made in self._made:
            made.close()
        self._pipes.shed()


@contextlib.asynccontextmanager
async def workshop(make: MakeSplicer) -> AsyncIterator[Workshop]:
    shop = Workshop(make)
    try:
        yield shop
    finally:
        shop.close()
