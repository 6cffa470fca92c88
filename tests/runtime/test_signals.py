"""Signals of a terminal: which end a command at once, and which it ignores."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from userspace_proxy.config.settings import Settings
from userspace_proxy.runtime.lifecycle import Lifecycle


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2, 0.4])
@pytest.mark.parametrize("command", ["check", "run"])
def test_ctrl_c_at_the_start_prints_no_traceback(tmp_path: Path, command: str, delay_s: float) -> None:
    arguments = [sys.executable, "-m", "userspace_proxy", command, "-"]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until_it_runs(process.pid)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(delay_s) if delay_s else process.wait(0.001)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)

    assert b"Traceback" not in said


def wait_until_it_runs(pid: int) -> None:
    """Wait until process *pid* has begun to load our own modules."""
    maps = Path(f"/proc/{pid}/maps")
    while "_yaml" not in maps.read_text() and "msgspec" not in maps.read_text() and "_socket" not in maps.read_text():
        pass


async def test_a_hang_up_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    lifecycle = Lifecycle(Settings())
    try:
        lifecycle.install_signal_handlers()
        signal.raise_signal(signal.SIGHUP)
        await asyncio.sleep(0.01)

        assert not lifecycle.stop.is_set()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            loop.remove_signal_handler(signum)
        signal.signal(signal.SIGHUP, before)
