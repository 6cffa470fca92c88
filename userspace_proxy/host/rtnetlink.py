"""Reads the interfaces, addresses, routes and routing rules of this host by netlink.

A start and an end of the proxy read them some 30 times. The program ``ip`` takes 4 ms of CPU for each.
The layouts are those of linux/rtnetlink.h, if_link.h, if_addr.h and fib_rules.h.
"""

import contextlib
import functools
import ipaddress
import os
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

from userspace_proxy import netlink
from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import in_thread
from userspace_proxy.model.endpoint import Family
from userspace_proxy.netlink import ADDRESS_FAMILIES

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Types of routes, tables, scopes, and flags of interfaces and addresses.
BLACKHOLE, UNREACHABLE, PROHIBIT, THROW = 6, 7, 8, 9
TABLE_MAIN, TABLE_LOCAL = 254, 255
SCOPE_GLOBAL, SCOPE_LINK = 0, 253
IS_BROADCAST, IS_LOOPBACK, HAS_NO_ARP = 0x2, 0x8, 0x80
IS_TEMPORARY, IS_DEPRECATED, IS_TENTATIVE = 0x1, 0x20, 0x40

_GET_LINK, _GET_ADDRESS, _GET_ROUTE, _GET_RULE = 18, 22, 26, 34
_LINK, _ADDRESS = struct.Struct("=BxHiII"), struct.Struct("=BBBBI")
# Of routes: IP family, length of the destination, table, protocol, type. Of rules: the first two.
_ROUTE = struct.Struct("=BB2xBBxB4x")
_NAME, _MASTER, _LINK_INFO, _INFO_KIND, _GROUP = 3, 10, 18, 1, 27
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8
_DESTINATION, _DEVICE, _METRIC, _SOURCE, _TABLE = 1, 4, 6, 7, 15
_RULE_PRIORITY, _RULE_MARK, _RULE_MASK = 6, 10, 16
_EXT_MASK, _SKIP_STATISTICS = 29, 1 << 3
# The kernel filters by the header of a request, such as the protocol of routes.
_SOL_NETLINK, _GET_STRICT_CHECK = 270, 12
_TIMEOUT_S = 5.0

_Result = TypeVar("_Result")


class HostAddress(NamedTuple):
    """An address of an interface, with the length of its network's prefix, its ``SCOPE_...`` and its flags."""

    ip: str
    prefix_length: int
    scope: int
    flags: int


class Interface(NamedTuple):
    """An interface.

    ``kind``: as in ``ip link add type KIND``; "" for hardware. ``has_master``: it is a port of a bridge, bond or VRF.
    """

    name: str
    flags: int
    group: int
    kind: str
    has_master: bool
    addresses: tuple[HostAddress, ...]


class HostRoute(NamedTuple):
    """A route. ``device``: "" if there is none, or several. ``source``: the address that is preferred, or ""."""

    destination: Network
    kind: int
    table: int
    device: str
    metric: int
    source: str


class RoutingRule(NamedTuple):
    """A routing rule. ``destination``: None for all. ``mark``: the mark and its mask."""

    priority: int
    destination: Network | None
    mark: tuple[int, int]
    table: int


async def read(query: Callable[[], _Result]) -> _Result:
    """Return what *query*, one of the functions below, returns; it runs in a thread.

    Raises:
        SyncError: the kernel refused it.
    """
    try:
        return await in_thread(query)
    except OSError as error:
        raise SyncError(f"the kernel does not list routes or addresses: {error.strerror or error}") from error


