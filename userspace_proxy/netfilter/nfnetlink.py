"""Netlink requests for which tools are too slow: nft reads whole tables, and conntrack prints its table as text."""

import errno
import os
import socket
import struct
import sys
from collections.abc import Collection, Iterable, Iterator
from enum import IntEnum
from typing import NamedTuple

from userspace_proxy import netlink
from userspace_proxy.model.endpoint import Address, Family, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.netlink import ADDRESS_FAMILIES, NESTED, attribute, attributes

# linux/netfilter/nfnetlink.h, nf_tables.h
NFTABLES = 10 << 8
_NEWTABLE, _GETTABLE = NFTABLES, NFTABLES | 1
_NEWRULE, _GETRULE = NFTABLES | 6, NFTABLES | 7
_TABLE_FLAGS, _DORMANT = 2, 1
FAMILIES = {"inet": 1, "ip": 2, "bridge": 7, "ip6": 10}
ATTR_TABLE = 1  # the first attribute of every message about a table, chain, rule, set or element
# linux/netfilter/nfnetlink_conntrack.h
_CT_GET, _CT_DELETE = 1 << 8 | 1, 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_IP, _TUPLE_PROTO = 1, 1, 2
_IP_SOURCE = {4: 1, 6: 3}
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_IP_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_STATUS, _STATUS_MASK, _SEEN_REPLY = 3, 26, (1 << 1).to_bytes(4, "big")
_FILTER, _FILTER_ORIG, _BY_PROTOCOL = 25, 1, (1 << 3).to_bytes(4, sys.byteorder)
_PROTOCOL_INFO, _PROTOCOL_INFO_TCP, _TCP_STATE = 4, 1, 1
_NFGENMSG_BYTES = 4
# One direction of an entry: source, destination, protocol and ports, each after its attribute header.
_DIRECTION: dict[Family, struct.Struct] = {
    4: struct.Struct("!8x4s4x4s8xB3x4xH2x4xH"),
    6: struct.Struct("!8x16s4x16s8xB3x4xH2x4xH"),
}
_TIMEOUT_S = 5.0


class TcpState(IntEnum):
    """States of a connection in conntrack (linux/netfilter/nf_conntrack_tcp.h)."""

    SYN_SENT = 1
    ESTABLISHED = 3


class Entry(NamedTuple):
    """One entry of conntrack.

    ``source``: the client. ``asked``: the address that it sends to. ``answering``: the address that replies come from.
    IP addresses are 4 or 16 bytes.
    """

    source: bytes
    source_port: int
    asked: bytes
    asked_port: int
    answering: bytes
    answering_port: int


def count_rules(table: str) -> int:
    """Return the number of rules in all chains of *table* (``family name``); 0 if there is no such table.

    Raises:
        OSError: the kernel refused the request.
    """
    family, _, name = table.partition(" ")
    body = struct.pack("=BBH", FAMILIES[family], 0, 0) + attribute(ATTR_TABLE, name.encode() + b"\0")
    with netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S) as sock:
        request = netlink.message(_GETRULE, netlink.REQUEST | netlink.DUMP, body)
        return sum(kind == _NEWRULE for kind, _ in netlink.dump(sock, request))


def is_dormant(table: str) -> bool:
    """Return whether the kernel has *table* (``family name``), but does not call its chains.

    Raises:
        OSError: the kernel refused the request.
    """
    family, _, name = table.partition(" ")
    return bool(_table_flags(family).get(name, 0) & _DORMANT)


def table_names(family: str) -> Collection[str]:
    """Return the names of the tables of *family*: inet, ip, ip6 or bridge.

    Raises:
        OSError: the kernel refused the request.
    """
    return _table_flags(family)


def _table_flags(family: str) -> dict[str, int]:
    body = struct.pack("=BBH", FAMILIES[family], 0, 0)
    with netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S) as sock:
        found = list(netlink.dump(sock, netlink.message(_GETTABLE, netlink.REQUEST | netlink.DUMP, body)))
    tables = (dict(netlink.attributes(body[_NFGENMSG_BYTES:])) for kind, body in found if kind == _NEWTABLE)
    return {
        each[ATTR_TABLE].rstrip(b"\0").decode(errors="replace"): int.from_bytes(each[_TABLE_FLAGS], "big")
        for each in tables
    }


