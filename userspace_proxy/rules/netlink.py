"""What the kernel holds, asked for without the nft tool, which reads all of a table to list one chain of it."""

from __future__ import annotations

import socket
import struct

_NETLINK_NETFILTER = 12
_REQUEST_DUMP = 0x1 | 0x300
_SUBSYSTEM_NFTABLES = 10
_NEWRULE, _GETRULE = 6, 7
_FAMILIES = {"inet": 1, "bridge": 7}
_ATTR_TABLE = 1
_ERROR, _DONE = 2, 3
_TIMEOUT_S = 5.0


def count_rules(table: str) -> int:
    """Return how many rules *table* (``family name``) has in all of its chains; 0 where there is no such table.

    Raises:
        OSError: the kernel did not say.
    """
    family, _, bare_name = table.partition(" ")
    name = bare_name.encode() + b"\0"
    attribute = struct.pack("=HH", 4 + len(name), _ATTR_TABLE) + name + bytes(-len(name) % 4)
    body = struct.pack("=BBH", _FAMILIES[family], 0, 0) + attribute
    header = struct.pack("=IHHII", 16 + len(body), _SUBSYSTEM_NFTABLES << 8 | _GETRULE, _REQUEST_DUMP, 1, 0)
    rules = 0
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER) as sock:
        sock.settimeout(_TIMEOUT_S)
        sock.send(header + body)
        while True:
            datagram = sock.recv(1 << 17)
            at = 0
            while at + 20 <= len(datagram):
                length, kind = struct.unpack_from("=IH", datagram, at)
                if kind == _DONE:
                    return rules
                if kind == _ERROR:
                    code = -struct.unpack_from("=i", datagram, at + 16)[0]
                    raise OSError(code, f"listing the rules of the table {table!r}")
                rules += kind == _SUBSYSTEM_NFTABLES << 8 | _NEWRULE
                at += (length + 3) & ~3
