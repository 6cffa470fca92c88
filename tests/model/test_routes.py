"""Routes of clients to listeners: behaviours 3 and 4, whose matrix was measured on a real kube-proxy.

Every Service here keeps the client's address where it can, so that a listener that is not transparent means
kube-proxy's masquerading.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.routes import Refusal, Sender, listeners, routes
from userspace_proxy.model.service import Portal, ServicePort, SourceIP, node_portal
from userspace_proxy.model.topology import Node, reach

NAME = ServicePortName(NamespacedName("default", "web"), "", L4Protocol.TCP)
HERE = Node("here")
CLUSTER_IP = Portal("10.96.0.1", 80, L4Protocol.TCP)
NODE_PORT = node_portal(4, 30_080, L4Protocol.TCP)
LOAD_BALANCER = Portal("203.0.113.1", 80, L4Protocol.TCP)
EXTERNAL_IP = Portal("203.0.113.2", 80, L4Protocol.TCP)
FROM_OUTSIDE = (NODE_PORT, LOAD_BALANCER, EXTERNAL_IP)

LOCAL = Endpoint("10.0.0.1", 80, node_name="here")
REMOTE = Endpoint("10.0.0.2", 80, node_name="other")

CLUSTER: dict[str, Any] = {}
ETP: dict[str, Any] = {"external_local": True}
ITP: dict[str, Any] = {"internal_local": True}

# What becomes of a client: the endpoints it may meet, and an m where they see the node's address instead of its own.
ALL, ALL_M, NEAR, NEAR_M = "L,R", "L,R m", "L", "L m"
REJECT, DROP = "REJECT", "DROP"


def service_port(policy: Mapping[str, Any], source_ip: SourceIP = SourceIP.TRANSPARENT) -> ServicePort:
    return ServicePort(
        NAME,
        80,
        ("10.96.0.1",),
        node_port=30_080,
        external_ips=("203.0.113.2",),
        load_balancer_ips=("203.0.113.1",),
        source_ip=source_ip,
        **policy,
    )


def becomes_of(
    sender: Sender,
    portal: Portal,
    policy: Mapping[str, Any],
    endpoints: Iterable[Endpoint] = (LOCAL, REMOTE),
    *,
    detects_pods: bool = True,
) -> str:
    given = service_port(policy)
    there = reach(given, endpoints, HERE)
    ways = {(r.portal, r.sender): r.to for r in routes(given, 4, there, detects_pods=detects_pods)}
    to = ways.get((portal, sender), ways[portal, Sender.ANYBODY])
    if isinstance(to, Refusal):
        return to.name
    met = there.cluster if to.scope is Scope.CLUSTER else there.local
    shown = {"10.0.0.1": "L", "10.0.0.2": "R"}
    return ",".join(shown.get(e.ip, e.ip) for e in met) + ("" if to.transparent else " m")


POD, NODE, ANYBODY = Sender.POD, Sender.NODE, Sender.ANYBODY


@pytest.mark.parametrize(
    ("policy", "sender", "at_cluster_ip", "from_outside"),
    [
        pytest.param(CLUSTER, POD, ALL, ALL_M, id="pod, both Cluster"),
        pytest.param(CLUSTER, NODE, ALL_M, ALL_M, id="node, both Cluster"),
        pytest.param(CLUSTER, ANYBODY, ALL_M, ALL_M, id="external, both Cluster"),
        pytest.param(ETP, POD, ALL, ALL, id="pod, eTP Local"),
        pytest.param(ETP, NODE, ALL_M, ALL_M, id="node, eTP Local"),
        pytest.param(ETP, ANYBODY, ALL_M, NEAR, id="external, eTP Local"),
        pytest.param(ITP, POD, NEAR, ALL_M, id="pod, iTP Local"),
        pytest.param(ITP, NODE, NEAR_M, ALL_M, id="node, iTP Local"),
        pytest.param(ITP, ANYBODY, NEAR_M, ALL_M, id="external, iTP Local"),
        pytest.param({**ITP, **ETP}, POD, NEAR, ALL, id="pod, both Local"),
        pytest.param({**ITP, **ETP}, NODE, NEAR_M, ALL_M, id="node, both Local"),
        pytest.param({**ITP, **ETP}, ANYBODY, NEAR_M, NEAR, id="external, both Local"),
    ],
)
def test_policy_and_sender_select_the_endpoints_and_the_source_address(
    policy: Mapping[str, Any], sender: Sender, at_cluster_ip: str, from_outside: str
) -> None:
    assert becomes_of(sender, CLUSTER_IP, policy) == at_cluster_ip
    assert [becomes_of(sender, portal, policy) for portal in FROM_OUTSIDE] == [from_outside] * 3


@pytest.mark.parametrize(
    ("policy", "sender", "at_cluster_ip", "from_outside"),
    [
        pytest.param(CLUSTER, POD, ALL, ALL_M, id="pod, both Cluster"),
        pytest.param(CLUSTER, ANYBODY, ALL, ALL_M, id="external, both Cluster"),
        pytest.param(ETP, POD, ALL, NEAR, id="pod, eTP Local"),
        pytest.param(ETP, NODE, ALL_M, ALL_M, id="node, eTP Local"),
        pytest.param(ETP, ANYBODY, ALL, NEAR, id="external, eTP Local"),
        pytest.param(ITP, POD, NEAR, ALL_M, id="pod, iTP Local"),
    ],
)
def test_without_a_pod_detector_no_address_is_replaced_at_cluster_ips_and_no_pod_is_short_circuited(
    policy: Mapping[str, Any], sender: Sender, at_cluster_ip: str, from_outside: str
) -> None:
    """M1. The node's own address stays the node's for every sender."""
    assert becomes_of(sender, CLUSTER_IP, policy, detects_pods=False) == at_cluster_ip
    assert [becomes_of(sender, portal, policy, detects_pods=False) for portal in FROM_OUTSIDE] == [from_outside] * 3


# ---- no endpoints (behaviours.md 3)


@pytest.mark.parametrize("policy", [CLUSTER, ETP, ITP])
@pytest.mark.parametrize("portal", [CLUSTER_IP, *FROM_OUTSIDE])
@pytest.mark.parametrize("sender", Sender)
def test_a_service_port_without_endpoints_is_rejected(
    policy: Mapping[str, Any], portal: Portal, sender: Sender
) -> None:
    """N1."""
    assert becomes_of(sender, portal, policy, ()) == REJECT


@pytest.mark.parametrize(
    ("policy", "sender", "at_cluster_ip", "from_outside"),
    [
        pytest.param(ITP, POD, DROP, "R m", id="iTP Local, pod"),
        pytest.param(ITP, NODE, DROP, "R m", id="iTP Local, node"),
        pytest.param(ITP, ANYBODY, DROP, "R m", id="iTP Local, external"),
        pytest.param(ETP, POD, "R", "R", id="eTP Local, pod"),
        pytest.param(ETP, NODE, "R m", "R m", id="eTP Local, node"),
        pytest.param(ETP, ANYBODY, "R m", DROP, id="eTP Local, external"),
    ],
)
def test_traffic_of_policy_local_is_dropped_if_all_endpoints_are_elsewhere(
    policy: Mapping[str, Any], sender: Sender, at_cluster_ip: str, from_outside: str
) -> None:
    """N2."""
    assert becomes_of(sender, CLUSTER_IP, policy, [REMOTE]) == at_cluster_ip
    assert [becomes_of(sender, portal, policy, [REMOTE]) for portal in FROM_OUTSIDE] == [from_outside] * 3


# ---- endpoints that terminate


def ep(name: str) -> Endpoint:
    """Return an endpoint: ``L`` (local) or ``R`` (remote), then its conditions R(eady), S(erving), T(erminating)."""
    where, conditions, number = name[0], name[2:-1], name[-1]
    node = "here" if where == "L" else "other"
    return Endpoint(name, int(number), "R" in conditions, "S" in conditions, "T" in conditions, node)


@pytest.mark.parametrize(
    ("endpoints", "pod_at_cluster_ip", "external_if_local", "external_if_cluster"),
    [
        pytest.param(
            ("L-RS1", "L-RS2", "L-ST3", "L-T4", "R-RS5"),
            *("L-RS1,L-RS2,R-RS5", "L-RS1,L-RS2", "L-RS1,L-RS2,R-RS5 m"),
            id="some are ready",
        ),
        pytest.param(
            ("L-ST1", "L-ST2", "L-T3", "R-RS4"), "R-RS4", "L-ST1,L-ST2", "R-RS4 m", id="all local ones terminate"
        ),
        pytest.param(
            ("L-ST1", "L-ST2", "L-T3", "R-ST4"),
            *("L-ST1,L-ST2,R-ST4", "L-ST1,L-ST2", "L-ST1,L-ST2,R-ST4 m"),
            id="all terminate",
        ),
        pytest.param(("R-ST1",), "R-ST1", DROP, "R-ST1 m", id="a remote one terminates"),
        pytest.param(("L-T1", "R-T2"), REJECT, REJECT, REJECT, id="none serves"),
        pytest.param((), REJECT, REJECT, REJECT, id="all are gone"),
    ],
)
def test_terminating_endpoints_serve_if_none_is_ready(
    endpoints: tuple[str, ...], pod_at_cluster_ip: str, external_if_local: str, external_if_cluster: str
) -> None:
    given = list(map(ep, endpoints))

    assert becomes_of(POD, CLUSTER_IP, ETP, given) == pod_at_cluster_ip
    assert becomes_of(ANYBODY, LOAD_BALANCER, ETP, given) == external_if_local
    assert becomes_of(ANYBODY, LOAD_BALANCER, CLUSTER, given) == external_if_cluster


# ---- what routes are for


@pytest.mark.parametrize("detects_pods", [True, False])
@pytest.mark.parametrize("source_ip", SourceIP)
@pytest.mark.parametrize("policy", [CLUSTER, ETP, ITP, {**ITP, **ETP}])
def test_every_route_leads_to_a_listener_that_is_there_and_every_listener_is_led_to(
    policy: Mapping[str, Any], source_ip: SourceIP, detects_pods: bool
) -> None:
    given = service_port(policy, source_ip)

    found = list(routes(given, 4, reach(given, [LOCAL, REMOTE], HERE), detects_pods=detects_pods))

    assert {route.to for route in found} == set(listeners(given, detects_pods=detects_pods))


@pytest.mark.parametrize("source_ip", [SourceIP.NODE, SourceIP.PROXY_PROTOCOL_V1, SourceIP.PROXY_PROTOCOL_V2])
@pytest.mark.parametrize("policy", [CLUSTER, ETP, ITP, {**ITP, **ETP}])
def test_only_a_transparent_service_has_transparent_listeners(policy: Mapping[str, Any], source_ip: SourceIP) -> None:
    given = service_port(policy, source_ip)

    assert not any(listener.transparent for listener in listeners(given, detects_pods=True))


def test_without_policies_a_portal_has_one_route_and_one_listener() -> None:
    given = service_port(CLUSTER, SourceIP.NODE)

    found = list(routes(given, 4, reach(given, [LOCAL], HERE), detects_pods=True))

    assert {route.sender for route in found} == {Sender.ANYBODY}
    assert listeners(given, detects_pods=True) == (ListenerName(NAME),)


def test_each_family_has_routes_of_its_own() -> None:
    given = ServicePort(NAME, 80, ("10.96.0.1", "fd00::1"), node_port=30_080)
    there = reach(given, [LOCAL], HERE)

    portals = [{str(r.portal) for r in routes(given, family, there, detects_pods=True)} for family in (4, 6)]

    assert portals == [{"10.96.0.1:80", "*:30080"}, {"[fd00::1]:80", "[::]:30080"}]
