"""Decoding of API objects into model values, and the problems that it reports."""

from __future__ import annotations

from typing import Any

import pytest

from tests.control.given import endpoint_slice, endpoints, named, node, pod, service
from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.service import Balance, ConnectionPolicy, ServicePort, SourceIP
from userspace_proxy.model.topology import Node

TCP_PORT = ("", "TCP")


def refusal(given: api.Service) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        decode.check_service(given)
    return caught.value


def ports_of(given: api.Service) -> list[ServicePort]:
    decode.check_service(given)
    found, _ = decode.service_ports(named("web"), given, decode.Allocation(("10.96.0.1",)))
    return list(found.values())


# ---- which Services count (S1, S2)


@pytest.mark.parametrize(
    "spec",
    [
        {"clusterIP": "None"},
        {"clusterIPs": ["None"]},
        {"clusterIP": "None", "clusterIPs": ["None"]},
        {"type": "ExternalName", "externalName": "example.org"},
        {"type": "ExternalName", "clusterIP": "10.96.0.1"},
        {"clusterIP": "None", "ports": None},
        {"type": "ExternalName", "ports": []},
    ],
)
def test_headless_and_external_name_services_are_skipped_without_a_problem(spec: dict[str, Any]) -> None:
    given = service(**spec)

    decode.check_service(given)
    assert not decode.is_proxied(given)


@pytest.mark.parametrize("value", ["", "other-proxy"])
def test_a_service_for_another_proxy_is_left_to_it(value: str) -> None:
    assert not decode.is_proxied(service(labels={"service.kubernetes.io/service-proxy-name": value}))


def test_a_named_proxy_serves_only_the_services_that_name_it() -> None:
    named = [service(labels={"service.kubernetes.io/service-proxy-name": name}) for name in ("mine", "other", "")]

    assert [decode.is_proxied(given, "mine") for given in [*named, service()]] == [True, False, False, False]


@pytest.mark.parametrize(
    ("plain", "eligible"),
    [
        ({"metadata": {"name": "n"}}, True),
        ({"metadata": {"name": "n"}, "spec": {"taints": None}}, True),
        ({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "node.kubernetes.io/unreachable"}]}}, True),
        ({"metadata": {"name": "n"}, "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler"}]}}, False),
        ({"metadata": {"name": "n", "deletionTimestamp": "2026-01-01T00:00:00Z"}}, False),
    ],
)
def test_a_node_that_is_about_to_go_is_not_eligible(plain: dict[str, Any], eligible: bool) -> None:
    given = api.convert("Node", plain)

    assert isinstance(given, api.Node)
    assert decode.is_eligible(given) is eligible


def test_an_unknown_node_is_not_eligible() -> None:
    assert not decode.is_eligible(None)


@pytest.mark.parametrize("cluster_ip", [None, "", "10.96.0.1", "fd00::1"])
def test_a_service_with_or_without_a_cluster_ip_is_served(cluster_ip: str | None) -> None:
    given = service(clusterIP=cluster_ip)

    decode.check_service(given)
    assert decode.is_proxied(given)


# ---- what is refused, and with which words


