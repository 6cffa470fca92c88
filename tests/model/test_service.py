"""The portals of a service port, and the text form of names."""

from __future__ import annotations

from typing import Any

import pytest

from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.service import (
    Portal,
    ServicePort,
    external_portals,
    internal_portals,
    load_balancer_portals,
    node_portal,
    portals,
)

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)


def test_a_service_port_is_dialled_at_each_of_its_addresses_and_at_its_node_port() -> None:
    port = ServicePort(NAME, 80, ("10.96.0.1", "fd00::1"), node_port=30_080, external_ips=("1.2.3.4",))

    assert portals(port) == (
        Portal("10.96.0.1", 80, L4Protocol.TCP),
        Portal("fd00::1", 80, L4Protocol.TCP),
        Portal("1.2.3.4", 80, L4Protocol.TCP),
        node_portal(4, 30_080, L4Protocol.TCP),
        node_portal(6, 30_080, L4Protocol.TCP),
    )


def test_external_portals_are_all_but_the_cluster_ips() -> None:
    port = ServicePort(
        NAME, 80, ("10.96.0.1",), node_port=30_080, external_ips=("1.2.3.4",), load_balancer_ips=("5.6.7.8",)
    )

    assert set(portals(port)) == {*internal_portals(port), *external_portals(port)}
    assert [str(portal) for portal in external_portals(port)] == ["1.2.3.4:80", "5.6.7.8:80", "*:30080"]
    assert [str(portal) for portal in load_balancer_portals(port)] == ["5.6.7.8:80"]


@pytest.mark.parametrize(
    ("more", "accessible"),
    [
        ({}, False),
        ({"node_port": 30_080}, True),
        ({"external_ips": ("1.2.3.4",)}, True),
        ({"load_balancer_ips": ("1.2.3.4",)}, True),
        ({"source_ranges": ("0.0.0.0/1",), "external_local": True}, False),
    ],
)
def test_a_service_is_externally_accessible_by_what_may_be_dialled_from_outside(
    more: dict[str, Any], accessible: bool
) -> None:
    assert ServicePort(NAME, 80, ("10.96.0.1",), **more).is_externally_accessible is accessible


def test_an_external_ip_that_is_the_cluster_ip_is_one_portal() -> None:
    port = ServicePort(NAME, 80, ("10.96.0.1",), external_ips=("10.96.0.1",))

    assert portals(port) == (Portal("10.96.0.1", 80, L4Protocol.TCP),)


def test_one_number_for_tcp_and_udp_is_two_portals() -> None:
    assert Portal("10.96.0.1", 53, L4Protocol.TCP) != Portal("10.96.0.1", 53, L4Protocol.UDP)


def test_portals_are_shown_as_a_client_would_write_them() -> None:
    assert str(Portal("10.96.0.1", 80, L4Protocol.TCP)) == "10.96.0.1:80"
    assert str(Portal("fd00::1", 80, L4Protocol.TCP)) == "[fd00::1]:80"
    assert str(node_portal(4, 30_080, L4Protocol.TCP)) == "*:30080"
    assert str(node_portal(6, 30_080, L4Protocol.TCP)) == "[::]:30080"


def test_names_are_shown_as_kube_proxy_shows_them() -> None:
    assert str(NAME) == "shop/web:http"
    assert str(NAME._replace(port_name="")) == "shop/web"


def test_a_key_tells_listeners_apart_by_all_that_they_differ_in() -> None:
    keys = {
        ListenerName(NAME._replace(port_name=name, protocol=protocol), scope, transparent).key
        for name in ("", "http")
        for protocol in L4Protocol
        for scope in Scope
        for transparent in (True, False)
    }

    assert len(keys) == 16
    assert ListenerName(NAME).key == "shop/web:http/TCP"
    assert ListenerName(NAME, Scope.LOCAL, transparent=True).key == "shop/web:http@local@transparent/TCP"
