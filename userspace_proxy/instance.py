"""One proxy in a network namespace: an abstract unix socket is the lock.

Abstract names belong to the network namespace, exactly as rules do, and the kernel frees the name with the
process, however it ends.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct

from userspace_proxy.errors import StartError

_NAME = "\0userspace-proxy"


def running_instance() -> int | None:
    """Return the process id of the proxy that runs in this network namespace (0: in another pid namespace)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(_NAME)
        except BlockingIOError:  # it is busy, so it is there
            return 0
        except OSError:
            return None
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid


def lock_instance() -> socket.socket:
    """Return the lock; it is held until closed. Who connects to it wants to know whose it is: `answer` them.

    Raises:
        StartError: another proxy holds it; says which process.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(_NAME)
    except OSError as error:
        sock.close()
        if error.errno != errno.EADDRINUSE:
            raise
        raise StartError(
            f"another userspace-proxy runs in this network namespace{running_as()}; stop it first"
        ) from None
    sock.listen(64)
    sock.setblocking(False)
    return sock


def answer(lock: socket.socket) -> None:
    """Let go those who have asked who we are; the kernel has told them."""
    with contextlib.suppress(OSError):
        while True:
            lock.accept()[0].close()


def running_as(pid: int | None = None) -> str:
    """Return `` (process 4711)`` where that can be told."""
    pid = running_instance() if pid is None else pid
    return f" (process {pid})" if pid else ""