@pytest.mark.parametrize(
    ("given", "field", "words"),
    [
        (service("Web"), "metadata.name", "such as 'web'"),
        (service("a" * 64), "metadata.name", "63 at most"),
        (service("-web"), "metadata.name", "such as 'web'"),
        (service("web\n"), "metadata.name", "not a valid name"),
        (service("wéb"), "metadata.name", "not a valid name"),
        (service(namespace='a" } flush'), "metadata.namespace", "not a valid name"),
        (service(type="Clusterip"), "spec.type", "ClusterIP"),
        (service(ports=[]), "spec", "no ports"),
        (service(ports=None), "spec", "no ports"),
        (service(ports=[{"port": 0}]), "spec.ports[0].port", "1 to 65535"),
        (service(ports=[{"port": 65_536}]), "spec.ports[0].port", "65536 is not a port"),
        (service(ports=[{"port": 80, "targetPort": 70_000}]), "spec.ports[0].targetPort", "70000"),
        (service(ports=[{"port": 80, "targetPort": "70000"}]), "spec.ports[0].targetPort", "70000"),
        (service(ports=[{"port": 80, "targetPort": "0"}]), "spec.ports[0].targetPort", "0 is not a port"),
        (service(ports=[{"port": 80, "targetPort": -1}]), "spec.ports[0].targetPort", "-1"),
        (service(ports=[{"port": 80, "nodePort": 99_999}]), "spec.ports[0].nodePort", "99999"),
        (service(ports=[{"port": 80, "protocol": "tcp"}]), "spec.ports[0].protocol", "write TCP or UDP"),
        (service(ports=[{"port": 80}, {"port": 81, "name": "b"}]), "spec.ports[0]", "must name each"),
        (service(ports=[{"port": 80, "name": "HTTP"}]), "spec.ports[0].name", "such as 'http'"),
        (
            service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "a"}]),
            "spec.ports[1].name",
            "already that of ports[0]",
        ),
        (
            service(ports=[{"port": 80, "name": "a"}, {"port": 80, "name": "b"}]),
            "spec.ports[1].port",
            "TCP port 80 is already ports[0]",
        ),
        (
            service(
                ports=[{"port": 80, "name": "a", "nodePort": 30_000}, {"port": 81, "name": "b", "nodePort": 30_000}]
            ),
            "spec.ports[1].nodePort",
            "already that of ports[0]",
        ),
        (service(sessionAffinity="clientip"), "spec.sessionAffinity", "ClientIP or None"),
        (
            service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 0}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "1 to 86400",
        ),
        (
            service(sessionAffinity="ClientIP", sessionAffinityConfig={"clientIP": {"timeoutSeconds": 86_401}}),
            "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            "86401 s",
        ),
        (service(clusterIP="none"), "spec.clusterIP", "a capital N"),
        (service(clusterIP="10.96.0.256"), "spec.clusterIP", "no IP address"),
        (service(clusterIP="10.96.0.1/32"), "spec.clusterIP", "no IP address"),
        (service(clusterIPs=["10.96.0.1", "x"]), "spec.clusterIPs[1]", "'x'"),
        (service(clusterIPs=["10.96.0.1", "10.96.0.1"]), "spec.clusterIPs[1]", "second one of its family"),
        (service(clusterIPs=["fd00::1", "fd00::2"]), "spec.clusterIPs[1]", "second one of its family"),
        (service(clusterIP="10.96.0.1", clusterIPs=["10.96.0.2"]), "spec.clusterIP", "not the first"),
        (service(externalIPs=["1.2.3.4", "nowhere"]), "spec.externalIPs[1]", "'nowhere'"),
        (service(externalIPs=["fe80::1%eth0"]), "spec.externalIPs[0]", "zone"),
        (service(clusterIP="224.0.0.1"), "spec.clusterIP", "a multicast address"),
        (service(clusterIP="239.255.255.255"), "spec.clusterIP", "a multicast address"),
        (service(clusterIP="0.0.0.0"), "spec.clusterIP", "an unspecified address"),
        (service(clusterIP="255.255.255.255"), "spec.clusterIP", "a broadcast address"),
        (service(clusterIP="127.0.0.1"), "spec.clusterIP", "a loopback address"),
        (service(clusterIP="169.254.20.10"), "spec.clusterIP", "a link-local address"),
        (service(clusterIP="::ffff:127.0.0.1"), "spec.clusterIP", "a loopback address"),
        (service(clusterIPs=["10.96.0.1", "::"]), "spec.clusterIPs[1]", "an unspecified address"),
        (service(clusterIP="::1"), "spec.clusterIP", "a loopback address"),
        (service(clusterIP="FF02::1"), "spec.clusterIP", "a multicast address"),
        (service(clusterIP="fe80::1"), "spec.clusterIP", "a link-local address"),
        (service(externalIPs=["0127.0.0.9"]), "spec.externalIPs[0]", "a loopback address"),
        (service(externalIPs=["febf::1"]), "spec.externalIPs[0]", "a link-local address"),
        (service(clusterIP="fe80::1%x } ; flush ruleset"), "spec.clusterIP", "zone"),
        (service(internalTrafficPolicy="local"), "spec.internalTrafficPolicy", "Cluster or Local"),
        (service(externalTrafficPolicy="PreferLocal"), "spec.externalTrafficPolicy", "Cluster or Local"),
        (service(loadBalancerSourceRanges=["192.0.2.0/33"]), "spec.loadBalancerSourceRanges[0]", "no range"),
        (service(loadBalancerSourceRanges=["", "192.0.2.1"]), "spec.loadBalancerSourceRanges[1]", "192.0.2.1/32"),
        (service(loadBalancerSourceRanges=["fd00::%1\n-A X\n#/64"]), "spec.loadBalancerSourceRanges[0]", "has a zone"),
        (service(loadBalancerSourceRanges=["2001:db8::1"]), "spec.loadBalancerSourceRanges[0]", "2001:db8::1/128"),
        (service(healthCheckNodePort=70_000), "spec.healthCheckNodePort", "1 to 65535"),
        (
            service(healthCheckNodePort=30_080, ports=[{"port": 80, "nodePort": 30_080}]),
            "spec.healthCheckNodePort",
            "already the node port of ports[0]",
        ),
        (service(ipFamilies=["IPv5"]), "spec.ipFamilies[0]", "IPv4 or IPv6"),
        (service(clusterIP="10.96.0.1", ipFamilies=["IPv6"]), "spec.ipFamilies[0]", "write IPv4"),
    ],
)
def test_an_invalid_value_is_refused_with_its_field_and_a_fix(given: api.Service, field: str, words: str) -> None:
    error = refusal(given)

    assert error.field == field
    assert words in str(error)
    assert error.fix


def test_a_service_without_a_spec_is_refused() -> None:
    assert "no spec" in str(refusal(api.Service(api.ObjectMeta(name="web"))))


@pytest.mark.parametrize("name", ["a", "0", "a-b", "a" * 63, "9lives"])
def test_every_legal_name_is_taken(name: str) -> None:
    decode.check_service(service(name, ports=[{"port": 80, "name": name}]))


def test_one_number_and_one_node_port_may_serve_tcp_and_udp() -> None:
    found = ports_of(
        service(
            type="NodePort",
            ports=[
                {"port": 53, "name": "tcp", "nodePort": 30_053},
                {"port": 53, "name": "udp", "protocol": "UDP", "nodePort": 30_053},
            ],
        )
    )

    assert [(p.name.protocol, p.port, p.node_port) for p in found] == [("TCP", 53, 30_053), ("UDP", 53, 30_053)]


# ---- addresses


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        ("10.96.0.10", "10.96.0.10"),
        (" 10.96.0.10 ", "10.96.0.10"),
        ("010.096.000.001", "10.96.0.1"),
        ("0.0.0.0", "0.0.0.0"),
        ("FD00:0:0::0001", "fd00::1"),
        ("fd00::1", "fd00::1"),
        ("::ffff:10.96.0.66", "10.96.0.66"),
        ("::FFFF:0a60:42", "10.96.0.66"),
    ],
)
def test_an_address_has_one_form_however_it_is_written(written: str, canonical: str) -> None:
    assert decode.canonical_ip(written) == canonical


