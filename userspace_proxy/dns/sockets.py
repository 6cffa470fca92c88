"""The sockets of cluster DNS."""

import contextlib
import errno
import ipaddress
import os
import socket
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from userspace_proxy.dataplane.sockets import IP_PKTINFO
from userspace_proxy.errors import StartError

PORT = 53
_IP_FREEBIND, _IPV6_FREEBIND = 15, 78  # linux/in.h, linux/in6.h
_IP_PKTOPTIONS, _IPV6_2292PKTOPTIONS = 9, 6
_BACKLOG = 512
_BUFFER_BYTES = 4 << 20
_FIXES = {
    errno.EACCES: "port 53 needs CAP_NET_BIND_SERVICE: give it, or run with sudo,"
    " or allow users the port (sysctl net.ipv4.ip_unprivileged_port_start=53)",
    errno.EADDRINUSE: "another program listens there (ss -lnup 'sport = 53'); stop it, or choose another --dns address",
}


def open_sockets(addresses: Iterable[str], inherited: Sequence[socket.socket] = ()) -> list[socket.socket]:
    """Return a UDP and a TCP socket for each of *addresses*: *inherited* ones, and new ones for the rest.

    Inherited sockets of other addresses are closed.

    Raises:
        StartError: a socket cannot be opened; all of them are closed.
    """
    found: list[socket.socket] = []
    by_address = {(sock.type, sock.getsockname()[0]): sock for sock in inherited}
    try:
        for ip in addresses:
            for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM):
                found.append(by_address.pop((kind, ip)) if (kind, ip) in by_address else _open(kind, ip))
    except OSError as error:
        for sock in found:
            sock.close()
        fix = _FIXES.get(error.errno or 0, error.strerror)
        raise StartError(f"--dns {ip}: {fix}") from None
    finally:
        for sock in by_address.values():
            sock.close()
    return found


def _open(kind: socket.SocketKind, ip: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in ip else socket.AF_INET
    with contextlib.ExitStack() as on_error:
        sock = on_error.enter_context(socket.socket(family, kind | socket.SOCK_NONBLOCK))
        # After a control process was killed, its successor listens beside the DNS process that is left.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_FREEBIND, 1)
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        else:
            sock.setsockopt(socket.IPPROTO_IP, _IP_FREEBIND, 1)
            sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER_BYTES)
        sock.bind((ip, PORT))
        if kind == socket.SOCK_STREAM:
            sock.listen(_BACKLOG)
        on_error.pop_all()
    return sock


def interface_of_stream(sock: socket.socket) -> int:
    """Return the index of the interface at which the connection of *sock* arrived.

    The listener must have been opened by this module, which requests this information from the kernel.
    """
    if sock.family == socket.AF_INET:
        info = sock.getsockopt(socket.IPPROTO_IP, _IP_PKTOPTIONS, 64)[socket.CMSG_LEN(0) :]
    else:
        info = sock.getsockopt(socket.IPPROTO_IPV6, _IPV6_2292PKTOPTIONS, 64)[socket.CMSG_LEN(16) :]
    return int.from_bytes(info[:4], sys.byteorder)


def is_of_dns(sock: socket.socket) -> bool:
    """Return whether *sock* belongs to cluster DNS: a socket at its port, or the channel to its process."""
    return sock.family == socket.AF_UNIX or sock.getsockname()[1] == PORT


def is_alone(sockets: Iterable[socket.socket]) -> bool:
    """Return whether *sockets* are the only ones at their addresses, and their addresses are still this host's."""
    ours = [sock for sock in sockets if sock.type == socket.SOCK_DGRAM]
    inodes = {str(os.fstat(sock.fileno()).st_ino) for sock in ours}
    rows = [line.split() for file in ("udp", "udp6") for line in Path("/proc/net", file).read_text().splitlines()[1:]]
    places = {row[1] for row in rows if row[9] in inodes}
    return sum(row[1] in places for row in rows) == len(ours) and all(_is_own(sock.getsockname()[0]) for sock in ours)


def _is_own(ip: str) -> bool:
    if ":" in ip:  # a route makes it this host's, but bind() does not ask for routes
        return f"{int(ipaddress.ip_address(ip)):032x} 80 " in Path("/proc/net/ipv6_route").read_text()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.bind((ip, 0))
        except OSError:
            return False
    return True
