"""Read IPVS's virtual servers from /proc, and change them by generic netlink. Blocks: call it in threads.

One read of /proc lists everything. Changes are our own messages, many to a system call: a library for it (pyroute2)
takes fifty times as long for each, which is seconds for thousands of Services.
"""

import ipaddress
import os
import re
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from userspace_proxy import netlink
from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.changes import ConnectionCounts, ServerChange, Verb
from userspace_proxy.modes.ipvs.table import FALL_BACK_FLAG, FALLING_BACK, OWN_FLAG, VirtualServers, VirtualServerSpec
from userspace_proxy.netfilter.sets import packed_ip
from userspace_proxy.netlink import attribute, attributes

_LISTING = Path("/proc/net/ip_vs")
# The kernel's timer tick (HZ, set when it is built) is the resolution of its coarse clocks.
_CLOCK_MONOTONIC_COARSE = 6
TICKS_A_SECOND = round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))
_COUNTS = re.compile(r"^(  -> \S+ +\S+ +\d+).*$", re.MULTILINE)
_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_NUMBER_OF = {4: socket.AF_INET, 6: socket.AF_INET6}
# A client is one address: a mask for IPv4, a length for IPv6.
_ONE_CLIENT: Mapping[int, bytes] = {4: b"\xff" * 4, 6: struct.pack("=I", 128)}
_PERSISTENT = 0x1
_MASQUERADING = 0

# linux/genetlink.h
_CONTROLLER, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
# linux/ip_vs.h
_SERVICE, _DEST = 1, 2
_GET_SERVICE = 4
_OF_SERVER = {Verb.ADD: 1, Verb.SET: 2, Verb.DELETE: 3}
_OF_ENDPOINT = {Verb.ADD: 5, Verb.SET: 6, Verb.DELETE: 7}
_SVC_AF, _SVC_PROTOCOL, _SVC_ADDR, _SVC_PORT = 1, 2, 3, 4
_SVC_SCHEDULER, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK = 6, 7, 8, 9
_DEST_ADDR, _DEST_PORT, _DEST_FORWARD, _DEST_WEIGHT, _DEST_MOST, _DEST_LEAST, _DEST_AF = 1, 2, 3, 4, 5, 6, 11
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Listing:
    """All virtual servers in the kernel, also those of other programs. ``connections``: the counts of each endpoint."""

    servers: VirtualServers = field(default_factory=dict)
    connections: Mapping[tuple[Portal, Address], ConnectionCounts] = field(default_factory=dict)


def is_loaded() -> bool:
    """Return whether this kernel has IPVS at the moment."""
    return _LISTING.exists()


def printed() -> str:
    """Return the kernel's listing as text; "" without IPVS."""
    return _LISTING.read_text() if is_loaded() else ""


def listing() -> Listing:
    """Return the kernel's listing; empty without IPVS."""
    return read(printed())


def without_counts(text: str) -> str:
    """Return *text*, a listing, without the numbers of connections: equal until a virtual server changes.

    Takes a tenth of the time of `read`.
    """
    return _COUNTS.sub(r"\1", text)


