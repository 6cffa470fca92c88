"""The pipe engine: copies small messages, and moves bulk data with splice(2) inside the kernel.

A direction that fills a whole buffer becomes bulk. Its bytes move from socket to pipe to socket in steps, in turn with
other work, until the source is drained. A pipe is held only while it contains bytes, and the direction does not read
again before the pipe is empty.

splice(2) does not pass an urgent byte. Before one, it returns EAGAIN, or 0 if the peer has ended its stream
(tcp_splice_read in net/ipv4/tcp.c). Neither result is certain, so the copy engine reads on.
"""

import logging
import os

from userspace_proxy.dataplane.pipes import Pipe
from userspace_proxy.dataplane.poller import BULK_BYTES
from userspace_proxy.dataplane.splice.copy import BUG, CopySplicer, Half

log = logging.getLogger(__name__)

# Never SPLICE_F_MORE: the kernel would hold back the last part to wait for more.
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK


class PipeHalf(Half):
    """One direction that is copied or spliced, depending on its traffic."""

    __slots__ = ()

    def take_bulk(self) -> bool:
        for sock in (self.source, self.sink):
            if sock.gettimeout() is None:
                sock.setblocking(False)  # splice(2) has no such flag for sockets
        self.queued = True
        self.splice.engine.poller.in_bulk(self._bulk_step)
        return True

    def _bulk_step(self, most_bytes: int) -> bool:
        """Move up to *most_bytes*. Return whether there may be more to move now."""
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
        """Copy in the next turn. Return False, because this bulk transfer is over."""
        self.go_on_later()
        return False

    def _move(self, most_bytes: int) -> bool:
        pipes = self.splice.engine.pipes
        pipe = pipes.lend()
        if pipe is None:  # all are in use: copy
            return self._copy_next()
        try:
            count = os.splice(self.source.fileno(), pipe.write_end, min(most_bytes, BULK_BYTES), flags=_FLAGS)
        except BlockingIOError:
            pipes.take_back(pipe)
            # Drained: the next edge reports new bytes. Or before an urgent byte whose edge was reported already: copy.
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
        """Send the content of *pipe*. Return whether all was sent and the pipe was given back."""
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
    """Starts a splice of two `PipeHalf` for each connection; all share one pool of pipes."""

    half = PipeHalf
