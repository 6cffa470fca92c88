"""The model's recvmmsg and sendmmsg, with the records that Linux writes: peer address, and pktinfo."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterable

from tests.simulation.kernel import Address, Datagram, Kernel
from userspace_proxy.dataplane.mmsg import reply_record

_ROOM_BYTES = 2_048
_MESSAGES = 32
_CONTROL_AT = 32
_CONTROL_BYTES = socket.CMSG_SPACE(20)
_INFO_AT = _CONTROL_AT + socket.CMSG_LEN(0)
_CONTROL = struct.Struct("=Qii")


def record_of(client: Address, asked_ip: str) -> bytes:
    """Return the record of a datagram from *client* that arrived at *asked_ip*."""
    ip, port = client
    name = struct.pack("=H", socket.AF_INET) + port.to_bytes(2, "big") + socket.inet_aton(ip)
    asked = socket.inet_aton(asked_ip)
    control = _CONTROL.pack(socket.CMSG_LEN(12), socket.IPPROTO_IP, 8) + struct.pack("=i", 3) + asked + asked
    return name.ljust(_CONTROL_AT, b"\0") + control.ljust(_CONTROL_BYTES, b"\0")


def reply_addresses(reply: bytes) -> tuple[Address, str]:
    """Return to whom the datagram with the record *reply* goes, and the address that it leaves from."""
    client = socket.inet_ntoa(reply[4:8]), int.from_bytes(reply[2:4], "big")
    return client, socket.inet_ntoa(reply[_INFO_AT + 4 : _INFO_AT + 8])


class SimulatedBatch:
    """Stands in for `Batch`."""

    kernel: Kernel

    def __init__(self, _record_bytes: int = 0) -> None:
        self.room = [memoryview(bytearray(_ROOM_BYTES)) for _ in range(_MESSAGES)]
        self._addressed: list[tuple[bytes, int]] = [(b"", 0)] * _MESSAGES

    def receive(self, fd: int) -> Iterable[tuple[bytes, int, memoryview]]:
        sock = self.kernel.descriptors[fd]
        assert isinstance(sock, Datagram)
        found = []
        for room in self.room:
            if not sock.records:
                break
            its_record, content = sock.records.popleft()
            room[: len(content)] = content
            found.append((its_record, len(content), room))
        return found

    def reply_record(self, record: bytes) -> bytes:
        return reply_record(record)

    def address(self, index: int, record: bytes, length: int) -> None:
        self._addressed[index] = record, length

    def send(self, fd: int, count: int) -> int:
        sock = self.kernel.descriptors[fd]
        assert isinstance(sock, Datagram)
        network, refused = self.kernel.network, 0
        for room, (its_record, length) in zip(self.room[:count], self._addressed, strict=False):
            refused += not network.reply(sock, its_record, bytes(room[:length]))
        return refused
