"""The server of a simulated pod: it answers HTTP and UDP with its name and what it saw of the client.

One process serves all pods; each server's sockets are in its pod's network namespace.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Callable
from typing import cast

from userspace_proxy.lab import Host
from userspace_proxy.lab.workloads import Port

_HEAD_MAX_BYTES = 65_536
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BACKLOG = 1_024


class PodServer:
    """Answers at the ports of one pod. ``hangs``: the process is stopped, while the kernel accepts connections."""

    def __init__(self, name: str, host: Host, ip: str) -> None:
        self.name = name
        self.ip = ip
        self.hangs = False
        self._host = host
        self._listeners: dict[Port, asyncio.Server | asyncio.DatagramTransport] = {}
        self._connections: set[_Http] = set()

    async def serve(self, ports: frozenset[Port]) -> None:
        """Listen at *ports* and no longer at others. Raises OSError."""
        for port in self._listeners.keys() - ports:
            self._listeners.pop(port).close()
        loop = asyncio.get_running_loop()
        for port in ports - self._listeners.keys():
            kind = socket.SOCK_DGRAM if port.protocol == "UDP" else socket.SOCK_STREAM
            with self._host.inside():
                sock = socket.socket(socket.AF_INET, kind)
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((self.ip, port.number))
            if port.protocol == "UDP":
                self._listeners[port], _ = await loop.create_datagram_endpoint(lambda: _Udp(self), sock=sock)
            else:
                server = await loop.create_server(lambda: _Http(self, self._connections), sock=sock, backlog=_BACKLOG)
                self._listeners[port] = server

    def kill(self) -> None:
        """Close all sockets at once, as the kernel does for a process that is killed."""
        for listener in self._listeners.values():
            listener.close()
        self._listeners.clear()
        for connection in [*self._connections]:
            connection.abort()

    def thaw(self) -> None:
        """Answer the requests that arrived while the server hung."""
        self.hangs = False
        for connection in [*self._connections]:
            connection.answer()

    def answer(self, local: tuple[str, int], client: str, said: str = "") -> bytes:
        """Return the answer at the address *local* to *client*; *said*: a PROXY header that came before."""
        return f"{self.name} {local[0]}:{local[1]} client={client}{said and ' '}{said}\n".encode()


class _Http(asyncio.Protocol):
    """One connection: answers each request, or the first line of another protocol."""

    def __init__(self, server: PodServer, connections: set[_Http]) -> None:
        self._server = server
        self._connections = connections
        self._received = b""
        self._said = ""
        self._transport: asyncio.Transport | None = None
        self.abort: Callable[[], None] = lambda: None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self.abort = transport.abort
        self._connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._connections.discard(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._server.hangs:
            self.answer()

    def answer(self) -> None:
        """Answer the requests that are complete."""
        while self._transport is not None and b"\n" in self._received:
            first, _, rest = self._received.partition(b"\n")
            if first.startswith(b"PROXY "):
                self._said, self._received = first.decode(errors="replace").strip(), rest
                continue
            if b"HTTP/" not in first:
                self._transport.write(self._body())
                self._transport.close()
                return
            head, end, rest = self._received.partition(b"\r\n\r\n")
            length = int(found[1]) if (found := _LENGTH.search(head)) else 0
            if not end or len(rest) < length:
                break
            self._received = rest[length:]
            self._answer_http(head, is_head=first.startswith(b"HEAD "))
        if len(self._received) > _HEAD_MAX_BYTES:
            self.abort()

    def _answer_http(self, head: bytes, *, is_head: bool) -> None:
        assert self._transport is not None
        body = self._body()
        closes = b"HTTP/1.0" in head.partition(b"\n")[0] or b"connection: close" in head.lower()
        lines = f"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {len(body)}\r\n"
        self._transport.write(lines.encode() + (b"Connection: close\r\n\r\n" if closes else b"\r\n"))
        if not is_head:
            self._transport.write(body)
        if closes:
            self._transport.close()

    def _body(self) -> bytes:
        assert self._transport is not None
        client = self._transport.get_extra_info("peername")[0]
        return self._server.answer(self._transport.get_extra_info("sockname"), client, self._said)


class _Udp(asyncio.DatagramProtocol):
    def __init__(self, server: PodServer) -> None:
        self._server = server
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # of another class before Python 3.12

    def datagram_received(self, data: bytes, address: tuple[str, int]) -> None:
        if self._transport is not None and not self._server.hangs:
            local = self._transport.get_extra_info("sockname")
            with contextlib.suppress(OSError):
                self._transport.sendto(self._server.answer(local, address[0]), address)
