"""End workers that hang and whose control process is gone: a successor would wait in vain for their listeners.

A member socket alone does not identify a worker, because a descriptor can be passed to any process. The command line
and the user must be a worker's, too. A pidfd guarantees that the process that was checked is the one that is ended.
"""

import asyncio
import logging
import os
import select
import signal
from pathlib import Path

from userspace_proxy.dataplane.rendezvous import process_of
from userspace_proxy.dataplane.watchdog import LOOK_EVERY_S, Watchdog, activity_of

_MODULE = b"userspace_proxy.dataplane.worker"
# Fewer looks than the watchdog allows a running worker. A worker that makes progress is left alone.
_LOOKS = 20
_ENDED_S = 2.0

log = logging.getLogger(__name__)


async def end_hung_worker(inode: int) -> bool:
    """End the worker that holds the member socket *inode* if it hangs. Return whether it has ended."""
    pid = process_of(inode)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:  # 0: in another PID namespace; or it has ended just now
        return bool(pid)
    try:
        if not _is_worker(pid, inode) or not (why := await _hangs(pid)) or has_ended(pidfd):
            return False
        log.warning("worker process %d %s and has no control process: it is killed", pid, why)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        ended = await asyncio.to_thread(has_ended, pidfd, _ENDED_S)
    except OSError:  # it is another user's
        ended = False
    finally:
        os.close(pidfd)
    return ended


async def _hangs(pid: int) -> str:
    """Return how a process that has not answered hangs; "" if it makes progress."""
    watchdog = Watchdog()
    watchdog.note_answer()
    for _ in range(_LOOKS):
        if why := watchdog.note_silence(activity_of(pid)):
            return why
        await asyncio.sleep(LOOK_EVERY_S)
    return ""


def _is_worker(pid: int, inode: int) -> bool:
    process = Path("/proc", str(pid))
    is_named = _MODULE in (process / "cmdline").read_bytes().split(b"\0")
    return is_named and process.stat().st_uid == os.geteuid() and process_of(inode) == pid


def has_ended(pidfd: int, timeout_s: float = 0) -> bool:
    """Return whether the process of *pidfd* has ended, or ends within *timeout_s*."""
    return bool(select.select([pidfd], [], [], timeout_s)[0])
