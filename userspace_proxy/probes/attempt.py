"""One probe of one endpoint: a non-blocking socket of its own.

What an endpoint answers comes from outside: a fixed number of bytes is read, and only the first ones are kept.
"""

import errno
import os
import re
import socket
from socket import SocketType

from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, is_self_connected, mark, reset_on_close, stream_socket
from userspace_proxy.model.endpoint import Address, join_address
from userspace_proxy.model.probe import ProbeKind, ProbeSpec
from userspace_proxy.printable import printable

_READ_BYTES = 4_096
_STATUS_LINE = re.compile(rb"HTTP/1\.[01] (\d{3})")
_STATUS_LINE_BYTES = len(b"HTTP/1.1 200")
_SHOWN_BYTES = 40
_IN_PROGRESS = {errno.EINPROGRESS, errno.EALREADY}
_DATAGRAM = int(socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

# None: the probe is not finished. "": it succeeded. Another text: why it failed.
Result = str | None


class Attempt:
    """One probe. Call `advance` until it returns a result, whenever the socket reports an event, then `close`."""

    __slots__ = ("_address", "_is_connected", "_received", "_spec", "is_watched", "sock")

    def __init__(self, address: Address, spec: ProbeSpec) -> None:
        """Open the socket, with OWN_MARK, so that redirect rules skip it.

        Raises:
            OSError: no socket can be opened.
        """
        self._address, self._spec = address, spec
        self._is_connected = self.is_watched = False
        self._received = b""
        if spec.kind is not ProbeKind.UDP:
            self.sock = stream_socket(address)
            if spec.kind is ProbeKind.TCP:
                # No local port stays in TIME_WAIT. The reset follows the SYN-ACK at once (`stream_socket` delays the
                # ACK), so that the server never accepts a TCP probe, as with HAProxy. Set before it connects: a probe
                # that is given up may be connected already.
                reset_on_close(self.sock)
            return
        self.sock = SocketType(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, _DATAGRAM, 0)
        try:
            mark(self.sock)
        except BaseException:
            self.sock.close()
            raise

    def close(self) -> None:
        self.sock.close()

    def advance(self) -> Result:
        """Take the next step that is possible without waiting, and return the result.

        Raises:
            OSError: this host is short of a resource, which says nothing about the endpoint.
        """
        try:
            return self._advance()
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno in LOCAL_SHORTAGES:
                raise
            return os.strerror(error.errno or 0).lower()

    def _advance(self) -> Result:
        if not self._is_connected:
            self._is_connected = self._connect()
            if not self._is_connected:
                return None
            match self._spec.kind:
                case ProbeKind.TCP:
                    return ""
                case ProbeKind.HTTP:
                    self.sock.send(self._request())
                case ProbeKind.UDP:
                    self.sock.send(self._spec.send)
        judge = self._judge_datagram if self._spec.kind is ProbeKind.UDP else self._judge_response
        # Until there is no more: the poller is edge-triggered.
        while (result := judge(self.sock.recv(_READ_BYTES))) is None:
            pass
        return result

    def _connect(self) -> bool:
        """Return whether the connection is there already. Raises OSError."""
        error = self.sock.connect_ex(self._address)
        if error in _IN_PROGRESS:
            return False
        if error == errno.EAGAIN:  # of a datagram socket: this host has no local port left (inet_autobind)
            error = errno.EADDRNOTAVAIL
        if not error and is_self_connected(self.sock, self._address):
            error = errno.ECONNREFUSED
        if error:
            raise OSError(error, os.strerror(error))
        return True

    def _request(self) -> bytes:
        lines = (
            f"GET {self._spec.path} HTTP/1.1",
            f"Host: {join_address(*self._address)}",
            "User-Agent: userspace-proxy-health-check",
            "Connection: close",
        )
        return "".join(f"{line}\r\n" for line in (*lines, "")).encode()

    def _judge_response(self, received: bytes) -> Result:
        self._received += received[:_STATUS_LINE_BYTES]
        found = _STATUS_LINE.match(self._received)
        if found is None:
            if not received:
                return "closed without an answer"
            return None if len(self._received) < _STATUS_LINE_BYTES else f"no HTTP/1: {_shown(self._received)}"
        first, last = self._spec.statuses
        return "" if first <= int(found[1]) <= last else f"status {int(found[1])}"

    def _judge_datagram(self, received: bytes) -> Result:
        return "" if self._spec.expect in received else f"it answered {_shown(received)}"


def _shown(received: bytes) -> str:
    return printable(repr(received[:_SHOWN_BYTES].decode(errors="replace")))
