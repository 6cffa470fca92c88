"""Conversion of plain values to structs, and the messages for values of a wrong type."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from userspace_proxy import api
from userspace_proxy.api.convert import below, steps
from userspace_proxy.errors import ConfigError


def service(text: str) -> Any:
    return api.convert("Service", yaml.safe_load(text))


def refusal(kind: str, text: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        api.convert(kind, yaml.safe_load(text))
    return caught.value


# ---- what is taken


def test_every_field_of_a_service_that_the_proxy_reads_is_converted() -> None:
    given = service("""
        apiVersion: v1
        kind: Service
        metadata: {name: web, namespace: shop, labels: {a: b}, resourceVersion: "17", uid: x}
        spec:
          type: NodePort
          selector: {app: web}
          clusterIP: 10.96.0.1
          clusterIPs: [10.96.0.1, "fd00::1"]
          externalIPs: [1.2.3.4]
          sessionAffinity: ClientIP
          sessionAffinityConfig: {clientIP: {timeoutSeconds: 60}}
          publishNotReadyAddresses: true
          ipFamilyPolicy: PreferDualStack
          ipFamilies: [IPv4, IPv6]
          ports:
          - {name: http, port: 80, targetPort: web, nodePort: 30080, protocol: TCP, appProtocol: http}
          - {name: more, port: 81, targetPort: 8081}
        status: {loadBalancer: {}}
    """)

    spec = given.spec
    assert (given.metadata.name, given.metadata.namespace, given.metadata.labels) == ("web", "shop", {"a": "b"})
    assert (spec.type, spec.selector, spec.cluster_ip) == ("NodePort", {"app": "web"}, "10.96.0.1")
    assert (spec.cluster_ips, spec.external_ips) == (["10.96.0.1", "fd00::1"], ["1.2.3.4"])
    assert (spec.session_affinity, spec.session_affinity_config.client_ip.timeout_seconds) == ("ClientIP", 60)
    assert (spec.publish_not_ready_addresses, spec.ip_family_policy) == (True, "PreferDualStack")
    assert spec.ip_families == ["IPv4", "IPv6"]
    assert [(p.name, p.port, p.target_port, p.node_port) for p in spec.ports] == [
        ("http", 80, "web", 30_080),
        ("more", 81, 8_081, None),
    ]


def test_every_field_of_a_pod_that_the_proxy_reads_is_converted() -> None:
    given = api.convert(
        "Pod",
        yaml.safe_load("""
            metadata: {name: p, deletionTimestamp: "2026-01-01T00:00:00Z"}
            spec:
              nodeName: n
              containers: [{ports: [{name: web, containerPort: 80}]}]
              initContainers: [{restartPolicy: Always, ports: [{containerPort: 81}]}]
            status:
              phase: Running
              podIP: 10.0.0.1
              podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]
              conditions: [{type: Ready, status: "True", lastProbeTime: null}]
        """),
    )

    assert isinstance(given, api.Pod)
    assert given.spec is not None
    assert given.status is not None
    assert given.metadata.deletion_timestamp == "2026-01-01T00:00:00Z"
    assert (given.spec.node_name, given.status.pod_ip, given.status.phase) == ("n", "10.0.0.1", "Running")
    assert [item.ip for item in given.status.pod_ips or ()] == ["10.0.0.1", "fd00::1"]
    assert [(c.type, c.status) for c in given.status.conditions or ()] == [("Ready", "True")]
    assert [c.restart_policy for c in given.spec.init_containers or ()] == ["Always"]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("Service", "{metadata: {name: a, namespace: null, labels: null}, spec: null}"),
        ("Service", "{metadata: {name: a}, spec: {ports: null, selector: null, externalIPs: null, type: null}}"),
        ("EndpointSlice", "{metadata: {name: a}, addressType: IPv4, endpoints: null, ports: null}"),
        (
            "EndpointSlice",
            "{metadata: {name: a}, endpoints: [{addresses: null, conditions: null}], ports: [{port: null}]}",
        ),
        ("Endpoints", "{metadata: {name: a}, subsets: null}"),
        ("Endpoints", "{metadata: {name: a}, subsets: [{addresses: null, notReadyAddresses: null, ports: null}]}"),
        ("Pod", "{metadata: {name: a}, spec: {containers: null}, status: {podIPs: null, conditions: null}}"),
        ("Pod", "{metadata: {name: a}, status: {podIP: null}}"),
        ("Node", "{metadata: {name: a}, spec: {podCIDR: 10.0.0.0/24}}"),
    ],
)
def test_null_is_accepted_wherever_go_encodes_it(kind: str, text: str) -> None:
    assert type(api.convert(kind, yaml.safe_load(text))).__name__ == kind


def test_every_kind_that_is_read_can_be_converted() -> None:
    assert {kind: type(api.convert(kind, {"metadata": {"name": "a"}})).__name__ for kind in api.KINDS} == {
        kind: kind for kind in api.KINDS
    }


# ---- what is refused


@pytest.mark.parametrize(
    ("kind", "text", "field", "words"),
    [
        ("Service", "[]", "", "must be a mapping, not a list"),
        ("Service", "{}", "", "lacks the field metadata"),
        ("Service", "{metadata: web}", "metadata", "must be a mapping, not text"),
        ("Service", "{metadata: {name: 17}}", "metadata.name", "must be text, not a number"),
        ("Service", "{metadata: {name: a}, spec: []}", "spec", "must be a mapping"),
        ("Service", "{metadata: {name: a}, spec: {ports: {port: 80}}}", "spec.ports", "must be a list, not a mapping"),
        ("Service", "{metadata: {name: a}, spec: {ports: 80}}", "spec.ports", "must be a list, not a number"),
        ("Service", "{metadata: {name: a}, spec: {ports: [80]}}", "spec.ports[0]", "must be a mapping, not a number"),
        ("Service", "{metadata: {name: a}, spec: {ports: [{name: b}]}}", "spec.ports[0]", "lacks the field port"),
        (
            "Service",
            "{metadata: {name: a}, spec: {ports: [{port: '80'}]}}",
            "spec.ports[0].port",
            "must be a number, not text",
        ),
        ("Service", "{metadata: {name: a}, spec: {ports: [{port: 80.5}]}}", "spec.ports[0].port", "must be a number"),
        ("Service", "{metadata: {name: a}, spec: {ports: [{port: true}]}}", "spec.ports[0].port", "not true or false"),
        ("Service", "{metadata: {name: a}, spec: {ports: [{port: null}]}}", "spec.ports[0].port", "not nothing"),
        (
            "Service",
            "{metadata: {name: a}, spec: {ports: [{port: 80, targetPort: [http]}]}}",
            "spec.ports[0].targetPort",
            "must be a number or text, not a list",
        ),
        ("Service", "{metadata: {name: a}, spec: {clusterIP: 10}}", "spec.clusterIP", "must be text, not a number"),
        (
            "Service",
            "{metadata: {name: a}, spec: {externalIPs: 1.2.3.4}}",
            "spec.externalIPs",
            "must be a list, not text",
        ),
        (
            "Service",
            "{metadata: {name: a}, spec: {publishNotReadyAddresses: 'yes'}}",
            "spec.publishNotReadyAddresses",
            "must be true or false, not text",
        ),
        (
            "Endpoints",
            "{metadata: {name: a}, subsets: [{addresses: [{}]}]}",
            "subsets[0].addresses[0]",
            "lacks the field ip",
        ),
        ("Pod", "{metadata: {name: a}, status: {podIP: 7}}", "status.podIP", "must be text"),
        (
            "EndpointSlice",
            "{metadata: {name: a}, endpoints: [{addresses: 10.0.0.1}]}",
            "endpoints[0].addresses",
            "a list",
        ),
    ],
)
def test_a_wrong_type_is_named_with_its_field_in_plain_words(kind: str, text: str, field: str, words: str) -> None:
    error = refusal(kind, text)

    assert error.field == field
    assert words in error.reason
    assert not set("`$|") & set(str(error)), "words of a library, not of a user"


@pytest.mark.parametrize("value", ["1.10", "yes", "8080", "null"])
def test_a_label_that_yaml_reads_as_another_type_is_named_with_a_fix(value: str) -> None:
    error = refusal("Service", f"{{metadata: {{name: a}}, spec: {{selector: {{app: web, version: {value}}}}}}}")

    assert error.field == "spec.selector.version"
    assert "'version' must be text" in error.reason
    assert "quotes" in error.fix or '""' in error.fix


def test_matchlabels_in_a_service_is_named_with_its_fix() -> None:
    error = refusal("Service", "{metadata: {name: a}, spec: {selector: {matchLabels: {app: web}}}}")

    assert error.field == "spec.selector.matchLabels"
    assert "right under 'selector'" in error.fix


def test_a_label_with_dots_in_its_name_can_be_found_again() -> None:
    error = refusal("Service", "{metadata: {name: a, labels: {app.kubernetes.io/version: 1.0}}}")

    assert steps(error.field) == ["metadata", "labels", "app.kubernetes.io/version"]


@pytest.mark.parametrize(
    "path",
    [
        ["spec", "ports", 0, "port"],
        ["items", 3, "metadata", "labels", "a.b/c"],
        ["metadata", "annotations", "x[0]"],
        ["plain"],
        [],
    ],
)
def test_a_written_path_is_split_into_its_steps(path: list[str | int]) -> None:
    field = ""
    for step in path:
        field = f"{field}[{step}]" if isinstance(step, int) else below(field, step)

    assert steps(field) == path
