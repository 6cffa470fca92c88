"""Sockets that speak to a backend as the client: it sees the client's own address in place of this node's.

Answers come back to such a socket where this host's routes lead them to itself (see the rules); what else decides
is here. Where it may not be, nothing is sent: an endpoint that was promised its clients' addresses gets no other.
"""

from __future__ import annotations

import errno
import logging
import socket
from socket import SocketType

from userspace_proxy.dataplane.conntrack_lookup import KernelTables
from userspace_proxy.interfaces import OWN_MARK, TRANSPARENT_MARK, Counters

# linux/in.h, in6.h
_IP_TRANSPARENT, _IP_BIND_ADDRESS_NO_PORT, _IPV6_TRANSPARENT = 19, 24, 75

log = logging.getLogger(__name__)


class Transparent:
    """What one listener needs to speak as its clients."""

    def __init__(self, tables: KernelTables, counters: Counters) -> None:
        self._tables = tables
        self._counters = counters

    def concerns(self, client_ip: str, backend_ip: str) -> bool:
        """Return whether the backend is to see the address of this client.

        Not where it is the backend itself, whose answers would not pass this host (behaviours M3), and not where one
        of the two is this host's own address: what it answers to the client goes straight there, never to us.
        """
        return client_ip != backend_ip and not any(map(self._tables.is_local, (client_ip, backend_ip)))

    def name_for(self, client_ip: str, backend_ip: str) -> str:
        """Return the address that the backend sees in place of this node's: *client_ip*, or "" for none."""
        return client_ip if self.concerns(client_ip, backend_ip) else ""

    def speak_as(self, sock: SocketType, client_ip: str, port: int = 0) -> None:
        """Give *sock*, not connected yet, the address of the client; without *port* that is found when it connects.

        Raises:
            OSError: we have not the right to (CAP_NET_ADMIN), or it means nothing to backends, as a link-local
                address does; it is counted.
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
            # Said aloud once, as it goes on until somebody mends it.
            level = logging.DEBUG if self._counters.sources_refused else logging.WARNING
            self._counters.sources_refused += 1
            log.log(level, "nothing is sent to backends in the name of %s: %s", client_ip, error.strerror)
            raise
