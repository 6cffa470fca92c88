"""Parses /proc/net/ip_vs. Pure."""

from __future__ import annotations

import ipaddress
import re

from userspace_proxy.trace.values import RealServer, VirtualServer

_SERVICE = re.compile(r"(TCP|UDP|SCTP)\s+(\[?[0-9A-Fa-f:.]+\]?):([0-9A-Fa-f]{4})\s+(\S+)")
_SERVER = re.compile(r"\s+->\s+(\[?[0-9A-Fa-f:.]+\]?):([0-9A-Fa-f]{4})\s+(\S+)\s+(-?\d+)")


def virtual_servers(text: str) -> list[VirtualServer]:
    """Return the virtual servers in *text*, which writes ports and IPv4 addresses in hexadecimal."""
    found: list[VirtualServer] = []
    for line in text.splitlines():
        if service := _SERVICE.match(line):
            protocol, ip, port, scheduler = service.groups()
            found.append(VirtualServer(protocol.lower(), _ip(ip), int(port, 16), scheduler, ()))
        elif found and (server := _SERVER.match(line)):
            ip, port, forwarding, weight = server.groups()
            last = found[-1]
            real = RealServer(_ip(ip), int(port, 16), forwarding, int(weight))
            servers = (*last.real_servers, real)
            found[-1] = VirtualServer(last.protocol, last.ip, last.port, last.scheduler, servers)
    return found


def virtual_server(text: str, protocol: str, ip: str, port: int) -> VirtualServer | None:
    """Return the virtual server of this portal, or None."""
    wanted = (protocol, ip, port)
    return next((one for one in virtual_servers(text) if (one.protocol, one.ip, one.port) == wanted), None)


def _ip(text: str) -> str:
    if text.startswith("["):
        return str(ipaddress.ip_address(text.strip("[]")))
    return str(ipaddress.ip_address(int(text, 16)))
