"""Decide whether a silent worker hangs or only waits for CPU. Pure except for `activity_of`.

An answer takes one turn of the worker's event loop. A process that runs or is ready to run may be late on a busy
machine, and replacing it does not help. One that is stopped, or sleeps without progress, does not recover by itself.
"""

import contextlib
from pathlib import Path
from typing import NamedTuple

# Looks are counted instead of seconds: a control process that was stopped itself has not looked in that time.
LOOK_EVERY_S = 0.5
_STILL_LOOKS = 10
_BUSY_LOOKS = 120
_STOPPED = "tT"
_RUNNING = "R"
# Fields of /proc/PID/stat after the name: minor and major faults, user and system time (proc_pid_stat(5)).
_PROGRESS_FIELDS = (7, 9, 11, 12)


class Activity(NamedTuple):
    """The kernel's view of a process: its state as a letter, and counters that rise while it runs."""

    state: str
    progress: tuple[int, ...]


def activity_of(pid: int) -> Activity | None:
    """Return the activity of process *pid*, or None if /proc does not have it."""
    folder = Path("/proc", str(pid))
    try:
        fields = (folder / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    progress = [int(fields[index]) for index in _PROGRESS_FIELDS]
    with contextlib.suppress(OSError, IndexError):  # a kernel without CONFIG_SCHED_INFO
        progress.append(int((folder / "schedstat").read_text().split()[0]))  # in nanoseconds; the others are in ticks
    return Activity(fields[0], tuple(progress))


class Watchdog:
    """Decides whether one worker hangs, from regular looks at its activity since its last answer."""

    def __init__(self) -> None:
        self.note_answer()
        self._has_answered = False  # a new worker first loads its modules, perhaps from a slow disk

    def note_answer(self) -> None:
        self._has_answered = True
        self._silent_looks = 0
        self._still_looks = 0
        self._before: Activity | None = None

    def note_silence(self, activity: Activity | None) -> str:
        """Note a look at a worker that owes an answer. Return why to replace it, or "" to wait on."""
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
