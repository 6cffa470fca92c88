"""Prometheus metrics. The data plane increments ints; a scrape collects them here."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from userspace_proxy import __version__
from userspace_proxy.admin.kubeproxy import KubeProxyMetrics, SyncStats
from userspace_proxy.interfaces import Counters, EndpointCounters, PlaneStats, WatchStats
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.freshness import FamilyHealth
from userspace_proxy.model.names import ServicePortName


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
    (
        "limited_connections",
        "TCP connections reset because their client or their Service had too many open",
        "limited",
        True,
    ),
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


# Metrics for each kind that is watched at the API.
_WATCH_FAMILIES: tuple[tuple[str, str, Callable[[WatchStats, float], float], bool], ...] = (
    ("events", "events received for a kind", lambda watch, _: watch.events, True),
    ("restarts", "times a watch of a kind was restarted", lambda watch, _: watch.restarts, True),
    ("relists", "times all objects of a kind were listed", lambda watch, _: watch.relists, True),
    ("expired", "times the resource version of a watch had expired (410)", lambda watch, _: watch.expired, True),
    (
        "last_heard_age_seconds",
        "seconds since the last event or bookmark of a kind; a bookmark every minute is usual",
        lambda watch, now: float("inf") if watch.heard_at is None else now - watch.heard_at,
        False,
    ),
    (
        "failing_seconds",
        "seconds for which the watch of a kind has failed; 0 while it works",
        lambda watch, now: 0.0 if watch.failing_since is None else now - watch.failing_since,
        False,
    ),
)


class _Scrape(Collector):
    def __init__(
        self, plane: PlaneStats, control: ControlStats, watches: Sequence[WatchStats], degraded_after_s: float
    ) -> None:
        self._plane = plane
        self._control = control
        self._watches = watches
        self._degraded_after_s = degraded_after_s

    def collect(self) -> Iterator[Metric]:
        services = [(_labels(name), counters) for name, counters in self._plane.services.items()]
        for name, text, field, rises in _FAMILIES:
            yield _family(f"userspace_proxy_{name}", text, _LABELS, _values(services, name, field), rises=rises)
        endpoints = [
            ((*labels, join_address(*address)), counters)
            for labels, of_it in ((_labels(name), of_it) for name, of_it in self._plane.endpoints.items())
            for address, counters in of_it.items()
        ]
        for name, text, field, rises in _ENDPOINT_FAMILIES:
            values = _values(endpoints, name, field)
            yield _family(f"userspace_proxy_endpoint_{name}", text, (*_LABELS, "endpoint"), values, rises=rises)
        yield from self._single()
        if self._watches:
            yield from self._of_watches(time.time())

    def _of_watches(self, now: float) -> Iterator[Metric]:
        for name, text, value, rises in _WATCH_FAMILIES:
            family = (CounterMetricFamily if rises else GaugeMetricFamily)(
                f"userspace_proxy_watch_{name}", text, labels=["kind"]
            )
            for watch in self._watches:
                family.add_metric([watch.kind], value(watch, now))
            yield family
        yield GaugeMetricFamily(
            "userspace_proxy_degraded",
            "1 when the watch of a kind has failed for longer than --degraded-after",
            value=any(watch.is_dead(now, self._degraded_after_s) for watch in self._watches),
        )

    def _single(self) -> Iterator[Metric]:
        plane, control = self._plane, self._control
        for name, text, value, rises in (
            ("connections_open_all", "TCP connections open now, all service ports", plane.connections_open, False),
            (
                "hidden_endpoints",
                "endpoints without metrics of their own, because there are more than --metrics-endpoint-series allows",
                plane.hidden_endpoints,
                False,
            ),
            ("accept_pauses", "times accepting was paused because descriptors were short", plane.accept_paused, True),
            ("local_shortages", "times this host ran out of ports, descriptors or memory", plane.local_shortages, True),
            (
                "worker_restarts",
                "times a data-plane process died, hung or broke its channel, and was replaced",
                plane.worker_restarts,
                True,
            ),
            ("data_plane_failing", "1 while a data-plane process serves nothing", control.is_plane_failing, False),
            ("service_ports", "service ports that are served", control.service_ports, False),
            ("rule_loads", "rule loads that succeeded", control.rule_loads, True),
            (
                "rule_repairs",
                "times rules were loaded again because somebody else changed them",
                control.rule_repairs,
                True,
            ),
            (
                "rule_repair_failing_seconds",
                "seconds for which changed rules could not be loaded again; 0 while rules are intact",
                control.repair_failing_s,
                False,
            ),
            ("last_sync_timestamp_seconds", "when the last sync succeeded", control.last_sync_at, False),
            ("sync_failures", "syncs that failed; the previous state stayed in force", control.sync_failures, True),
            (
                "sync_failing_seconds",
                "seconds for which every sync has failed; 0 after a successful sync",
                control.sync_failing_s,
                False,
            ),
            ("object_problems", "objects and files that cannot be used as they are", control.problems, False),
            ("unopened_service_ports", "service ports without a listener", control.unopened, False),
            (
                "access_log_lines_dropped",
                "access-log lines dropped because they could not be written, or not fast enough",
                plane.access_lines_dropped,
                True,
            ),
            ("log_lines_dropped", "log lines dropped because stderr did not take them", plane.log_lines_dropped, True),
        ):
            family = (CounterMetricFamily if rises else GaugeMetricFamily)(f"userspace_proxy_{name}", text)
            family.add_metric([], value)
            yield family
        info = GaugeMetricFamily("userspace_proxy_build_info", "the version that runs", labels=["version"])
        info.add_metric([__version__], 1)
        yield info


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


def _family(
    name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], int]], *, rises: bool
) -> CounterMetricFamily | GaugeMetricFamily:
    make: Callable[..., CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily if rises else GaugeMetricFamily
    family = make(name, text, labels=labels)
    for of_one, value in values:
        family.add_metric(of_one, value)
    return family


class _Alone(Collector):
    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


def render(
    plane: PlaneStats,
    control: ControlStats,
    watches: Sequence[WatchStats] = (),
    degraded_after_s: float = 0.0,
    syncs: SyncStats | None = None,
    of_mode: Iterable[Metric] = (),
) -> Iterator[bytes]:
    """Yield the text of one scrape, metric by metric: for 10,000 Services the whole is 16 MB.

    *of_mode*: the metrics of the proxy mode in use that other modes do not have.
    """
    collectors: list[Collector] = [_Scrape(plane, control, watches, degraded_after_s)]
    if syncs is not None:
        collectors.append(KubeProxyMetrics(syncs))
    for family in itertools.chain(*(collector.collect() for collector in collectors), of_mode):
        yield generate_latest(_Alone(family))


def slis(families: Mapping[str, FamilyHealth]) -> bytes:
    """Return the body of /metrics/slis: health under the metric name that all Kubernetes components share."""
    registry = CollectorRegistry(auto_describe=False)
    health = Gauge("kubernetes_healthcheck", "1 when this check is passed", ["name", "type"], registry=registry)
    for family, of_it in families.items():
        for kind in ("healthz", "livez"):
            health.labels(f"sync-{family}", kind).set(of_it.healthy)
    return generate_latest(registry)
