"""Whether a worker that does not answer hangs, or has only not had its turn. Pure, but for `activity_of`.

An answer takes a turn of the event loop. A process that is ready to run, or does something, may be late for hours on a
busy machine and is no better off replaced; one that is stopped, sleeps or waits for a disk without any sign of life
does not come back by itself.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import NamedTuple

# Looks are counted, not seconds: a process that was itself stopped has not looked meanwhile.
LOOK_EVERY_S = 0.5
_STILL_LOOKS = 10
_BUSY_LOOKS = 120
_STOPPED = "tT"
_RUNNING = "R"
# In /proc/PID/stat, behind the name: minor and major faults, user and system time (proc_pid_stat(5)).
_PROGRESS_FIELDS = (7, 9, 11, 12)


class Activity(NamedTuple):
    """What the kernel tells of a process: its state as a letter, and numbers that rise when it does something."""

    state: str
    progress: tuple[int, ...]


def activity_of(pid: int) -> Activity | None:
    """Return what process *pid* does; None where /proc does not tell."""
    folder = Path("/proc", str(pid))
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    progress = [int(fields[index]) for index in _PROGRESS_FIELDS]
    with contextlib.suppress(OSError, IndexError):  # a kernel without CONFIG_SCHED_INFO
        progress.append(int((folder / "schedstat").read_text().split()[0]))  # nanoseconds, where those are hundredths
    return Activity(fields[0], tuple(progress))


class Watchdog:
    """Counts looks at one worker since it was heard last."""

    def __init__(self) -> None:
        self._has_answered = False
        self.note_answer()
        self._has_answered = False  # it begins by reading its modules, perhaps from a slow disk

    def note_answer(self) -> None:
        self._has_answered = True
        self._silent_looks = 0
        self._still_looks = 0
        self._before: Activity | None = None

    def note_silence(self, activity: Activity | None) -> str:
        """Take note of a look at a worker that owes an answer; return why it is to be replaced, "" if it is not."""
        self._silent_looks += 1
        is_still = (
            activity is not None
            and activity == self._before
            and activity.state != _RUNNING
            and (self._has_answered or activity.state in _STOPPED)
        )
        self._still_looks = self._still_looks + 1 if is_still else 0
        self._before = activity
        if self._still_looks < _STILL_LOOKS and self._silent_looks < _BUSY_LOOKS:
            return ""
        state = f" (state {activity.state})" if activity is not None else ""
        return f"has not answered for {self._silent_looks * LOOK_EVERY_S:.3g} s{state}"
