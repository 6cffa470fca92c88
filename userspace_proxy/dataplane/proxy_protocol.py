"""PROXY protocol headers: they carry the client's address and the dialled address to a backend. Pure.

The protocol is HAProxy's, https://www.haproxy.org/download/3.0/doc/proxy-protocol.txt: version 1 is a line of text,
version 2 is binary and also covers datagrams.
"""

import socket
from collections.abc import Callable, Mapping
from functools import partial

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import SourceIP

Header = Callable[[Address, Address], bytes]
"""Returns the header for a client's address and the address that it dialled, both of one family."""

_SIGNATURE_AND_PROXY = b"\r\n\r\n\0\r\nQUIT\n\x21"


def header_v1(client: Address, dialled: Address) -> bytes:
    """Return the version 1 header of a TCP connection."""
    family = 6 if ":" in client[0] else 4
    return f"PROXY TCP{family} {_bare(client[0])} {dialled[0]} {client[1]} {dialled[1]}\r\n".encode()


def header_v2(client: Address, dialled: Address, transport: int) -> bytes:
    """Return the version 2 header of a TCP connection, or of each datagram of *client*."""
    family, family_code = (socket.AF_INET6, 2) if ":" in client[0] else (socket.AF_INET, 1)
    addresses = (
        socket.inet_pton(family, _bare(client[0]))
        + socket.inet_pton(family, dialled[0])
        + client[1].to_bytes(2, "big")
        + dialled[1].to_bytes(2, "big")
    )
    return _SIGNATURE_AND_PROXY + bytes((family_code << 4 | transport,)) + len(addresses).to_bytes(2, "big") + addresses


# Version 2 has numbers for the transports: 1 for a stream, 2 for datagrams.
_HEADERS: Mapping[tuple[SourceIP, L4Protocol], Header] = {
    (SourceIP.PROXY_PROTOCOL_V1, L4Protocol.TCP): header_v1,
    (SourceIP.PROXY_PROTOCOL_V2, L4Protocol.TCP): partial(header_v2, transport=1),
    (SourceIP.PROXY_PROTOCOL_V2, L4Protocol.UDP): partial(header_v2, transport=2),
}


def header_of(source_ip: SourceIP, protocol: L4Protocol) -> Header | None:
    """Return the function that makes PROXY headers for *source_ip* and *protocol*, or None if they use no header."""
    return _HEADERS.get((source_ip, protocol))


def _bare(ip: str) -> str:
    """Return *ip* without the zone of a link-local address, which means nothing on another host."""
    return ip.partition("%")[0]
