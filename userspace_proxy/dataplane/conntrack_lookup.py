"""Queries to the kernel by netlink: is an address local, what did a client dial, which UDP flows exist.

The kernel answers the first two within the system call, so they do not block. They are made only for new connections
of service ports that need them. The third is made at the start, and rarely later.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import defaultdict

from userspace_proxy import netlink
from userspace_proxy.dataplane.sockets import plain_ip
from userspace_proxy.model.endpoint import FAMILIES, Address
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.netfilter.nfnetlink import read_entries
from userspace_proxy.netlink import NESTED, attribute, attributes, ip_text

# linux/rtnetlink.h, nfnetlink.h, nfnetlink_conntrack.h
_RTM_GETROUTE, _RTA_DST, _RTN_LOCAL = 26, 1, 2
_CT_GET = 1 << 8 | 1
_TUPLE_ORIG, _TUPLE_REPLY, _TUPLE_IP, _TUPLE_PROTO = 1, 2, 1, 2
_IP_DESTINATION = {socket.AF_INET: 2, socket.AF_INET6: 4}
_PROTOCOL, _SOURCE_PORT, _DESTINATION_PORT = 1, 2, 3

_RTMSG = struct.Struct("=8BI")
_ROUTE_TYPE_AT = 7
_NFGENMSG_BYTES = 4


class KernelTables:
    """The routes and conntrack entries of the network namespace in which the first query is made."""

    def __init__(self) -> None:
        self._sockets: dict[int, socket.socket] = {}  # by protocol, opened at the first query

    def is_local(self, ip: str) -> bool:
        """Return whether *ip* is an address of this host, so that packets to it never leave the host."""
        family, packed = _packed(ip)
        route = _RTMSG.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, 0) + attribute(_RTA_DST, packed)
        answer = self._ask(netlink.ROUTE, _RTM_GETROUTE, route)
        return answer is not None and answer[_ROUTE_TYPE_AT] == _RTN_LOCAL

    def dialled_by(self, client: Address, reached: Address) -> Address:
        """Return the address that the UDP *client* dialled to arrive at *reached*; without NAT, *reached* itself."""
        family, source = _packed(reached[0])
        # Look up by the reply direction, which goes from *reached* to the client.
        to = _IP_DESTINATION[family]
        ips = attribute(to - 1, source) + attribute(to, _packed(client[0])[1])
        ports = (
            attribute(_PROTOCOL, bytes((socket.IPPROTO_UDP,)))
            + attribute(_SOURCE_PORT, reached[1].to_bytes(2, "big"))
            + attribute(_DESTINATION_PORT, client[1].to_bytes(2, "big"))
        )
        flow = attribute(_TUPLE_IP | NESTED, ips) + attribute(_TUPLE_PROTO | NESTED, ports)
        question = bytes((family, 0, 0, 0)) + attribute(_TUPLE_REPLY | NESTED, flow)
        answer = self._ask(netlink.NETFILTER, _CT_GET, question)
        if answer is None:
            return reached
        asked = dict(attributes(dict(attributes(answer[_NFGENMSG_BYTES:]))[_TUPLE_ORIG]))
        ip, port = dict(attributes(asked[_TUPLE_IP]))[to], dict(attributes(asked[_TUPLE_PROTO]))[_DESTINATION_PORT]
        return socket.inet_ntop(family, ip), int.from_bytes(port, "big")

    def udp_flows(self) -> dict[tuple[str, Address], set[int]]:
        """Return the source ports of UDP flows in conntrack, by source IP ("" for this host's) and destination.

        Empty if the kernel does not list them. An entry outlives the last datagram of its flow by conntrack's timeouts.
        """
        found: defaultdict[tuple[bytes, bytes, int], set[int]] = defaultdict(set)
        with contextlib.suppress(OSError):
            for family in FAMILIES:
                for entry in read_entries(L4Protocol.UDP, family):
                    found[entry.source, entry.asked, entry.asked_port].add(entry.source_port)
        flows: dict[tuple[str, Address], set[int]] = {}
        own: dict[str, bool] = {}
        for (source, to, to_port), ports in found.items():
            ip = ip_text(source)
            if ip not in own:
                own[ip] = self.is_local(ip)
            flows.setdefault(("" if own[ip] else ip, (ip_text(to), to_port)), set()).update(ports)
        return flows

    def _ask(self, protocol: int, kind: int, question: bytes) -> bytes | None:
        """Return the answer to a query, or None if the kernel has none."""
        try:
            sock = self._sockets.get(protocol)
            if sock is None:
                sock = self._sockets[protocol] = netlink.open_socket(protocol, timeout_s=0)
            sock.send(netlink.message(kind, netlink.REQUEST, question))
            kind, answer = next(netlink.messages(sock.recv(netlink.RECEIVED_BYTES)))
        except OSError:
            return None
        return None if kind == netlink.ERROR else answer

    def close(self) -> None:
        for sock in self._sockets.values():
            sock.close()


def _packed(ip: str) -> tuple[socket.AddressFamily, bytes]:
    bare = plain_ip(ip).partition("%")[0]
    family = socket.AF_INET6 if ":" in bare else socket.AF_INET
    return family, socket.inet_pton(family, bare)
