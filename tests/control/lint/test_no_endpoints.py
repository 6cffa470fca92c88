"""One finding wherever clients would be refused, and none where they are served."""

from __future__ import annotations

import ipaddress
from dataclasses import replace

import pytest

from tests.control.given import OPTIONS, faults, findings
from userspace_proxy.control.lint import Linter, LintOptions
from userspace_proxy.sources.documents import parse
from userspace_proxy.sources.lines import Document

SERVICE = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.9, ports: [{name: http, port: 80}, {name: more, port: 81}]}
"""
SLICE = """\
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 8080}, {name: more, port: 8081}]
endpoints: [{addresses: [10.20.1.2]}]
"""
ENDPOINTS = """\
---
apiVersion: v1
kind: Endpoints
metadata: {name: web}
subsets:
- addresses: [{ip: 10.20.1.2}]
  ports: [{name: http, port: 8080}, {name: more, port: 8081}]
"""
SELECTING = """\
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.9, selector: {app: web, tier: front}, ports: [{port: 80, targetPort: http}]}
"""
POD = """\
---
apiVersion: v1
kind: Pod
metadata: {name: web-1, labels: {app: web, tier: front}}
spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
status: {podIP: 10.20.1.2, conditions: [{type: Ready, status: "True"}]}
"""
DEPLOYMENT = """\
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  template:
    metadata: {labels: {app: web, tier: front}}
    spec: {containers: [{name: c, ports: [{name: http, containerPort: 8080}]}]}
