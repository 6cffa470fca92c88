"""Clients on lab hosts: sockets of this process in another network namespace."""

import socket

from userspace_proxy.lab.hosts import Host


def connect(
    host: Host, ip: str, port: int, timeout_s: float = 5.0, kind: socket.SocketKind = socket.SOCK_STREAM
) -> socket.socket:
    """Return a socket on *host*, connected to *ip* and *port*. Raises OSError."""
    with host.inside():
        sock = socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, kind)
    sock.settimeout(timeout_s)
    try:
        sock.connect((ip, port))
    except BaseException:
        sock.close()
        raise
    return sock


def ask(host: Host, ip: str, port: int = 80, timeout_s: float = 5.0) -> str:
    """Send GET / on a new connection and return the body, the name of the server. Raises OSError."""
    with connect(host, ip, port, timeout_s) as sock:
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        received = b""
        while part := sock.recv(4096):
            received += part
    if not received:
        raise ConnectionError("the connection was closed without an answer")
    return received.rpartition(b"\r\n\r\n")[2].decode().strip()
