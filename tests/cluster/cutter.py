"""A connection to the API server that can be cut, as by a load balancer, a firewall or a cable."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from userspace_proxy.lab import Host, connect

_RESET = struct.pack("ii", 1, 0)


class Cutter:
    """Forwards bytes between port *at* of *host* and *port* there, until it cuts the connections."""

    def __init__(self, host: Host, port: int, at: int = 0) -> None:
        self._host = host
        self._to = port
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        with host.inside():
            self._listener = socket.create_server(("127.0.0.1", at))
        self.port: int = self._listener.getsockname()[1]
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Reset every connection that stands."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    # A thread waits in recv: it is the one who closes.
                    sock.shutdown(socket.SHUT_RD)
            self.cuts += len(self._open) // 2

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                front, _ = self._listener.accept()
            except OSError:
                return
            try:
                back = connect(self._host, "127.0.0.1", self._to)
            except OSError:
                front.close()
                continue
            back.settimeout(None)
            with self._lock:
                self._open |= {front, back}
            for one, other in ((front, back), (back, front)):
                threading.Thread(target=self._hand_on, args=(one, other), daemon=True).start()

    def _hand_on(self, one: socket.socket, other: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := one.recv(1 << 16):
                other.sendall(data)
        with self._lock:
            for sock in (one, other):
                self._open.discard(sock)
        for sock in (one, other):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
