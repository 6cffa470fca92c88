"""Telling a dead peer from one that has merely stopped reading.

A living peer acknowledges whatever reaches it, even while its window is closed; a dead one acknowledges
nothing. TCP_USER_TIMEOUT does not know the difference (it kills a reader whose window stays closed), so the
kernel's own record, TCP_INFO, is read instead.
"""

from __future__ import annotations

import socket
import struct
from enum import Enum

# struct tcp_info (linux/tcp.h): eight bytes of state, then 32-bit fields.
_BYTES = 148
_RETRANSMITS, _PROBES = 2, 3
_UNACKED_AND_LAST_ACK_RECV = struct.Struct("=I28xI")
_UNACKED_AT = 24
_UNSENT_AT = 144


class Answer(Enum):
    """What is known of a peer. NOTHING_ASKED: it has acknowledged all there is, and keepalive does the rest."""

    NOTHING_ASKED = "nothing asked"
    SOME = "some"
    NONE = "none"


def last_answer(sock: socket.SocketType, waiting_s: float) -> Answer:
    """Return NONE when *sock* asks its peer for a sign of life - it sends data again, or probes a closed window -
    and has had none for the last *waiting_s* seconds.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
    except OSError:
        return Answer.SOME
    if len(info) < _BYTES:
        return Answer.SOME
    unacked, last_ack_ms = _UNACKED_AND_LAST_ACK_RECV.unpack_from(info, _UNACKED_AT)
    (unsent,) = struct.unpack_from("=I", info, _UNSENT_AT)
    if not (unacked or unsent or info[_PROBES]):
        return Answer.NOTHING_ASKED
    asks = (unacked and info[_RETRANSMITS]) or info[_PROBES]
    return Answer.NONE if asks and last_ack_ms >= waiting_s * 1000 else Answer.SOME
