"""The DNS names of Services, computed from objects."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from typing import Any

import pytest

from tests.control.given import SYNCED, endpoint_slice, endpoints, named, pod, service
from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.control.allocations import ManifestAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.dns_names import DnsHost, NamedPort, ServiceNames
from userspace_proxy.model.names import NamespacedName

HTTP = NamedPort("http", "TCP", 80)
HEADLESS = {"clusterIP": "None", "ports": [{"name": "http", "port": 80}]}


def tracker() -> Tracker:
    return Tracker(ManifestAllocations([ipaddress.ip_network("10.96.0.0/16")]), has_names=True)


def names_after(*given: api.KubernetesObject, known: Tracker | None = None) -> Mapping[NamespacedName, ServiceNames]:
    """Return the DNS names after *given* are applied."""
    known = known or tracker()
    known.apply(
        [
            *(ObjectEvent(EventType.SET, type(each).__name__, named(each.metadata.name), each) for each in given),
            SYNCED,
        ]
    )
    return known.state().names


def hosts(names: ServiceNames) -> list[tuple[str, str]]:
    return [tuple(host) for group in names.groups for host in group.hosts]  # type: ignore[misc]


def headless(name: str = "web", **spec: Any) -> api.Service:
    return service(name, **{**HEADLESS, **spec})


def test_a_service_is_called_by_its_cluster_ip_and_its_named_ports() -> None:
    ports = [{"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]

    known = names_after(service("web", clusterIP="10.96.0.11", ports=ports), service("other"))

    assert known[named("web")] == ServiceNames(("10.96.0.11",), (HTTP, NamedPort("dns", "UDP", 53)))
    assert known[named("other")].cluster_ips[0].startswith("10.96."), "an allocated address has a name"
    assert known[named("other")].ports == (), "a port without a name has no record"


def test_a_service_of_sctp_ports_alone_is_called_by_its_cluster_ip() -> None:
    ports = [{"name": "sip", "port": 5060, "protocol": "SCTP"}]

    known = names_after(service("phone", clusterIP="10.96.0.12", ports=ports))

    assert known[named("phone")] == ServiceNames(("10.96.0.12",), (NamedPort("sip", "SCTP", 5060),))


def test_text_that_is_no_name_is_not_published() -> None:
    """The API refuses it; in a file it could add lines to the output of `names`."""
    target = service("a", type="ExternalName", externalName="x.example\n192.0.2.6 bank.example", ports=None)
    piece = endpoint_slice({"addresses": ["10.0.0.5"], "hostname": "h\n192.0.2.6 b"}, of="b")

    known = names_after(target, headless("b"), piece)

    assert named("a") not in known
    assert hosts(known[named("b")]) == [("10-0-0-5", "10.0.0.5")]


def test_an_external_name_service_is_called_after_its_target() -> None:
    known = names_after(service("db", type="ExternalName", externalName="db.example.com.", ports=None))

    assert known[named("db")] == ServiceNames(external_name="db.example.com")


def test_an_endpoint_without_a_hostname_is_called_by_its_address() -> None:
    first = {"addresses": ["10.244.0.1"], "hostname": "db-0"}
    piece = endpoint_slice(
        first,
        "10.244.0.2",
        ports=[{"name": "http", "port": 80}],
        labels={"service.kubernetes.io/headless": ""},
    )
    piece6 = endpoint_slice("fd00::2", name="web-2", address_type="IPv6", ports=[{"name": "http", "port": 80}])

    known = names_after(headless(), piece, piece6)[named("web")]

    assert hosts(known) == [("db-0", "10.244.0.1"), ("10-244-0-2", "10.244.0.2"), ("fd00--2", "fd00::2")]
    assert [group.ports for group in known.groups] == [(HTTP,)]


@pytest.mark.parametrize(("publishes", "expected"), [(False, ["a"]), (True, ["a", "b"])])
def test_endpoints_that_are_not_ready_have_names_if_the_service_publishes_them(
    publishes: bool, expected: list[str]
) -> None:
    web = headless(publishNotReadyAddresses=publishes)
    unready = {"addresses": ["10.244.0.2"], "hostname": "b", "conditions": {"ready": False}}
    piece = endpoint_slice({"addresses": ["10.244.0.1"], "hostname": "a"}, unready)
    older = endpoints(
        {
            "addresses": [{"ip": "10.244.0.1", "hostname": "a"}],
            "notReadyAddresses": [{"ip": "10.244.0.2", "hostname": "b"}],
        }
    )

    assert [name for name, _ in hosts(names_after(web, piece)[named("web")])] == expected
    assert [name for name, _ in hosts(names_after(web, older)[named("web")])] == expected


@pytest.mark.parametrize(
    ("publishes", "expected"), [(False, ["10.244.0.1"]), (True, ["10.244.0.1", "10.244.0.2", "10.244.0.3"])]
)
def test_pods_have_names_once_they_are_ready(publishes: bool, expected: list[str]) -> None:
    web = headless(selector={"app": "web"}, publishNotReadyAddresses=publishes)
    pods = [
        pod("a", "10.244.0.1"),
        pod("b", "10.244.0.2", ready=False),
        pod("c", "10.244.0.3", ending=True),
        pod("d", "10.244.0.4", phase="Failed"),
    ]

    assert [ip for _, ip in hosts(names_after(web, *pods)[named("web")])] == expected


def with_hostname(name: str, ip: str, subdomain: str) -> api.Pod:
    plain = {
        "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"hostname": name, "subdomain": subdomain},
        "status": {"podIP": ip},
    }
    made = api.convert("Pod", plain)
    assert isinstance(made, api.Pod)
    return made


def test_a_pod_has_its_hostname_below_the_service_that_is_its_subdomain() -> None:
    given = [with_hostname("a", "10.244.0.1", "web"), with_hostname("b", "10.244.0.2", "another")]

    known = names_after(headless(selector={"app": "web"}), *given)

    assert hosts(known[named("web")]) == [("a", "10.244.0.1"), ("10-244-0-2", "10.244.0.2")]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, ["10.244.0.1"]),
        ({"ipFamilies": ["IPv6"]}, ["fd00::1"]),
        ({"ipFamilyPolicy": "PreferDualStack"}, ["10.244.0.1", "fd00::1"]),
    ],
)
def test_a_pod_of_two_families_has_the_addresses_of_its_services_families(
    spec: Mapping[str, Any], expected: Iterable[str]
) -> None:
    dual = pod("a", None, podIPs=[{"ip": "10.244.0.1"}, {"ip": "fd00::1"}])

    known = names_after(headless(selector={"app": "web"}, **spec), dual)

    assert [ip for _, ip in hosts(known[named("web")])] == expected


def test_what_has_not_changed_stays_the_same_object_and_what_is_gone_has_no_name() -> None:
    known = tracker()
    before = names_after(headless("a"), headless("b"), service("c"), known=known)
    piece = endpoint_slice("10.244.0.1", of="b")
    after = names_after(piece, known=known)
    known.apply([ObjectEvent(EventType.DELETE, "Service", named("c"))])

    assert after[named("a")] is before[named("a")]
    assert after[named("c")] is before[named("c")]
    assert hosts(after[named("b")]) == [tuple(DnsHost("10-244-0-1", "10.244.0.1"))]
    assert named("c") not in known.state().names


def test_a_change_of_type_changes_the_name() -> None:
    known = tracker()
    assert names_after(service("web", clusterIP="10.96.0.11"), known=known)[named("web")].cluster_ips

    assert names_after(headless("web"), known=known)[named("web")] == ServiceNames()
