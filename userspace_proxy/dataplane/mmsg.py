"""Receive and send many datagrams in one system call: recvmmsg and sendmmsg, which Python lacks.

A record holds a peer's address and the control message with the local address of the datagram, as the kernel wrote
them. Nothing is parsed per datagram: the record itself is the key of a flow. `reply_record` turns it into the record
that tells the kernel where a reply goes and from which local address it leaves.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
import sys
from collections.abc import Iterable

from userspace_proxy.dataplane.sockets import plain_ip
from userspace_proxy.model.endpoint import Address

MESSAGES = 32
DATAGRAM_BYTES = 65_536

_SOCKADDR_BYTES = 28  # struct sockaddr_in6; an IPv4 socket leaves the end unused
_CONTROL_AT = 32  # control messages are aligned to 8
_CONTROL_BYTES = socket.CMSG_SPACE(20)  # struct in6_pktinfo; struct in_pktinfo is shorter
_RECORD_BYTES = _CONTROL_AT + _CONTROL_BYTES
_PKTINFO_AT = _CONTROL_AT + socket.CMSG_LEN(0)
_INTERFACE6_AT = _PKTINFO_AT + 16
_NO_INTERFACE = bytes(_RECORD_BYTES - _INTERFACE6_AT)
_LINK_LOCAL = b"\xfe\x80"
_MAPPED = bytes(10) + b"\xff\xff"
_INET6 = struct.pack("=H", socket.AF_INET6)
_PORT = struct.Struct("!2xH")

_libc = ctypes.PyDLL(None)  # the calls never wait, so there is no need to release the interpreter's lock
_recvmmsg, _sendmmsg = _libc.recvmmsg, _libc.sendmmsg


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("len", ctypes.c_size_t))


class _Mmsghdr(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p),
        ("namelen", ctypes.c_uint),
        ("iov", ctypes.c_void_p),
        ("iovlen", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("_end_of_msghdr", ctypes.c_size_t * 0),
        ("len", ctypes.c_uint),
    )


class Batch:
    """Buffers for MESSAGES datagrams and their records."""

    def __init__(self, record_bytes: int = _RECORD_BYTES) -> None:
        """*record_bytes*: the length of the records that `receive` returns."""
        # mmap instead of a bytearray: pages that are never used take no memory.
        self._memory = mmap.mmap(-1, MESSAGES * DATAGRAM_BYTES)
        everything = memoryview(self._memory)
        self.room = [everything[start : start + DATAGRAM_BYTES] for start in range(0, len(everything), DATAGRAM_BYTES)]
        self._records = bytearray(MESSAGES * _RECORD_BYTES)
        self._iovecs = (_Iovec * MESSAGES)()
        self._headers = (_Mmsghdr * MESSAGES)()
        memory_at = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        records_at = ctypes.addressof(ctypes.c_char.from_buffer(self._records))
        for index, (iovec, header) in enumerate(zip(self._iovecs, self._headers, strict=True)):
            iovec.base, iovec.len = memory_at + index * DATAGRAM_BYTES, DATAGRAM_BYTES
            header.iov, header.iovlen = ctypes.addressof(iovec), 1
            header.name, header.namelen = records_at + index * _RECORD_BYTES, _SOCKADDR_BYTES
            header.control, header.controllen = header.name + _CONTROL_AT, _CONTROL_BYTES
        self._first = ctypes.c_void_p(ctypes.addressof(self._headers))
        header_bytes, size = memoryview(self._headers).cast("B"), ctypes.sizeof(_Mmsghdr)
        unused = memoryview(bytes(header_bytes))
        counts = header_bytes.cast("I")[_Mmsghdr.len.offset // 4 :: size // 4]
        # Of the first n messages: records, lengths, headers, and what these were before the kernel wrote to them.
        record = f"{record_bytes}s{_RECORD_BYTES - record_bytes}x"
        self._parts = [
            (struct.Struct(record * n), counts[:n], header_bytes[: n * size], unused[: n * size])
            for n in range(MESSAGES + 1)
        ]
        self._lengths = memoryview(self._iovecs).cast("B").cast("P")[1::2]

    def receive(self, fd: int) -> Iterable[tuple[bytes, int, memoryview]]:
        """Return record, length and content (valid until the next call) of each datagram at the socket *fd*."""
        received = _recvmmsg(fd, self._first, MESSAGES, socket.MSG_DONTWAIT, None)
        if received <= 0:
            return ()
        records, lengths, headers, unused = self._parts[received]
        found = zip(records.unpack_from(self._records), lengths.tolist(), self.room, strict=False)
        headers[:] = unused  # the kernel has overwritten the buffer lengths
        return found

    def reply_record(self, record: bytes) -> bytes:
        """Return what `reply_record` returns, for a *record* of the last `receive`, which may lack the interface."""
        if record.startswith(_LINK_LOCAL, _PKTINFO_AT):
            at = self._records.find(record)
            record = bytes(self._records[at : at + _RECORD_BYTES])
        return reply_record(record)

    def address(self, index: int, record: bytes, length: int) -> None:
        """Set the *record* (destination and source) for the first *length* bytes of ``room[index]``."""
        start = index * _RECORD_BYTES
        self._records[start : start + _RECORD_BYTES] = record
        self._lengths[index] = length

    def send(self, fd: int, count: int) -> int:
        """Send the first *count* datagrams from the socket *fd*, in order. Return how many the kernel refused."""
        sent = _sendmmsg(fd, self._first, count, socket.MSG_DONTWAIT)
        if sent == count:
            return 0
        sent, refused = max(0, sent), 0
        while sent < count:
            # sendmmsg stops before a refused datagram, and reports an error only if that one is the first.
            header = ctypes.c_void_p(ctypes.addressof(self._headers[sent]))
            more = _sendmmsg(fd, header, count - sent, socket.MSG_DONTWAIT)
            refused += more <= 0
            sent += max(1, more)
        return refused


def flow_record_bytes(family: int) -> int:
    """Return the length of the records that are keys of flows, at sockets of *family*.

    At an IPv6 socket, which serves both families, they end before the interface: a flow outlives a change of route.
    """
    return _INTERFACE6_AT if family == socket.AF_INET6 else _RECORD_BYTES


def client_address(record: bytes) -> Address:
    """Return the IP and port of the peer of *record*."""
    (port,) = _PORT.unpack_from(record)
    if record.startswith(_INET6):
        packed = record[8:24]
        if not packed.startswith(_MAPPED):
            return socket.inet_ntop(socket.AF_INET6, packed), port
        return socket.inet_ntoa(packed[12:]), port
    return socket.inet_ntoa(record[4:8]), port


def client_of(record: bytes) -> bytes:
    """Return the key of the client: the IPv4 address of the peer of *record*, or the /64 of its IPv6 address."""
    if not record.startswith(_INET6):
        return record[4:8]
    return record[8:24] if record.startswith(_MAPPED, 8) else record[8:16]


def asked_ip(record: bytes) -> str:
    """Return the local address that the datagram of *record* arrived at."""
    info = record[_PKTINFO_AT:]
    if not record.startswith(_INET6):
        return socket.inet_ntoa(info[8:12])
    return plain_ip(socket.inet_ntop(socket.AF_INET6, info[:16]))


def interface_of(record: bytes) -> int:
    """Return the index of the interface that the datagram of *record* came in at."""
    at = _INTERFACE6_AT if record.startswith(_INET6) else _PKTINFO_AT
    return int.from_bytes(record[at : at + 4], sys.byteorder)


def anybody_like(record: bytes) -> str:
    """Return the unspecified IP of the peer's family, for callers that need only the family."""
    return "::" if record.startswith(_INET6) and not record.startswith(_MAPPED, 8) else "0.0.0.0"  # noqa: S104


def reply_record(record: bytes) -> bytes:
    """Return the record for a reply to the peer of *record*, sent from the address that its datagram arrived at."""
    if record.startswith(_INET6):  # struct in6_pktinfo: address, interface (which a link-local address needs)
        return record if record.startswith(_LINK_LOCAL, _PKTINFO_AT) else record[:_INTERFACE6_AT] + _NO_INTERFACE
    # struct in_pktinfo: interface, local address, destination
    info = record[_PKTINFO_AT:]
    return record[:_PKTINFO_AT] + bytes(4) + info[4:8] + bytes(len(info) - 8)
