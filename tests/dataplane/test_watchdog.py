"""Which worker that does not answer is replaced, and which is only waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.net.world import wait_until
from userspace_proxy.dataplane.watchdog import LOOK_EVERY_S, Activity, Watchdog, activity_of

FIVE_SECONDS, A_MINUTE = int(5 / LOOK_EVERY_S), int(60 / LOOK_EVERY_S)


def replaced_after(watchdog: Watchdog, *activities: Activity | None, looks: int = 10_000) -> int:
    """Return after how many looks it is to be replaced, *activities* being seen in turns; 0 for never."""
    for look in range(looks):
        if watchdog.note_silence(activities[look % len(activities)]):
            return look + 1
    return 0


def watchdog() -> Watchdog:
    """Return the one of a worker that has answered before."""
    of_one = Watchdog()
    of_one.note_answer()
    return of_one


@pytest.mark.parametrize("state", ["T", "t", "D", "S"])
def test_a_worker_that_is_stopped_or_sleeps_without_a_sign_of_life_is_replaced_after_five_seconds(state: str) -> None:
    assert replaced_after(watchdog(), Activity(state, (1, 2))) == FIVE_SECONDS + 1


def test_a_worker_that_waits_for_cpu_is_given_a_minute() -> None:
    assert replaced_after(watchdog(), Activity("R", (1, 2))) == A_MINUTE


def test_a_worker_that_does_something_is_given_a_minute() -> None:
    """One that pages in memory sleeps whenever it is looked at, and its faults are counted."""
    assert replaced_after(watchdog(), Activity("D", (1, 2)), Activity("D", (1, 3))) == A_MINUTE


def test_a_sign_of_life_or_an_answer_begins_the_count_anew() -> None:
    one = watchdog()
    assert replaced_after(one, Activity("S", (1,)), looks=FIVE_SECONDS) == 0
    assert replaced_after(one, Activity("S", (2,)), looks=FIVE_SECONDS) == 0
    one.note_answer()
    assert replaced_after(one, Activity("S", (2,))) == FIVE_SECONDS + 1


@pytest.mark.parametrize(("state", "looks"), [("D", A_MINUTE), ("S", A_MINUTE), ("T", FIVE_SECONDS + 1)])
def test_a_worker_that_has_not_answered_yet_may_load_its_modules_from_a_slow_disk(state: str, looks: int) -> None:
    assert replaced_after(Watchdog(), Activity(state, (1,))) == looks


def test_without_proc_a_worker_is_given_a_minute() -> None:
    assert replaced_after(watchdog(), None) == A_MINUTE


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "print(flush=True)\nwhile True: pass"], stdout=subprocess.PIPE) as one:
        assert one.stdout is not None
        one.stdout.readline()
        yield one
        one.kill()


def test_the_activity_of_a_process_is_read_from_proc(busy: subprocess.Popen[bytes]) -> None:
    seen = activity_of(busy.pid)
    assert seen is not None
    wait_until(lambda: activity_of(busy.pid) != seen, "it does something")

    os.kill(busy.pid, signal.SIGSTOP)

    wait_until(lambda: (now := activity_of(busy.pid)) is not None and now.state == "T", "it is stopped")
    assert activity_of(busy.pid) == activity_of(busy.pid)


def test_a_process_that_is_gone_has_no_activity(busy: subprocess.Popen[bytes]) -> None:
    busy.kill()
    busy.wait(20)

    assert activity_of(busy.pid) is None
