"""Decodes the kernel's trace messages (nfnetlink group 9). Pure.

`nft monitor trace` reads the same messages but cannot print rules that iptables wrote. Here a rule is identified by its
handle, and `rulebook` has its text.
"""

import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from userspace_proxy import netlink
from userspace_proxy.netlink import attributes
from userspace_proxy.trace.values import Ends

GROUP_NFTRACE = 9
_MSG_TRACE = 10 << 8 | 17
_NFGENMSG_BYTES = 4
# enum nft_trace_attributes, linux/netfilter/nf_tables.h
_TABLE, _CHAIN, _HANDLE, _TYPE, _VERDICT, _ID = 1, 2, 3, 4, 5, 6
_NETWORK, _TRANSPORT, _IIF, _OIF, _POLICY = 8, 9, 10, 12, 16
_VERDICT_CODE, _VERDICT_CHAIN = 1, 2
_TYPES = {1: "policy", 2: "return", 3: "rule"}
_VERDICTS = {
    0: "drop", 1: "accept", 2: "stolen", 3: "queue", 4: "repeat", -1: "continue", -2: "break", -3: "jump", -4: "goto",
    -5: "return",
}  # fmt: skip
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_FLAGS = {0x02: "SYN", 0x04: "RST", 0x01: "FIN", 0x10: "ACK"}
_UNREACHABLE = {(1, 3): "ICMP unreachable", (58, 1): "ICMPv6 unreachable"}


@dataclass(frozen=True, slots=True)
class Message:
    """One trace event of one packet: a rule matched, a chain ended, or the policy decided.

    ``ends`` and ``what`` are set where a base chain begins.
    """

    packet: int
    family: str
    table: str
    chain: str
    kind: str
    handle: int
    verdict: str
    to: str
    iif: int
    oif: int
    ends: Ends | None
    what: str


def messages(datagram: bytes) -> Iterator[Message]:
    """Yield the trace messages in *datagram*; other messages are skipped."""
    for kind, body in netlink.messages(datagram):
        if kind == _MSG_TRACE:
            yield _message(_FAMILIES.get(body[0], str(body[0])), dict(attributes(body[_NFGENMSG_BYTES:])))


def _message(family: str, fields: dict[int, bytes]) -> Message:
    verdict, to = "", ""
    if _VERDICT in fields:
        parts = dict(attributes(fields[_VERDICT]))
        verdict = _VERDICTS.get(struct.unpack("!i", parts[_VERDICT_CODE])[0], "?")
        to = _text(parts.get(_VERDICT_CHAIN, b""))
    elif _POLICY in fields:
        verdict = _VERDICTS.get(struct.unpack("!i", fields[_POLICY])[0], "?")
    kind, handle = _TYPES.get(_number(fields, _TYPE), "?"), _number(fields, _HANDLE)
    ends, what = _packet(fields.get(_NETWORK, b""), fields.get(_TRANSPORT, b""))
    return Message(
        packet=_number(fields, _ID),
        family=family,
        table=_text(fields[_TABLE]),
        chain=_text(fields[_CHAIN]),
        kind="end" if kind == "rule" and not handle else kind,
        handle=handle,
        verdict=verdict,
        to=to,
        iif=_number(fields, _IIF),
        oif=_number(fields, _OIF),
        ends=ends,
        what=what,
    )


def _packet(network: bytes, transport: bytes) -> tuple[Ends | None, str]:
    if not network:
        return None, ""
    if network[0] >> 4 == 4:
        protocol, family, source, destination = network[9], socket.AF_INET, network[12:16], network[16:20]
    else:
        protocol, family, source, destination = network[6], socket.AF_INET6, network[8:24], network[24:40]
    ports = struct.unpack_from("!HH", transport) if protocol in (6, 17) and len(transport) >= 4 else (0, 0)
    ends = Ends(socket.inet_ntop(family, source), ports[0], socket.inet_ntop(family, destination), ports[1])
    return ends, _what(protocol, transport)


def _what(protocol: int, transport: bytes) -> str:
    if protocol == socket.IPPROTO_TCP and len(transport) > 13:
        return "+".join(name for bit, name in _FLAGS.items() if transport[13] & bit) or "segment"
    if protocol == socket.IPPROTO_UDP:
        return "datagram"
    return _UNREACHABLE.get((protocol, transport[0] if transport else 0), "packet")


def _number(fields: dict[int, bytes], key: int) -> int:
    return int.from_bytes(fields.get(key, b""), "big")


def _text(packed: bytes) -> str:
    return packed.rstrip(b"\0").decode()
