"""A mode that fails during a comparison becomes a note, and the others are measured."""

from __future__ import annotations

import random

import pytest

from tests.compare.conftest import PutTool
from userspace_proxy.compare.cases import Case
from userspace_proxy.compare.command import ComparisonRequest, ComparisonRun
from userspace_proxy.compare.disasters import POD_FAILURES, Scene
from userspace_proxy.compare.modes import HAPROXY, NGINX, ComparedMode
from userspace_proxy.compare.nodes import CompareLab, ModeNode
from userspace_proxy.compare.results import DIRECT
from userspace_proxy.errors import StartError
from userspace_proxy.lab import ip


class BareLab(CompareLab):
    """The hosts of the comparison, of which there is one, that all modes share."""

    def __init__(self, node: ModeNode) -> None:
        self.client = node.client
        self._node = node

    def add(self, _: str) -> ModeNode:
        return self._node


class UnreachableNode(ModeNode):
    def wait_until_it_serves(self) -> None:
        raise StartError(f"{self.name} does not serve")


def no_start(_: ModeNode) -> None:
    """It runs already, if it does."""


def mode(name: str) -> ComparedMode:
    return ComparedMode(name, name, "proxy", no_start)


def comparison(node: ModeNode, *modes: ComparedMode) -> ComparisonRun:
    one = ComparisonRun(ComparisonRequest(modes=("none",)), BareLab(node), lambda _: None)
    one.session.running.update((each, node) for each in modes)
    return one


@pytest.mark.parametrize(("name", "why"), [(HAPROXY, "No such file"), (NGINX, "invalid configuration")])
def test_a_mode_that_cannot_be_notified_of_a_failure_is_noted(
    node: ModeNode, put_tool: PutTool, name: str, why: str
) -> None:
    put_tool("nginx", "echo invalid configuration >&2; exit 1")
    scene = Scene(BareLab(node), POD_FAILURES[0], {mode(name): node})

    scene.tell([0, 2])

    ((untold, reason),) = scene.untold.items()
    assert untold.name == name
    assert why in reason


def test_a_mode_whose_conntrack_entries_cannot_be_deleted_skips_the_round(node: ModeNode, put_tool: PutTool) -> None:
    put_tool("conntrack", "echo no netlink >&2; exit 1")
    case = Case("load", "a load", "requests", lambda _, __: {"rate": 1.0})
    broken = mode(HAPROXY)
    one = comparison(node, broken)

    one.session.run_round(1, {case: [broken]}, random.Random(1), 0.1)

    assert one.session.results.samples == []
    assert one.session.results.notes == ["haproxy, a load, round 1: ip netns exec node conntrack -F: no netlink"]


def test_no_pod_fails_if_no_mode_answers(node: ModeNode) -> None:
    one = comparison(node)

    one.let_pods_fail()

    assert one.session.results.timelines == []


def test_nothing_is_compared_without_direct_connections(node: ModeNode) -> None:
    unreachable = UnreachableNode(DIRECT, node.host, node.client, 1, node.folder)

    with pytest.raises(StartError, match="direct connections did not start: direct does not serve"):
        comparison(unreachable).start_modes()


def test_a_mode_that_does_not_start_leaves_no_worker_behind(node: ModeNode) -> None:
    def start(node: ModeNode) -> None:
        process = node.start("sh", "-c", f"sleep 300 & : > {node.folder}/started; exit 1")
        process.wait(20)
        raise StartError("it did not start")

    broken = ComparedMode(HAPROXY, HAPROXY, "proxy", start)

    assert comparison(node).session.start(broken) == "it did not start"

    assert ip("netns", "pids", node.host.name) == ""
