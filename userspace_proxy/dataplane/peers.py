"""Distinguish a dead peer from one that has stopped reading.

A live peer acknowledges every segment, even while its window is closed; a dead peer acknowledges none.
TCP_USER_TIMEOUT does not distinguish the two: it also ends the connection of a reader whose window stays closed. So the
kernel's TCP_INFO is read instead.
"""

import socket
import struct
from enum import Enum

# struct tcp_info (linux/tcp.h): eight bytes of state, then 32-bit fields.
_BYTES = 148
_RETRANSMITS, _PROBES = 2, 3
_UNACKED_AND_LAST_ACK_RECV = struct.Struct("=I28xI")
_ESTABLISHED = 1  # linux/net/tcp_states.h
_UNACKED_AT = 24
_SENT_AND_RECEIVED_MS = struct.Struct("=I4xI")
_LAST_DATA_AT = 44
_UNSENT_AT = 144


class PeerAnswer(Enum):
    """Result of `last_answer`.

    NOTHING_ASKED: the peer has acknowledged all data, so keepalive does the check. SOME: the peer has answered lately,
    or is not asked for an answer. NONE: the peer does not answer.
    """

    NOTHING_ASKED = "nothing asked"
    SOME = "some"
    NONE = "none"


def has_left(sock: socket.SocketType) -> bool:
    """Return whether the peer of *sock* has ended or reset the connection."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except OSError:
        return True


def silence(client: socket.SocketType, backend: socket.SocketType) -> tuple[float, bool]:
    """Return for how many seconds no data has passed between both peers, and whether the client has spoken last.

    The time is 0.0 while a peer has not acknowledged all data. The kernel's clock has steps of some milliseconds; if
    both have spoken in the same step, the backend counts as the last.
    """
    silences = []
    for sock in (client, backend):
        try:
            info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
        except OSError:
            return 0.0, False
        (unacked,) = struct.unpack_from("=I", info, _UNACKED_AT)
        (unsent,) = struct.unpack_from("=I", info, _UNSENT_AT)
        if unacked or unsent:
            return 0.0, False
        silences.append(_SENT_AND_RECEIVED_MS.unpack_from(info, _LAST_DATA_AT))
    (to_client, from_client), (to_backend, from_backend) = silences
    is_asked = from_client < from_backend or to_backend < to_client
    return min(to_client, from_client, to_backend, from_backend) / 1000, is_asked


def last_answer(sock: socket.SocketType, waiting_s: float) -> PeerAnswer:
    """Return NONE if the peer of *sock* owes an answer and has sent none for *waiting_s* seconds.

    A peer owes an answer to a retransmission or to a probe of its closed window. If all data is acknowledged, the
    result is NOTHING_ASKED; in all other cases it is SOME.
    """
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES)
    except OSError:
        return PeerAnswer.SOME
    if len(info) < _BYTES:
        return PeerAnswer.SOME
    unacked, last_ack_ms = _UNACKED_AND_LAST_ACK_RECV.unpack_from(info, _UNACKED_AT)
    (unsent,) = struct.unpack_from("=I", info, _UNSENT_AT)
    if not (unacked or unsent or info[_PROBES]):
        return PeerAnswer.NOTHING_ASKED
    asks = (unacked and info[_RETRANSMITS]) or info[_PROBES]
    return PeerAnswer.NONE if asks and last_ack_ms >= waiting_s * 1000 else PeerAnswer.SOME
