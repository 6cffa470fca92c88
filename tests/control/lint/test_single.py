"""Findings on one object: one line with the field and the fix, and a bounded number of lines."""

from __future__ import annotations

import pytest

from tests.control.given import faults, findings

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
"""
SLICE = """\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.0.9]}]
ports: [{port: 8080}]
"""
ENDPOINTS = """\
apiVersion: v1
kind: Endpoints
metadata: {name: web}
subsets: [{addresses: [{ip: 10.244.0.9}], ports: [{port: 8080}]}]
"""


@pytest.mark.parametrize(
    ("text", "field", "fix"),
    [
        (SERVICE.replace("{port: 80}", "80"), "spec.ports[0]", "write 'port: 80'"),
        (SERVICE.replace("{port: 80}", '"80:8080"'), "spec.ports[0]", "write port: 80 and targetPort: 8080"),
        (SERVICE.replace("{app: web}", "app=web"), "spec.selector", "write 'app: web'"),
        (SLICE.replace("8080", '"8080"'), "ports[0].port", "without quotes"),
        (SLICE.replace("addresses:", "address:"), "endpoints[0].address", "did you mean 'addresses'?"),
        (ENDPOINTS.replace("port: ", "targetPort: "), "subsets[0].ports[0].targetPort", "did you mean 'port'?"),
        (SLICE.replace("addressType", "spec:\n  addressType"), "spec", "move what is in it to the top level"),
        (SLICE.replace("EndpointSlice", "EndpointSlices"), "kind", "did you mean EndpointSlice?"),
        (SERVICE.replace("apiVersion", "apiversion"), "apiversion", "did you mean 'apiVersion'?"),
        (SERVICE.replace("{name: web}", "[{name: web}]"), "metadata", "remove the '-'"),
        (SLICE.replace("[10.244.0.9]", "10.244.0.9"), "endpoints[0].addresses", "write [10.244.0.9]"),
        (SLICE.replace("[10.244.0.9]", "[{ip: 10.244.0.9}]"), "endpoints[0].addresses[0]", "alone: 10.244.0.9"),
        (
            SLICE.replace("9]}]", "9], hints: {forZones: [a]}}]"),
            "endpoints[0].hints.forZones[0]",
            "write 'name: a'",
        ),
        (ENDPOINTS.replace("{ip: 10.244.0.9}", "10.244.0.9"), "subsets[0].addresses[0]", "write 'ip: 10.244.0.9'"),
        (
            SERVICE.replace("  ports", "  externalIPs: [192.0.2.0/24]\n  ports"),
            "spec.externalIPs[0]",
            "write one such as 192.0.2.10",
        ),
    ],
)
def test_a_value_in_the_wrong_form_is_one_fault_that_shows_the_right_one(text: str, field: str, fix: str) -> None:
    (found,) = faults(text)

    assert found.field == field
    assert fix in found.fix


def test_ports_without_names_are_one_fault_for_all_of_them() -> None:
    (found,) = faults(SERVICE.replace("[{port: 80}]", "[{port: 80}, {port: 81}, {name: c, port: 82}]"))

    assert found.field == "spec.ports[0]"
    assert found.problem.endswith("2 of 3 have no name")


def test_families_in_the_wrong_order_are_one_fault() -> None:
    spec = "  clusterIPs: [10.96.0.7, 'fd00:96::7']\n  ipFamilies: [IPv6, IPv4]\n  ports"

    (found,) = faults(SERVICE.replace("  ports", spec))

    assert found.field == "spec.ipFamilies[0]"


def test_of_an_object_that_is_wrong_all_over_fifty_fields_are_named() -> None:
    found = faults(SERVICE + "".join(f"  unknown{index}: x\n" for index in range(20_000)))

    assert len(found) == 51
    assert found[0].problem == "more than 50 fields are wrong"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (ENDPOINTS.replace("10.244.0.9", "10.96.0.11"), "subsets[0].addresses[0].ip"),
        (SLICE.replace("10.244.0.9", "10.96.0.11"), "endpoints[0].addresses[0]"),
    ],
)
def test_an_endpoint_at_an_address_of_the_service_range_is_a_fault(text: str, field: str) -> None:
    (found,) = faults(text)

    assert found.field == field
    assert found.problem.startswith("10.96.0.11 is of the Service range 10.96.0.0/16")


def test_an_endpoint_on_the_loopback_device_is_served_here_and_a_note() -> None:
    found = findings(
        SERVICE.replace("selector: {app: web}\n  ", "") + "---\n" + ENDPOINTS.replace("10.244.0.9", "127.0.0.1")
    )

    assert [(f.severity, f.field) for f in found] == [("note", "subsets[0].addresses[0].ip")]


def test_a_second_address_of_an_endpoint_is_a_note() -> None:
    found = findings(SERVICE.replace("selector: {app: web}\n  ", "") + "---\n" + SLICE.replace("9]", "9, 10.244.0.10]"))

    assert [(f.severity, f.field) for f in found] == [("note", "endpoints[0].addresses[1]")]
