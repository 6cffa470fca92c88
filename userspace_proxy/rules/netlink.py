"""What tools are too slow for: nft reads all of a table to count its rules, conntrack is a process for each flow."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Sequence
from typing import NamedTuple

from userspace_proxy.model.endpoint import Address, family_of

_NETLINK_NETFILTER = 12
_REQUEST_DUMP = 0x1 | 0x300
_SUBSYSTEM_NFTABLES = 10
_NEWRULE, _GETRULE = 6, 7
_FAMILIES = {"inet": 1, "bridge": 7}
_ATTR_TABLE = 1
_ERROR, _DONE = 2, 3
_REQUEST = 0x1
_SUBSYSTEM_CONNTRACK, _CT_DELETE = 1, 2
_NESTED = 0x8000
# linux/netfilter/nfnetlink_conntrack.h
_CTA_TUPLE_ORIG, _CTA_ZONE = 1, 18
_CTA_TUPLE_IP, _CTA_TUPLE_PROTO = 1, 2
_CTA_IP = {4: (1, 2), 6: (3, 4)}  # source, destination
_CTA_PROTO_NUM, _CTA_PROTO_SRC_PORT, _CTA_PROTO_DST_PORT = 1, 2, 3
_FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
# Each may be answered by an error, and what waits to be read has a limit.
_DELETED_AT_ONCE = 100
_TIMEOUT_S = 5.0


def count_rules(table: str) -> int:
    """Return how many rules *table* (``family name``) has in all of its chains; 0 where there is no such table.

    Raises:
        OSError: the kernel did not say.
    """
    family, _, bare_name = table.partition(" ")
    name = bare_name.encode() + b"\0"
    body = struct.pack("=BBH", _FAMILIES[family], 0, 0) + _attribute(_ATTR_TABLE, name)
    header = struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM_NFTABLES << 8 | _GETRULE, _REQUEST_DUMP, 1, 0)
    rules = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.send(header + body)
        while True:
            datagram = sock.recv(1 << 17)
            at = 0
            while at + 20 <= len(datagram):
                length, kind = struct.unpack_from("=IH", datagram, at)
                if kind == _DONE:
                    return rules
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", datagram, at + 16)[0]
                    raise OSError(code, f"listing the rules of the table {table!r}")
                rules += kind == _SUBSYSTEM_NFTABLES << 8 | _NEWRULE
                at += (length + 3) & ~3


class UdpFlow(NamedTuple):
    """One flow as conntrack knows it: who asked whom."""

    client: Address
    asked: Address
    zone: int = 0


def delete_udp_flows(flows: Sequence[UdpFlow]) -> None:
    """Have conntrack forget *flows*; those that it does not know any more are passed over.

    Raises:
        OSError: the kernel refused.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        for first in range(0, len(flows), _DELETED_AT_ONCE):
            sock.send(b"".join(map(_deletion, flows[first : first + _DELETED_AT_ONCE])))
            while (code := _next_error(sock)) is not None:  # the kernel has answered before send() returns
                if code not in (0, errno.ENOENT):
                    raise OSError(code, f"deleting {len(flows)} UDP flows")


def _next_error(sock: socket.socket) -> int | None:
    """Return the code of the next answer that waits in *sock*; None where there is none."""
    try:
        answer = sock.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return None
    return -int(struct.unpack_from("=i", answer, 16)[0])


def _deletion(flow: UdpFlow) -> bytes:
    (client, client_port), (asked, port), zone = flow
    family = family_of(asked)
    source, destination = _CTA_IP[family]
    addresses = (
        _attribute(kind, socket.inet_pton(_FAMILY[family], ip)) for kind, ip in ((source, client), (destination, asked))
    )
    protocol = (
        _attribute(_CTA_PROTO_NUM, bytes([socket.IPPROTO_UDP])),
        _attribute(_CTA_PROTO_SRC_PORT, client_port.to_bytes(2)),
        _attribute(_CTA_PROTO_DST_PORT, port.to_bytes(2)),
    )
    there = _attribute(_CTA_TUPLE_IP | _NESTED, b"".join(addresses))
    there += _attribute(_CTA_TUPLE_PROTO | _NESTED, b"".join(protocol))
    body = struct.pack("=BBH", _FAMILY[family], 0, 0) + _attribute(_CTA_TUPLE_ORIG | _NESTED, there)
    body += _attribute(_CTA_ZONE, zone.to_bytes(2)) if zone else b""
    return struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM_CONNTRACK << 8 | _CT_DELETE, _REQUEST, 1, 0) + body


def _attribute(kind: int, value: bytes) -> bytes:
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)
