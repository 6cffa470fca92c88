"""Encode and decode netlink messages and their attributes. Pure."""

from __future__ import annotations

import struct
from collections.abc import Iterator

HEADER_BYTES = 16
_HEADER = struct.Struct("=IHHII")
_ATTRIBUTE = struct.Struct("=HH")
NESTED = 0x8000


def message(kind: int, flags: int, body: bytes) -> bytes:
    return _HEADER.pack(HEADER_BYTES + len(body), kind, flags, 1, 0) + body


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
