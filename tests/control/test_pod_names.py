"""How processes find Services without cluster DNS: the kubelet's variables, and lines of /etc/hosts."""

from __future__ import annotations

import pytest

from userspace_proxy import api
from userspace_proxy.control.pod_names import KnownService, environment, hosts_lines
from userspace_proxy.model.dns_names import DnsHost, HostGroup, ServiceNames
from userspace_proxy.model.names import NamespacedName

API = KnownService([api.ServicePort(443, "https")], ServiceNames(("10.96.0.1",)))
WEB = KnownService(
    [api.ServicePort(80, "http-alt", "TCP"), api.ServicePort(80, "quic", "UDP")],
    ServiceNames(("fd00:10:96::b", "10.96.0.11")),
)
DB = KnownService(
    [], ServiceNames(groups=(HostGroup((), (DnsHost("db-0", "10.244.0.2"), DnsHost("db-1", "fd00::3"))),))
)
MAIL = KnownService([], ServiceNames(external_name="mail.example.com"))
SERVICES = {
    NamespacedName("default", "kubernetes"): API,
    NamespacedName("shop", "web-2"): WEB,
    NamespacedName("shop", "db"): DB,
    NamespacedName("shop", "mail"): MAIL,
}

# What pkg/kubelet/envvars makes of the same Services.
OF_API = """\
KUBERNETES_SERVICE_HOST=10.96.0.1
KUBERNETES_SERVICE_PORT=443
KUBERNETES_SERVICE_PORT_HTTPS=443
KUBERNETES_PORT=tcp://10.96.0.1:443
KUBERNETES_PORT_443_TCP=tcp://10.96.0.1:443
KUBERNETES_PORT_443_TCP_PROTO=tcp
KUBERNETES_PORT_443_TCP_PORT=443
KUBERNETES_PORT_443_TCP_ADDR=10.96.0.1
"""
OF_WEB = """\
WEB_2_SERVICE_HOST=fd00:10:96::b
WEB_2_SERVICE_PORT=80
WEB_2_SERVICE_PORT_HTTP_ALT=80
WEB_2_SERVICE_PORT_QUIC=80
WEB_2_PORT=tcp://[fd00:10:96::b]:80
WEB_2_PORT_80_TCP=tcp://[fd00:10:96::b]:80
WEB_2_PORT_80_TCP_PROTO=tcp
WEB_2_PORT_80_TCP_PORT=80
WEB_2_PORT_80_TCP_ADDR=fd00:10:96::b
WEB_2_PORT_80_UDP=udp://[fd00:10:96::b]:80
WEB_2_PORT_80_UDP_PROTO=udp
WEB_2_PORT_80_UDP_PORT=80
WEB_2_PORT_80_UDP_ADDR=fd00:10:96::b
"""


def test_text_that_is_no_name_is_no_part_of_a_variable() -> None:
    ports = [api.ServicePort(80, "a=1\nPATH"), api.ServicePort(81, "b", "tcp\nPATH=/"), api.ServicePort(82)]

    found = environment({NamespacedName("shop", "odd"): KnownService(ports, ServiceNames(("10.96.0.9",)))}, "shop")

    assert "".join(found.values()).isprintable()
    assert [name for name in found if not name.startswith("ODD_PORT_82_")] == [
        "ODD_SERVICE_HOST", "ODD_SERVICE_PORT", "ODD_PORT",
    ]  # fmt: skip


@pytest.mark.parametrize(("namespace", "expected"), [("shop", OF_API + OF_WEB), ("default", OF_API), ("empty", OF_API)])
def test_a_pod_has_the_variables_of_its_namespace_and_of_the_api(namespace: str, expected: str) -> None:
    found = environment(SERVICES, namespace)

    assert "".join(f"{name}={value}\n" for name, value in found.items()) == expected


def test_a_service_of_the_namespace_comes_before_the_api_of_the_same_name() -> None:
    found = environment({**SERVICES, NamespacedName("shop", "kubernetes"): WEB}, "shop")

    assert found["KUBERNETES_SERVICE_HOST"] == "fd00:10:96::b"


def test_names_in_the_hosts_file_are_short_in_their_own_namespace() -> None:
    assert list(hosts_lines(SERVICES, "shop", "cluster.local")) == [
        "10.96.0.1 kubernetes.default.svc.cluster.local kubernetes.default.svc kubernetes.default",
        "10.244.0.2 db.shop.svc.cluster.local db.shop.svc db.shop db db-0.db.shop.svc.cluster.local",
        "fd00::3 db.shop.svc.cluster.local db.shop.svc db.shop db db-1.db.shop.svc.cluster.local",
        "# mail.shop.svc.cluster.local is mail.example.com",
        "fd00:10:96::b web-2.shop.svc.cluster.local web-2.shop.svc web-2.shop web-2",
        "10.96.0.11 web-2.shop.svc.cluster.local web-2.shop.svc web-2.shop web-2",
    ]
