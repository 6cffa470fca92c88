"""Dial backends from the client's own address instead of this node's.

Replies reach such a socket if the routes of this host lead them back here (see the rules). This module decides for
which connections that is so. If the kernel refuses the address, nothing is sent: an endpoint that should see its
clients' addresses must never see another one.
"""

import errno
import logging
import socket
from socket import SocketType

from userspace_proxy.dataplane.conntrack_lookup import KernelTables
from userspace_proxy.model.counters import Counters
from userspace_proxy.model.redirects import OWN_MARK, TRANSPARENT_MARK

# linux/in.h, in6.h
_IP_TRANSPARENT, _IP_BIND_ADDRESS_NO_PORT, _IPV6_TRANSPARENT = 19, 24, 75

log = logging.getLogger(__name__)


class Transparent:
    """Sets the client's address on the backend sockets of one listener."""

    def __init__(self, tables: KernelTables, counters: Counters) -> None:
        self._tables = tables
        self._counters = counters

    def concerns(self, client_ip: str, backend_ip: str) -> bool:
        """Return whether the backend should see the client's address instead of this node's.

        Two cases keep this node's address, because the reply would not pass this host: 1. The client is the backend
        itself (hairpin, behaviours M3). 2. The client or the backend has an address of this host: the reply goes
        straight to the client, not to the proxy.
        """
        return client_ip != backend_ip and not any(map(self._tables.is_local, (client_ip, backend_ip)))

    def speak_as(self, sock: SocketType, client_ip: str, port: int = 0) -> None:
        """Bind *sock*, not connected yet, to the client's address; without *port*, connect() chooses one.

        Raises:
            OSError: CAP_NET_ADMIN is missing, *port* is in use, or backends cannot use the address (such as a
                link-local one). Counted, unless *port* is in use.
        """
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, OWN_MARK | TRANSPARENT_MARK)
            if ":" in client_ip:
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_TRANSPARENT, 1)
            else:
                sock.setsockopt(socket.IPPROTO_IP, _IP_TRANSPARENT, 1)
            sock.setsockopt(socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1)
            sock.bind((client_ip.partition("%")[0], port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise
            # A warning only once: the cause lasts until it is fixed.
            level = logging.DEBUG if self._counters.sources_refused else logging.WARNING
            self._counters.sources_refused += 1
            log.log(level, "cannot send to backends from the client's address %s: %s", client_ip, error.strerror)
            raise
