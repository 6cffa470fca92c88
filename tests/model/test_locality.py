"""kube-proxy's TestNoEndpointsMetric as a table, by family."""

from __future__ import annotations

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.locality import without_local_endpoints
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
HERE, THERE = Endpoint("10.0.0.1", 80, node_name="here"), Endpoint("10.0.1.1", 80, node_name="there")
THERE6 = Endpoint("fd00::1", 80, node_name="there")


def counts(*endpoints: Endpoint, internal: bool, external: bool, node_port: int = 30_080) -> dict[str, int]:
    service_port = ServicePort(
        NAME, 80, ("10.96.0.1", "fd00:96::1"), node_port, internal_local=internal, external_local=external
    )
    state = ProxyState({NAME: service_port}, {NAME: endpoints}, Node("here"))
    return {f"{policy} {family}": count for (policy, family), count in without_local_endpoints(state).items() if count}


@pytest.mark.parametrize(
    ("endpoints", "internal", "external", "counted"),
    [
        ((HERE, THERE), True, True, {}),
        ((HERE,), True, True, {}),
        ((THERE,), True, False, {"internal IPv4": 1}),
        ((THERE,), False, True, {"external IPv4": 1}),
        ((THERE,), True, True, {"internal IPv4": 1, "external IPv4": 1}),
        ((HERE, THERE6), True, False, {"internal IPv6": 1}),
        ((THERE,), False, False, {}),
        ((), True, True, {}),
    ],
)
def test_a_service_port_is_counted_where_its_endpoints_are_all_elsewhere(
    endpoints: tuple[Endpoint, ...], internal: bool, external: bool, counted: dict[str, int]
) -> None:
    assert counts(*endpoints, internal=internal, external=external) == counted


def test_a_service_port_without_external_portals_is_not_counted_for_external_traffic() -> None:
    assert counts(THERE, internal=False, external=True, node_port=0) == {}


def test_an_empty_state_has_counts_of_zero() -> None:
    assert list(without_local_endpoints(ProxyState()).values()) == [0, 0, 0, 0]
