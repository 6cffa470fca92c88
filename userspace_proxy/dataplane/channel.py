"""Messages and descriptors between two processes over a unix stream socket.

A frame is its length, the number of descriptors that come with it, and a msgpack body. Descriptors travel
with the first bytes of their frame, so they have arrived when the frame is complete.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Callable, Sequence

_HEADER = struct.Struct("=IH")
# Little, so that a reader does other things between two frames.
_READ_BYTES = 1 << 14
# As many as the kernel takes in one message (SCM_MAX_FD).
DESCRIPTORS_A_FRAME = 250
FRAME_MAX_BYTES = 64 << 20


class Channel:
    """One end. *on_frame* is called with each frame's body and descriptors; *on_close* once, when the peer is gone."""

    def __init__(
        self,
        sock: socket.socket,
        on_frame: Callable[[bytes, list[int]], None],
        on_close: Callable[[], None],
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._on_frame = on_frame
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._received = bytearray()
        self._descriptors: deque[int] = deque()
        self._waiting: deque[tuple[memoryview, Sequence[int]]] = deque()
        self._closed = False
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._loop.add_reader(sock.fileno(), self._read)

    # ---- out

    def send(self, body: bytes, descriptors: Sequence[int] = ()) -> None:
        """Send a frame; what the kernel does not take now goes out as it can, in order. Nothing once closed."""
        if self._closed:
            return
        self._all_sent.clear()
        self._waiting.append((memoryview(_HEADER.pack(len(body), len(descriptors)) + body), descriptors))
        if len(self._waiting) == 1:
            self._write()

    def _write(self) -> None:
        while self._waiting:
            data, descriptors = self._waiting[0]
            try:
                sent = socket.send_fds(self._sock, [data], list(descriptors))
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._write)
                return
            except OSError:
                self.close()
                return
            if sent == len(data):
                self._waiting.popleft()
            else:
                self._waiting[0] = (data[sent:], ())
        self._loop.remove_writer(self._sock.fileno())
        self._all_sent.set()

    async def sent(self) -> None:
        """Wait until the kernel has all that was sent, or nobody is there to have it."""
        await self._all_sent.wait()

    # ---- in

    def _read(self) -> None:
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, _READ_BYTES, DESCRIPTORS_A_FRAME)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)  # recv_fds takes MSG_CMSG_CLOEXEC and forgets it
        self._descriptors += descriptors
        if not data:
            self.close()
            return
        self._received += data
        while len(self._received) >= _HEADER.size:
            length, count = _HEADER.unpack_from(self._received)
            if length > FRAME_MAX_BYTES:
                self.close()
                return
            end = _HEADER.size + length
            if len(self._received) < end:
                return
            if count > len(self._descriptors):
                # The kernel drops those for which this process has no room: without them all further are others'.
                self.close()
                return
            body = bytes(self._received[_HEADER.size : end])
            del self._received[:end]
            self._on_frame(body, [self._descriptors.popleft() for _ in range(count)])

    def close(self) -> None:
        """Close this end; descriptors that belong to no whole frame are closed, too."""
        if self._closed:
            return
        self._closed = True
        self._all_sent.set()
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for descriptor in self._descriptors:
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._on_close()
