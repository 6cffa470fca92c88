"""Whom a new process ends because it serves, hangs and has no control process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from userspace_proxy.dataplane.rendezvous import Role, join, members, port_of
from userspace_proxy.runtime.hung_workers import end_hung_worker


async def test_a_process_that_was_passed_the_lock_of_a_worker_is_not_ended() -> None:
    with join(Role.SERVES_ON) as member:
        inode = members(Role.SERVES_ON)[port_of(member)]
        code = "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)"
        holder = subprocess.Popen([sys.executable, "-c", code], pass_fds=[member.fileno()])
    try:
        os.waitid(os.P_PID, holder.pid, os.WSTOPPED | os.WNOWAIT)
        assert not await end_hung_worker(inode)
        assert holder.poll() is None
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(20)