def read(text: str) -> Listing:
    """Parse *text*, a listing. Virtual servers for packet marks and of SCTP are skipped.

    The kernel takes an affinity time-out in seconds, and prints it in ticks.
    """
    servers: VirtualServers = {}
    connections: dict[tuple[Portal, Address], ConnectionCounts] = {}
    portal: Portal | None = None
    weights: dict[Address, int] = {}
    for line in text.splitlines():
        match line.split():
            case ["->", address, _, weight, active, inactive] if portal is not None and address != "RemoteAddress:Port":
                endpoint = _address(address)
                weights[endpoint] = int(weight)
                connections[portal, endpoint] = ConnectionCounts(int(active), int(inactive))
            case [("TCP" | "UDP") as protocol, address, scheduler, *options]:
                portal, weights = Portal(*_address(address), L4Protocol(protocol)), {}
                ticks = int(options[options.index("persistent") + 1]) if "persistent" in options else None
                servers[portal] = VirtualServerSpec(scheduler, ticks and ticks // TICKS_A_SECOND, weights)
            case [_, _, *_] if not line.startswith(" "):
                portal = None
    return Listing(servers, connections)


def _address(text: str) -> Address:
    """Parse ``0A600001:0050`` or ``[fd00:0000:...]:0050``."""
    ip, _, port = text.rpartition(":")
    if ip.startswith("["):
        return str(ipaddress.IPv6Address(ip.strip("[]"))), int(port, 16)
    return socket.inet_ntoa(bytes.fromhex(ip)), int(port, 16)


# ---- netlink


def own_portals() -> set[Portal]:
    """Return the portals of the virtual servers that have our flag.

    Raises:
        OSError: this kernel has no IPVS, or refused the request.
    """
    found = set()
    with netlink.open_socket(netlink.GENERIC, _TIMEOUT_S) as sock:
        request = netlink.message(_find_ipvs(sock), netlink.REQUEST | netlink.DUMP, _command(_GET_SERVICE))
        for _, body in netlink.dump(sock, request):
            if (portal := _own_portal(dict(attributes(dict(attributes(body[4:]))[_SERVICE])))) is not None:
                found.add(portal)
    return found


def _own_portal(server: Mapping[int, bytes]) -> Portal | None:
    """Return the portal of a virtual server with our flag; None for others, which may have no address."""
    protocols = {number: protocol for protocol, number in _PROTOCOLS.items()}
    protocol = protocols.get(*struct.unpack("=H", server.get(_SVC_PROTOCOL, b"\0\0")))
    flags, _mask = struct.unpack("=II", server[_SVC_FLAGS])
    if not flags & OWN_FLAG or _SVC_ADDR not in server or protocol is None:
        return None
    family = struct.unpack("=H", server[_SVC_AF])[0]
    ip = socket.inet_ntop(family, server[_SVC_ADDR][: 4 if family == socket.AF_INET else 16])
    return Portal(ip, int.from_bytes(server[_SVC_PORT][:2]), protocol)


class ChangeResults(NamedTuple):
    """The changes that were done, and those that the kernel refused, with its error."""

    done: list[ServerChange]
    refused: list[tuple[ServerChange, OSError]]


def apply(changes: Sequence[ServerChange]) -> ChangeResults:
    """Apply *changes*. Skip endpoints whose virtual server was refused: it belongs to another program.

    Raises:
        OSError: this kernel has no IPVS, or does not answer.
    """
    results = ChangeResults([], [])
    with netlink.open_socket(netlink.GENERIC, _TIMEOUT_S) as sock:
        kind = _find_ipvs(sock)
        _apply(sock, kind, [change for change in changes if change.comes_first], results)
        without = {change.portal for change, _ in results.refused}
        _apply(sock, kind, [c for c in changes if not c.comes_first and c.portal not in without], results)
    return results


def _apply(sock: socket.socket, kind: int, changes: Sequence[ServerChange], results: ChangeResults) -> None:
    flags = netlink.REQUEST | netlink.ACK | netlink.CREATE
    requests = [netlink.message(kind, flags, _body(change)) for change in changes]
    for change, code in zip(changes, netlink.send_all(sock, requests), strict=True):
        if code:
            results.refused.append((change, OSError(code, os.strerror(code))))
        else:
            results.done.append(change)


def _body(change: ServerChange) -> bytes:
    verb, portal, server, endpoint, weight = change
    family = portal.family
    key = (
        attribute(_SVC_AF, struct.pack("=H", _NUMBER_OF[family]))
        + attribute(_SVC_PROTOCOL, struct.pack("=H", _PROTOCOLS[portal.protocol]))
        + attribute(_SVC_ADDR, packed_ip(portal.ip))
        + attribute(_SVC_PORT, portal.port.to_bytes(2, "big"))
    )
    if endpoint is not None:
        ip, port = endpoint
        dest = attribute(_DEST_ADDR, packed_ip(ip)) + attribute(_DEST_PORT, port.to_bytes(2, "big"))
        dest += attribute(_DEST_AF, struct.pack("=H", _NUMBER_OF[family_of(ip)]))
        settings = ((_DEST_FORWARD, _MASQUERADING), (_DEST_WEIGHT, weight), (_DEST_MOST, 0), (_DEST_LEAST, 0))
        dest += b"".join(attribute(name, struct.pack("=I", value)) for name, value in settings)
        return _command(_OF_ENDPOINT[verb]) + attribute(_SERVICE, key) + attribute(_DEST, dest)
    if verb is not Verb.DELETE:
        flags = OWN_FLAG | (0 if server.affinity_timeout_s is None else _PERSISTENT)
        flags |= FALL_BACK_FLAG if server.scheduler in FALLING_BACK else 0
        key += (
            attribute(_SVC_SCHEDULER, server.scheduler.encode() + b"\0")
            + attribute(_SVC_FLAGS, struct.pack("=II", flags, 0xFFFF_FFFF))
            + attribute(_SVC_TIMEOUT, struct.pack("=I", server.affinity_timeout_s or 0))
            + attribute(_SVC_NETMASK, _ONE_CLIENT[family])
        )
    return _command(_OF_SERVER[verb]) + attribute(_SERVICE, key)


def _command(number: int) -> bytes:
    return struct.pack("=BBH", number, 1, 0)


def _find_ipvs(sock: socket.socket) -> int:
    """Return the message type that the kernel has given to IPVS."""
    body = _command(_GET_FAMILY) + attribute(_FAMILY_NAME, b"IPVS\0")
    sock.send(netlink.message(_CONTROLLER, netlink.REQUEST, body))
    for kind, answer in netlink.messages(sock.recv(netlink.RECEIVED_BYTES)):
        if kind == netlink.ERROR:
            raise OSError(netlink.answer(answer)[0], "this kernel has no IPVS")
        return int(struct.unpack("=H", dict(attributes(answer[4:]))[_FAMILY_ID])[0])
    raise OSError("the kernel does not answer whether it has IPVS")