"""


@pytest.mark.parametrize(
    "text",
    [
        SERVICE + SLICE,
        SERVICE + ENDPOINTS,
        SELECTING + POD,
        SERVICE
        + SLICE.replace(
            "[{addresses: [10.20.1.2]}]",
            "[{addresses: [10.20.1.2], conditions: {ready: false}}, {addresses: [10.20.1.3]}]",
        ),
        SERVICE
        + SLICE.replace("10.20.1.2]}", "10.20.1.2], conditions: {ready: false, serving: true, terminating: true}}"),
        SERVICE + SLICE + SLICE.replace("web-1", "web-2").replace("IPv4", "IPv6").replace("10.20.1.2", "'fd00::2'"),
        SERVICE
        + SLICE.replace("discovery.k8s.io/v1", "discovery.k8s.io/v1beta1").replace(
            "[10.20.1.2]", "[10.20.1.2], topology: {kubernetes.io/hostname: node-1, topology.kubernetes.io/zone: a}"
        ),
        SERVICE.replace("10.96.0.9", "None") + SLICE.replace("web}}", "web, service.kubernetes.io/headless: ''}}"),
        SLICE.lstrip("-\n").replace("kubernetes.io/service-name: web", "multicluster.kubernetes.io/service-name: web"),
    ],
)
def test_a_served_service_has_no_finding(text: str) -> None:
    assert findings(text) == []


def test_a_name_that_gives_endpoints_is_no_finding_and_one_that_cannot_be_read_is_one() -> None:
    def named(target: str) -> str:
        return SERVICE.replace(
            "{name: web", f"{{name: web, annotations: {{userspace-proxy/endpoints-from: {target}}}", 1
        )

    (found,) = findings(named("'web:8080'") + SLICE)

    assert findings(named("'dns://web:8080'")) == []
    assert found.field == "metadata.annotations.userspace-proxy/endpoints-from"
    assert "dns://web:8080" in found.fix


@pytest.mark.parametrize(
    ("text", "field", "said"),
    [
        (
            SERVICE + SLICE.replace("ports: [{name: http, port: 8080}, {name: more, port: 8081}]\n", ""),
            "ports",
            "no ports",
        ),
        (SERVICE + ENDPOINTS.replace("  ports:", "- ports:"), "subsets", "stand in two subsets"),
        (SERVICE + SLICE.replace("IPv4", "IPv6").replace("10.20.1.2", "'fd00::2'"), "addressType", "is IPv4 alone"),
        (SERVICE + SLICE.replace("IPv4", "FQDN").replace("10.20.1.2", "a.example"), "addressType", "'FQDN'"),
        (SERVICE + SLICE.replace(", {name: more, port: 8081}", ""), "spec.ports[1].name", "port 81 are refused"),
        (SERVICE + SLICE.replace("name: more, port: 8081", "name: mroe, port: 8081"), "ports[1].name", "'mroe'"),
        (SERVICE + SLICE.replace("10.20.1.2]}", "10.20.1.2], conditions: {ready: false}}"), "endpoints", "is ready"),
        (SERVICE + ENDPOINTS.replace("- addresses", "- notReadyAddresses"), "subsets", "no endpoint is ready"),
        (SERVICE, "spec", "nothing here gives it endpoints"),
        (SELECTING + POD.replace("True", "False"), "spec.selector", "the Pod it selects is not ready"),
        (SELECTING + POD.replace("10.20.1.2,", "10.20.1.2, phase: Failed,"), "spec.selector", "has ended"),
        (SELECTING + POD.replace("10.20.1.2", "'fd00::2'"), "spec.selector", "is IPv4 alone"),
        (SELECTING + POD.replace("tier: front", "tier: back"), "spec.selector.tier", "matches no Pod"),
        (SELECTING + POD.replace("app: web, tier: front", "a: b"), "spec.selector", "matches no Pod"),
        (SELECTING + DEPLOYMENT.replace("tier: front", "tier: frint"), "spec.selector.tier", "matches no Pod"),
        (SELECTING + POD.replace("name: http", "name: web"), "spec.ports[0].targetPort", "a port named 'http'"),
    ],
)
def test_where_clients_are_refused_one_finding_says_why(text: str, field: str, said: str) -> None:
    (found,) = findings(text)

    assert (found.severity, found.field) == ("fault", field)
    assert said in found.problem
    assert found.fix


@pytest.mark.parametrize(
    ("text", "field"),
    [
        (SELECTING + DEPLOYMENT, "spec.selector"),
        (SELECTING + POD.partition("status")[0], "spec.selector"),
        (SELECTING, "spec.selector"),
        (SELECTING + DEPLOYMENT.replace("app: web", "app: webhook"), "spec.selector"),
        (SERVICE + SLICE.replace("[{addresses: [10.20.1.2]}]", "[]"), "endpoints"),
        (SLICE.lstrip("-\n"), 'metadata.labels["kubernetes.io/service-name"]'),
        (SERVICE + SLICE.replace("port: 8081}", "port: 8081}, {name: old, port: 1}"), "ports[2].name"),
        (
            SERVICE + SLICE + SLICE.replace("web-1", "w-2").replace("IPv4", "FQDN").replace("10.20.1.2", "a.b"),
            "addressType",
        ),
        (SELECTING.replace("http", "9090") + POD, "spec.ports[0].targetPort"),
    ],
)
def test_what_is_only_incomplete_here_is_a_note(text: str, field: str) -> None:
    (found,) = findings(text)

    assert (found.severity, found.field) == ("note", field)


def test_the_consequences_of_a_fault_are_not_named() -> None:
    text = SERVICE.replace("name: http, port: 80", "name: http, port: 80, protocol: tcp") + SLICE

    assert [found.field for found in faults(text)] == ["spec.ports[0].protocol"]


def test_a_service_of_a_family_without_a_range_is_a_fault_and_with_one_it_is_none() -> None:
    text = SERVICE.replace("clusterIP: 10.96.0.9", "ipFamilies: [IPv6]") + SLICE.replace("IPv4", "IPv6").replace(
        "10.20.1.2", "'fd00::2'"
    )
    both = LintOptions([*OPTIONS.cluster_ips, ipaddress.ip_network("fd00:96::/112")])

    assert [found.field for found in faults(text)] == ["spec.ipFamilies[0]"]
    assert findings(text, both) == []


def test_an_address_outside_of_the_load_balancer_pool_is_a_fault_where_there_is_one() -> None:
    text = SERVICE.replace("{clusterIP", "{type: LoadBalancer, loadBalancerIP: 203.0.113.9, clusterIP") + SLICE
    pool = LintOptions(OPTIONS.cluster_ips, [ipaddress.ip_network("198.51.100.0/24")])

    assert findings(text) == []
    assert [found.field for found in findings(text, pool)] == ["spec.loadBalancerIP"]


def test_an_annotation_without_an_effect_in_the_mode_is_a_note() -> None:
    text = SERVICE.replace("{name: web}", "{name: web, annotations: {userspace-proxy/weights: '10.20.1.2=3'}}") + SLICE

    assert findings(text) == []
    assert findings(text, replace(OPTIONS, mode="nftables")) == []
    (found,) = findings(text, replace(OPTIONS, mode="iptables"))
    assert (found.severity, found.problem) == ("note", "it has no effect in iptables mode")


@pytest.mark.parametrize(
    ("annotation", "modes"),
    [
        ("balance: round-robin", {"userspace", "ipvs"}),
        ("balance: least-connections", {"userspace", "ipvs"}),
        ("balance: source-hash", {"userspace", "ipvs"}),
        ("balance: random", {"userspace", "iptables", "nftables", "ipvs"}),
        ("slow-start: 30s", {"userspace"}),
    ],
)
def test_balancing_that_a_mode_does_not_honour_is_a_note(annotation: str, modes: set[str]) -> None:
    text = SERVICE.replace("{name: web}", f"{{name: web, annotations: {{userspace-proxy/{annotation}}}}}") + SLICE

    silent = {
        mode
        for mode in ("userspace", "iptables", "nftables", "ipvs")
        if findings(text, replace(OPTIONS, mode=mode)) == []
    }

    assert silent == modes


def test_a_service_that_requires_two_families_and_has_one_is_a_note() -> None:
    (found,) = findings(SERVICE.replace("clusterIP: 10.96.0.9", "ipFamilyPolicy: RequireDualStack") + SLICE)

    assert (found.severity, found.problem) == ("note", "it has IPv4 alone")


def test_that_no_endpoint_is_on_this_node_is_a_note_where_a_policy_wants_one() -> None:
    text = SERVICE.replace("{clusterIP", "{internalTrafficPolicy: Local, clusterIP") + SLICE.replace(
        "[10.20.1.2]", "[10.20.1.2], nodeName: there"
    )

    assert findings(text) == findings(text, LintOptions(OPTIONS.cluster_ips, node="there")) == []
    (found,) = findings(text, LintOptions(OPTIONS.cluster_ips, node="here"))
    assert (found.severity, found.field) == ("note", "spec.internalTrafficPolicy")


def test_a_port_that_cannot_be_proxied_is_one_finding() -> None:
    text = (
        SERVICE.replace("{name: http, port: 80}, {name: more, port: 81}", "{name: http, port: 80, protocol: SCTP}")
        + SLICE
    )

    assert [found.field for found in findings(text)] == ["spec.ports[0].protocol"]


@pytest.mark.parametrize(
    ("piece", "field"),
    [
        (ENDPOINTS.replace("name: web", "name: web-endpoints"), "metadata.name"),
        (
            SLICE.replace("kubernetes.io/service-name", "k8s.io/service-name"),
            'metadata.labels["kubernetes.io/service-name"]',
        ),
        (ENDPOINTS.replace("kind: Endpoints", "kind: Endpoint"), "kind"),
        (ENDPOINTS.replace("{ip: 10.20.1.2}", "10.20.1.2"), "subsets[0].addresses[0]"),
        (SLICE.replace("[10.20.1.2]", "[{ip: 10.20.1.2}]"), "endpoints[0].addresses[0]"),
    ],
)
def test_a_slice_or_endpoints_that_reach_no_service_are_one_fault_and_not_the_service_too(
    piece: str, field: str
) -> None:
    (found,) = findings(SERVICE + piece)

    assert (found.severity, found.field) == ("fault", field)


def test_endpoints_of_another_name_may_be_meant_for_the_one_service_that_has_none() -> None:
    (found,) = faults(SERVICE + ENDPOINTS.replace("name: web", "name: database"))
    served = SERVICE.replace("web", "database").replace("10.96.0.9, ", "").replace("clusterIP: ", "")

    assert found.fix == "did you mean 'web', which has no endpoints?"
    assert [f.field for f in faults(f"{SERVICE}---\n{served}{ENDPOINTS.replace('name: web', 'name: database')}")] == [
        "spec"
    ]


def test_a_service_without_endpoints_is_named_once_the_faulty_slice_is_gone() -> None:
    linter = Linter(OPTIONS)
    (service,), (piece,) = (
        parse(Document("f", line, text), for_check=True)[0]
        for line, text in (
            (1, SERVICE),
            (5, SLICE.replace("[10.20.1.2]", "[{ip: 10.20.1.2}]")),
        )
    )
    examined = list(map(linter.examine, (service, piece)))
    for held, own in examined:
        linter.add(held, own)
    for _ in linter.work():
        pass
    before = [found.error.field for found in linter.diagnostics()]

    linter.remove(examined[-1][0])
    for _ in linter.work():
        pass

    assert before == ["endpoints[0].addresses[0]"]
    assert [found.error.field for found in linter.diagnostics()] == ["spec"]


def test_a_label_that_another_service_selects_is_no_misspelt_one() -> None:
    ad = SELECTING.replace("app: web, tier: front", "app: adservice").replace("name: web", "name: ad")
    ad = ad.replace("10.96.0.9", "10.96.0.8")
    cart = SELECTING.replace("app: web, tier: front", "app: cartservice")

    assert faults(f"{cart}---\n{ad}{DEPLOYMENT.replace('app: web, tier: front', 'app: adservice')}") == []


def test_a_note_of_a_selector_shows_the_label_of_the_template_that_is_here() -> None:
    (found,) = findings(SELECTING.replace("app: web, tier: front", "app: shop") + DEPLOYMENT)

    assert found.severity == "note"
    assert "write 'app: web', as a template here has it" in found.fix


PAIR = """\
apiVersion: v1
kind: Service
metadata: {name: a}
spec: {FIRST selector: {app: web}, ports: [{port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: b}
spec: {SECOND selector: {app: web}, ports: [{port: 80}]}
"""


def test_a_service_that_states_an_address_has_it_wherever_it_stands() -> None:
    options = replace(OPTIONS, cluster_ips=[ipaddress.ip_network("10.96.0.0/29")])
    # Any of these may be given to the first one.
    texts = [PAIR.replace("FIRST", "").replace("SECOND", f"clusterIP: 10.96.0.{last},") for last in range(1, 7)]

    assert [faults(text + POD, options) for text in texts] == [[]] * 6


def test_a_service_that_loses_an_external_address_to_a_later_one_is_named() -> None:
    text = PAIR.replace("FIRST", "externalIPs: [10.96.0.50],").replace("SECOND", "clusterIP: 10.96.0.50,")

    (found,) = faults(text + POD)

    assert (found.line, found.field) == (4, "spec.externalIPs[0]")
