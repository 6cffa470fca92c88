"""Telling a dead peer from one that has merely stopped reading.

A living peer acknowledges whatever reaches it, even while its window is closed; a dead one acknowledges
nothing. TCP_USER_TIMEOUT does not know the difference (it kills a reader whose window stays closed), so the
kernel's own record, TCP_INFO, is read instead.
"""

from __future__ import annotations

import socket
import struct

# struct tcp_info (linux/tcp.h): eight bytes of state, then 32-bit fields.
_BYTES = 60
_RETRANSMITS, _PROBES = 2, 3
_UNACKED_AT = 24
_LAST_ACK_RECV_AT = 56


def is_unanswered(sock: socket.socket, waiting_s: float) -> bool:
    """Return whether *sock* asks its peer for a sign of life - it sends data again, or probes a closed window -
    and has had none for the last *waiting_s* seconds.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
    except OSError:
        return False
    if len(info) < _BYTES:
        return False
    (unacked,) = struct.unpack_from("=I", info, _UNACKED_AT)
    asks = (unacked and info[_RETRANSMITS]) or info[_PROBES]
    if not asks:
        return False
    (last_ack_ms,) = struct.unpack_from("=I", info, _LAST_ACK_RECV_AT)
    return bool(last_ack_ms >= waiting_s * 1000)
