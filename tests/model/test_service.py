"""Where clients may dial a service port, and how names are shown."""

from __future__ import annotations

from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import Portal, ServicePort, portals

NAME = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)


def test_a_service_port_is_dialled_at_each_of_its_addresses_and_at_its_node_port() -> None:
    port = ServicePort(NAME, 80, ("10.96.0.1", "fd00::1"), node_port=30_080, external_ips=("1.2.3.4",))

    assert portals(port) == (
        Portal("10.96.0.1", 80, L4Protocol.TCP),
        Portal("fd00::1", 80, L4Protocol.TCP),
        Portal("1.2.3.4", 80, L4Protocol.TCP),
        Portal(None, 30_080, L4Protocol.TCP),
    )


def test_an_external_ip_that_is_the_cluster_ip_is_one_portal() -> None:
    port = ServicePort(NAME, 80, ("10.96.0.1",), external_ips=("10.96.0.1",))

    assert portals(port) == (Portal("10.96.0.1", 80, L4Protocol.TCP),)


def test_one_number_for_tcp_and_udp_is_two_portals() -> None:
    assert Portal("10.96.0.1", 53, L4Protocol.TCP) != Portal("10.96.0.1", 53, L4Protocol.UDP)


def test_portals_are_shown_as_a_client_would_write_them() -> None:
    assert str(Portal("10.96.0.1", 80, L4Protocol.TCP)) == "10.96.0.1:80"
    assert str(Portal("fd00::1", 80, L4Protocol.TCP)) == "[fd00::1]:80"
    assert str(Portal(None, 30_080, L4Protocol.TCP)) == "*:30080"


def test_names_are_shown_as_kube_proxy_shows_them() -> None:
    assert str(NAME) == "shop/web:http"
    assert str(NAME._replace(port_name="")) == "shop/web"


def test_a_key_tells_tcp_from_udp_and_a_named_port_from_an_unnamed_one() -> None:
    keys = {NAME._replace(port_name=name, protocol=protocol).key for name in ("", "http") for protocol in L4Protocol}

    assert len(keys) == 4
    assert NAME.key == "shop/web:http/TCP"
