"""Claims are judged by the figures alone."""

from __future__ import annotations

import pytest

from tests.compare.made_results import add_rounds, results_of
from userspace_proxy.compare import cases
from userspace_proxy.compare.claims import CLAIMS, Verdict
from userspace_proxy.compare.derived import outage
from userspace_proxy.compare.modes import IPTABLES, IPVS, NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, ModeRun, Results, Sample, Timeline

QUIET = {DIRECT: [100.0, 100.0, 100.0], DIRECT_AGAIN: [101.0, 99.0, 100.0]}
CONTRARY = [100.0, 300.0, 50.0]  # rounds that do not agree with QUIET's on which is more
HOP = ((cases.KEEPALIVE_1, "p50_ms"), (cases.KEEPALIVE_64, "machine_cpu_s"), (cases.NEW_64, "machine_cpu_s"))


def verdict(claim: str, results: Results) -> Verdict:
    return next(each for each in CLAIMS if each.name == claim).judge(results)


def test_userspace_is_slow_if_the_kernel_is_faster() -> None:
    rounds = {NFTABLES: [90.0, 91.0, 92.0], USERSPACE: [45.0, 45.0, 46.0], **QUIET}
    said = verdict("slow", results_of(cases.KEEPALIVE_64, "rate", rounds))

    assert said.ruling == "holds"
    assert "nftables is better in requests a second, 64 connections: 2.00 times (2.00 to 2.02)." in said.words


def test_direct_connections_replace_missing_kernel_modes() -> None:
    said = verdict("slow", results_of(cases.KEEPALIVE_64, "rate", {USERSPACE: [50.0, 50.0, 50.0], **QUIET}))

    assert said.ruling == "holds"
    assert said.words[0].startswith("No kernel mode took part")


def test_a_difference_in_the_noise_is_undecided() -> None:
    rounds = {NFTABLES: [90.0, 110.0, 92.0], USERSPACE: [100.0, 95.0, 96.0], **QUIET}

    assert verdict("slow", results_of(cases.KEEPALIVE_64, "rate", rounds)).ruling == "undecided"


def test_a_kernel_mode_with_a_latency_of_zero_is_not_the_best() -> None:
    rounds = {NFTABLES: [0.5] * 3, IPTABLES: [0.0] * 3, USERSPACE: [1.0] * 3, **QUIET}
    said = verdict("slow", results_of(cases.KEEPALIVE_1, "p50_ms", rounds))

    assert "nftables is better in latency of a request, one connection: 2.00 times (2.00 to 2.00)." in said.words


def test_userspace_is_not_slow_if_all_differences_are_decided_and_small() -> None:
    three_percent = {NFTABLES: [103.0] * 3, USERSPACE: [100.0] * 3, DIRECT: [100.0] * 3, DIRECT_AGAIN: [100.0] * 3}
    results = results_of(cases.BULK_1, "rate", three_percent)

    assert verdict("slow", results).ruling == "fails"

    add_rounds(results, cases.KEEPALIVE_64, "rate", {NFTABLES: CONTRARY, USERSPACE: [90.0] * 3, **QUIET})

    assert verdict("slow", results).ruling == "undecided"


def test_undecided_figures_do_not_contradict_most_others() -> None:
    results = results_of(cases.KEEPALIVE_64, "rate", {NFTABLES: [90.0] * 3, USERSPACE: [45.0] * 3, **QUIET})
    add_rounds(results, cases.NEW_64, "rate", {NFTABLES: CONTRARY, USERSPACE: [90.0] * 3, **QUIET})
    assert verdict("slow", results).ruling == "undecided", "one of two"

    add_rounds(results, cases.BULK_1, "rate", {NFTABLES: [90.0] * 3, USERSPACE: [45.0] * 3, **QUIET})
    assert verdict("slow", results).ruling == "holds", "two of three"

    as_good = {NFTABLES: [103.0] * 3, USERSPACE: [100.0] * 3, DIRECT: [100.0] * 3, DIRECT_AGAIN: [100.0] * 3}
    add_rounds(results, cases.BULK_8, "rate", as_good)
    assert verdict("slow", results).ruling == "partly"


@pytest.mark.parametrize(("copying_s", "ruling"), [(130.0, "partly"), (101.0, "holds")])
def test_copying_is_a_choice_if_the_copying_engine_costs_more(copying_s: float, ruling: str) -> None:
    rounds = {NFTABLES: [50.0] * 3, USERSPACE: [100.0] * 3, USERSPACE_COPY: [copying_s] * 3, **QUIET}
    results = results_of(cases.BULK_1, "machine_cpu_s", rounds)
    none = {DIRECT: [0.0] * 3, DIRECT_AGAIN: [0.0] * 3}
    add_rounds(results, cases.BULK_1, "proxy_cpu_s", {USERSPACE: [1.0] * 3, USERSPACE_COPY: [2.0] * 3, **none})

    said = verdict("copies", results)

    assert said.ruling == ruling
    assert "2.00 times (2.00 to 2.00, noise unknown) the CPU of" in said.words[-1]


