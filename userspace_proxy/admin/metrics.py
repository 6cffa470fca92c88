"""Prometheus metrics. The data plane increments ints; a scrape collects them here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from userspace_proxy import __version__
from userspace_proxy.admin.families import family, single
from userspace_proxy.model.counters import Counters, EndpointCounters, PlaneStats
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.sync_health import FamilyHealth
from userspace_proxy.model.watch_stats import WatchStats


class ControlStats(NamedTuple):
    """The state of the control process."""

    service_ports: int
    rule_loads: int
    rule_repairs: int
    last_sync_at: float
    problems: int
    unopened: int
    is_plane_failing: bool = False
    sync_failures: int = 0
    sync_failing_s: float = 0.0
    repair_failing_s: float = 0.0


# Metric name, help text, field of Counters, and whether it only rises.
_FAMILIES = (
    ("endpoints", "endpoints that may take new traffic, as the cluster says", "endpoints", False),
    ("ejected_endpoints", "of these, the ones that are ejected now because they failed", "ejected", False),
    ("slow_start_endpoints", "endpoints in slow start, which get a part of their connections", "starting", False),
    ("connections", "TCP connections accepted for a service port", "accepted", True),
    ("open_connections", "TCP connections open now", "open", False),
    ("failed_connections", "TCP connections reset because no endpoint could be reached", "failed", True),
    ("unanswered_connections", "TCP connections that a backend reset before it sent a byte", "unanswered", True),
    ("removal_closed_connections", "TCP connections ended by on-endpoint-removal", "closed_by_removal", True),
    ("age_closed_connections", "TCP connections ended by max-connection-age", "closed_by_age", True),
    ("waiting_connections", "TCP connections that wait for an endpoint now", "waiting", False),
    ("waits_released_connections", "TCP connections for which an endpoint came", "waits_released", True),
    ("waits_expired_connections", "TCP connections for which no endpoint came in time", "waits_expired", True),
    ("waits_abandoned_connections", "TCP connections whose client left while it waited", "waits_abandoned", True),
    ("refused_connections", "TCP connections that came to a proxy port by another way than a portal", "refused", True),
    ("limited_connections", "TCP connections reset because their client or Service had too many", "limited", True),
    ("to_backends_bytes", "bytes from clients to backends", "bytes_to_backends", True),
    ("to_clients_bytes", "bytes from backends to clients", "bytes_to_clients", True),
    ("dial_failures", "attempts to reach an endpoint that failed", "dial_failures", True),
    ("port_exhaustions", "attempts for which every local port was in use", "port_exhaustions", True),
    ("refused_sources", "dials for which the kernel refused the client's address as source", "sources_refused", True),
    ("retries", "attempts after the first one of a connection or flow", "retries", True),
    ("ejections", "times an endpoint was ejected for a while", "ejections", True),
    ("affinity_pins", "clients that stay with an endpoint, by sessionAffinity", "pins", False),
    ("udp_flows", "UDP flows begun", "flows_total", True),
    ("udp_open_flows", "UDP flows now", "flows", False),
    ("udp_evicted_flows", "UDP flows evicted to make room for others", "flows_evicted", True),
    ("udp_dropped_datagrams", "datagrams dropped because they could not be forwarded", "datagrams_dropped", True),
)
_LABELS = ("namespace", "service", "port", "protocol")
# The same for each endpoint, with fields of EndpointCounters.
_ENDPOINT_FAMILIES = (
    ("connections", "TCP connections to an endpoint", "opened", True),
    ("open_connections", "TCP connections to an endpoint that are open now", "open", False),
    ("open_dials", "attempts to reach an endpoint that are under way", "dialling", False),
    ("to_backends_bytes", "bytes from clients to an endpoint", "bytes_to_backends", True),
    ("to_clients_bytes", "bytes from an endpoint to clients", "bytes_to_clients", True),
    ("dial_failures", "attempts to reach an endpoint that failed", "dial_failures", True),
    ("retries", "attempts to reach an endpoint after another one had failed", "retries", True),
    ("ejections", "times an endpoint was ejected for a while", "ejections", True),
    ("udp_flows", "UDP flows to an endpoint", "opened", True),
    ("udp_open_flows", "UDP flows to an endpoint now", "open", False),
)
# Time series of one endpoint: all of these but the two of the other protocol.
SERIES_AN_ENDPOINT = len(_ENDPOINT_FAMILIES) - 2


# Of the whole proxy: fields of PlaneStats.
_PLANE_METRICS = (
    ("connections_open_all", "TCP connections open now, all service ports", "connections_open", False),
    (
        "hidden_endpoints",
        "endpoints without metrics: more than --metrics-endpoint-series",
        "hidden_endpoints",
        False,
    ),
    ("accept_pauses", "times accepting was paused because descriptors were short", "accept_paused", True),
    ("local_shortages", "times this host ran out of ports, descriptors or memory", "local_shortages", True),
    ("worker_restarts", "times a data-plane process died or hung, and was replaced", "worker_restarts", True),
    ("access_log_lines_dropped", "access-log lines that were not written", "access_lines_dropped", True),
    ("log_lines_dropped", "log lines dropped because stderr did not take them", "log_lines_dropped", True),
)
# Fields of ControlStats.
_CONTROL_METRICS = (
    ("data_plane_failing", "1 while a data-plane process serves nothing", "is_plane_failing", False),
    ("service_ports", "service ports that are served", "service_ports", False),
    ("rule_loads", "rule loads that succeeded", "rule_loads", True),
    ("rule_repairs", "rule loads because another program had changed rules", "rule_repairs", True),
    ("rule_repair_failing_seconds", "seconds for which repairs of rules have failed", "repair_failing_s", False),
    ("last_sync_timestamp_seconds", "when the last sync succeeded", "last_sync_at", False),
    ("sync_failures", "syncs that failed; the previous state stayed in force", "sync_failures", True),
    ("sync_failing_seconds", "seconds for which every sync has failed", "sync_failing_s", False),
    ("object_problems", "objects and files that cannot be used as they are", "problems", False),
    ("unopened_service_ports", "service ports without a listener", "unopened", False),
)


def _plane_metrics(plane: PlaneStats) -> Iterator[Metric]:
    services = [(_labels(name), counters) for name, counters in plane.services.items()]
    for name, text, field, rises in _FAMILIES:
        yield family(f"userspace_proxy_{name}", text, _LABELS, _values(services, name, field), rises=rises)
    endpoints = [
        ((*_labels(name), join_address(*address)), counters)
        for name, of_service_port in plane.endpoints.items()
        for address, counters in of_service_port.items()
    ]
    for name, text, field, rises in _ENDPOINT_FAMILIES:
        values = _values(endpoints, name, field)
        yield family(f"userspace_proxy_endpoint_{name}", text, (*_LABELS, "endpoint"), values, rises=rises)


def _single_metrics(stats: PlaneStats | ControlStats, rows: Iterable[tuple[str, str, str, bool]]) -> Iterator[Metric]:
    for name, text, field, rises in rows:
        yield single(f"userspace_proxy_{name}", text, getattr(stats, field), rises=rises)


def watch_metrics(watches: Sequence[WatchStats], degraded_after_s: float) -> Iterator[Metric]:
    """Yield the metrics of *watches*, none for a source without any."""
    if not watches:
        return
    now = time.time()
    rows: list[tuple[str, str, Callable[[WatchStats], float], bool]] = [
        ("events", "events received for a kind", lambda watch: watch.events, True),
        ("restarts", "times a watch of a kind was restarted", lambda watch: watch.restarts, True),
        ("relists", "times all objects of a kind were listed", lambda watch: watch.relists, True),
        ("expired", "times the resource version of a watch had expired (410)", lambda watch: watch.expired, True),
        (
            "last_heard_age_seconds",
            "seconds since the last event or bookmark of a kind; a bookmark every minute is usual",
            lambda watch: float("inf") if watch.heard_at is None else now - watch.heard_at,
            False,
        ),
        (
            "failing_seconds",
            "seconds for which the watch of a kind has failed; 0 while it works",
            lambda watch: 0.0 if watch.failing_since is None else now - watch.failing_since,
            False,
        ),
    ]
    for name, text, value, rises in rows:
        values = [((watch.kind,), value(watch)) for watch in watches]
        yield family(f"userspace_proxy_watch_{name}", text, ("kind",), values, rises=rises)
    text = "1 when the watch of a kind has failed for longer than --degraded-after"
    is_degraded = any(watch.is_dead(now, degraded_after_s) for watch in watches)
    yield single("userspace_proxy_degraded", text, is_degraded, rises=False)


def _labels(name: ServicePortName) -> tuple[str, ...]:
    return name.service.namespace, name.service.name, name.port_name, str(name.protocol)


def _values(
    counted: Iterable[tuple[tuple[str, ...], Counters | EndpointCounters]], name: str, field: str
) -> Iterator[tuple[tuple[str, ...], int]]:
    """Yield labels and value of each metric, except metrics of TCP for UDP and of UDP for TCP."""
    for labels, counters in counted:
        if ("connections" in name and labels[3] == "UDP") or (name.startswith("udp_") and labels[3] == "TCP"):
            continue
        yield labels, getattr(counters, field)


class _OneFamily(Collector):
    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def render(plane: PlaneStats, control: ControlStats, *others: Iterable[Metric]) -> Iterator[bytes]:
    """Yield the text of one scrape, metric by metric: for 10,000 Services the whole is 16 MB.

    *others*: metrics of further parts.
    """
    metrics = itertools.chain(
        _plane_metrics(plane),
        _single_metrics(plane, _PLANE_METRICS),
        _single_metrics(control, _CONTROL_METRICS),
        [family("userspace_proxy_build_info", "the running version", ("version",), [((__version__,), 1)], rises=False)],
        *others,
    )
    for metric in metrics:
        yield generate_latest(_OneFamily(metric))


def slis(families: Mapping[str, FamilyHealth]) -> bytes:
    """Return the body of /metrics/slis: health under the metric name that all Kubernetes components share."""
    registry = CollectorRegistry(auto_describe=False)
    health = Gauge("kubernetes_healthcheck", "1 when this check is passed", ["name", "type"], registry=registry)
    for ip_family, of_it in families.items():
        for kind in ("healthz", "livez"):
            health.labels(f"sync-{ip_family}", kind).set(of_it.healthy)
    return generate_latest(registry)