@pytest.mark.parametrize("written", ["", "10..0.1", "10.96.0.", ".10.96.0", "10.96.0", "::g", "1.2.3.4.5", "None"])
def test_a_text_that_is_no_address_is_rejected(written: str) -> None:
    with pytest.raises(ConfigError, match="no IP address"):
        decode.canonical_ip(written)


@pytest.mark.parametrize(
    "ip", ["240.0.0.1", "0.0.0.1", "255.255.255.254", "12.7.0.1", "223.0.0.1", "22.4.0.1", "ff::1", "fec0::1", "::2"]
)
def test_an_address_similar_to_a_special_one_is_accepted(ip: str) -> None:
    decode.check_service(service(clusterIP=ip, externalIPs=[ip]))
    assert not list(decode.backend_ip_errors(ip, "ip"))


NO_BACKENDS = ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "169.254.0.1", "fe80::1", "255.255.255.255", "::ffff:0.0.0.0"]


@pytest.mark.parametrize("ip", NO_BACKENDS)
def test_an_address_that_no_backend_can_have_is_skipped_and_named_by_check(ip: str) -> None:
    family = "IPv6" if ":" in ip else "IPv4"
    older = endpoints({"addresses": [{"ip": ip}], "ports": [{"port": 80}]})

    assert not any(decode.from_slices([endpoint_slice(ip, address_type=family)]).values())
    assert not any(decode.from_endpoints(older).values())
    assert decode.pod_ips(pod(ip=ip)) == []
    (error,) = decode.backend_ip_errors(ip, "ip")
    assert "which no backend can have" in error.reason
    assert error.fix


@pytest.mark.parametrize("ip", ["127.0.0.1", "::1"])
def test_a_backend_may_be_on_this_host(ip: str) -> None:
    assert decode.pod_ips(pod(ip=ip)) == [ip]
    assert not list(decode.backend_ip_errors(ip, "ip"))


# ---- ports of a Service


def test_a_service_port_has_every_field_of_the_manifest() -> None:
    found = ports_of(
        service(
            type="LoadBalancer",
            ports=[{"port": 80, "name": "http", "nodePort": 30_080}],
            externalIPs=["001.2.3.4"],
            sessionAffinity="ClientIP",
            sessionAffinityConfig={"clientIP": {"timeoutSeconds": 60}},
        )
    )

    assert found == [
        ServicePort(
            name=ServicePortName(named("web"), "http", L4Protocol.TCP),
            port=80,
            cluster_ips=("10.96.0.1",),
            node_port=30_080,
            external_ips=("1.2.3.4",),
            affinity_timeout_s=60,
        )
    ]


@pytest.mark.parametrize(
    ("spec", "timeout_s"),
    [
        ({}, None),
        ({"sessionAffinity": "None"}, None),
        ({"sessionAffinity": "None", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 5}}}, None),
        ({"sessionAffinity": "ClientIP"}, 10_800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": None}}, 10_800),
        ({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86_400}}}, 86_400),
    ],
)
def test_affinity_lasts_three_hours_by_default(spec: dict[str, Any], timeout_s: int | None) -> None:
    assert [port.affinity_timeout_s for port in ports_of(service(**spec))] == [timeout_s]


@pytest.mark.parametrize(("kind", "node_port"), [(None, 0), ("ClusterIP", 0), ("NodePort", 30_080)])
def test_a_node_port_counts_only_for_types_that_have_one(kind: str | None, node_port: int) -> None:
    """S8: a type changed back to ClusterIP frees the port, though the manifest may still name it."""
    found = ports_of(service(type=kind, ports=[{"port": 80, "nodePort": 30_080}]))

    assert [port.node_port for port in found] == [node_port]


def test_an_sctp_port_is_named_and_the_other_ports_are_served() -> None:
    given = service(ports=[{"port": 1, "name": "s", "protocol": "SCTP"}, {"port": 2, "name": "t"}])
    decode.check_service(given)

    found, problems = decode.service_ports(named("web"), given, decode.Allocation(("10.96.0.1",)))

    assert {index: port.port for index, port in found.items()} == {1: 2}
    assert [problem.field for problem in problems] == ["spec.ports[0].protocol"]


# ---- policies, load balancers, source addresses (S5, S8, P3 to P7, H1)

VIP = "203.0.113.1"


def port_of(*cluster_ips: str, source_ip: SourceIP = SourceIP.NODE, **given: Any) -> tuple[ServicePort, list[str]]:
    """Return the first port of a Service, and the fields of its errors."""
    made = service(**given)
    decode.check_service(made)
    found, problems = decode.service_ports(
        named("web"), made, decode.Allocation(cluster_ips or ("10.96.0.1",)), source_ip
    )
    assert all(problem.fix for problem in problems)
    return found[0], [problem.field for problem in problems]


@pytest.mark.parametrize(
    ("spec", "internal_local", "external_local"),
    [
        ({}, False, False),
        ({"internalTrafficPolicy": "Cluster", "externalTrafficPolicy": "Cluster"}, False, False),
        ({"internalTrafficPolicy": "Local"}, True, False),
        ({"externalTrafficPolicy": "Local"}, False, True),
        ({"internalTrafficPolicy": "", "externalTrafficPolicy": None}, False, False),
    ],
)
def test_a_traffic_policy_is_local_only_if_stated(
    spec: dict[str, Any], internal_local: bool, external_local: bool
) -> None:
    found, _ = port_of(**spec)

    assert (found.internal_local, found.external_local) == (internal_local, external_local)


