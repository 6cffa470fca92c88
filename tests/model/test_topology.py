"""Which endpoints may take traffic (behaviours C1 to C8, U1)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import Node, reach, serving_endpoints, usable_endpoints

READY = Endpoint("10.0.0.1", 80)
LEAVING = Endpoint("10.0.0.2", 80, ready=False, serving=True, terminating=True)
STARTING = Endpoint("10.0.0.3", 80, ready=False, serving=False)
UNREADY_SERVING = Endpoint("10.0.0.4", 80, ready=False, serving=True)
GONE = Endpoint("10.0.0.5", 80, ready=False, serving=False, terminating=True)
PUBLISHED = Endpoint("10.0.0.6", 80, ready=True, serving=False, terminating=True)


def test_only_ready_endpoints_take_traffic_if_there_are_any() -> None:
    assert usable_endpoints([LEAVING, READY, STARTING, UNREADY_SERVING, GONE]) == (READY,)


def test_if_none_is_ready_endpoints_that_serve_while_terminating_take_traffic() -> None:
    assert usable_endpoints([LEAVING, STARTING, UNREADY_SERVING, GONE]) == (LEAVING,)


def test_an_endpoint_that_is_neither_ready_nor_terminating_takes_no_traffic() -> None:
    """C4."""
    assert usable_endpoints([STARTING, UNREADY_SERVING, GONE]) == ()


def test_a_ready_endpoint_takes_traffic_independent_of_other_conditions() -> None:
    assert usable_endpoints([PUBLISHED, LEAVING]) == (PUBLISHED,)


def test_udp_flows_may_stay_with_endpoints_that_still_serve() -> None:
    """U1: whatever `ready` and `terminating` say."""
    assert serving_endpoints([READY, LEAVING, STARTING, UNREADY_SERVING, GONE]) == (READY, LEAVING, UNREADY_SERVING)


def test_usable_endpoints_of_an_iterator_fall_back_too() -> None:
    assert usable_endpoints(iter([LEAVING, STARTING])) == (LEAVING,)


# ---- behaviours.md 2: the cases of kube-proxy's topology_test.go

NAME = ServicePortName(NamespacedName("default", "web"), "", L4Protocol.TCP)
HERE = Node("here", zone="zone-a")
CLUSTER: dict[str, Any] = {}
INTERNAL: dict[str, Any] = {"internal_local": True}
EXTERNAL: dict[str, Any] = {"external_local": True, "node_port": 30_080}
BOTH: dict[str, Any] = {**INTERNAL, **EXTERNAL}
FALLING_BACK: dict[str, Any] = {"ready": False, "terminating": True}
STARTING_UP: dict[str, Any] = {"ready": False, "serving": False}
DEAD: dict[str, Any] = {"ready": False, "serving": False, "terminating": True}


def ep(number: int, node: str = "other", zones: str = "", nodes: str = "", **conditions: bool) -> Endpoint:
    return Endpoint(
        f"10.0.0.{number}",
        80,
        node_name=node,
        zone_hints=tuple(zones.split()),
        node_hints=tuple(nodes.split()),
        **conditions,
    )


def service_port(policy: Mapping[str, Any]) -> ServicePort:
    return ServicePort(NAME, 80, ("10.96.0.1",), **policy)


HINTED = (ep(1, zones="zone-a"), ep(2, zones="zone-b"), ep(3, "here", zones="zone-b"), ep(4, zones="zone-a"))
FOR_NODES = (ep(1, "here", "zone-a", "here"), ep(2, "other", "zone-a", "other"), ep(3, "third", "zone-b", "third"))


@pytest.mark.parametrize(
    ("policy", "node", "endpoints", "cluster", "local", "has_any"),
    [
        pytest.param(CLUSTER, HERE, HINTED, {1, 4}, set(), True, id="zone hints: the own zone"),
        pytest.param(EXTERNAL, HERE, HINTED, {1, 4}, {3}, True, id="eTP Local: the local set ignores hints"),
        pytest.param(INTERNAL, HERE, HINTED, set(), {3}, True, id="iTP Local: the local set ignores hints"),
        pytest.param(CLUSTER, Node(), HINTED, {1, 2, 3, 4}, set(), True, id="nothing is known of the node"),
        pytest.param(CLUSTER, Node("here"), HINTED, {1, 2, 3, 4}, set(), True, id="the node is in no zone"),
        pytest.param(CLUSTER, Node("here", ""), HINTED, {1, 2, 3, 4}, set(), True, id="the zone label is empty"),
        pytest.param(CLUSTER, Node("here", "zone-c"), HINTED, {1, 2, 3, 4}, set(), True, id="none for the zone"),
        pytest.param(CLUSTER, HERE, (*HINTED, ep(5)), {1, 2, 3, 4, 5}, set(), True, id="one ready has no hint"),
        pytest.param(
            *(CLUSTER, HERE, (*HINTED, ep(5, **STARTING_UP)), {1, 4}, set(), True), id="an unready one has no hint"
        ),
        pytest.param(
            *(CLUSTER, HERE, (ep(1, zones="zone-a", **STARTING_UP), ep(2, zones="zone-b")), {2}, set(), True),
            id="only an unready one is for the zone",
        ),
        pytest.param(
            *(CLUSTER, HERE, (ep(1, zones="zone-b zone-a"), ep(2, zones="zone-b zone-c")), {1}, set(), True),
            id="several zones in one hint",
        ),
        pytest.param(
            *(CLUSTER, HERE, (ep(1, zones="zone-a", **FALLING_BACK), ep(2, zones="zone-b", **FALLING_BACK))),
            *({1, 2}, set(), True),
            id="no topology for those that terminate",
        ),
        pytest.param(CLUSTER, HERE, FOR_NODES, {1}, set(), True, id="PreferSameNode: the own node"),
        pytest.param(
            CLUSTER, Node("fourth", "zone-a"), FOR_NODES, {1, 2}, set(), True, id="PreferSameNode: none, so the zone"
        ),
        pytest.param(
            CLUSTER, Node("fourth", "zone-c"), FOR_NODES, {1, 2, 3}, set(), True, id="PreferSameNode: none at all"
        ),
        pytest.param(
            *(CLUSTER, HERE, (*FOR_NODES, ep(4, "fourth", "zone-a")), {1, 2, 4}, set(), True),
            id="PreferSameNode: one without, so the zone",
        ),
        pytest.param(CLUSTER, HERE, (*FOR_NODES, ep(4)), {1, 2, 3, 4}, set(), True, id="one without any hint"),
        pytest.param(
            *(EXTERNAL, HERE, (ep(1, zones="zone-a"), ep(2, "here", zones="zone-b")), {1}, {2}, True),
            id="conflicting topology and local",
        ),
        pytest.param(INTERNAL, HERE, (), set(), set(), False, id="iTP Local: no endpoints"),
        pytest.param(INTERNAL, HERE, (ep(1), ep(2)), set(), set(), True, id="iTP Local: all remote"),
        pytest.param(INTERNAL, HERE, (ep(1, "here"), ep(2, "here")), set(), {1, 2}, True, id="iTP Local: all local"),
        pytest.param(INTERNAL, HERE, (ep(1, "here"), ep(2)), set(), {1}, True, id="iTP Local: some local"),
        pytest.param(INTERNAL, Node(), (ep(1, ""), ep(2)), set(), set(), True, id="a node without a name has none"),
        pytest.param(
            *(CLUSTER, HERE, (ep(1), ep(2, **FALLING_BACK), ep(3, **STARTING_UP)), {1}, set(), True),
            id="Cluster: some ready",
        ),
        pytest.param(
            *(CLUSTER, HERE, (ep(1, **FALLING_BACK), ep(2, "here", **FALLING_BACK), ep(3, **DEAD)), {1, 2}, set()),
            True,
            id="Cluster: all terminating",
        ),
        pytest.param(CLUSTER, HERE, (ep(1, **STARTING_UP), ep(2, **DEAD)), set(), set(), False, id="Cluster: none"),
        pytest.param(CLUSTER, HERE, (ep(1, ready=False),), set(), set(), False, id="serving, but neither ready nor T"),
        pytest.param(CLUSTER, HERE, (), set(), set(), False, id="Cluster: no endpoints"),
        pytest.param(
            *({**INTERNAL, "node_port": 30_080}, HERE, (ep(1, "here"), ep(2)), {1, 2}, {1}, True),
            id="iTP Local, eTP Cluster",
        ),
        pytest.param(EXTERNAL, HERE, (ep(1, "here"), ep(2)), {1, 2}, {1}, True, id="iTP Cluster, eTP Local"),
        pytest.param(BOTH, HERE, (ep(1, "here"), ep(2)), {1, 2}, {1}, True, id="both Local"),
        pytest.param(
            *(BOTH, HERE, (ep(1, **FALLING_BACK), ep(2, **FALLING_BACK)), {1, 2}, set(), True),
            id="both Local: all remote and terminating",
        ),
        pytest.param(
            *(BOTH, HERE, (ep(1), ep(2, "here", **FALLING_BACK)), {1}, {2}, True),
            id="the local set falls back for itself",
        ),
        pytest.param(
            {"external_local": True}, HERE, (ep(1), ep(2, "here")), {1, 2}, set(), True, id="eTP of nobody outside"
        ),
        pytest.param(BOTH, HERE, (ep(1, "here", **STARTING_UP),), set(), set(), False, id="neither R nor S nor T"),
    ],
)
def test_traffic_policies_select_the_reachable_endpoints(
    policy: Mapping[str, Any],
    node: Node,
    endpoints: tuple[Endpoint, ...],
    cluster: set[int],
    local: set[int],
    has_any: bool,
) -> None:
    found = reach(service_port(policy), iter(endpoints), node)

    assert (numbers(found.cluster), numbers(found.local), found.has_any) == (cluster, local, has_any)


def numbers(endpoints: Iterable[Endpoint]) -> set[int]:
    return {int(endpoint.ip.rpartition(".")[2]) for endpoint in endpoints}
