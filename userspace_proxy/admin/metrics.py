"""Prometheus metrics. The data plane increments ints; a scrape collects them here."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from userspace_proxy import __version__
from userspace_proxy.admin.families import by_family, durations, family, single
from userspace_proxy.model.counters import ControlStats, Counters, EndpointCounters, PlaneStats, metrics_of
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.sync_health import FamilyHealth, SyncHealth
from userspace_proxy.model.watch_stats import WatchStats

_LABELS = ("namespace", "service", "port", "protocol")
# Time series of one endpoint: all of its metrics but the two of the other protocol.
SERIES_AN_ENDPOINT = sum(1 for _ in metrics_of(EndpointCounters)) - 2


def _plane_metrics(plane: PlaneStats) -> Iterator[Metric]:
    services = [(_labels(name), counters) for name, counters in plane.services.items()]
    for metric, field in metrics_of(Counters):
        values = _values(services, metric.name, field)
        yield family(f"userspace_proxy_{metric.name}", metric.text, _LABELS, values, rises=metric.rises)
    endpoints = [
        ((*_labels(name), join_address(*address)), counters)
        for name, of_service_port in plane.endpoints.items()
        for address, counters in of_service_port.items()
    ]
    for metric, field in metrics_of(EndpointCounters):
        name, labels = f"userspace_proxy_endpoint_{metric.name}", (*_LABELS, "endpoint")
        yield family(name, metric.text, labels, _values(endpoints, metric.name, field), rises=metric.rises)


def _single_metrics(stats: PlaneStats | ControlStats) -> Iterator[Metric]:
    for metric, field in metrics_of(type(stats)):
        yield single(f"userspace_proxy_{metric.name}", metric.text, getattr(stats, field), rises=metric.rises)


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


class ChangeStats(Protocol):
    """Counts of changes: all, and those that no sync has applied yet."""

    @property
    def total(self) -> int: ...

    @property
    def pending(self) -> int: ...


def kubeproxy_metrics(
    syncs: Histogram,
    programming: Mapping[str, Histogram],
    sync_health: SyncHealth,
    changes: Mapping[str, ChangeStats],
    answers: Mapping[tuple[str, int], int],
    no_local: Mapping[tuple[str, str], int],
) -> Iterator[Metric]:
    """Yield kube-proxy's sync metrics for one scrape.

    *syncs*: how long they took. *programming*: time from the change of a pod until traffic follows it, by IP family.
    *changes*: of Services and endpoints. *answers*: by path and status. *no_local*: service ports with policy Local
    that have no endpoint on this node, by policy and family.
    """
    prefix = "kubeproxy_sync_proxy_rules"
    of_both = dict.fromkeys(programming, syncs)
    yield durations(f"{prefix}_duration_seconds", "how long a sync took; one sync is for both IP families", of_both)
    yield durations(
        "kubeproxy_network_programming_duration_seconds",
        "from the change of a pod or a Service until traffic follows it",
        programming,
    )
    for name, text, at in (
        ("last_timestamp_seconds", "when the last sync succeeded", sync_health.updated_at),
        ("last_queued_timestamp_seconds", "when a change was last queued for a sync", sync_health.queued_at),
    ):
        seconds = {ip_family: at.get(ip_family, 0.0) for ip_family in programming}
        yield by_family(f"{prefix}_{name}", text, seconds, rises=False)
    for what, counts in changes.items():
        name, of_what = f"{prefix}_{what}_changes", f"changes of {what}s"
        yield single(name, f"{of_what} received", counts.total, rises=True)
        yield single(f"{name}_pending", f"{of_what} that no sync has applied yet", counts.pending, rises=False)
    yield family(
        f"{prefix}_no_local_endpoints_total",
        "service ports with endpoints, none of them on this node, where traffic must stay on it",
        ("traffic_policy", "ip_family"),
        no_local.items(),
        rises=False,
    )
    for path in ("healthz", "livez"):
        by_code = [((str(status),), count) for (of, status), count in answers.items() if of == path]
        yield family(f"kubeproxy_proxy_{path}", f"answers at /{path}", ("code",), by_code, rises=True)


def render(plane: PlaneStats, control: ControlStats, *others: Iterable[Metric]) -> Iterator[bytes]:
    """Yield the text of one scrape, metric by metric: for 10,000 Services the whole is 16 MB.

    *others*: metrics of further parts.
    """
    metrics = itertools.chain(
        _plane_metrics(plane),
        _single_metrics(plane),
        _single_metrics(control),
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