@pytest.mark.parametrize(
    ("ingress", "ips"),
    [
        (None, ()),
        ([], ()),
        ([{"ip": VIP}], (VIP,)),
        ([{"ip": VIP, "ipMode": "VIP"}, {"ip": "203.0.113.02", "ipMode": None}], (VIP, "203.0.113.2")),
        ([{"ip": VIP, "ipMode": "Proxy"}], ()),
        ([{"hostname": "lb.example.org"}, {"ip": VIP}], (VIP,)),
        ([{"ip": VIP}, {"ip": VIP}], (VIP,)),
        ([{"ip": " "}, {"ip": None}], ()),
        ([{"ip": "2001:db8::1"}], ()),
    ],
)
def test_ingress_ips_are_served_unless_their_mode_is_proxy(
    ingress: list[dict[str, Any]] | None, ips: tuple[str, ...]
) -> None:
    """P3, S5, P7."""
    found, problems = port_of(type="LoadBalancer", ingress=ingress)

    assert (found.load_balancer_ips, problems) == (ips, [])


def test_an_ingress_ip_that_is_none_is_named_and_the_others_count() -> None:
    found, problems = port_of(type="LoadBalancer", ingress=[{"ip": "here"}, {"ip": "127.0.0.1"}, {"ip": VIP}])

    assert found.load_balancer_ips == (VIP,)
    assert problems == ["status.loadBalancer.ingress[0].ip", "status.loadBalancer.ingress[1].ip"]


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_a_service_that_is_no_load_balancer_any_more_has_none_of_its_ips(kind: str) -> None:
    """S8."""
    assert port_of(type=kind, ingress=[{"ip": VIP}])[0].load_balancer_ips == ()


@pytest.mark.parametrize(
    ("written", "ranges"),
    [
        (None, ()),
        ([], ()),
        ([" 192.0.2.0/24 ", ""], ("192.0.2.0/24",)),
        (["192.000.2.7/24"], ("192.0.2.0/24",)),
        (["192.0.2.0/24", "192.0.2.0/24"], ("192.0.2.0/24",)),
        (["192.0.2.0/24", "0.0.0.0/0"], ()),
        (["192.0.2.0/24", "10.0.0.1/0"], ()),
        (["192.0.2.0/24", "::/0"], ("192.0.2.0/24",)),
    ],
)
def test_source_ranges_are_canonical_and_none_where_all_may_come(
    written: list[str] | None, ranges: tuple[str, ...]
) -> None:
    """P4, S5."""
    found, problems = port_of(type="LoadBalancer", loadBalancerSourceRanges=written)
    assert (found.source_ranges, problems) == (ranges, [])


def test_both_families_have_source_ranges_of_their_own() -> None:
    ranges = ["0.0.0.0/0", "2001:db8::/32", "192.0.2.0/24"]
    found, _ = port_of("10.96.0.1", "fd00::1", type="LoadBalancer", loadBalancerSourceRanges=ranges)

    assert found.source_ranges == ("2001:db8::/32",)


@pytest.mark.parametrize("written", ["2001:db8::/32", "::/0", "::ffff:10.0.0.0/104", "::ffff:0:0/96"])
@pytest.mark.parametrize("ingress", [[], [{"ip": VIP}]])
def test_source_ranges_that_contain_no_client_admit_none_and_are_reported(
    written: str, ingress: list[dict[str, str]]
) -> None:
    found, problems = port_of(type="LoadBalancer", loadBalancerSourceRanges=[written], ingress=ingress)

    assert found.source_ranges == ("0.0.0.0/32",)
    assert problems[-1] == "spec.loadBalancerSourceRanges"


def test_the_fix_for_a_mapped_range_is_its_ipv4_range() -> None:
    ranges = ["192.0.2.0/24", "::ffff:10.0.0.0/104"]
    given = service(type="LoadBalancer", loadBalancerSourceRanges=ranges)

    _, problems = decode.service_ports(named("web"), given, decode.Allocation(("10.96.0.1",)))

    assert [(problem.field, problem.fix) for problem in problems] == [
        ("spec.loadBalancerSourceRanges[1]", "write 10.0.0.0/8")
    ]


def test_a_family_of_load_balancer_ips_without_source_range_admits_no_client() -> None:
    both: dict[str, Any] = {"type": "LoadBalancer", "loadBalancerSourceRanges": ["192.0.2.0/24"]}

    found, problems = port_of("10.96.0.1", "fd00::1", **both, ingress=[{"ip": VIP}, {"ip": "2001:db8::7"}])
    assert found.source_ranges == ("192.0.2.0/24", "::/128")
    assert problems == ["spec.loadBalancerSourceRanges"]

    _, problems = port_of("10.96.0.1", "fd00::1", **both, ingress=[{"ip": VIP}])
    assert problems == [], "there is nothing to dial in the other family"


def test_addresses_of_a_family_that_a_service_lacks_are_skipped() -> None:
    """S5."""
    given: dict[str, Any] = {"externalIPs": ["1.2.3.4", " ", "2001:db8::4"]}

    assert port_of("fd00::1", **given)[0].external_ips == ("2001:db8::4",)
    assert port_of("10.96.0.1", "fd00::1", **given)[0].external_ips == ("1.2.3.4", "2001:db8::4")


