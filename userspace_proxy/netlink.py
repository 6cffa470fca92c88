"""Netlink: messages and attributes as bytes, and the exchange of requests and answers with the kernel.

The layout is that of linux/netlink.h.
"""

import os
import socket
import struct
from collections.abc import Iterator, Sequence

ROUTE, NETFILTER, GENERIC = 0, 12, 16
REQUEST, ACK, DUMP, CREATE = 0x1, 0x4, 0x300, 0x400
ERROR, DONE = 2, 3
NESTED = 0x8000
HEADER_BYTES = 16
RECEIVED_BYTES = 1 << 17
ADDRESS_FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}  # by IP version
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
_CODE = struct.Struct("=i")
_ANSWER = struct.Struct("=i8xI")  # the error, then the header of the request with its number
_SENT_AT_ONCE = 128


def message(kind: int, flags: int, body: bytes, number: int = 1) -> bytes:
    """Return a netlink message. The kernel's answer refers to *number*."""
    return _HEADER.pack(HEADER_BYTES + len(body), kind, flags, number, 0) + body


def messages(datagram: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and body of each message in *datagram*. A truncated header ends the iteration."""
    at = 0
    while at + HEADER_BYTES <= len(datagram):
        length, kind, *_ = _HEADER.unpack_from(datagram, at)
        if length < HEADER_BYTES:
            return
        yield kind, datagram[at + HEADER_BYTES : at + length]
        at += (length + 3) & ~3


def attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def attributes(packed: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield kind and value of each attribute in *packed*."""
    at = 0
    while at + _ATTRIBUTE.size <= len(packed):
        length, kind = _ATTRIBUTE.unpack_from(packed, at)
        yield kind & ~NESTED, packed[at + _ATTRIBUTE.size : at + length]
        at += max(_ATTRIBUTE.size, length + -length % 4)


def ip_text(packed: bytes) -> str:
    """Return an IPv4 or IPv6 address of 4 or 16 bytes as text."""
    return socket.inet_ntop(ADDRESS_FAMILIES[4 if len(packed) == 4 else 6], packed)


def open_socket(protocol: int, timeout_s: float) -> socket.socket:
    """Return a blocking netlink socket. Its calls raise TimeoutError after *timeout_s*."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    sock.settimeout(timeout_s)
    return sock


def answer(body: bytes) -> tuple[int, int]:
    """Return the errno in the *body* of an ERROR message (0 for success) and the number of the request."""
    code, number = _ANSWER.unpack_from(body)
    return -code, number


def dump(sock: socket.socket, request: bytes) -> Iterator[tuple[int, bytes]]:
    """Send *request*, a request for a list, and yield kind and body of each message of the answer.

    Raises:
        OSError: the kernel refused the request, or ended the list with an error.
    """
    sock.send(request)
    while True:
        for kind, body in messages(sock.recv(RECEIVED_BYTES)):
            if kind in (DONE, ERROR):  # each begins with a code: a list that has begun can still fail
                if code := -_CODE.unpack_from(body)[0]:
                    raise OSError(code, os.strerror(code))
                return
            yield kind, body


def send_all(sock: socket.socket, requests: Sequence[bytes]) -> Iterator[int]:
    """Send *requests*, which have the flag ACK; yield the errno of each, 0 for success."""
    for start in range(0, len(requests), _SENT_AT_ONCE):
        part = requests[start : start + _SENT_AT_ONCE]
        sock.send(b"".join(part))
        left = len(part)
        while left:
            for kind, body in messages(sock.recv(RECEIVED_BYTES)):
                if kind == ERROR:
                    left -= 1
                    yield answer(body)[0]
