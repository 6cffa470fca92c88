"""The delay before a sync: short when idle, at least the minimum period, and longer after failures."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tests.fakes import FakeClock
from userspace_proxy.control.pacer import GATHER_S, Pacer


def test_the_first_change_waits_only_for_others_like_it(clock: FakeClock) -> None:
    assert Pacer(clock, min_period_s=10, max_retry_s=30).delay_s() == GATHER_S


def test_the_next_sync_waits_for_the_rest_of_the_period(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=10, max_retry_s=30)
    pacer.note_end(succeeded=True)

    clock.now_s += 4

    assert pacer.delay_s() == pytest.approx(6)


def test_a_sync_that_loaded_no_rules_does_not_delay_the_next_one(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=10, max_retry_s=30)
    pacer.note_end(succeeded=True)
    clock.now_s += 8
    pacer.note_end(succeeded=True, has_loaded=False)

    assert pacer.delay_s() == pytest.approx(2)

    clock.now_s += 2
    pacer.note_end(succeeded=True, has_loaded=False)

    assert pacer.delay_s() == GATHER_S


def test_a_sync_that_loads_no_rules_is_followed_by_four_times_its_duration_up_to_the_period(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=0.05, max_retry_s=30)
    pacer.note_end(succeeded=True, has_loaded=False, took_s=0.005)

    assert pacer.delay_s() == pytest.approx(0.02)

    pacer.note_end(succeeded=True, has_loaded=False, took_s=2.0)

    assert pacer.delay_s() == pytest.approx(0.05)


def test_a_change_long_after_the_last_sync_goes_at_once(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=10, max_retry_s=30)
    pacer.note_end(succeeded=True)

    clock.now_s += 100

    assert pacer.delay_s() == GATHER_S


def test_failures_double_the_delay_up_to_the_maximum(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=0, max_retry_s=30)
    waits = []
    for _ in range(10):
        pacer.note_end(succeeded=False)
        waits.append(pacer.delay_s())

    assert all(later == min(2 * sooner, 30) for sooner, later in pairwise(waits))
    assert waits[-1] == 30


def test_a_failure_is_never_retried_faster_than_the_period_allows(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=10, max_retry_s=30)
    pacer.note_end(succeeded=False)

    assert pacer.delay_s() == pytest.approx(10)


def test_a_success_resets_the_retry_delay(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=0, max_retry_s=30)
    for succeeded in (False, False, False, True):
        pacer.note_end(succeeded=succeeded)

    assert pacer.delay_s() == GATHER_S


def test_the_retry_delay_stays_finite_after_very_many_failures(clock: FakeClock) -> None:
    pacer = Pacer(clock, min_period_s=0, max_retry_s=30)
    for _ in range(10_000):
        pacer.note_end(succeeded=False)

    assert pacer.delay_s() == 30