@pytest.mark.parametrize(
    ("spec", "ips"),
    [
        ({"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}, ["10.96.0.1", "fd00::1"]),
        ({"clusterIPs": ["fd00::1", "10.96.0.1"], "ipFamilies": ["IPv6", "IPv4"]}, ["fd00::1", "10.96.0.1"]),
        ({"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4"]}, ["10.96.0.1"]),
        ({"clusterIPs": ["10.96.0.1", "fd00::1"]}, ["10.96.0.1", "fd00::1"]),
        ({"clusterIP": "10.96.0.1", "ipFamilies": []}, ["10.96.0.1"]),
        ({"clusterIP": "010.96.0.01", "clusterIPs": None}, ["10.96.0.1"]),
        ({"clusterIP": ""}, []),
    ],
)
def test_a_cluster_ip_counts_where_there_is_a_family_for_it(spec: dict[str, Any], ips: list[str]) -> None:
    """S5."""
    given = service(**spec)
    decode.check_service(given)

    assert [ip for _, ip in decode.given_cluster_ips(given)] == ips


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}, 31_000),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Cluster"}, 0),
        ({"type": "LoadBalancer"}, 0),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, 0),
        ({"type": "ClusterIP", "externalTrafficPolicy": "Local"}, 0),
    ],
)
def test_only_load_balancer_services_of_policy_local_have_a_health_check_port(
    spec: dict[str, Any], number: int
) -> None:
    """H1."""
    assert port_of(**spec, healthCheckNodePort=31_000)[0].health_check_node_port == number


def test_a_service_gets_its_allocated_values_for_fields_that_it_does_not_state() -> None:
    given = service(
        type="LoadBalancer",
        externalTrafficPolicy="Local",
        ports=[{"port": 53, "name": "a"}, {"port": 53, "name": "b", "protocol": "UDP"}],
    )
    allocation = decode.Allocation(("10.96.0.1",), {("a", "TCP"): 30_100, ("b", "UDP"): 30_200}, (VIP,), 30_300)

    found, _ = decode.service_ports(named("web"), given, allocation)

    assert [p.node_port for p in found.values()] == [30_100, 30_200]
    assert {(p.load_balancer_ips, p.health_check_node_port) for p in found.values()} == {((VIP,), 30_300)}


def annotated(text: str, **spec: Any) -> dict[str, Any]:
    return {"annotations": {"userspace-proxy/source-ip": text}, **spec}


UDP = [{"port": 53, "protocol": "UDP"}]


@pytest.mark.parametrize("default", [SourceIP.NODE, SourceIP.TRANSPARENT])
@pytest.mark.parametrize("written", SourceIP)
def test_the_source_ip_annotation_selects_the_address_that_endpoints_see(written: SourceIP, default: SourceIP) -> None:
    assert port_of(source_ip=default, **annotated(written)) == (port_of(source_ip=written)[0], [])
    assert port_of(source_ip=default)[0].source_ip is default


@pytest.mark.parametrize(
    "given", [annotated("Transparent"), annotated(""), annotated("proxy-protocol-v1", ports=UDP)], ids=str
)
def test_an_annotation_that_cannot_be_followed_is_named_and_the_nodes_default_applies(given: dict[str, Any]) -> None:
    found, problems = port_of(source_ip=SourceIP.TRANSPARENT, **given)

    assert found.source_ip is SourceIP.TRANSPARENT
    assert problems == ["metadata.annotations.userspace-proxy/source-ip"]


def test_only_the_udp_port_of_a_service_goes_without_proxy_protocol_v1() -> None:
    ports = [{"port": 53, "name": "udp", "protocol": "UDP"}, {"port": 53, "name": "tcp"}]
    given = service(**annotated("proxy-protocol-v1", ports=ports))

    found, problems = decode.service_ports(named("web"), given, decode.Allocation(("10.96.0.1",)))

    assert [port.source_ip for port in found.values()] == [SourceIP.NODE, SourceIP.PROXY_PROTOCOL_V1]
    assert len(problems) == 1


def test_annotations_of_kernel_modes_are_read_or_refused_by_name() -> None:
    def read(scheduler: str, weights: str) -> tuple[str, Any, list[str]]:
        stated = {"userspace-proxy/ipvs-scheduler": scheduler, "userspace-proxy/weights": weights}
        found, problems = port_of(annotations=stated)
        return found.ipvs_scheduler, found.weights, problems

    weights = (("10.244.0.5", 3), ("fd00::1", 0))
    assert read("lc", " 10.244.0.5=3, fd00:0::1=0,") == ("lc", weights, [])
    for scheduler, written in (("fastest", "10.244.0.5"), ("", "10.244.0.5=101"), ("LC", "a=1"), ("rr2", "1.2.3.4=-1")):
        assert read(scheduler, written) == (
            *("", ()),
            ["metadata.annotations.userspace-proxy/ipvs-scheduler", "metadata.annotations.userspace-proxy/weights"],
        )


def test_balancing_is_read_or_refused_by_name() -> None:
    def read(balance: str, slow_start: str) -> tuple[Balance | None, float, list[str]]:
        stated = {"userspace-proxy/balance": balance, "userspace-proxy/slow-start": slow_start}
        found, problems = port_of(annotations=stated)
        return found.balance, found.slow_start_s, problems

    for word in Balance:
        assert read(word, "1m30s") == (word, 90.0, [])
    for balance, slow_start in (("leastconn", "30"), ("", ""), ("Random", "-1s")):
        assert read(balance, slow_start) == (
            *(None, 0.0),
            ["metadata.annotations.userspace-proxy/balance", "metadata.annotations.userspace-proxy/slow-start"],
        )


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("dns://web:8080", ("web", 8080)),
        ("dns://Web.default.svc.cluster.local.", ("web.default.svc.cluster.local", 0)),
        *((text, None) for text in ("web:8080", "dns://", "dns://web:0", "dns://web:65536", "dns://web/x", "dns://.")),
        *((text, None) for text in (f"dns://{'a' * 64}", "dns://" + ".".join(["a"] * 128), "dns://a..b", "http://web")),
    ],
)
def test_a_name_that_gives_endpoints_is_read_or_refused(text: str, target: tuple[str, int] | None) -> None:
    stated = {"userspace-proxy/endpoints-from": text}

    assert decode.dns_target(service(annotations=stated, selector={})) == target
    assert port_of(annotations=stated, selector={})[1] == (
        [] if target else ["metadata.annotations.userspace-proxy/endpoints-from"]
    )


