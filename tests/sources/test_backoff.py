"""Retry delays after failures."""

from __future__ import annotations

import random

from userspace_proxy.sources.backoff import Backoff, FollowError


class NoJitter(random.Random):
    def uniform(self, a: float, b: float) -> float:
        return b


def backoff() -> Backoff:
    return Backoff(0.8, NoJitter())


def test_each_failure_doubles_the_delay_up_to_its_maximum() -> None:
    waits = backoff()

    assert [waits.delay_s(FollowError("no", 30.0)) for _ in range(8)] == [0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0]


def test_a_failure_with_another_maximum_begins_a_new_series() -> None:
    waits = backoff()
    for _ in range(5):
        waits.delay_s(FollowError("nobody there", 4.0))

    assert waits.delay_s(FollowError("refused", 30.0)) == 0.8


def test_after_a_success_the_retry_delay_is_short_again() -> None:
    waits = backoff()
    for _ in range(5):
        waits.delay_s(FollowError("no", 30.0))
    waits.reset()

    assert waits.delay_s(FollowError("no", 30.0)) == 0.8


def test_retry_after_of_the_server_is_added_to_the_delay() -> None:
    assert backoff().delay_s(FollowError("too many requests", 30.0, retry_after_s=7.0)) == 7.8


def test_only_the_first_failure_of_a_series_is_retried_at_once() -> None:
    waits = backoff()

    assert [waits.delay_s(FollowError("401", 30.0, at_once=True)) for _ in range(3)] == [0.0, 0.8, 1.6]


def test_a_failure_that_changes_the_next_request_is_retried_at_once_between_other_failures() -> None:
    """A restored API server: 403 until its roles are loaded, then another history, then no WatchList."""

    class ExpiredError(FollowError):
        pass

    class NoWatchListError(FollowError):
        pass

    waits = backoff()
    row = [
        FollowError("403", 30.0),
        FollowError("403", 30.0),
        ExpiredError("410", 30.0, at_once=True),
        NoWatchListError("422", 30.0, at_once=True),
        ExpiredError("410", 30.0, at_once=True),
    ]

    assert [waits.delay_s(failure) for failure in row] == [0.8, 1.6, 0.0, 0.0, 3.2]


def test_the_retry_delay_has_a_maximum() -> None:
    waits = backoff()

    assert [waits.delay_s(FollowError("no", 30.0)) for _ in range(2_000)][-1] == 30.0


def test_retry_delays_have_jitter() -> None:
    waits = {Backoff(0.8, random.Random(seed)).delay_s(FollowError("no", 30.0)) for seed in range(50)}

    assert len(waits) == 50
    assert min(waits) >= 0.4
    assert max(waits) <= 0.8
