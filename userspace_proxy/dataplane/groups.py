"""Open one socket for each worker on the same port; the kernel sends each client always to the same socket.

SO_REUSEPORT alone spreads by the client's address *and port*. Two connections of one client would then reach two
workers, and each worker would pin the client to another endpoint. So a small classic BPF program in the kernel
chooses by the client's address alone.
"""

import array
import contextlib
import socket
import struct
from collections.abc import Iterable, Sequence

from userspace_proxy.dataplane.connections import Limits, require_room
from userspace_proxy.dataplane.sockets import closed_on_error, open_listener
from userspace_proxy.model.names import L4Protocol

_SO_ATTACH_REUSEPORT_CBPF = 51
# linux/bpf_common.h. Offsets from here on count from the network header, wherever the program starts to read.
_NETWORK_HEADER = 0xFFF00000
_LOAD_WORD, _LOAD_BYTE, _TO_X, _RETURN = 0x20, 0x30, 0x07, 0x16
_JUMP, _JUMP_EQUAL = 0x05, 0x15
_SHIFT_RIGHT, _MULTIPLY, _REMAINDER, _XOR_X = 0x74, 0x24, 0x94, 0xAC
_IP4_SOURCE, _IP6_SOURCE = 12, 8
# Knuth's multiplicative hash (2^32 divided by the golden ratio) spreads neighbouring addresses.
_SPREAD, _SPREAD_SHIFT = 0x9E3779B1, 16


def open_group(protocol: L4Protocol, port: int, count: int, limits: Limits) -> list[socket.socket]:
    """Return *count* sockets of one proxy port. Each client always reaches the same one.

    Raises:
        OSError: the port is taken, or no descriptor is left.
    """
    group = fit_group([], protocol, port, count, limits)
    with closed_on_error(*group):
        require_room(group[-1].fileno())
        return group


def close_group(group: Iterable[socket.socket]) -> None:
    for sock in group:
        sock.close()


def fit_group(
    group: Sequence[socket.socket], protocol: L4Protocol, port: int, count: int, limits: Limits
) -> list[socket.socket]:
    """Return *group* with sockets opened or closed so that there are *count*.

    Raises:
        OSError: the port is taken, or no descriptor is left; *group* is unchanged.
    """
    fitting = list(group[:count])
    with contextlib.ExitStack() as on_error:
        while len(fitting) < count:
            if fitting:
                # Only after the first socket is bound: a port that another program has must be refused.
                fitting[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            sock = open_listener(
                protocol, port, limits.dead_peer_timeout_s, limits.congestion_control, shared=bool(fitting)
            )
            on_error.callback(sock.close)
            fitting.append(sock)
        if count > 1 or len(group) > 1:
            _choose_by_client_address(fitting[0], count)
        on_error.pop_all()
    close_group(group[count:])
    return fitting


def _choose_by_client_address(sock: socket.socket, count: int) -> None:
    instructions = b"".join(struct.pack("=HBBI", *instruction) for instruction in _program(count))
    held = array.array("B", instructions)
    address, size = held.buffer_info()
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_REUSEPORT_CBPF, struct.pack("@HP", size // 8, address))


def _program(count: int) -> list[tuple[int, int, int, int]]:
    """Return the BPF instructions: code, jump if true, jump if false, operand."""
    words = [_NETWORK_HEADER + _IP6_SOURCE + 4 * index for index in range(4)]
    folded = [(_LOAD_WORD, 0, 0, words[0])]
    for word in words[1:]:
        folded += [(_TO_X, 0, 0, 0), (_LOAD_WORD, 0, 0, word), (_XOR_X, 0, 0, 0)]
    return [
        (_LOAD_BYTE, 0, 0, _NETWORK_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_EQUAL, 0, 2, 4),
        (_LOAD_WORD, 0, 0, _NETWORK_HEADER + _IP4_SOURCE),
        (_JUMP, 0, 0, len(folded)),
        *folded,
        (_MULTIPLY, 0, 0, _SPREAD),
        (_SHIFT_RIGHT, 0, 0, _SPREAD_SHIFT),
        (_REMAINDER, 0, 0, count),
        (_RETURN, 0, 0, 0),
    ]
