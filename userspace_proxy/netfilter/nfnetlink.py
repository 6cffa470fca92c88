"""Netlink requests that are too slow with tools: nft reads a whole table; conntrack starts anew for each deletion."""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable

from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.netlink import NESTED, attribute, message, messages

_NETLINK_NETFILTER = 12
_REQUEST_DUMP = 0x1 | 0x300
_SUBSYSTEM_NFTABLES = 10
_NEWRULE, _GETRULE = 6, 7
_FAMILIES = {"inet": 1, "bridge": 7}
_ATTR_TABLE = 1
_ERROR, _DONE = 2, 3
_REQUEST_ANSWERED = 0x1 | 0x4
# linux/netfilter/nfnetlink_conntrack.h
_CT_DELETE = 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_IP, _TUPLE_PROTO = 1, 1, 2
_IP_SOURCE = {4: 1, 6: 3}
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_IP_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_DELETED_AT_ONCE = 256
_TIMEOUT_S = 5.0


def count_rules(table: str) -> int:
    """Return the number of rules in all chains of *table* (``family name``); 0 if there is no such table.

    Raises:
        OSError: the kernel refused the request.
    """
    family, _, bare_name = table.partition(" ")
    body = struct.pack("=BBH", _FAMILIES[family], 0, 0) + attribute(_ATTR_TABLE, bare_name.encode() + b"\0")
    rules = 0
    with _netfilter() as sock:
        sock.send(message(_SUBSYSTEM_NFTABLES << 8 | _GETRULE, _REQUEST_DUMP, body))
        while True:
            for kind, body in messages(sock.recv(1 << 17)):
                if kind == _DONE:
                    return rules
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], f"listing the rules of the table {table!r}")
                rules += kind == _SUBSYSTEM_NFTABLES << 8 | _NEWRULE


def delete_flows(protocol: L4Protocol, flows: Iterable[tuple[Address, Address]]) -> int:
    """Delete *flows* (client, dialled address) of *protocol* from conntrack; return how many existed.

    Raises:
        OSError: the kernel refused.
    """
    wanted = [message(_CT_DELETE, _REQUEST_ANSWERED, _flow(protocol, client, asked)) for client, asked in flows]
    deleted = 0
    with _netfilter() as sock:
        for start in range(0, len(wanted), _DELETED_AT_ONCE):
            part = wanted[start : start + _DELETED_AT_ONCE]
            sock.send(b"".join(part))
            for _ in part:
                code = -struct.unpack_from("=i", sock.recv(4096), 16)[0]
                if code not in (0, errno.ENOENT):  # ENOENT: the flow has ended meanwhile
                    raise OSError(code, f"deleting {protocol} flows from conntrack")
                deleted += not code
    return deleted


def _flow(protocol: L4Protocol, client: Address, asked: Address) -> bytes:
    family = family_of(asked[0])
    number = socket.AF_INET if family == 4 else socket.AF_INET6
    source, destination = (socket.inet_pton(number, address[0]) for address in (client, asked))
    ips = attribute(_IP_SOURCE[family], source) + attribute(_IP_SOURCE[family] + 1, destination)
    ports = (
        attribute(_PROTOCOL, bytes((_IP_PROTOCOLS[protocol],)))
        + attribute(_SOURCE_PORT, client[1].to_bytes(2, "big"))
        + attribute(_DESTINATION_PORT, asked[1].to_bytes(2, "big"))
    )
    flow = attribute(_TUPLE_IP | NESTED, ips) + attribute(_TUPLE_PROTO | NESTED, ports)
    return bytes((number, 0, 0, 0)) + attribute(_TUPLE_ORIG | NESTED, flow)


def _netfilter() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    sock.settimeout(_TIMEOUT_S)
    return sock
