"""Each violation of the API server's rules is one finding."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.control.given import faults as faults_in
from userspace_proxy import api
from userspace_proxy.control.lint import Finding
from userspace_proxy.control.lint.api_rules import RULES, Rule
from userspace_proxy.control.lint.relations import RELATIONS, Relation

# Objects that the API server accepts and in which every field of the table stands.
GOOD: Mapping[str, dict[str, Any]] = {
    "Service": {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "labels": {"app": "web"}, "annotations": {"a": "b"}},
        "spec": {
            "type": "LoadBalancer",
            "selector": {"app": "web"},
            "clusterIP": "10.96.0.10",
            "clusterIPs": ["10.96.0.10"],
            "ipFamilies": ["IPv4"],
            "ipFamilyPolicy": "SingleStack",
            "externalIPs": ["198.51.100.1"],
            "ports": [
                {
                    "name": "http",
                    "port": 80,
                    "targetPort": "http",
                    "nodePort": 30080,
                    "protocol": "TCP",
                    "appProtocol": "http",
                }
            ],
            "sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}},
            "internalTrafficPolicy": "Cluster",
            "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 30081,
            "loadBalancerClass": "example.org/lb",
            "loadBalancerSourceRanges": ["192.0.2.0/24"],
            "trafficDistribution": "PreferClose",
        },
        "status": {"loadBalancer": {"ingress": [{"ip": "198.51.100.2", "ipMode": "VIP"}]}},
    },
    "EndpointSlice": {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "labels": {"kubernetes.io/service-name": "web", "a": "b"},
            "annotations": {"a": "b"},
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": ["10.244.0.5"],
                "nodeName": "node-1",
                "hints": {"forZones": [{"name": "a"}], "forNodes": [{"name": "node-1"}]},
            }
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"}],
    },
    "Endpoints": {
        "apiVersion": "v1",
        "kind": "Endpoints",
        "metadata": {"name": "web", "labels": {"a": "b"}, "annotations": {"a": "b"}},
        "subsets": [
            {
                "addresses": [{"ip": "10.244.0.5", "nodeName": "node-1"}],
                "ports": [{"name": "http", "port": 8080, "protocol": "TCP", "appProtocol": "http"}],
            }
        ],
    },
    "Pod": {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "web-1", "labels": {"app": "web"}, "annotations": {"a": "b"}},
        "spec": {
            "nodeName": "node-1",
            "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}]}],
            "initContainers": [
                {
                    "name": "i",
                    "restartPolicy": "Always",
                    "ports": [{"name": "i", "containerPort": 81, "protocol": "TCP"}],
                }
            ],
        },
        "status": {"podIP": "10.244.0.5", "podIPs": [{"ip": "10.244.0.5"}]},
    },
    "Node": {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": "node-1", "labels": {"a": "b"}, "annotations": {"a": "b"}},
        "spec": {"podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"], "taints": [{"key": "example.org/a"}]},
    },
}
_EXTERNAL = {"type": "ExternalName", "externalName": "example.org"}
# For each of RELATIONS, in its order, fields of a spec that break it.
CONTRADICTIONS: tuple[dict[str, Any], ...] = (
    {"clusterIP": "None", "type": "NodePort"},
    {"clusterIP": "None", "clusterIPs": ["None", "10.96.0.9"]},
    {"clusterIPs": ["10.96.0.9"]},
    {"type": "ExternalName"},
    {**_EXTERNAL, "clusterIP": "10.96.0.9"},
    {**_EXTERNAL, "clusterIPs": ["10.96.0.9"]},
    {**_EXTERNAL, "ipFamilies": ["IPv4"]},
    {**_EXTERNAL, "ipFamilyPolicy": "SingleStack"},
    {"ports": [{"port": 80, "nodePort": 30080}]},
    {"sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 10}}},
    {"ipFamilies": ["IPv4", "IPv4"]},
    {"ipFamilies": ["IPv4", "IPv6"]},
    {"loadBalancerSourceRanges": ["192.0.2.0/24"]},
    {"loadBalancerClass": "example.org/lb"},
    {"allocateLoadBalancerNodePorts": False},
    {"healthCheckNodePort": 31000},
    {"type": "LoadBalancer", "healthCheckNodePort": 31000},
    {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 8080},
    {"externalTrafficPolicy": "Local"},
)
SERVICE_ALONE: dict[str, Any] = {
    "apiVersion": "v1",
    "kind": "Service",
    "metadata": {"name": "web"},
    "spec": {"selector": {"app": "web"}, "ports": [{"port": 80}]},
}


def faults(*objects: Mapping[str, Any]) -> list[Finding]:
    return faults_in("---\n".join(yaml.safe_dump(each, sort_keys=False) for each in objects))


def broken(kind: str, rule: Rule) -> tuple[dict[str, Any], str]:
    """Return the good object of *kind* with the value that *rule* refuses, and the field where that stands."""
    given = copy.deepcopy(GOOD[kind])
    path = rule.field.removesuffix(".*").removesuffix(".{}").removesuffix("[]").replace("[]", "[0]")
    *parents, last = api.steps(path)
    at: Any = given
    for step in parents:
        at = at[step]
    if rule.field.endswith(".{}"):
        at[last] = {**at[last], str(rule.wrong): "b"}
        return given, f"{path}.{rule.wrong}"
    if rule.field.endswith(".*"):
        at[last]["a"] = rule.wrong
        return given, f"{path}.a"
    if rule.field.endswith("[]"):
        at[last] = [rule.wrong]
        return given, f"{path}[0]"
    at[last] = rule.wrong
    return given, path


def cases() -> Iterator[Any]:
    for kind, rules in RULES.items():
        for rule in rules:
            yield pytest.param(kind, rule, id=f"{kind}-{rule.field}")


@pytest.mark.parametrize("kind", GOOD)
def test_what_the_api_accepts_is_no_fault(kind: str) -> None:
    assert faults(GOOD[kind]) == []


def test_what_belongs_together_is_no_fault() -> None:
    assert faults(*GOOD.values()) == []


@pytest.mark.parametrize(("kind", "rule"), list(cases()))
def test_a_value_that_the_api_refuses_is_one_fault_at_its_field(kind: str, rule: Rule) -> None:
    given, field = broken(kind, rule)

    found = faults(given)

    assert len(found) == 1, found
    assert found[0].field.startswith(field.partition("[0]")[0].removesuffix("s"))
    assert found[0].fix


@pytest.mark.parametrize(
    ("kind", "rule"), [(kind, rule) for kind, rules in RULES.items() for rule in rules if isinstance(rule.wrong, int)]
)
def test_a_number_in_quotes_is_one_fault_at_its_field(kind: str, rule: Rule) -> None:
    given, field = broken(kind, rule._replace(wrong="30080"))

    assert [finding.field for finding in faults(given)] == [field]


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "LoadBalancer", "ports": [{"port": 10250}]},
        {"clusterIP": "None", "ipFamilies": ["IPv4", "IPv6"], "selector": None},
        {"ipFamilyPolicy": "PreferDualStack", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:10:96::9"]},
        {"type": "LoadBalancer", "loadBalancerSourceRanges": [" 192.0.2.0/24 "]},
    ],
    ids=str,
)
def test_a_combination_of_fields_that_the_api_accepts_is_no_fault(spec: dict[str, Any]) -> None:
    given = copy.deepcopy(SERVICE_ALONE)
    given["spec"].update(spec)

    assert faults(given) == []


def test_two_ports_of_endpoints_may_have_one_name() -> None:
    ports = [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "dns", "port": 53, "protocol": "TCP"}]

    assert faults({**GOOD["Endpoints"], "subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": ports}]}) == []


@pytest.mark.parametrize(
    ("relation", "spec"),
    list(zip(RELATIONS, CONTRADICTIONS, strict=True)),
    ids=lambda value: f"{value.field}: {value.demand}" if isinstance(value, Relation) else "",
)
def test_a_field_that_contradicts_another_is_one_fault(relation: Relation, spec: dict[str, Any]) -> None:
    given = copy.deepcopy(SERVICE_ALONE)
    given["spec"].update(spec)

    (found,) = faults(given)

    assert found.field.startswith(relation.field.partition("[]")[0])
    assert found.problem == relation.demand


@pytest.mark.parametrize(
    ("kind", "change", "field"),
    [
        ("EndpointSlice", {"addressType": "IPv6"}, "endpoints[0].addresses[0]"),
        ("EndpointSlice", {"addressType": None}, "addressType"),
        ("EndpointSlice", {"endpoints": [{"addresses": []}]}, "endpoints[0].addresses"),
        ("EndpointSlice", {"ports": [{"port": 1}, {"port": 2}]}, "ports[1].name"),
        ("EndpointSlice", {"ports": [{"name": "a", "port": 1}, {"name": "a", "port": 2}]}, "ports[1].name"),
        ("EndpointSlice", {"endpoints": [{"addresses": ["10.0.0.1"]}] * 1_001}, "endpoints"),
        ("EndpointSlice", {"endpoints": [{"addresses": ["10.0.0.1"] * 101}]}, "endpoints[0].addresses"),
        (
            "EndpointSlice",
            {"endpoints": [{"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": z} for z in "abcdefghi"]}}]},
            "endpoints[0].hints.forZones",
        ),
        (
            "EndpointSlice",
            {"endpoints": [{"addresses": ["10.0.0.1"], "hints": {"forZones": [{"name": "a"}] * 2}}]},
            "endpoints[0].hints.forZones[1].name",
        ),
        ("Endpoints", {"subsets": [{}]}, "subsets[0]"),
        (
            "Endpoints",
            {"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"port": 1}, {"name": "b", "port": 2}]}]},
            "subsets[0].ports[0].name",
        ),
        (
            "Endpoints",
            {"subsets": [{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "a"}]}]},
            "subsets[0].ports[0].port",
        ),
        (
            "Pod",
            {
                "spec": {
                    "containers": [{"ports": [{"containerPort": 1, "name": "a"}, {"containerPort": 2, "name": "a"}]}]
                }
            },
            "spec.containers[0].ports[1].name",
        ),
        ("Pod", {"status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.2"}]}}, "status.podIP"),
        ("Pod", {"status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}]}}, "status.podIPs[1]"),
        ("Node", {"spec": {"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.2.0.0/24"]}}, "spec.podCIDR"),
        ("Node", {"spec": {"podCIDRs": ["10.1.0.0/24", "10.2.0.0/24"]}}, "spec.podCIDRs[1]"),
    ],
)
def test_a_contradiction_within_an_object_is_one_fault(kind: str, change: dict[str, Any], field: str) -> None:
    found = faults({**GOOD[kind], **change})

    assert [finding.field for finding in found] == [field]
