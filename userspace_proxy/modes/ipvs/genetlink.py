"""IPVS itself: what it has is read from /proc, one read however much it is; changes go by generic netlink.

By our own messages, many to a call: a library made for it (pyroute2) takes fifty times as long for each, which is
seconds for thousands of Services. Everything here blocks, and is called in threads.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.table import OWN_FLAG, Connections, Step, Verb, VirtualServer, VirtualServers
from userspace_proxy.netfilter.sets import packed_ip
from userspace_proxy.netlink import attribute, attributes, message, messages

_LISTING = Path("/proc/net/ip_vs")
# The kernel's timer tick (HZ, a matter of its build) is the resolution of its coarse clocks.
_CLOCK_MONOTONIC_COARSE = 6
TICKS_A_SECOND = round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))
_COUNTS = re.compile(r"^(  -> \S+ +\S+ +\d+).*$", re.MULTILINE)
_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_NUMBER_OF = {4: socket.AF_INET, 6: socket.AF_INET6}
# A client is one address: a mask for IPv4, a length for IPv6.
_ONE_CLIENT: Mapping[int, bytes] = {4: b"\xff" * 4, 6: struct.pack("=I", 128)}
_PERSISTENT = 0x1
_MASQUERADING = 0

_NETLINK_GENERIC = 16
_REQUEST, _ACK, _DUMP, _CREATE = 0x1, 0x4, 0x300, 0x400
_CONTROLLER, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 0x10, 3, 1, 2
_ERROR, _DONE = 2, 3
# linux/ip_vs.h
_SERVICE, _DEST = 1, 2
_GET_SERVICE = 4
_OF_SERVER = {Verb.ADD: 1, Verb.SET: 2, Verb.DELETE: 3}
_OF_ENDPOINT = {Verb.ADD: 5, Verb.SET: 6, Verb.DELETE: 7}
_SVC_AF, _SVC_PROTOCOL, _SVC_ADDR, _SVC_PORT = 1, 2, 3, 4
_SVC_SCHEDULER, _SVC_FLAGS, _SVC_TIMEOUT, _SVC_NETMASK = 6, 7, 8, 9
_DEST_ADDR, _DEST_PORT, _DEST_FORWARD, _DEST_WEIGHT, _DEST_MOST, _DEST_LEAST, _DEST_AF = 1, 2, 3, 4, 5, 6, 11
_AT_ONCE = 128
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class Listing:
    """What the kernel has, whoever made it. ``connections``: how many each endpoint has."""

    servers: VirtualServers = field(default_factory=dict)
    connections: Mapping[tuple[Portal, Address], Connections] = field(default_factory=dict)


def is_loaded() -> bool:
    """Return whether this kernel has IPVS at the moment."""
    return _LISTING.exists()


def printed() -> str:
    """Return what the kernel prints of IPVS; nothing where it has none."""
    return _LISTING.read_text() if is_loaded() else ""


def listing() -> Listing:
    """Return what IPVS has; nothing where the kernel has no IPVS."""
    return read(printed())


def without_counts(text: str) -> str:
    """Return *text*, as `printed`, without how many connections there are: the same until somebody changes a server.

    A tenth of the time that it takes to read it.
    """
    return _COUNTS.sub(r"\1", text)


def read(text: str) -> Listing:
    """Read what the kernel has `printed`; virtual servers by mark, and SCTP, are left out.

    It is told seconds of affinity by netlink, and prints ticks there.
    """
    servers: VirtualServers = {}
    connections: dict[tuple[Portal, Address], Connections] = {}
    portal: Portal | None = None
    weights: dict[Address, int] = {}
    for line in text.splitlines():
        words = line.split()
        if not words or words[0] in ("IP", "Prot") or words[1] == "RemoteAddress:Port":
            continue
        if words[0] != "->":
            portal = Portal(*_address(words[1]), L4Protocol(words[0])) if words[0] in L4Protocol.__members__ else None
            if portal is not None:
                ticks = int(words[words.index("persistent") + 1]) if "persistent" in words else None
                weights = {}
                servers[portal] = VirtualServer(words[2], ticks and ticks // TICKS_A_SECOND, weights)
        elif portal is not None:
            endpoint = _address(words[1])
            weights[endpoint] = int(words[3])
            connections[portal, endpoint] = Connections(int(words[4]), int(words[5]))
    return Listing(servers, connections)


def _address(text: str) -> Address:
    """Read ``0A600001:0050`` or ``[fd00:0000:...]:0050``."""
    ip, _, port = text.rpartition(":")
    if ip.startswith("["):
        return str(ipaddress.IPv6Address(ip.strip("[]"))), int(port, 16)
    return socket.inet_ntoa(bytes.fromhex(ip)), int(port, 16)


# ---- netlink


def own_portals() -> set[Portal]:
    """Return the portals of the virtual servers that are ours by their flag.

    Raises:
        OSError: this kernel has no IPVS, or does not say.
    """
    protocols = {number: protocol for protocol, number in _PROTOCOLS.items()}
    found = set()
    with _socket() as sock:
        kind = _family(sock)
        sock.send(message(kind, _REQUEST | _DUMP, _command(_GET_SERVICE)))
        for body in _answers(sock):
            server = dict(attributes(dict(attributes(body[4:]))[_SERVICE]))
            protocol = protocols.get(*struct.unpack("=H", server.get(_SVC_PROTOCOL, b"\0\0")))
            flags, _mask = struct.unpack("=II", server[_SVC_FLAGS])
            # Those by mark have no address, and of other protocols there are none of ours.
            if flags & OWN_FLAG and _SVC_ADDR in server and protocol is not None:
                family = struct.unpack("=H", server[_SVC_AF])[0]
                size = 4 if family == socket.AF_INET else 16
                ip = socket.inet_ntop(family, server[_SVC_ADDR][:size])
                port = int.from_bytes(server[_SVC_PORT][:2])
                found.add(Portal(ip, port, protocol))
    return found


class Taken(NamedTuple):
    """What came of steps: which were done, and which were refused, and why."""

    done: list[Step]
    refused: list[tuple[Step, OSError]]


def take(steps: Sequence[Step]) -> Taken:
    """Take *steps*; those for endpoints whose virtual server was refused are left out: it is somebody else's.

    Raises:
        OSError: this kernel has no IPVS, or does not answer.
    """
    taken = Taken([], [])
    with _socket() as sock:
        kind = _family(sock)

        def take_each(these: Sequence[Step]) -> None:
            for start in range(0, len(these), _AT_ONCE):
                part = these[start : start + _AT_ONCE]
                sock.send(b"".join(message(kind, _REQUEST | _ACK | _CREATE, _body(step)) for step in part))
                for step, code in zip(part, _codes(sock, len(part)), strict=True):
                    if code:
                        taken.refused.append((step, OSError(code, os.strerror(code))))
                    else:
                        taken.done.append(step)

        take_each([step for step in steps if step.is_beginning])
        without = {step.portal for step, _ in taken.refused}
        take_each([step for step in steps if not step.is_beginning and step.portal not in without])
    return taken


def _body(step: Step) -> bytes:
    verb, portal, server, endpoint, weight = step
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
        persistent = 0 if server.affinity_timeout_s is None else _PERSISTENT
        key += (
            attribute(_SVC_SCHEDULER, server.scheduler.encode() + b"\0")
            + attribute(_SVC_FLAGS, struct.pack("=II", OWN_FLAG | persistent, 0xFFFF_FFFF))
            + attribute(_SVC_TIMEOUT, struct.pack("=I", server.affinity_timeout_s or 0))
            + attribute(_SVC_NETMASK, _ONE_CLIENT[family])
        )
    return _command(_OF_SERVER[verb]) + attribute(_SERVICE, key)


def _command(number: int) -> bytes:
    return struct.pack("=BBH", number, 1, 0)


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC)
    sock.settimeout(_TIMEOUT_S)
    return sock


def _family(sock: socket.socket) -> int:
    """Return the number by which the kernel knows IPVS at the moment."""
    body = struct.pack("=BBH", _GET_FAMILY, 1, 0) + attribute(_FAMILY_NAME, b"IPVS\0")
    sock.send(message(_CONTROLLER, _REQUEST, body))
    for kind, answer in messages(sock.recv(1 << 16)):
        if kind == _ERROR:
            raise OSError(-struct.unpack_from("=i", answer)[0], "this kernel has no IPVS")
        return int(struct.unpack("=H", dict(attributes(answer[4:]))[_FAMILY_ID])[0])
    raise OSError("the kernel does not say whether it has IPVS")


def _answers(sock: socket.socket) -> Iterator[bytes]:
    """Yield the bodies of a dump."""
    while True:
        for kind, body in messages(sock.recv(1 << 17)):
            if kind == _DONE:
                return
            if kind == _ERROR:
                raise OSError(-struct.unpack_from("=i", body)[0], "listing virtual servers")
            yield body


def _codes(sock: socket.socket, count: int) -> list[int]:
    """Return what the kernel answered *count* messages: 0, or why it refused."""
    codes: list[int] = []
    while len(codes) < count:
        codes += [-struct.unpack_from("=i", body)[0] for kind, body in messages(sock.recv(1 << 17)) if kind == _ERROR]
    return codes