def test_a_name_gives_no_endpoints_beside_a_selector() -> None:
    stated = {"userspace-proxy/endpoints-from": "dns://web:8080"}

    assert decode.dns_target(service(annotations=stated, selector={"app": "web"})) is None
    assert port_of(annotations=stated, selector={"app": "web"})[1] == [
        "metadata.annotations.userspace-proxy/endpoints-from"
    ]


@pytest.mark.parametrize(
    ("removal", "age", "wait", "policy"),
    [
        ("keep", "0", "0", ConnectionPolicy()),
        ("reset", "1h", "30s", ConnectionPolicy(0.0, 3600.0, None, 30.0)),
        ("drain=30s", "1h, force=5m", "1m30s", ConnectionPolicy(30.0, 3600.0, 300.0, 90.0)),
        ("drain = 500ms", " 90m ,force=0", "250ms", ConnectionPolicy(0.5, 5400.0, 0.0, 0.25)),
    ],
)
def test_a_connection_policy_is_read(removal: str, age: str, wait: str, policy: ConnectionPolicy) -> None:
    found, problems = port_of(annotations=_policy(removal, age, wait))

    assert (found.connections, problems) == (policy, [])


def _policy(removal: str, age: str, wait: str) -> dict[str, str]:
    stated = {"on-endpoint-removal": removal, "max-connection-age": age, "wait-for-endpoints": wait}
    return {f"userspace-proxy/{name}": text for name, text in stated.items()}


@pytest.mark.parametrize(
    ("removal", "age", "wait"),
    [
        ("", "", ""),
        ("drain", "1 hour", "soon"),
        ("drain=", "1h,", "-1s"),
        ("drain=10", "1h, 5m", "30"),
        ("force=5m", "force=5m", "9999999h"),
        ("reset=1s", "1h, force=5m, force=6m", "1e9s"),
    ],
)
def test_a_connection_policy_is_read_or_refused_by_name(removal: str, age: str, wait: str) -> None:
    found, problems = port_of(annotations=_policy(removal, age, wait))

    assert found.connections == ConnectionPolicy()
    assert problems == [f"metadata.annotations.{name}" for name in _policy(removal, age, wait)]


def test_a_connection_policy_is_of_tcp_alone() -> None:
    found, problems = port_of(annotations=_policy("reset", "1h", "30s"), ports=UDP)

    assert (found.connections, problems) == (ConnectionPolicy(), [])


# ---- Nodes

HERE = Node("here", addresses=("192.0.2.1",))


def test_a_node_gives_its_zone_its_addresses_and_its_pod_cidrs() -> None:
    given = node(
        "here",
        ("Hostname", "here.example.org"),
        ("ExternalIP", "203.0.113.9"),
        ("InternalIP", "010.0.0.1"),
        ("InternalIP", "FD00::1"),
        ("InternalIP", "somewhere"),
        ("InternalIP", "10.0.0.1"),
        zone="zone-a",
        pod_cidrs=["10.244.1.0/24", "fd00:1::/64", "nonsense", "fd00:2::%eth0/64"],
    )

    assert decode.node_of(given, HERE) == Node(
        "here", "zone-a", ("10.0.0.1", "fd00::1", "203.0.113.9"), ("10.244.1.0/24", "fd00:1::/64")
    )


@pytest.mark.parametrize("given", [None, api.Node(api.ObjectMeta(name="here")), node("here")])
def test_without_a_node_object_the_facts_of_the_host_are_used(given: api.Node | None) -> None:
    assert decode.node_of(given, HERE) == HERE


def test_a_node_of_one_family_may_state_its_range_in_the_older_field() -> None:
    given = api.convert("Node", {"metadata": {"name": "here"}, "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": None}})

    assert isinstance(given, api.Node)
    assert decode.node_of(given, HERE).pod_cidrs == ("10.244.1.0/24",)


# ---- EndpointSlices (S3, S4, S6, C1)


def test_a_slice_belongs_to_the_service_its_label_names_in_its_namespace() -> None:
    assert decode.service_of(endpoint_slice(of="web"), "default") == named("web")


@pytest.mark.parametrize("piece", [endpoint_slice(of=None), endpoint_slice(of="")])
def test_a_slice_without_that_label_belongs_to_none(piece: api.EndpointSlice) -> None:
    assert decode.service_of(piece, "default") is None


def test_a_slice_that_is_marked_headless_has_no_endpoints_for_a_proxy() -> None:
    assert not decode.from_slices([endpoint_slice("10.244.0.1", labels={"service.kubernetes.io/headless": ""})])


@pytest.mark.parametrize(
    ("conditions", "ready", "serving", "terminating"),
    [
        (None, True, True, False),
        ({}, True, True, False),
        ({"ready": None, "serving": None, "terminating": None}, True, True, False),
        ({"ready": False}, False, True, False),
        ({"ready": False, "serving": True, "terminating": True}, False, True, True),
        ({"ready": False, "serving": False, "terminating": True}, False, False, True),
    ],
)
def test_missing_conditions_of_a_slice_count_as_ready(
    conditions: dict[str, bool] | None, ready: bool, serving: bool, terminating: bool
) -> None:
    piece = endpoint_slice({"addresses": ["10.0.0.1"], "conditions": conditions, "nodeName": "n"})

    assert decode.from_slices([piece])[TCP_PORT] == [Endpoint("10.0.0.1", 8080, ready, serving, terminating, "n")]