def read_entries(protocol: L4Protocol, family: Family, state: TcpState | None = None) -> Iterator[Entry]:
    """Yield the entries of conntrack of *protocol* and *family*; of TCP, those in *state*.

    Raises:
        OSError: the kernel refused the request, or does not answer.
    """
    wanted, direction = _IP_PROTOCOLS[protocol], _DIRECTION[family]
    number = attribute(_TUPLE_PROTO | NESTED, attribute(_PROTOCOL, bytes((wanted,))))
    # The kernel lists only entries of the protocol, from Linux 5.8 on; before, it lists all. Such a question is refused
    # (EOPNOTSUPP) without a family, so that both families take two walks through its whole table.
    question = (
        bytes((ADDRESS_FAMILIES[family], 0, 0, 0))
        + attribute(_TUPLE_ORIG | NESTED, number)
        + attribute(_FILTER | NESTED, attribute(_FILTER_ORIG, _BY_PROTOCOL))
    )
    if state is TcpState.SYN_SENT:
        # The kernel lists only entries without a reply, from Linux 5.16 on; before, it lists all.
        question += attribute(_STATUS, bytes(4)) + attribute(_STATUS_MASK, _SEEN_REPLY)
    with netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S) as sock:
        for _, body in netlink.dump(sock, netlink.message(_CT_GET, netlink.REQUEST | netlink.DUMP, question)):
            parts = attributes(body[_NFGENMSG_BYTES:])
            (_, original), (_, reply) = next(parts), next(parts)  # they come first (ctnetlink_fill_info)
            if len(original) < direction.size:
                continue
            source, asked, number, source_port, asked_port = direction.unpack_from(original)
            if number == wanted and (state is None or _tcp_state(parts) == state):
                answering, _, _, answering_port, _ = direction.unpack_from(reply)
                yield Entry(source, source_port, asked, asked_port, answering, answering_port)


def _tcp_state(parts: Iterable[tuple[int, bytes]]) -> int | None:
    for kind, value in parts:
        if kind == _PROTOCOL_INFO:
            return dict(attributes(dict(attributes(value))[_PROTOCOL_INFO_TCP]))[_TCP_STATE][0]
    return None


def delete_flows(protocol: L4Protocol, flows: Iterable[tuple[Address, Address]]) -> int:
    """Delete *flows* (client, dialled address) of *protocol* from conntrack; return how many existed.

    Raises:
        OSError: the kernel refused the request.
    """
    flags = netlink.REQUEST | netlink.ACK
    requests = [netlink.message(_CT_DELETE, flags, _flow(protocol, client, asked)) for client, asked in flows]
    deleted = 0
    with netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S) as sock:
        for code in netlink.send_all(sock, requests):
            if code not in (0, errno.ENOENT):  # ENOENT: the flow has ended meanwhile
                raise OSError(code, f"deleting {protocol} flows from conntrack: {os.strerror(code)}")
            deleted += not code
    return deleted


def _flow(protocol: L4Protocol, client: Address, asked: Address) -> bytes:
    family = family_of(asked[0])
    number = ADDRESS_FAMILIES[family]
    source, destination = (socket.inet_pton(number, address[0]) for address in (client, asked))
    ips = attribute(_IP_SOURCE[family], source) + attribute(_IP_SOURCE[family] + 1, destination)
    ports = (
        attribute(_PROTOCOL, bytes((_IP_PROTOCOLS[protocol],)))
        + attribute(_SOURCE_PORT, client[1].to_bytes(2, "big"))
        + attribute(_DESTINATION_PORT, asked[1].to_bytes(2, "big"))
    )
    flow = attribute(_TUPLE_IP | NESTED, ips) + attribute(_TUPLE_PROTO | NESTED, ports)
    return bytes((number, 0, 0, 0)) + attribute(_TUPLE_ORIG | NESTED, flow)
