"""Netlink requests that are too slow with tools: nft reads a whole table; conntrack starts again for each deletion."""

import errno
import os
import socket
import struct
from collections.abc import Iterable

from userspace_proxy import netlink
from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.netlink import NESTED, attribute

# linux/netfilter/nfnetlink.h, nf_tables.h
NFTABLES = 10 << 8
_NEWTABLE, _GETTABLE = NFTABLES, NFTABLES | 1
_NEWRULE, _GETRULE = NFTABLES | 6, NFTABLES | 7
_TABLE_FLAGS, _DORMANT = 2, 1
FAMILIES = {"inet": 1, "bridge": 7}
ATTR_TABLE = 1  # the first attribute of every message about a table, chain, rule, set or element
# linux/netfilter/nfnetlink_conntrack.h
_CT_DELETE = 1 << 8 | 2
_TUPLE_ORIG, _TUPLE_IP, _TUPLE_PROTO = 1, 1, 2
_IP_SOURCE = {4: 1, 6: 3}
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3
_IP_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_TIMEOUT_S = 5.0


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
    body = struct.pack("=BBH", FAMILIES[family], 0, 0)
    with netlink.open_socket(netlink.NETFILTER, _TIMEOUT_S) as sock:
        found = list(netlink.dump(sock, netlink.message(_GETTABLE, netlink.REQUEST | netlink.DUMP, body)))
    tables = (dict(netlink.attributes(body[4:])) for kind, body in found if kind == _NEWTABLE)
    flags = (each[_TABLE_FLAGS] for each in tables if each[ATTR_TABLE] == name.encode() + b"\0")
    return any(int.from_bytes(each, "big") & _DORMANT for each in flags)


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
