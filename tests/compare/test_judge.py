"""A difference is decided if all rounds agree on it and it exceeds the noise."""

from __future__ import annotations

import pytest

from tests.compare.made_results import results_of
from userspace_proxy.compare.judge import Figure, compare, figure, noise, summed_up
from userspace_proxy.compare.modes import NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN


def judged(ours: list[float], kernel: list[float], again: list[float]) -> tuple[float, bool]:
    rounds = {USERSPACE: ours, NFTABLES: kernel, DIRECT: [100.0] * len(again), DIRECT_AGAIN: again}
    compared = compare(results_of("load", "rate", rounds), "load", NFTABLES, USERSPACE, "rate")
    assert compared is not None
    return compared.ratio.median, compared.decided


def test_rounds_that_agree_decide() -> None:
    ratio, is_decided = judged([50, 51, 49], [100, 99, 101], [101, 99, 100])

    assert ratio == pytest.approx(2.0, rel=0.05)
    assert is_decided


def test_a_round_that_was_disturbed_for_both_modes_counts() -> None:
    assert judged([50, 10, 49], [100, 20, 98], [101, 99, 100]) == (2.0, True)


def test_rounds_that_disagree_are_undecided() -> None:
    assert not judged([50, 120, 49], [100, 99, 101], [101, 99, 100])[1]


def test_a_difference_within_the_noise_is_undecided() -> None:
    assert not judged([90, 91, 92], [100, 101, 102], [150, 60, 120])[1]


def test_two_rounds_are_too_few() -> None:
    assert not judged([50, 51], [100, 99], [101, 99])[1]


@pytest.mark.parametrize("odd", [100.0, 120.0])
def test_one_round_that_disagrees_is_enough(odd: float) -> None:
    assert judged([50.0] * 7, [100.0] * 7, [101.0] * 7)[1]
    assert not judged([50.0] * 6 + [odd], [100.0] * 7, [101.0] * 7)[1]


def test_the_spread_is_that_of_all_rounds() -> None:
    assert summed_up([5, 1, 2, 3, 4, 99]) == Figure(3.5, 1, 99)
    assert summed_up([]) is None


def test_noise_is_the_ratio_of_both_runs_of_direct_connections() -> None:
    results = results_of("load", "rate", {DIRECT: [100, 100, 100], DIRECT_AGAIN: [125, 80, 100]})

    assert noise(results, "load", "rate") == pytest.approx(1.25)


def test_nothing_is_decided_if_direct_connections_lack_the_figure() -> None:
    none = {DIRECT: [0.0] * 3, DIRECT_AGAIN: [0.0] * 3}
    rounds = {USERSPACE: [1.0] * 3, USERSPACE_COPY: [2.0] * 3, **none}
    results = results_of("load", "proxy_cpu_s", rounds)

    compared = compare(results, "load", USERSPACE_COPY, USERSPACE, "proxy_cpu_s")

    assert compared is not None
    assert compared.ratio.median == 2.0
    assert compared.noise is None
    assert not compared.decided


def test_a_mode_without_the_figure_has_none() -> None:
    results = results_of("load", "rate", {USERSPACE: [1.0]})

    assert figure(results, "load", NFTABLES, "rate") is None
    assert compare(results, "load", NFTABLES, USERSPACE, "rate") is None
