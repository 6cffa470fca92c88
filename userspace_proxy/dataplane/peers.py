"""Distinguish a dead peer from one that has stopped reading.

A live peer acknowledges every segment, even while its window is closed; a dead peer acknowledges none.
TCP_USER_TIMEOUT does not distinguish the two: it also ends the connection of a reader whose window stays closed. So the
kernel's TCP_INFO is read instead.
"""

import socket
import struct
from enum import Enum
from socket import SocketType
from typing import NamedTuple

_ESTABLISHED = 1  # linux/net/tcp_states.h
# struct tcp_info (linux/tcp.h): the fields of `_TcpInfo`, and other ones between them.
_TCP_INFO = struct.Struct("=2xBB20xI16xI4xII84xI")


class _TcpInfo(NamedTuple):
    """The kernel's view of one socket's peer. Times are milliseconds ago."""

    retransmits: int
    probes: int
    unacknowledged: int
    sent_ms: int
    received_ms: int
    acknowledged_ms: int
    unsent_bytes: int

    @property
    def owes_data(self) -> bool:
        """Whether the peer has not acknowledged all data."""
        return bool(self.unacknowledged or self.unsent_bytes)


def _tcp_info(sock: SocketType) -> _TcpInfo | None:
    """Return the kernel's view of the peer of *sock*, or None if the connection is gone."""
    try:
        return _TcpInfo._make(_TCP_INFO.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO.size)))
    except (OSError, struct.error):  # struct.error: an old kernel, which has fewer fields
        return None


class PeerAnswer(Enum):
    """Result of `last_answer`.

    NOTHING_ASKED: the peer has acknowledged all data, so keepalive does the check. SOME: the peer has answered lately,
    or is not asked for an answer. NONE: the peer does not answer.
    """

    NOTHING_ASKED = "nothing asked"
    SOME = "some"
    NONE = "none"


def has_left(sock: SocketType) -> bool:
    """Return whether the peer of *sock* has ended or reset the connection."""
    try:
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != _ESTABLISHED
    except OSError:
        return True


def silence(client: SocketType, backend: SocketType) -> tuple[float, bool]:
    """Return for how many seconds no data has passed between both peers, and whether the client has spoken last.

    The time is 0.0 while a peer has not acknowledged all data. The kernel's clock has steps of some milliseconds; if
    both have spoken in the same step, the backend counts as the last.
    """
    of_client, of_backend = _tcp_info(client), _tcp_info(backend)
    if of_client is None or of_backend is None or of_client.owes_data or of_backend.owes_data:
        return 0.0, False
    is_asked = of_client.received_ms < of_backend.received_ms or of_backend.sent_ms < of_client.sent_ms
    silent_ms = min(of_client.sent_ms, of_client.received_ms, of_backend.sent_ms, of_backend.received_ms)
    return silent_ms / 1000, is_asked


def last_answer(sock: SocketType, waiting_s: float) -> PeerAnswer:
    """Return NONE if the peer of *sock* owes an answer and has sent none for *waiting_s* seconds.

    A peer owes an answer to a retransmission or to a probe of its closed window. If all data is acknowledged, the
    result is NOTHING_ASKED; in all other cases it is SOME.
    """
    info = _tcp_info(sock)
    if info is None:
        return PeerAnswer.SOME
    if not (info.owes_data or info.probes):
        return PeerAnswer.NOTHING_ASKED
    asks = (info.unacknowledged and info.retransmits) or info.probes
    return PeerAnswer.NONE if asks and info.acknowledged_ms >= waiting_s * 1000 else PeerAnswer.SOME