@pytest.mark.parametrize(
    ("iptables", "ipvs", "ruling"),
    [(100.0, 120.0, "holds"), (120.0, 100.0, "partly")],
)
def test_the_claim_about_hops_is_judged_by_iptables_alone(iptables: float, ipvs: float, ruling: str) -> None:
    results = results_of("none", "none", {IPTABLES: [], IPVS: [], DIRECT: [], DIRECT_AGAIN: []})
    for case, figure in HOP:
        add_rounds(results, case, figure, {IPTABLES: [iptables] * 3, IPVS: [ipvs] * 3, **QUIET})

    said = verdict("hop", results)

    assert said.ruling == ruling
    assert any(sentence.startswith("ipvs, compared with direct connections") for sentence in said.words)


def test_the_claim_about_hops_is_unmeasured_without_iptables() -> None:
    results = results_of("none", "none", {IPVS: [], DIRECT: [], DIRECT_AGAIN: []})
    for case, figure in HOP:
        add_rounds(results, case, figure, {IPVS: [120.0] * 3, **QUIET})

    assert verdict("hop", results).ruling == "unmeasured"


@pytest.mark.parametrize(
    ("last", "ruling"),
    [([150.0] * 3, "holds"), (CONTRARY, "undecided"), ([50.0] * 3, "fails")],
    ids=["better", "undecided", "worse"],
)
def test_ipvs_is_not_the_best_if_it_is_decidedly_worse(last: list[float], ruling: str) -> None:
    results = results_of("none", "none", {IPVS: [], IPTABLES: [], NFTABLES: [], DIRECT: [], DIRECT_AGAIN: []})
    for case, ipvs in ((cases.KEEPALIVE_64, [150.0] * 3), (cases.NEW_64, last)):
        add_rounds(results, case, "rate", {IPVS: ipvs, IPTABLES: [90.0] * 3, NFTABLES: [90.0] * 3, **QUIET})

    assert verdict("ipvs", results).ruling == ruling


@pytest.mark.parametrize(
    ("change_ms", "ruling"),
    [
        ({10: 5.0}, "undecided"),
        ({10: 5.0, 100: 9.0}, "undecided"),
        ({10: 5.0, 1_000: 1_500.0}, "holds"),
        ({10: 5.0, 1_000: 70.0, 5_000: 1_500.0}, "fails"),
    ],
)
def test_an_untried_number_of_services_is_not_too_large(change_ms: dict[int, float], ruling: str) -> None:
    results = results_of("none", "none", {USERSPACE: []})
    for size, each_ms in change_ms.items():
        results.samples.append(Sample(f"services-{size}", USERSPACE, 1, {"change_ms": each_ms, "load_s": 0.1}))

    assert verdict("sizes", results).ruling == ruling


@pytest.mark.parametrize(("last_us", "ruling"), [(150.0, "holds"), (9.0, "undecided")])
def test_iptables_is_o_n_if_connections_slow_down_with_more_services(last_us: float, ruling: str) -> None:
    results = results_of("none", "none", {})
    results.modes += [ModeRun(name, name, "kernel", ours=True) for name in (IPTABLES, NFTABLES)]
    for size, iptables_us in ((10, 6.0), (10_000, last_us)):
        for mode, added_us in ((IPTABLES, iptables_us), (NFTABLES, 6.0)):
            figures = {"added_us": added_us, "spread_us": 8.0}
            results.samples.append(Sample(f"services-{size}", mode, 1, figures))

    assert verdict("lookup", results).ruling == ruling


def timeline(mode: str, failed: list[int]) -> Timeline:
    return Timeline("dies", mode, 1, 0.5, 1.0, 2.0, [3 - count for count in failed], [0] * len(failed), failed)


def test_an_outage_is_counted_until_a_second_after_modes_were_notified() -> None:
    failed, slow = outage([timeline(NFTABLES, [3, 0, 1, 1, 0, 0, 3, 3])])

    assert failed == pytest.approx(2 / 12)
    assert slow == 0


@pytest.mark.parametrize(("ours", "ruling"), [([0] * 8, "holds"), ([0, 0, 1, 1, 0, 0, 0, 0], "fails")])
def test_a_dead_pod_costs_requests_in_kernel_modes_only(ours: list[int], ruling: str) -> None:
    results = results_of("none", "none", {NFTABLES: [], USERSPACE: []})
    results.timelines += [timeline(NFTABLES, [0, 0, 1, 1, 0, 0, 0, 0]), timeline(USERSPACE, ours)]

    assert verdict("failures", results).ruling == ruling


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.name)
def test_a_claim_without_figures_is_unmeasured(claim: object) -> None:
    name = next(each.name for each in CLAIMS if each is claim)

    said = verdict(name, results_of("none", "none", {}))

    assert said.ruling == "unmeasured"
    assert said.words
