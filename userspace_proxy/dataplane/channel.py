"""Messages and descriptors between two processes over a unix stream socket.

A frame is its length, the number of its descriptors, and a msgpack body. Descriptors travel with the first bytes of
their frame, so they have arrived when the frame is complete. A descriptor for which the reader has no room is lost
(MSG_CTRUNC). Its frame still arrives, with LOST in place of the descriptor.
"""

import asyncio
import contextlib
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterable, Sequence

_HEADER = struct.Struct("=IH")
# Small, so that a reader does other work between two frames.
_READ_BYTES = 1 << 14
# Below the kernel's limit for one message (253, SCM_MAX_FD).
DESCRIPTORS_A_FRAME = 250
# Senders split messages (`wire.fitting`). This bound is for messages that cannot be split, and against garbage.
FRAME_MAX_BYTES = 1 << 30
# A child process sends this frame back at once, before it answers queued requests: its event loop runs.
PING = b""
# In place of a descriptor that was lost.
LOST = -1
# Temporary shortages of this host: retried a little later. ETOOMANYREFS: too many descriptors are in flight.
_SHORTAGES = {errno.ENOMEM, errno.ENOBUFS, errno.ETOOMANYREFS}
_SHORTAGE_PAUSE_S = 0.1


class Channel:
    """One end of a channel to another process.

    *on_frame* is called with the body and the descriptors of each frame; LOST replaces a descriptor that did not
    arrive. *on_close* is called once, when the peer is gone or this end has given up (``broken`` has the reason). In
    the second case the peer has not noticed yet.
    """

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[bytes, list[int]], None],
        on_close: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._on_frame = on_frame
        self._on_close = on_close
        self.broken = ""
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        # One list per frame with descriptors: the kernel delivers those of two frames in two reads.
        self._descriptors: deque[list[int]] = deque()
        self._waiting: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._closed = False
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._loop.add_reader(sock.fileno(), self._read)

    # ---- out

    def send(self, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame. The rest that the kernel cannot accept now follows later, in order. No effect once closed."""
        if self._closed:
            return
        self._all_sent.clear()
        self._waiting.append((memoryview(_HEADER.pack(len(body), len(descriptors)) + body), descriptors))
        if len(self._waiting) == 1:
            self._write()

    def _write(self) -> None:
        while self._waiting and not self._closed:
            data, descriptors = self._waiting[0]
            try:
                sent = socket.send_fds(self.sock, [data], list(descriptors))
            except OSError as error:
                self._write_later(error)
                return
            if sent == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = (data[sent:], ())
        if not self._closed:
            self._loop.remove_writer(self.sock.fileno())
            self._all_sent.set()

    def _write_later(self, error: OSError) -> None:
        """Write on after *error*, as soon as that is possible; close this end if it is not."""
        if error.errno == errno.EAGAIN:
            self._loop.add_writer(self.sock.fileno(), self._write)
        elif error.errno in _SHORTAGES:
            self._loop.remove_writer(self.sock.fileno())
            self._loop.call_later(_SHORTAGE_PAUSE_S, self._write)
        else:
            self.close()

    async def sent(self) -> None:
        """Wait until the kernel has accepted all frames, or the channel is closed."""
        await self._all_sent.wait()

    # ---- in

    def _read(self) -> None:
        try:
            data, descriptors, flags, _ = socket.recv_fds(self.sock, _READ_BYTES, DESCRIPTORS_A_FRAME)
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in _SHORTAGES:
                self._loop.remove_reader(self.sock.fileno())
                self._loop.call_later(_SHORTAGE_PAUSE_S, self._read_on)
                return
            data, descriptors, flags = b"", [], 0
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # recv_fds ignores its flags, so no MSG_CMSG_CLOEXEC
        if descriptors or flags & socket.MSG_CTRUNC:
            self._descriptors.append(descriptors)
        if not data:
            self.close()
            return
        self._received += data
        while not self._closed and self._take_frame():
            pass

    def _take_frame(self) -> bool:
        """Pass on the first frame of the received data. Return False if there is none, or not all of it."""
        if len(self._received) < _HEADER.size:
            return False
        length, count = _HEADER.unpack_from(self._received)
        if length > FRAME_MAX_BYTES:
            self.break_off(f"a frame has {length} bytes, more than {FRAME_MAX_BYTES}")
            return False
        end = _HEADER.size + length
        if len(self._received) < end:
            return False
        came: list[int] = []
        if count:
            if not self._descriptors or len(self._descriptors[0]) > count:
                self.break_off("a frame came without its descriptors")
                return False
            came = self._descriptors.popleft()
        body = bytes(self._received[_HEADER.size : end])
        del self._received[:end]
        self._on_frame(body, came + [LOST] * (count - len(came)))
        return True

    def _read_on(self) -> None:
        if not self._closed:
            self._loop.add_reader(self.sock.fileno(), self._read)

    def break_off(self, why: str) -> None:
        """Close this end, because the incoming data cannot be understood."""
        if not self._closed:
            self.broken = why
            self.close()

    def close(self) -> None:
        """Close this end, and the descriptors that belong to no complete frame."""
        if self._closed:
            return
        self._closed = True
        self._all_sent.set()
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self._on_close()
        self.sock.close()
        for descriptors in self._descriptors:
            close_descriptors(descriptors)


def close_descriptors(descriptors: Iterable[int]) -> None:
    """Close the *descriptors* of a frame, except lost ones."""
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
