"""Where clients may dial a service port, and how names are shown."""

from __future__ import annotations

from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.service import Portal, ServicePort, node_portal, portals

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


def test_listeners_of_one_service_port_are_told_apart_by_their_names_and_keys() -> None:
    names = [
        ListenerName(NAME._replace(port_name=port_name, protocol=protocol), scope, transparent)
        for port_name in ("", "http")
        for protocol in L4Protocol
        for scope in Scope
        for transparent in (False, True)
    ]

    assert len({name.key for name in names}) == len(names)
    assert ListenerName(NAME).key == "shop/web:http/TCP"
    assert str(ListenerName(NAME)) == "shop/web:http"
    assert str(ListenerName(NAME, Scope.LOCAL, transparent=True)) == "shop/web:http (local endpoints) (transparent)"
