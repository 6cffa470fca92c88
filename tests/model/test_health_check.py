"""Which Services have a health-check node port, and which endpoints it counts (behaviours H1, H3)."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.health_check import HealthCheck, health_checks
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node

WEB = NamespacedName("default", "web")
PORT = 32_123


def state(*endpoints: Endpoint, node: str = "here", **more: Any) -> ProxyState:
    """Return a state with one Service of two ports, which have the same *endpoints*."""
    names = [ServicePortName(WEB, port_name, L4Protocol.TCP) for port_name in ("http", "https")]
    options: dict[str, Any] = {"health_check_node_port": PORT, "external_local": True, **more}
    return ProxyState(
        MappingProxyType({name: ServicePort(name, 80, ("10.96.0.1",), **options) for name in names}),
        MappingProxyType(dict.fromkeys(names, endpoints)),
        Node(node),
    )


def here(ip: str, port: int = 8080, *, ready: bool = True, terminating: bool = False) -> Endpoint:
    return Endpoint(ip, port, ready=ready, terminating=terminating, node_name="here")


def elsewhere(ip: str) -> Endpoint:
    return Endpoint(ip, 8080, node_name="elsewhere")


@pytest.mark.parametrize("options", [{"health_check_node_port": 0}, {"external_local": False}])
def test_only_services_with_a_health_check_node_port_and_policy_local_are_listed(options: dict[str, Any]) -> None:
    assert health_checks(state(here("10.0.0.1"), **options)) == {}


def test_without_services_no_health_is_counted() -> None:
    assert health_checks(ProxyState()) == {}


@pytest.mark.parametrize(
    ("endpoints", "count"),
    [
        ([], 0),
        ([here("10.0.0.1")], 1),
        ([here("10.0.0.1"), here("10.0.0.2"), elsewhere("10.0.0.3")], 2),
        ([elsewhere("10.0.0.3"), Endpoint("10.0.0.4", 8080)], 0),
        ([here("10.0.0.1", 8080), here("10.0.0.1", 8443)], 1),
        ([here("10.0.0.1", ready=False)], 0),
        ([here("10.0.0.1", ready=False, terminating=True)], 0),
        ([here("10.0.0.1", terminating=True)], 1),  # publishNotReadyAddresses
        ([here("10.0.0.1"), here("fd00::1"), here("10.0.0.2"), here("fd00::2")], 2),
        ([here("fd00::1"), here("fd00::2")], 2),
    ],
)
def test_ready_endpoints_of_this_node_are_counted_by_ip(endpoints: list[Endpoint], count: int) -> None:
    assert health_checks(state(*endpoints)) == {WEB: HealthCheck(PORT, count)}


def test_a_node_without_a_name_has_no_endpoint() -> None:
    assert health_checks(state(Endpoint("10.0.0.1", 80, node_name=""), node="")) == {WEB: HealthCheck(PORT, 0)}
