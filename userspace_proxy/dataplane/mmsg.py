"""Many datagrams of an unconnected socket in one system call: recvmmsg and sendmmsg, which Python does not have.

A peer is a record: its address and the control message that says which of our addresses it asked, as the
kernel gave them. Nothing in it is parsed for a datagram: as it is, it is the key of a flow, and turned
round (`reply_record`) it says where and from which address an answer leaves.
"""

from __future__ import annotations

import ctypes
import mmap
import socket
import struct
from collections.abc import Iterable

from userspace_proxy.dataplane.sockets import plain_ip
from userspace_proxy.model.endpoint import Address

MESSAGES = 32
DATAGRAM_BYTES = 65_536

_SOCKADDR_BYTES = 28  # struct sockaddr_in6; an IPv4 socket leaves its end empty
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
_RECORDS = [struct.Struct(f"{_RECORD_BYTES}s" * count) for count in range(MESSAGES + 1)]

_libc = ctypes.CDLL(None)
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
    """Room for MESSAGES datagrams, with their records."""

    def __init__(self) -> None:
        # Not a bytearray, which would be written to, and be resident, from its beginning to its end.
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
        self._header_bytes = memoryview(self._headers).cast("B")
        self._unused_headers = bytes(self._headers)
        words = ctypes.sizeof(_Mmsghdr) // 4
        self._counts = self._header_bytes.cast("I")[_Mmsghdr.len.offset // 4 :: words]
        self._lengths = memoryview(self._iovecs).cast("B").cast("P")[1::2]

    def receive(self, fd: int) -> Iterable[tuple[bytes, int, memoryview]]:
        """Return what waits at the socket *fd*: record, length and (until the next call) content of each datagram."""
        received = _recvmmsg(fd, self._first, MESSAGES, socket.MSG_DONTWAIT, None)
        if received <= 0:
            return ()
        found = zip(
            _RECORDS[received].unpack_from(self._records), self._counts[:received].tolist(), self.room, strict=False
        )
        self._header_bytes[:] = self._unused_headers  # the kernel has noted in them how much of the room it used
        return found

    def address(self, index: int, record: bytes, length: int) -> None:
        """Say to whom, and as what, the first *length* bytes of ``room[index]`` go."""
        start = index * _RECORD_BYTES
        self._records[start : start + _RECORD_BYTES] = record
        self._lengths[index] = length

    def send(self, fd: int, count: int) -> int:
        """Send the first *count* from the socket *fd*, in order; return how many the kernel refused."""
        sent = max(0, _sendmmsg(fd, self._first, count, socket.MSG_DONTWAIT))
        refused = 0
        while sent < count:
            # It stopped in front of one that it refuses, and says so only where that one is the first.
            header = ctypes.c_void_p(ctypes.addressof(self._headers[sent]))
            more = _sendmmsg(fd, header, count - sent, socket.MSG_DONTWAIT)
            refused += more <= 0
            sent += max(1, more)
        return refused


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
    """Return what counts as one client: the IPv4 address of the peer of *record*, or its /64 of IPv6."""
    if not record.startswith(_INET6):
        return record[4:8]
    return record[8:24] if record.startswith(_MAPPED, 8) else record[8:16]


def asked_ip(record: bytes) -> str:
    """Return which of our addresses the peer of *record* asked, as the kernel delivered it."""
    info = record[_PKTINFO_AT:]
    if not record.startswith(_INET6):
        return socket.inet_ntoa(info[8:12])
    return plain_ip(socket.inet_ntop(socket.AF_INET6, info[:16]))


def anybody_like(record: bytes) -> str:
    """Return the unspecified IP of the family of the peer of *record*: for who need not know more of it."""
    return "::" if record.startswith(_INET6) and not record.startswith(_MAPPED, 8) else "0.0.0.0"  # noqa: S104


def reply_record(record: bytes) -> bytes:
    """Return the record for an answer to the peer of *record*: it leaves from the address that was asked."""
    if record.startswith(_INET6):  # struct in6_pktinfo: address, interface (which a link-local address needs)
        return record if record.startswith(_LINK_LOCAL, _PKTINFO_AT) else record[:_INTERFACE6_AT] + _NO_INTERFACE
    # struct in_pktinfo: interface, local address, destination
    info = record[_PKTINFO_AT:]
    return record[:_PKTINFO_AT] + bytes(4) + info[4:8] + bytes(len(info) - 8)
