"""IPVS itself: what it has is read from /proc, one read however much it is; changes go by pyroute2.

Everything here blocks, and is called in threads: pyroute2 runs an event loop of its own.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.rules.ipvs import OWN_FLAG, Connections, Step, VirtualServer, VirtualServers

if TYPE_CHECKING:
    from pyroute2 import IPVS, IPVSService  # type: ignore[import-untyped]

_LISTING = Path("/proc/net/ip_vs")
_PERSISTENT = 0x1
_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}
_MASQUERADING = 0
_ONE_CLIENT: Mapping[int, str] = {4: "255.255.255.255", 6: socket.inet_ntoa(struct.pack("=I", 128))}


@dataclass(frozen=True, slots=True)
class Listing:
    """What the kernel has, whoever made it. ``connections``: how many each endpoint has."""

    servers: VirtualServers = field(default_factory=dict)
    connections: Mapping[tuple[Portal, Address], Connections] = field(default_factory=dict)


def is_loaded() -> bool:
    """Return whether this kernel has IPVS at the moment."""
    return _LISTING.exists()


def listing() -> Listing:
    """Return what IPVS has; nothing where the kernel has no IPVS."""
    return read(_LISTING.read_text()) if is_loaded() else Listing()


def read(text: str) -> Listing:
    """Read what the kernel prints to /proc/net/ip_vs; virtual servers by mark, and SCTP, are left out."""
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
                timeout_s = int(words[words.index("persistent") + 1]) if "persistent" in words else None
                weights = {}
                servers[portal] = VirtualServer(words[2], timeout_s, weights)
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


def own_portals() -> set[Portal]:
    """Return the portals of the virtual servers that are ours by their flag.

    Raises:
        OSError: this kernel has no IPVS, or does not say.
    """
    from pyroute2.netlink import NetlinkError  # type: ignore[import-untyped]

    protocols: dict[int | None, L4Protocol] = {number: protocol for protocol, number in _PROTOCOLS.items()}
    found = set()
    try:
        with _ipvs() as ipvs:
            for message in ipvs.service("dump"):
                service = dict(message.get_attr("IPVS_CMD_ATTR_SERVICE")["attrs"])
                protocol = protocols.get(service.get("IPVS_SVC_ATTR_PROTOCOL"))
                if protocol is not None and service["IPVS_SVC_ATTR_FLAGS"]["flags"] & OWN_FLAG:
                    ip = str(ipaddress.ip_address(service["IPVS_SVC_ATTR_ADDR"]))
                    found.add(Portal(ip, service["IPVS_SVC_ATTR_PORT"], protocol))
    except NetlinkError as error:
        raise OSError(error.code, "listing virtual servers") from error
    return found


def take(steps: Iterable[Step]) -> list[tuple[Step, OSError]]:
    """Take *steps*, each whatever became of those before; return those that the kernel refused, and why."""
    from pyroute2 import IPVSDest
    from pyroute2.netlink import NetlinkError

    refused: list[tuple[Step, OSError]] = []
    with _ipvs() as ipvs:
        for step in steps:
            service = _service(step)
            try:
                if step.endpoint is None:
                    ipvs.service(step.verb, service=service)
                else:
                    ip, port = step.endpoint
                    dest = IPVSDest(addr=ip, port=port, weight=step.weight, fwd_method=_MASQUERADING)
                    ipvs.dest(step.verb, service=service, dest=dest)
            except NetlinkError as error:
                refused.append((step, OSError(error.code, os.strerror(error.code))))
    return refused


def _service(step: Step) -> IPVSService:
    from pyroute2 import IPVSService

    portal, server = step.portal, step.server
    persistent = {} if server.affinity_timeout_s is None else {"timeout": server.affinity_timeout_s}
    return IPVSService(
        addr=portal.ip,
        af=socket.AF_INET if portal.family == 4 else socket.AF_INET6,
        port=portal.port,
        protocol=_PROTOCOLS[portal.protocol],
        sched_name=server.scheduler,
        netmask=_ONE_CLIENT[portal.family],
        flags={"flags": OWN_FLAG | (_PERSISTENT if persistent else 0), "mask": 0xFFFF_FFFF},
        **persistent,
    )


@contextlib.contextmanager
def _ipvs() -> Iterator[IPVS]:
    """Open IPVS's socket. Raises OSError where this kernel has no IPVS."""
    from pyroute2 import IPVS
    from pyroute2.netlink import NetlinkError

    try:
        opened = IPVS()
    except NetlinkError as error:
        raise OSError(error.code, "this kernel has no IPVS") from error
    with opened:
        yield opened