@pytest.mark.parametrize(
    ("hints", "zones", "nodes"),
    [
        (None, set(), set()),
        ({"forZones": None, "forNodes": None}, set(), set()),
        ({"forZones": [{"name": "a"}, {"name": "b"}]}, {"a", "b"}, set()),
        ({"forNodes": [{"name": "n"}, {"name": None}]}, set(), {"n"}),
    ],
)
def test_endpoints_are_used_by_the_zones_and_nodes_that_their_hints_name(
    hints: dict[str, Any] | None, zones: set[str], nodes: set[str]
) -> None:
    """C6."""
    piece = endpoint_slice({"addresses": ["10.0.0.1"], "hints": hints})

    (found,) = decode.from_slices([piece])[TCP_PORT]

    assert (set(found.zone_hints), set(found.node_hints)) == (zones, nodes)


def test_ports_are_matched_by_name_and_protocol() -> None:
    ports: list[dict[str, Any]] = [
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns", "port": 54},
        {"port": 80},
    ]

    found = decode.from_slices([endpoint_slice("10.0.0.1", ports=ports)])

    assert {key: [e.port for e in known] for key, known in found.items()} == {
        ("dns", "UDP"): [53],
        ("dns", "TCP"): [54],
        ("", "TCP"): [80],
    }


def test_the_first_address_of_an_endpoint_counts() -> None:
    piece = endpoint_slice({"addresses": ["010.0.0.1", "10.0.0.2"]})

    assert [e.ip for e in decode.from_slices([piece])[TCP_PORT]] == ["10.0.0.1"]


@pytest.mark.parametrize(
    "piece",
    [
        endpoint_slice("10.0.0.1", address_type="FQDN"),
        endpoint_slice("10.0.0.1", ports=[{"port": None}]),
        endpoint_slice("10.0.0.1", ports=[{"port": 0}]),
        endpoint_slice("10.0.0.1", ports=[{"port": 70_000}]),
        endpoint_slice("10.0.0.1", ports=[{"port": -1}]),
        endpoint_slice({"addresses": []}),
        endpoint_slice({"addresses": None}),
        endpoint_slice("nonsense"),
        endpoint_slice("fe80::1%eth0"),
        api.EndpointSlice(api.ObjectMeta(name="x")),
    ],
)
def test_incomplete_entries_of_a_slice_are_skipped(piece: api.EndpointSlice) -> None:
    assert not any(decode.from_slices([piece]).values())


def test_an_incomplete_object_harms_no_other() -> None:
    piece = endpoint_slice("nonsense", {"addresses": None}, "10.0.0.2", ports=[{"port": 0}, {"port": 8080}])

    assert [str(e) for e in decode.from_slices([piece])[TCP_PORT]] == ["10.0.0.2:8080"]


# ---- Endpoints, the older form


def test_endpoints_in_the_list_of_not_ready_addresses_are_not_ready() -> None:
    given = endpoints(
        {
            "addresses": [{"ip": "10.0.0.1", "nodeName": "n"}],
            "notReadyAddresses": [{"ip": "10.0.0.2"}],
            "ports": [{"port": 80}],
        }
    )

    assert decode.from_endpoints(given)[TCP_PORT] == [
        Endpoint("10.0.0.1", 80, node_name="n"),
        Endpoint("10.0.0.2", 80, ready=False, serving=False),
    ]


def test_subsets_with_other_ports_are_added_up() -> None:
    given = endpoints(
        {"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 80}]},
        {"addresses": [{"ip": "10.0.0.2"}], "ports": [{"port": 81}]},
    )

    assert [str(e) for e in decode.from_endpoints(given)[TCP_PORT]] == ["10.0.0.1:80", "10.0.0.2:81"]


@pytest.mark.parametrize("port", [None, 0, -5, 65_536])
def test_endpoints_without_a_usable_port_are_skipped(port: int | None) -> None:
    given = endpoints(
        {"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": port}]}, {"addresses": None, "ports": None}
    )

    assert not any(decode.from_endpoints(given).values())


# ---- Pods


def made_of(*pods: api.Pod, **spec: Any) -> list[Endpoint]:
    return decode.from_pods(service(**spec), pods).get(TCP_PORT, [])


@pytest.mark.parametrize(
    ("given", "ready", "serving", "terminating"),
    [
        (pod(ready=True), True, True, False),
        (pod(ready=None), True, True, False),
        (pod(ready=False), False, False, False),
        (pod(ready=True, ending=True), False, True, True),
        (pod(ready=False, ending=True), False, False, True),
        (pod(conditions=[]), False, False, False),
        (pod(conditions=[{"type": "PodScheduled", "status": "True"}]), False, False, False),
        (pod(conditions=[{"type": "Ready", "status": "Unknown"}]), False, False, False),
    ],
)
def test_a_pod_is_ready_by_its_condition_unless_it_is_terminating(
    given: api.Pod, ready: bool, serving: bool, terminating: bool
) -> None:
    assert made_of(given) == [Endpoint("10.244.0.1", 80, ready, serving, terminating, "node1")]


@pytest.mark.parametrize("given", [pod(ready=False), pod(ready=True, ending=True), pod(ready=False, ending=True)])
def test_a_service_that_publishes_them_takes_unready_and_ending_pods_too(given: api.Pod) -> None:
    assert [e.ready for e in made_of(given, publishNotReadyAddresses=True)] == [True]


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_has_ended_is_no_endpoint_whatever_is_published(phase: str) -> None:
    assert made_of(pod(phase=phase), publishNotReadyAddresses=True) == []


