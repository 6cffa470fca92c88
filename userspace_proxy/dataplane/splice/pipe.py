"""The pipe engine: small messages are copied, bulk goes through splice(2) without coming to this process.

A direction that fills a whole buffer becomes bulk: its bytes move from socket to pipe to socket in steps that
take turns with everything else, until the source is dry. A pipe is held only while bytes are in it, and the
direction does not read again before they are gone.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
from collections.abc import Callable

from userspace_proxy.dataplane.pipes import Pipe, PipePool
from userspace_proxy.dataplane.poller import BULK_BYTES, Poller
from userspace_proxy.dataplane.splice.copy import BUG, CopySplice, Half

log = logging.getLogger(__name__)

# Never SPLICE_F_MORE: the kernel would wait for more before it sends the last part.
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class PipeSplicer:
    """Starts a `PipeSplice` for each pair of sockets; they share the pipes."""

    def __init__(self, poller: Poller, loop: asyncio.AbstractEventLoop, pipes: PipePool) -> None:
        self._poller = poller
        self._loop = loop
        self._pipes = pipes

    def start(self, client: socket.socket, backend: socket.socket, on_end: Callable[[str], None]) -> PipeSplice:
        splice = PipeSplice(client, backend, self._poller, self._loop, on_end)
        splice.pipes = self._pipes
        splice.start()
        return splice


class PipeSplice(CopySplice):
    """One connection of which each direction is copied or spliced, as its bytes come."""

    __slots__ = ("pipes",)

    pipes: PipePool

    def _take_bulk(self, half: Half) -> bool:
        half.queued = True
        self._poller.in_bulk(functools.partial(self._bulk_step, half))
        return True

    def _bulk_step(self, half: Half, most_bytes: int) -> bool:
        """Move up to *most_bytes*; return whether there may be more to move now."""
        try:
            more = not self._ended and not half.done and self._move(half, most_bytes)
        except Exception:
            log.exception(BUG)
            self.cut("a bug")
            more = False
        if not more:
            half.queued = False
        return more

    def _move(self, half: Half, most_bytes: int) -> bool:
        pipe = self.pipes.lend()
        if pipe is None:  # all are in use: copy, as the other engine does
            half.queued = False
            self._poller.again(lambda: self._pump_again(half))
            return False
        try:
            count = os.splice(half.source.fileno(), pipe.write_end, min(most_bytes, BULK_BYTES), flags=_FLAGS)
        except BlockingIOError:
            self.pipes.take_back(pipe)
            return False  # dry: the next edge tells
        except OSError as error:
            self.pipes.take_back(pipe)
            self._source_failed(half, error)
            return False
        if not count:
            self.pipes.take_back(pipe)
            self._source_ended(half)
            return False
        pipe.held_bytes = count
        half.pipe = pipe
        return self._empty_pipe(half, pipe)

    def _empty_pipe(self, half: Half, pipe: Pipe) -> bool:
        """Send what is in *pipe*; return whether all of it is gone, and the pipe given back."""
        while pipe.held_bytes:
            try:
                sent = os.splice(pipe.read_end, half.sink.fileno(), pipe.held_bytes, flags=_FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                self._sink_failed(half, error)
                return False
            pipe.held_bytes -= sent
            half.moved_bytes += sent
        half.pipe = None
        self.pipes.take_back(pipe)
        return True

    def _flush(self, half: Half) -> None:
        if half.pipe is None:
            super()._flush(half)
        elif self._empty_pipe(half, half.pipe) and not half.queued:
            self._take_bulk(half)

    def _drop_pipe(self, half: Half) -> None:
        if half.pipe is not None:
            self.pipes.take_back(half.pipe)
            half.pipe = None
