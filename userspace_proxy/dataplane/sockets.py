"""Open sockets: listeners for both families, backend sockets, and the options of both."""

import contextlib
import errno
import functools
import socket
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socket import SocketType

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.listeners import NO_ROOM
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.redirects import OWN_MARK

BACKLOG = 4096
_DATAGRAM_BUFFER_BYTES = 1 << 20
_SO_RCVBUFFORCE = 33
IP_PKTINFO = 8
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h, and the same number at level IPPROTO_IPV6
_TCP_RTO_MAX_MS = 44  # Linux 6.15; older kernels refuse it, and find some dead peers later
_MAPPED = "::ffff:"
_PACKED4_BYTES = 6
_LINGER_0 = struct.pack("ii", 1, 0)

# A peer is dead after this number of lost probes; an outage may last from the first to the last.
_KEEPALIVE_PROBES = 5
_EPHEMERAL_S = 10.0
_KEEPALIVE_MAX_S = 32_767  # of TCP_KEEPIDLE and TCP_KEEPINTVL (include/net/tcp.h)

# Plain ints: combining enum members costs a look-up each time.
_BLOCKING_STREAM = int(socket.SOCK_STREAM)
_STREAM = _BLOCKING_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_DATAGRAM = int(socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

# Shortages of this host (ports, descriptors or memory); the endpoint is not at fault.
LOCAL_SHORTAGES = {
    errno.EADDRNOTAVAIL,
    errno.EADDRINUSE,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOBUFS,
    errno.ENOMEM,
    errno.ENOSPC,  # more sockets in epolls than fs.epoll.max_user_watches
    errno.EAGAIN,
}


# Those of LOCAL_SHORTAGES for which another port does not help, but a later try may.
_ROOM_SHORTAGES = LOCAL_SHORTAGES - {errno.EADDRNOTAVAIL, errno.EADDRINUSE, errno.EAGAIN}


def refusal(port: int, error: OSError) -> str:
    """Return why there is no listener at *port*. The text omits the port if any other port would fail alike."""
    return f"{NO_ROOM if error.errno in _ROOM_SHORTAGES else f'port {port}'}: {error.strerror}"


@functools.cache
def has_ipv6() -> bool:
    """Return whether this host can open IPv6 sockets. If not, listeners serve IPv4 alone."""
    try:
        socket.socket(socket.AF_INET6, socket.SOCK_STREAM).close()
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        return False
    return True


def bind_listener(kind: socket.SocketKind, port: int, *, shared: bool = False, at: str = "") -> socket.socket:
    """Return a non-blocking socket bound to *port* at the address *at*, or on every address of both families.

    *shared*: bind beside our other sockets at that port, which must have SO_REUSEPORT.

    Raises:
        OSError: the port is taken, or no descriptor is left.
    """
    family = socket.AF_INET6 if (":" in at if at else has_ipv6()) else socket.AF_INET
    with closed_on_error(socket.socket(family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)) as sock:
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, bool(at))
        if kind == socket.SOCK_STREAM:
            # Connections of a dead proxy in TIME_WAIT must not block the port for the next one. For UDP, this option
            # would let two processes share the port, and one of them would get no datagrams.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        # Without *at*, REDIRECT chooses the address.
        sock.bind((at or ("::" if family == socket.AF_INET6 else "0.0.0.0"), port))  # noqa: S104
        return sock


@contextlib.contextmanager
def closed_on_error(sock: socket.socket, *others: socket.socket) -> Iterator[socket.socket]:
    """Close the sockets if the block raises."""
    try:
        yield sock
    except BaseException:
        for each in (sock, *others):
            each.close()
        raise


def prepare_listener(sock: socket.socket, dead_peer_timeout_s: float) -> None:
    """Set the inherited options that a listener of another version, or with other settings, may lack."""
    # On an accepted socket it would be too late: an urgent byte that arrived before is already dropped.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
    keep_alive(sock, dead_peer_timeout_s)


