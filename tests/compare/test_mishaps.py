"""A mode that goes wrong while it is compared becomes a note; the others are measured."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

import pytest

from tests.compare.given import put_tool
from userspace_proxy.compare.cases import Case
from userspace_proxy.compare.command import ComparisonRequest, _Comparison
from userspace_proxy.compare.failures import Event, watch
from userspace_proxy.compare.modes import DIRECT, HAPROXY, NGINX, Mode
from userspace_proxy.compare.sites import Site, Sites
from userspace_proxy.errors import StartError
from userspace_proxy.lab import ip


class BareSites(Sites):
    """The hosts of the comparison, of which there is one, that all modes share."""

    def __init__(self, site: Site) -> None:
        self.client = site.client
        self._site = site

    def add(self, _: str) -> Site:
        return self._site


class UnreachableSite(Site):
    def wait_until_it_serves(self) -> None:
        raise StartError(f"{self.name} does not serve")


def no_start(_: Site) -> None:
    """It runs already, if it does."""


def mode(name: str, tell_error: Exception | None = None) -> Mode:
    def tell(_: Site, __: Iterable[int]) -> None:
        if tell_error is not None:
            raise tell_error

    return Mode(name, name, "proxy", no_start, tell)


def comparison(site: Site, *modes: Mode) -> _Comparison:
    one = _Comparison(ComparisonRequest(modes=("none",)), BareSites(site), lambda _: None)
    one._running.update((each, site) for each in modes)
    return one


REFUSED = ConnectionRefusedError(111, "Connection refused")
RELOAD = subprocess.CalledProcessError(1, ["nginx", "-s", "reload"], "", "invalid configuration\n")


@pytest.mark.parametrize("error", [REFUSED, RELOAD], ids=["HAProxy is dead", "nginx does not reload"])
def test_a_mode_that_cannot_be_told_has_no_timeline_and_the_event_is_undone_for_the_others(
    site: Site, error: Exception
) -> None:
    undone: list[bool] = []
    noted: list[str] = []
    event = Event(
        "dies", "a pod dies: its port refuses", 0.0, happen=lambda _: None, undo=lambda _: undone.append(True)
    )
    running = {mode(HAPROXY, tell_error=error): site, mode(NGINX): site}

    timelines = watch(BareSites(site), running, event, 1, noted.append)

    assert [line.mode for line in timelines] == [NGINX]
    assert undone == [True]
    assert len(noted) == 1
    assert noted[0].startswith("haproxy, round 1: could not be told that a pod dies: ")
    assert "refused" in noted[0] or "invalid configuration" in noted[0]


def test_a_mode_whose_connections_cannot_be_forgotten_is_left_out_of_the_round(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_tool(site.folder, monkeypatch, "conntrack", "echo no netlink >&2; exit 1")
    case = Case("load", "a load", "requests", lambda _, __: {"rate": 1.0})
    broken = mode(HAPROXY)
    one = comparison(site, broken)

    one._run_once(case, [broken], 1, 0.1)

    assert one._results.samples == []
    assert one._results.notes == ["haproxy, a load, round 1: ip netns exec node conntrack -F: no netlink"]


def test_where_no_mode_answers_no_pod_is_let_fail(site: Site) -> None:
    one = comparison(site)

    one._let_pods_fail()

    assert one._results.timelines == []


def test_without_the_direct_way_nothing_is_compared_and_the_reason_is_said(site: Site) -> None:
    unreachable = UnreachableSite(DIRECT, site.node, site.client, 1, site.folder)

    with pytest.raises(StartError, match="the direct way did not start: direct does not serve"):
        comparison(unreachable)._start_modes()


def test_a_mode_that_does_not_start_leaves_no_worker_behind(site: Site) -> None:
    def start(site: Site) -> None:
        process = site.start("sh", "-c", f"sleep 300 & : > {site.folder}/started; exit 1")
        process.wait(20)
        raise StartError("it did not start")

    broken = Mode(HAPROXY, HAPROXY, "proxy", start, lambda _, __: None)

    assert comparison(site)._start(broken) == "it did not start"

    assert ip("netns", "pids", site.node.name) == ""
