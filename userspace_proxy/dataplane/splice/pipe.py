"""The pipe engine: small messages are copied, bulk goes through splice(2) without coming to this process.

A direction that fills a whole buffer becomes bulk: its bytes move from socket to pipe to socket in steps that
take turns with everything else, until the source is dry. A pipe is held only while bytes are in it, and the
direction does not read again before they are gone.

splice(2) does not pass an urgent byte: in front of it, it returns EAGAIN, or 0 if the peer has ended its stream
(tcp_splice_read in net/ipv4/tcp.c). So neither tells anything for certain, and recv(2) is asked.
"""

from __future__ import annotations

import logging
import os

from userspace_proxy.dataplane.pipes import Pipe
from userspace_proxy.dataplane.poller import BULK_BYTES
from userspace_proxy.dataplane.splice.copy import BUG, CopySplicer, Half

log = logging.getLogger(__name__)

# Never SPLICE_F_MORE: the kernel would wait for more before it sends the last part.
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class PipeHalf(Half):
    """One direction that is copied or spliced, as its bytes come."""

    __slots__ = ()

    def take_bulk(self) -> bool:
        for sock in (self.source, self.sink):
            if sock.gettimeout() is None:
                sock.setblocking(False)  # splice(2) has no flag that does this for sockets
        self.queued = True
        self.splice.engine.poller.in_bulk(self._bulk_step)
        return True

    def _bulk_step(self, most_bytes: int) -> bool:
        """Move up to *most_bytes*; return whether there may be more to move now."""
        self.queued = False
        try:
            more = not self.done and self._move(most_bytes)
        except Exception:
            log.exception(BUG)
            self.cut()
            return False
        if more:
            self.queued = True
        return more

    def _copy_next(self) -> bool:
        """Copy in the next turn; return False, as this bulk is over."""
        self.queued = True
        self.splice.engine.poller.again(self.go_on)
        return False

    def _move(self, most_bytes: int) -> bool:
        pipes = self.splice.engine.pipes
        pipe = pipes.lend()
        if pipe is None:  # all are in use: copy, as the other engine does
            return self._copy_next()
        try:
            count = os.splice(self.source.fileno(), pipe.write_end, min(most_bytes, BULK_BYTES), flags=_FLAGS)
        except BlockingIOError:
            pipes.take_back(pipe)
            # Dry: the next edge tells. Or in front of an urgent byte of which an edge has told already.
            return self.to_the_end and self._copy_next()
        except OSError as error:
            pipes.take_back(pipe)
            self.source_failed(error)
            return False
        if not count:
            pipes.take_back(pipe)
            return self._copy_next()
        pipe.held_bytes = count
        self.pipe, self.stuck = pipe, True
        return self._empty(pipe)

    def _empty(self, pipe: Pipe) -> bool:
        """Send what is in *pipe*; return whether all of it is gone, and the pipe given back."""
        while pipe.held_bytes:
            try:
                sent = os.splice(pipe.read_end, self.sink.fileno(), pipe.held_bytes, flags=_FLAGS)
            except BlockingIOError:
                return False
            except OSError as error:
                self.sink_failed(error)
                return False
            pipe.held_bytes -= sent
            self.moved_bytes += sent
        self.drop()
        return True

    def flush(self) -> None:
        if self.pipe is None:
            super().flush()
        elif self._empty(self.pipe) and not self.queued:
            self.take_bulk()

    def drop(self) -> None:
        super().drop()
        if self.pipe is not None:
            self.splice.engine.pipes.take_back(self.pipe)
            self.pipe = None


class PipeSplicer(CopySplicer):
    """Starts a splice of two `PipeHalf` for each pair of sockets; they share the pipes."""

    half = PipeHalf
