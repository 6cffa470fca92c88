"""What textbooks say is judged by the figures alone."""

from __future__ import annotations

import pytest

from tests.compare.given import results_of
from userspace_proxy.compare import cases
from userspace_proxy.compare.claims import CLAIMS, Verdict
from userspace_proxy.compare.modes import DIRECT, DIRECT_AGAIN, IPTABLES, NFTABLES, USERSPACE
from userspace_proxy.compare.readings import outage
from userspace_proxy.compare.results import ModeRun, Results, Sample, Timeline

QUIET = {DIRECT: [100.0, 100.0, 100.0], DIRECT_AGAIN: [101.0, 99.0, 100.0]}


def verdict(claim: str, results: Results) -> Verdict:
    return next(each for each in CLAIMS if each.name == claim).judge(results)


def test_where_the_kernel_is_faster_userspace_is_called_slow_and_the_ratio_is_said() -> None:
    rounds = {NFTABLES: [90.0, 91.0, 92.0], USERSPACE: [45.0, 45.0, 46.0], **QUIET}
    said = verdict("slow", results_of(cases.KEEPALIVE_64, "rate", rounds))

    assert said.ruling == "holds"
    assert "nftables is better in requests a second, 64 connections: 2.00 times (2.00 to 2.02)." in said.words


def test_where_no_kernel_mode_took_part_the_direct_way_stands_for_it_and_that_is_said() -> None:
    said = verdict("slow", results_of(cases.KEEPALIVE_64, "rate", {USERSPACE: [50.0, 50.0, 50.0], **QUIET}))

    assert said.ruling == "holds"
    assert said.words[0].startswith("No kernel mode took part")


def test_a_difference_in_the_noise_is_undecided() -> None:
    rounds = {NFTABLES: [90.0, 110.0, 92.0], USERSPACE: [100.0, 95.0, 96.0], **QUIET}

    assert verdict("slow", results_of(cases.KEEPALIVE_64, "rate", rounds)).ruling == "undecided"


@pytest.mark.parametrize(("last_us", "ruling"), [(150.0, "holds"), (9.0, "undecided")])
def test_iptables_is_o_n_where_a_new_connection_gets_slower_with_more_services(last_us: float, ruling: str) -> None:
    results = results_of("none", "none", {})
    results.modes += [ModeRun(name, name, "kernel", ours=True) for name in (IPTABLES, NFTABLES)]
    for size, iptables_us in ((10, 6.0), (10_000, last_us)):
        for mode, added_us in ((IPTABLES, iptables_us), (NFTABLES, 6.0)):
            figures = {"added_us": added_us, "spread_us": 8.0}
            results.samples.append(Sample(f"services-{size}", mode, 1, figures))

    assert verdict("lookup", results).ruling == ruling


def timeline(mode: str, failed: list[int]) -> Timeline:
    return Timeline("dies", mode, 1, 0.5, 1.0, 2.0, [3 - count for count in failed], [0] * len(failed), failed)


def test_an_outage_is_counted_from_the_event_until_a_second_after_modes_were_told() -> None:
    failed, slow = outage([timeline(NFTABLES, [3, 0, 1, 1, 0, 0, 3, 3])])

    assert failed == pytest.approx(2 / 12)
    assert slow == 0


@pytest.mark.parametrize(("ours", "ruling"), [([0] * 8, "holds"), ([0, 0, 1, 1, 0, 0, 0, 0], "fails")])
def test_a_dead_pod_costs_the_kernel_modes_requests_and_userspace_none(ours: list[int], ruling: str) -> None:
    results = results_of("none", "none", {NFTABLES: [], USERSPACE: []})
    results.timelines += [timeline(NFTABLES, [0, 0, 1, 1, 0, 0, 0, 0]), timeline(USERSPACE, ours)]

    assert verdict("failures", results).ruling == ruling


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_about_nothing_measured_is_called_unmeasured(claim: object) -> None:
    name = next(each.name for each in CLAIMS if each is claim)

    said = verdict(name, results_of("none", "none", {}))

    assert said.ruling == "unmeasured"
    assert said.words
