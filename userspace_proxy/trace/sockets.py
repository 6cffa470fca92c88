"""Finds the process with a socket at a local port, from /proc."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from userspace_proxy.trace.values import Listener

_WORKER = "userspace_proxy.dataplane.worker"
_LISTENS = {"tcp": "0A", "udp": "07"}


def listener_at(protocol: str, port: int, proc: Path = Path("/proc")) -> Listener | None:
    """Return the process that listens at *port*; a worker of this proxy before the process that created its sockets."""
    inodes = set(_inodes(protocol, port, proc))
    found = [(pid, command) for pid, command in _owners(inodes, proc)] if inodes else []
    found.sort(key=lambda owner: (_WORKER not in owner[1], owner[0]))
    for pid, command in found:
        if _WORKER in command:
            return Listener(pid, "userspace-proxy worker", port, is_ours=True)
        is_ours = "userspace_proxy" in command or "userspace-proxy" in command
        with contextlib.suppress(OSError):
            name = (proc / str(pid) / "comm").read_text().strip()
            return Listener(pid, "userspace-proxy" if is_ours else name, port, is_ours)
    return Listener(0, "a process that may not be looked at", port, is_ours=False) if inodes else None


def _inodes(protocol: str, port: int, proc: Path) -> Iterator[str]:
    for table in (f"net/{protocol}", f"net/{protocol}6"):
        with contextlib.suppress(OSError):
            for line in (proc / "thread-self" / table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == _LISTENS[protocol] and int(words[1].rpartition(":")[2], 16) == port:
                    yield words[9]


def _owners(inodes: Iterable[str], proc: Path) -> Iterator[tuple[int, str]]:
    wanted = {f"socket:[{inode}]" for inode in inodes}
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or may not be inspected
            if any(str(fd.readlink()) in wanted for fd in (folder / "fd").iterdir()):
                yield int(folder.name), (folder / "cmdline").read_text().replace("\0", " ")