def interfaces() -> list[Interface]:
    """Return the interfaces of this host. Raises OSError."""
    addresses: dict[int, list[HostAddress]] = {}
    for body in _dump(_GET_ADDRESS, _ADDRESS.pack(0, 0, 0, 0, 0)):
        family, prefix_length, flags, scope, index = _ADDRESS.unpack_from(body)
        found = dict(netlink.attributes(body[_ADDRESS.size :]))
        ip = found.get(_IFA_LOCAL, found.get(_IFA_ADDRESS))
        if ip is not None and family in ADDRESS_FAMILIES.values():  # there are others, such as MCTP
            flags = int.from_bytes(found[_IFA_FLAGS], sys.byteorder) if _IFA_FLAGS in found else flags
            addresses.setdefault(index, []).append(HostAddress(netlink.ip_text(ip), prefix_length, scope, flags))
    listed = []
    question = _LINK.pack(0, 0, 0, 0, 0) + netlink.attribute(_EXT_MASK, _SKIP_STATISTICS.to_bytes(4, sys.byteorder))
    for body in _dump(_GET_LINK, question):
        _, _, index, flags, _ = _LINK.unpack_from(body)
        found = dict(netlink.attributes(body[_LINK.size :]))
        info = dict(netlink.attributes(found.get(_LINK_INFO, b"")))
        # A name may be any bytes; `socket.if_indextoname` decodes it in the same way.
        name, kind = (os.fsdecode(value.rstrip(b"\0")) for value in (found[_NAME], info.get(_INFO_KIND, b"")))
        listed.append(
            Interface(name, flags, _number(found, _GROUP), kind, _MASTER in found, tuple(addresses.get(index, ())))
        )
    return listed


def routes(family: Family, *, table: int = 0, protocol: int = 0, default_only: bool = False) -> list[HostRoute]:
    """Return the routes of *family*. *table*, *protocol*: only theirs, unless 0. *default_only*: only default routes.

    Raises:
        OSError: the kernel refused the request.
    """
    name = functools.cache(_name)
    found = []
    for length, kind, packed in _route_messages(family, table, protocol):
        if length and default_only:
            continue
        its = dict(netlink.attributes(packed))
        destination, source = _network(family, its.get(_DESTINATION), length), its.get(_SOURCE)
        device, metric = name(_number(its, _DEVICE)), _number(its, _METRIC)
        text = netlink.ip_text(source) if source else ""
        found.append(HostRoute(destination, kind, _number(its, _TABLE), device, metric, text))
    return found


def _route_messages(family: Family, table: int, protocol: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield the length of the destination, the type and the attributes of each route."""
    wanted = ADDRESS_FAMILIES[family]
    try:
        for body in _dump(_GET_ROUTE, _ROUTE.pack(wanted, 0, table, protocol, 0)):
            its_family, length, _, _, kind = _ROUTE.unpack_from(body)
            if its_family == wanted:  # a kernel without IPv6 lists the routes of IPv4
                yield length, kind, body[_ROUTE.size :]
    except FileNotFoundError:
        return  # a table exists from its first route on


def routing_rules(family: Family) -> list[RoutingRule]:
    """Return the routing rules of *family*. Raises OSError."""
    found = []
    for body in _dump(_GET_RULE, _ROUTE.pack(ADDRESS_FAMILIES[family], 0, 0, 0, 0)):
        its_family, length, *_ = _ROUTE.unpack_from(body)
        if its_family == ADDRESS_FAMILIES[family]:
            its = dict(netlink.attributes(body[_ROUTE.size :]))
            destination = _network(family, its[_DESTINATION], length) if _DESTINATION in its else None
            mark = _number(its, _RULE_MARK), _number(its, _RULE_MASK)
            found.append(RoutingRule(_number(its, _RULE_PRIORITY), destination, mark, _number(its, _TABLE)))
    return found


def _dump(kind: int, question: bytes) -> Iterator[bytes]:
    with netlink.open_socket(netlink.ROUTE, _TIMEOUT_S) as sock:
        sock.setsockopt(_SOL_NETLINK, _GET_STRICT_CHECK, 1)
        for _, body in netlink.dump(sock, netlink.message(kind, netlink.REQUEST | netlink.DUMP, question)):
            yield body


def _number(found: dict[int, bytes], kind: int) -> int:
    return int.from_bytes(found.get(kind, b""), sys.byteorder)


def _network(family: Family, packed: bytes | None, length: int) -> Network:
    if family == 4:
        return ipaddress.IPv4Network((packed or bytes(4), length), strict=False)
    return ipaddress.IPv6Network((packed or bytes(16), length), strict=False)


def _name(index: int) -> str:
    with contextlib.suppress(OSError):  # 0, or it is gone
        return socket.if_indextoname(index)
    return ""