@pytest.mark.parametrize("given", [pod(ip=None), pod(ip=""), pod(ip="junk"), api.Pod(api.ObjectMeta(name="p"))])
def test_a_pod_without_an_address_is_no_endpoint(given: api.Pod) -> None:
    assert made_of(given) == []


def test_a_dual_stack_pod_is_an_endpoint_of_each_family() -> None:
    given = pod(podIPs=[{"ip": "10.244.0.1"}, {"ip": "FD00::1"}, {"ip": None}])

    assert [e.ip for e in made_of(given)] == ["10.244.0.1", "fd00::1"]


@pytest.mark.parametrize(
    ("port", "number"),
    [
        ({"port": 80}, 80),
        ({"port": 80, "targetPort": 8080}, 8080),
        ({"port": 80, "targetPort": "8080"}, 8080),
        ({"port": 80, "targetPort": 0}, 80),
        ({"port": 80, "targetPort": ""}, 80),
    ],
)
def test_a_target_port_is_a_number_or_the_port_itself(port: dict[str, Any], number: int) -> None:
    assert [e.port for e in made_of(pod(), ports=[port])] == [number]


def test_a_named_target_port_is_looked_up_in_each_pod() -> None:
    old = pod("old", "10.0.0.1", ports=[{"name": "http", "containerPort": 8080}])
    new = pod("new", "10.0.0.2", ports=[{"name": "admin", "containerPort": 1}, {"name": "http", "containerPort": 9090}])
    lacking = pod("lacking", "10.0.0.3", ports=[{"name": "web", "containerPort": 80}])

    found = made_of(old, new, lacking, ports=[{"port": 80, "targetPort": "http"}])

    assert [str(e) for e in found] == ["10.0.0.1:8080", "10.0.0.2:9090"]


def test_a_named_target_port_matches_by_protocol_too() -> None:
    given = pod(ports=[{"name": "dns", "containerPort": 53, "protocol": "UDP"}, {"name": "dns", "containerPort": 5353}])
    web = service(ports=[{"port": 53, "targetPort": "dns", "protocol": "UDP", "name": "dns"}])

    assert [e.port for e in decode.from_pods(web, [given])["dns", "UDP"]] == [53]
    assert [e.port for e in made_of(given, ports=[{"port": 53, "targetPort": "dns"}])] == [5353]


def test_a_named_port_may_be_that_of_a_sidecar_but_not_of_a_finished_init_container() -> None:
    def with_init(policy: str | None) -> api.Pod:
        container = {"ports": [{"name": "http", "containerPort": 8080}], "restartPolicy": policy}
        plain = {
            "metadata": {"name": "p"},
            "spec": {"containers": None, "initContainers": [container]},
            "status": {"podIP": "10.0.0.1"},
        }
        made = api.convert("Pod", plain)
        assert isinstance(made, api.Pod)
        return made

    ports = [{"port": 80, "targetPort": "http"}]
    assert [e.port for e in made_of(with_init("Always"), ports=ports)] == [8080]
    assert made_of(with_init(None), ports=ports) == []


@pytest.mark.parametrize("name", ["²", "9" * 5_000, "http"])
def test_a_target_port_that_no_pod_has_gives_no_endpoint_and_no_trouble(name: str) -> None:
    web = service(ports=[{"port": 80, "targetPort": name}])
    decode.check_service(web)

    assert not any(decode.from_pods(web, [pod()]).values())


@pytest.mark.parametrize("number", [0, 70_000])
def test_a_container_port_that_is_no_port_gives_no_endpoint(number: int) -> None:
    given = pod(ports=[{"name": "http", "containerPort": number}])

    assert made_of(given, ports=[{"port": 80, "targetPort": "http"}]) == []


# ---- putting it together (S9)


def port_with(*cluster_ips: str) -> ServicePort:
    return decode.service_ports(named("web"), service(), decode.Allocation(cluster_ips))[0][0]


def test_one_address_in_several_slices_is_one_endpoint() -> None:
    pieces = [endpoint_slice("10.0.0.1", "10.0.0.2"), endpoint_slice("10.0.0.2", "10.0.0.3", name="web-2")]

    found = decode.endpoints_of(port_with("10.96.0.1"), [decode.from_slices(pieces)])

    assert [e.ip for e in found] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]


def test_slices_and_endpoints_of_one_service_are_added_up() -> None:
    older = endpoints({"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.9"}], "ports": [{"port": 8080}]})

    found = decode.endpoints_of(
        port_with("10.96.0.1"), [decode.from_slices([endpoint_slice("10.0.0.1")]), decode.from_endpoints(older)]
    )

    assert [e.ip for e in found] == ["10.0.0.1", "10.0.0.9"]


@pytest.mark.parametrize(
    ("cluster_ips", "used"),
    [
        (("10.96.0.1",), ["10.0.0.1"]),
        (("fd00::1",), ["fd00::a"]),
        (("10.96.0.1", "fd00::1"), ["10.0.0.1", "fd00::a"]),
    ],
)
def test_only_the_families_of_the_service_are_used(cluster_ips: tuple[str, ...], used: list[str]) -> None:
    """S5."""
    pieces = [endpoint_slice("10.0.0.1"), endpoint_slice("fd00::a", name="web-6", address_type="IPv6")]

    found = decode.endpoints_of(port_with(*cluster_ips), [decode.from_slices(pieces)])

    assert [e.ip for e in found] == used
