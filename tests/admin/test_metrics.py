"""One scrape: every counter of every service port, in names that stay."""

from __future__ import annotations

import time
from dataclasses import fields

import pytest
from prometheus_client.parser import text_string_to_metric_families

from userspace_proxy import __version__
from userspace_proxy.admin.metrics import SERIES_AN_ENDPOINT, kubeproxy_metrics, render, watch_metrics
from userspace_proxy.control.controller import Changes
from userspace_proxy.model.counters import ControlStats, Counters, EndpointCounters, PlaneStats
from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.sync_health import SyncHealth
from userspace_proxy.model.watch_stats import WatchStats

TCP = ServicePortName(NamespacedName("shop", "web"), "http", L4Protocol.TCP)
ORDER = ("namespace", "service", "port", "protocol", "endpoint", "version")
UDP = ServicePortName(NamespacedName("shop", "dns"), "", L4Protocol.UDP)

CONTROL_FIELDS = [field.name for field in fields(ControlStats)]


def control(**given: int | float) -> ControlStats:
    return ControlStats(**given)  # type: ignore[arg-type]


def samples(plane: PlaneStats, stats: ControlStats) -> dict[tuple[str, ...], float]:
    """Return (name, then its labels in their order) -> value, as a Prometheus reads it."""
    text = b"".join(render(plane, stats)).decode()
    return {
        (sample.name, *(sample.labels[label] for label in ORDER if label in sample.labels)): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_counters_of_a_service_port_bear_its_name() -> None:
    counters = Counters(accepted=5, open=2, dial_failures=3, retries=4, ejections=1, failed=6, bytes_to_backends=7)
    counters.limited, counters.port_exhaustions = 8, 9

    seen = samples(PlaneStats({TCP: counters}), control())

    labels = ("shop", "web", "http", "TCP")
    assert seen["userspace_proxy_connections_total", *labels] == 5
    assert seen["userspace_proxy_open_connections", *labels] == 2
    assert seen["userspace_proxy_dial_failures_total", *labels] == 3
    assert seen["userspace_proxy_retries_total", *labels] == 4
    assert seen["userspace_proxy_ejections_total", *labels] == 1
    assert seen["userspace_proxy_failed_connections_total", *labels] == 6
    assert seen["userspace_proxy_to_backends_bytes_total", *labels] == 7
    assert seen["userspace_proxy_limited_connections_total", *labels] == 8
    assert seen["userspace_proxy_port_exhaustions_total", *labels] == 9


def test_metrics_of_one_protocol_are_not_shown_for_the_other() -> None:
    seen = samples(PlaneStats({TCP: Counters(), UDP: Counters(flows=3, flows_total=9)}), control())

    of_tcp = {key[0] for key in seen if key[1:2] == ("shop",) and key[2] == "web"}
    of_udp = {key[0] for key in seen if key[1:2] == ("shop",) and key[2] == "dns"}
    assert not any("udp" in name for name in of_tcp)
    assert not any("connections" in name for name in of_udp)
    assert seen["userspace_proxy_udp_open_flows", "shop", "dns", "", "UDP"] == 3
    assert seen["userspace_proxy_udp_flows_total", "shop", "dns", "", "UDP"] == 9


def test_every_counter_there_is_is_shown() -> None:
    """A counter that no metric shows has no use."""
    names = Counters.__dataclass_fields__
    counters = Counters(**{name: 1_000 + n for n, name in enumerate(names)})

    shown = set(samples(PlaneStats({TCP: counters, UDP: counters}), control()).values())

    assert {1_000 + n for n in range(len(names))} <= shown


def test_the_counters_of_an_endpoint_bear_its_address_and_every_one_is_shown() -> None:
    counters = EndpointCounters(**{name: 1_000 + n for n, name in enumerate(EndpointCounters.__dataclass_fields__)})
    endpoints = {TCP: {("10.0.0.1", 80): counters}, UDP: {("fd00::1", 53): counters}}

    seen = samples(PlaneStats({}, endpoints), control())

    of_tcp = {key[0]: value for key, value in seen.items() if key[-1] == "10.0.0.1:80"}
    of_udp = {key[0]: value for key, value in seen.items() if key[-1] == "[fd00::1]:53"}
    assert seen["userspace_proxy_endpoint_connections_total", "shop", "web", "http", "TCP", "10.0.0.1:80"] == 1_000
    assert seen["userspace_proxy_endpoint_udp_open_flows", "shop", "dns", "", "UDP", "[fd00::1]:53"] == 1_001
    for shown in (of_tcp, of_udp):
        assert sorted(shown.values()) == [1_000 + n for n in range(len(EndpointCounters.__dataclass_fields__))]
        assert len(shown) == SERIES_AN_ENDPOINT


def test_hidden_endpoints_are_counted() -> None:
    assert samples(PlaneStats({}, hidden_endpoints=7), control())["userspace_proxy_hidden_endpoints",] == 7


def test_the_control_process_exposes_metrics_of_its_own() -> None:
    given = control(**{field: 100 + n for n, field in enumerate(CONTROL_FIELDS)})

    shown = samples(PlaneStats({}, connections_open=7, accept_paused=8, local_shortages=9), given)

    assert {100 + n for n in range(len(CONTROL_FIELDS))} <= set(shown.values())
    assert shown["userspace_proxy_connections_open_all",] == 7
    assert shown["userspace_proxy_accept_pauses_total",] == 8
    assert shown["userspace_proxy_local_shortages_total",] == 9
    assert shown["userspace_proxy_build_info", __version__] == 1


def test_how_well_a_cluster_is_heard_is_shown_for_each_kind() -> None:
    now = time.time()
    watches = [
        WatchStats("services", heard_at=now - 5, events=1, restarts=2, relists=3, expired=4),
        WatchStats("nodes", heard_at=now - 500, failing_since=now - 400),
    ]
    text = b"".join(render(PlaneStats({}), control(), watch_metrics(watches, 180.0))).decode()
    shown = {
        (sample.name.removeprefix("userspace_proxy_"), sample.labels.get("kind", "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    counts = ("watch_events_total", "watch_restarts_total", "watch_relists_total", "watch_expired_total")
    assert [shown[name, "services"] for name in counts] == [1, 2, 3, 4]
    assert shown["watch_last_heard_age_seconds", "services"] == pytest.approx(5, abs=2)
    assert shown["watch_failing_seconds", "services"] == 0
    assert shown["watch_failing_seconds", "nodes"] == pytest.approx(400, abs=2)
    assert shown["degraded", ""] == 1


def test_metrics_of_kube_proxy_have_its_names() -> None:
    durations, programming = Histogram([0.1, 1.0]), Histogram([1.0])
    for seconds in (0.1, 0.5, 5.0):
        durations.observe(seconds)
    programming.observe(0.25)
    health = SyncHealth(1.0)
    health.updated_at, health.queued_at = {"IPv4": 7.0, "IPv6": 6.0}, {"IPv4": 8.0}
    changes = {"service": Changes(total=5, pending=1), "endpoint": Changes(total=9, pending=2)}
    answers, no_local = {("healthz", 200): 3}, {("internal", "IPv4"): 4}
    syncs = kubeproxy_metrics(durations, {"IPv4": programming}, health, changes, answers, no_local)
    lines = b"".join(render(PlaneStats({}), control(), syncs)).decode().splitlines()

    assert {
        'kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="0.1"} 1.0',
        'kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="1"} 2.0',
        'kubeproxy_sync_proxy_rules_duration_seconds_bucket{ip_family="IPv4",le="+Inf"} 3.0',
        'kubeproxy_sync_proxy_rules_duration_seconds_sum{ip_family="IPv4"} 5.6',
        'kubeproxy_network_programming_duration_seconds_bucket{ip_family="IPv4",le="1"} 1.0',
        'kubeproxy_network_programming_duration_seconds_count{ip_family="IPv4"} 1.0',
        'kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family="IPv4"} 7.0',
        'kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds{ip_family="IPv4"} 8.0',
        "kubeproxy_sync_proxy_rules_service_changes_total 5.0",
        "kubeproxy_sync_proxy_rules_service_changes_pending 1.0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total 9.0",
        "kubeproxy_sync_proxy_rules_endpoint_changes_pending 2.0",
        'kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="internal"} 4.0',
        'kubeproxy_proxy_healthz_total{code="200"} 3.0',
    } <= set(lines)


def test_a_proxy_without_services_can_be_scraped() -> None:
    assert samples(PlaneStats({}), control())["userspace_proxy_service_ports",] == 0


def test_each_metric_is_exposed_once_and_with_help() -> None:
    text = b"".join(render(PlaneStats({TCP: Counters(), UDP: Counters()}), control())).decode()

    helped = [line.split()[2] for line in text.splitlines() if line.startswith("# HELP")]
    assert len(helped) == len(set(helped))
    assert all(name.startswith("userspace_proxy_") for name in helped)
