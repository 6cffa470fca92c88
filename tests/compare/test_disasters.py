"""Disasters: what is stated and judged, what real ones cost in userspace mode, and the chapter of the report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare.made_results import whole_run
from userspace_proxy.compare.command import CASE_NAMES, ComparisonRequest
from userspace_proxy.compare.disasters import _EVENTS, DISASTERS, POD_FAILURES, Disaster, figures_of, happen, takes_part
from userspace_proxy.compare.modes import HAPROXY, MODES, NGINX, USERSPACE
from userspace_proxy.compare.nodes import SMALL, CompareLab
from userspace_proxy.compare.page import page
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, ModeRun, Results, Sample, Timeline
from userspace_proxy.compare.session import Session
from userspace_proxy.compare.tables import disaster_sheets
from userspace_proxy.lab import Lab

OURS = ModeRun(USERSPACE, USERSPACE, "proxy", ours=True)
KERNEL = ModeRun("nftables", "nftables", "kernel", ours=True)
AS_STATED = {"failed": 0, "received": 0, "lost": 0, "lost_at_victims": 0}


def disaster_of(name: str) -> Disaster:
    return next(each for each in (*POD_FAILURES, *DISASTERS) if each.name == name)


# ---- what is stated


def test_ten_disasters_are_stated_for_every_mode_that_takes_part() -> None:
    assert len(DISASTERS) == 10
    assert [each.name for each in (*POD_FAILURES, *DISASTERS)] == list(_EVENTS)
    for each in DISASTERS:
        assert set(each.expected) == set(each.apart) == {USERSPACE, "kernel", HAPROXY}
        assert set(each.victims) <= set(range(each.endpoints))
        assert each.what
        assert each.why
        assert each.length_s < 10, "each disaster takes less than 15 s, with the patience of its last client"


def test_every_mode_takes_part_in_the_failures_of_one_pod_which_state_nothing() -> None:
    for each in POD_FAILURES:
        assert not each.expected
        assert {mode.name for mode in MODES if not takes_part(mode, each)} == {DIRECT_AGAIN}
        assert each.case == each.name


@pytest.mark.parametrize("disaster", DISASTERS, ids=lambda disaster: disaster.name)
def test_no_new_connection_may_fail_in_userspace_mode(disaster: Disaster) -> None:
    assert disaster.expected[USERSPACE] == 0


def test_a_quick_comparison_has_disasters_only_if_they_are_named() -> None:
    assert not ComparisonRequest(duration_s=60).disasters
    assert len(ComparisonRequest().disasters) == 10
    assert len(ComparisonRequest(duration_s=60, cases=("disasters",)).disasters) == 10
    assert ComparisonRequest(cases=("latency", "killed")).disasters == [disaster_of("killed")]
    assert not ComparisonRequest(cases=("latency",)).disasters
    assert {"disasters", "killed"} <= set(CASE_NAMES)


# ---- how it is judged


def test_requests_that_a_victim_received_are_counted_apart_from_failures() -> None:
    line = Timeline("disaster-killed", USERSPACE, 1, 0.1, 0.2, 0.5, [6] * 6, [0, 0, 1, 0, 0, 0], [0, 0, 2, 1, 0, 0])

    figures = figures_of(line, 2, ["pod1", "pod2", "pod2"], ["pod2", "pod1"], {"pod2"})

    assert figures["recover_s"] == pytest.approx(0.2)
    del figures["recover_s"]
    assert figures == {
        "requests": 40,
        "failed": 1,
        "received": 2,
        "slow": 1,
        "opened": 3,
        "lost": 2,
        "lost_at_victims": 1,
    }


def test_without_failures_nothing_was_lost_and_the_recovery_took_no_time() -> None:
    line = Timeline("disaster-killed", USERSPACE, 1, 0.1, 0.2, 0.5, [6] * 6, [0] * 6, [0] * 6)

    figures = figures_of(line, 1, [], [], {"pod2"})

    assert (figures["failed"], figures["received"], figures["recover_s"]) == (0, 0, 0)


@pytest.mark.parametrize(
    ("figures", "surprises"),
    [
        ({}, []),
        ({"failed": 1}, ["more failures"]),
        ({"received": 2, "lost": 2, "lost_at_victims": 2}, []),
        ({"received": 3}, ["more requests lost on the way"]),
        ({"lost": 2, "lost_at_victims": 1}, ["open connections lost without a reason"]),
    ],
)
def test_figures_worse_than_stated_are_named(figures: dict[str, float], surprises: list[str]) -> None:
    assert disaster_of("killed").surprises(OURS, {**AS_STATED, **figures}) == surprises


def test_a_kernel_mode_may_fail_more_often() -> None:
    figures = {**AS_STATED, "failed": 60.0}

    assert disaster_of("killed").surprises(KERNEL, figures) == []
    assert disaster_of("killed").surprises(OURS, figures) == ["more failures"]


def test_an_upgrade_may_lose_no_open_connection() -> None:
    assert disaster_of("upgraded").surprises(OURS, {**AS_STATED, "lost": 1, "lost_at_victims": 0})


# ---- the report


def test_the_chapter_has_what_was_stated_beside_what_was_measured() -> None:
    results = whole_run()
    stopped = disaster_of("stopped")
    results.timelines.append(Timeline(stopped.case, USERSPACE, 1, 0.1, 0.5, 0.5, [6] * 20, [0] * 20, [1] * 20))
    results.samples.append(
        Sample(
            stopped.case,
            USERSPACE,
            1,
            {**AS_STATED, "requests": 140, "failed": 7, "received": 13, "slow": 0, "recover_s": 1.5, "opened": 6},
        )
    )

    chapter = page(results).decode().partition('<section id="disasters">')[2].partition("</section>")[0]

    assert stopped.title in chapter
    assert "userspace-proxy/health-check: http interval=200ms timeout=200ms fall=2" in chapter
    assert "<td>7 of 140</td><td>at most 0</td><td>13</td><td>at most 30</td>" in chapter.replace("\n", "")
    assert "more failures" in chapter
    assert "<svg" in chapter
    assert disaster_of("killed").title not in chapter


def test_a_report_without_disasters_has_no_chapter_of_them() -> None:
    assert 'id="disasters"' not in page(whole_run()).decode()


# ---- real ones


@pytest.fixture
def session(tmp_path: Path) -> Iterator[Session]:
    """Userspace mode on its node, with three endpoints that may fail."""
    with Lab() as hosts:
        lab = CompareLab(hosts, tmp_path)
        lab.start_nginx("small", SMALL)
        session = Session(
            lab, Results("1.0", "2026-01-01", {"processors": "", "kernel": ""}, 60.0, 0, 0.0, []), lambda _: None
        )
        mode = next(each for each in MODES if each.name == USERSPACE)
        assert takes_part(mode, disaster_of("killed"))
        assert session.start(mode) is None
        yield session


def test_real_disasters_fail_no_new_connection_in_userspace_mode(session: Session) -> None:
    for name in ("killed", "upgraded"):
        short = replace(disaster_of(name), length_s=1.5 if name == "upgraded" else 0.5)
        happen(session, replace(short, told_after_s=0.2) if short.told_after_s else short)

    results = session.results
    assert results.notes == []
    by_name = {disaster.name: sheet for disaster, sheet in disaster_sheets(results)}
    assert list(by_name) == ["killed", "upgraded"]
    for sample in results.samples:
        assert sample.figures["failed"] == 0, sample
    assert results.figures("disaster-killed", USERSPACE, "lost_at_victims")[1] >= 1, "round robin: two of six"
    assert results.figures("disaster-upgraded", USERSPACE, "lost")[1] == 0
    assert results.figures("disaster-upgraded", USERSPACE, "requests")[1] == 120
    assert 'id="disaster-killed"' in page(results).decode()


def test_a_pod_that_dies_fails_direct_connections_and_no_others(session: Session) -> None:
    for mode in MODES:
        if mode.name in (DIRECT, NGINX) and not mode.missing():
            assert session.start(mode) is None
    names = [mode.name for mode in session.running]

    for number in (1, 2):
        happen(session, replace(disaster_of("dies"), length_s=1.0, told_after_s=0.5), number)
    happen(session, replace(disaster_of("leaves"), length_s=0.5))

    timelines = session.results.timelines
    assert session.results.notes == []
    assert session.results.samples == []
    rounds = [("dies", 1), ("dies", 2), ("leaves", 1)]
    assert [(line.event, line.round, line.mode) for line in timelines] == [
        (*each, name) for each in rounds for name in names
    ]
    failed = {line.mode: sum(line.failed) for line in timelines if line.round == 1 and line.event == "dies"}
    assert failed[DIRECT] > 0, "one client in three dials the dead pod"
    assert failed[USERSPACE] <= 2, "requests that the pod held when it died"