def open_listener(
    protocol: L4Protocol,
    port: int,
    dead_peer_timeout_s: float,
    congestion_control: str = "",
    *,
    shared: bool = False,
    at: str = "",
) -> socket.socket:
    """Return the socket of a proxy port, at the address *at* or on every address. *shared*: other sockets have the
    port, too.

    Accepted sockets inherit its options.

    *congestion_control*: the algorithm for its connections; "" for the host's default.

    Raises:
        OSError: the port is taken, no descriptor is left, or the congestion control is not available.
    """
    kind = socket.SOCK_DGRAM if protocol is L4Protocol.UDP else socket.SOCK_STREAM
    with closed_on_error(bind_listener(kind, port, shared=shared, at=at)) as sock:
        if protocol is L4Protocol.UDP:
            _prepare_udp(sock)
        else:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            prepare_listener(sock, dead_peer_timeout_s)
            if congestion_control:
                _control_congestion(sock, congestion_control)
            sock.listen(BACKLOG)
        return sock


def _prepare_udp(sock: socket.socket) -> None:
    """Let *sock* hold bursts, and report the destination address of each datagram."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _DATAGRAM_BUFFER_BYTES)
    except OSError:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _DATAGRAM_BUFFER_BYTES)
    if sock.family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
    else:
        sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)


def reserve_refusing_port(port: int) -> tuple[socket.socket, socket.socket]:
    """Hold *port* so that the kernel refuses its clients.

    TCP: bound but never listening, so a SYN gets a reset. UDP: bound and connected to a peer that never sends, so other
    datagrams match no socket and get port unreachable.
    """
    with contextlib.ExitStack() as on_error:
        tcp = on_error.enter_context(bind_listener(socket.SOCK_STREAM, port))
        udp = on_error.enter_context(bind_listener(socket.SOCK_DGRAM, port))
        # Not ::1: if IPv6 is disabled by sysctl (Docker's containers), :: can be bound but ::1 not reached.
        udp.connect((f"{_MAPPED}127.0.0.1" if udp.family == socket.AF_INET6 else "127.0.0.1", 9))
        on_error.pop_all()
    return tcp, udp


def keep_alive(sock: SocketType, dead_peer_timeout_s: float) -> None:
    """Let the kernel detect within *dead_peer_timeout_s* that an idle peer is dead; 0 disables it.

    TCP_USER_TIMEOUT is no alternative: it also ends the connection of a live peer that has stopped reading.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, bool(dead_peer_timeout_s))
    if not dead_peer_timeout_s:
        return
    limit_s = min(int(dead_peer_timeout_s), _KEEPALIVE_MAX_S * (_KEEPALIVE_PROBES + 1))
    probe_s = max(1, limit_s // (_KEEPALIVE_PROBES + 1))
    probes = max(1, min(_KEEPALIVE_PROBES, limit_s // probe_s - 1))
    idle_s = max(1, limit_s - probes * probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, idle_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, probes)
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_RTO_MAX_MS, max(1000, probe_s * 1000))


def datagram_socket(address: Address, port: int, bind: Callable[[SocketType, int], None]) -> SocketType:
    """Return a non-blocking UDP socket of the family of *address*, with *bind* at the local *port*, not connected yet.

    OWN_MARK makes rules skip it: otherwise an endpoint that is itself a portal would loop back to the proxy. Sockets
    that are connected to other endpoints may share the port.
    """
    sock = SocketType(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, _DATAGRAM, 0)
    try:
        mark(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bind(sock, port)
    except BaseException:
        sock.close()
        raise
    return sock


def bind_anywhere(sock: SocketType, port: int) -> None:
    """Bind *sock* to *port*; connect() chooses the address."""
    # An empty host would cost a getaddrinfo() for every flow.
    sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", port))  # noqa: S104


def reset_on_close(sock: SocketType) -> None:
    """Let `close` reset the connection of *sock* instead of ending it with a FIN."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_0)


def mark(sock: SocketType) -> None:
    """Set OWN_MARK if this user may. `forward` runs without CAP_NET_ADMIN, and loads no rules that look for it."""
    try:  # noqa: SIM105 - a context manager costs more, for every connection
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, OWN_MARK)
    except PermissionError:
        pass


def _control_congestion(sock: SocketType, name: str) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, name.encode())


def knows_congestion_control(name: str) -> bool:
    """Return whether this host has the congestion control *name* and lets this process use it."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock, contextlib.suppress(OSError):
        _control_congestion(sock, name)
        return True
    return False


def stream_socket(address: Address, congestion_control: str = "") -> SocketType:
    """Return a non-blocking TCP socket of the family of *address*, with OWN_MARK, not connected yet.

    It delays ACKs, which saves packets: the first bytes sent carry the last one of the handshake, or TCP_QUICKACK sends
    it. Nagle's algorithm is on, which does not delay the first bytes. The splice ends both (splice/copy.py). It is a
    plain `_socket.socket`, without the Python wrapper of `socket.socket`.
    """
    sock = SocketType(socket.AF_INET6 if ":" in address[0] else socket.AF_INET, _STREAM, 0)
    try:
        mark(sock)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 0)
        # Set before the first urgent byte arrives; otherwise a read drops the byte.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        if congestion_control:
            _control_congestion(sock, congestion_control)
    except BaseException:
        sock.close()
        raise
    return sock


def accept(listener: socket.socket, family: int) -> tuple[SocketType, Address]:
    """Return the next client's blocking socket and its address. A plain `_socket.socket`, as in `stream_socket`.

    `listener.accept` would add a wrapper class; a non-blocking socket would add a system call.
    """
    fd, address = listener._accept()  # type: ignore[attr-defined]  # noqa: SLF001
    return SocketType(family, _BLOCKING_STREAM, 0, fd), (plain_ip(address[0]), address[1])


def is_self_connected(sock: SocketType, address: Address) -> bool:
    """Return whether *sock*, connected to *address*, is its own peer.

    This happens if nothing listens at a local address and the kernel chooses the dialled port as source port (TCP
    simultaneous open, RFC 9293). Both ends are then the same socket, and it receives what it sends.
    """
    lowest = lowest_ephemeral_port(time.monotonic() // _EPHEMERAL_S)
    return address[1] >= lowest and sock.getsockname()[:2] == address


@functools.lru_cache(maxsize=1)
def lowest_ephemeral_port(_period: float) -> int:
    """Return the lowest port that the kernel chooses. It is read once in each *_period*: an operator may change it."""
    try:
        return int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 1


def plain_ip(ip: str) -> str:
    """Return *ip* with an IPv4-mapped address (``::ffff:10.0.0.1``) as plain IPv4 (``10.0.0.1``)."""
    return ip[len(_MAPPED) :] if ip.startswith(_MAPPED) and "." in ip else ip


def original_destination(sock: SocketType, client_ip: str) -> bytes | None:
    """Return the address that the client dialled before NAT on this host, as `packed`; None if conntrack has no entry.

    Without NAT, the original destination is the local address of the connection.
    """
    try:
        if ":" in client_ip:
            raw = sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28)
            return raw[2:4] + raw[8:24]  # struct sockaddr_in6: family, port, flow, address, scope
        return sock.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)[2:8]  # struct sockaddr_in: family, port, address
    except OSError:
        return None


def unpacked(address: bytes) -> Address:
    """Return the address that `packed` encoded."""
    family = socket.AF_INET6 if len(address) > _PACKED4_BYTES else socket.AF_INET
    return socket.inet_ntop(family, address[2:]), int.from_bytes(address[:2], "big")


def packed(ip: str, port: int) -> bytes:
    """Return port and IP in the kernel's byte layout."""
    return port.to_bytes(2, "big") + socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip)
