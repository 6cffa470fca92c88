"""Tell a dead peer from one that has stopped reading.

A live peer acknowledges every segment, even while its window is closed; a dead peer acknowledges none.
TCP_USER_TIMEOUT cannot tell them apart: it also ends the connection of a reader whose window stays closed. So the
kernel's TCP_INFO is read instead.
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
    """Result of `last_answer`.

    NOTHING_ASKED: the peer has acknowledged all data, so keepalive does the check. SOME: the peer has answered lately,
    or is not asked for an answer. NONE: the peer does not answer.
    """

    NOTHING_ASKED = "nothing asked"
    SOME = "some"
    NONE = "none"


def last_answer(sock: socket.SocketType, waiting_s: float) -> Answer:
    """Return NONE if the peer of *sock* owes an answer and has sent none for *waiting_s* seconds.

    It owes an answer to a retransmission or to a probe of its closed window.
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
