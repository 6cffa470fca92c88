"""Metrics under kube-proxy's names where the meaning is the same, so that its dashboards and alerts keep working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from userspace_proxy.model.histogram import Histogram


class ChangeStats(Protocol):
    """Counts of changes: all, and those that no sync has applied yet."""

    @property
    def total(self) -> int: ...

    @property
    def pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SyncStats:
    """The data of kube-proxy's sync metrics.

    ``synced_at``, ``queued_at``: wall-clock seconds of the last sync and of the last queued change, by IP family.
    ``programming``: time from the change of a pod until traffic follows it, by IP family. ``changes``: of Services and
    endpoints. ``answers``: by path and status. ``no_local``: service ports with policy Local that have no endpoint on
    this node, by policy and family.
    """

    durations: Histogram
    programming: Mapping[str, Histogram]
    synced_at: Mapping[str, float] = field(default_factory=dict)
    queued_at: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, ChangeStats] = field(default_factory=dict)
    answers: Mapping[tuple[str, int], int] = field(default_factory=dict)
    no_local: Mapping[tuple[str, str], int] = field(default_factory=dict)


class KubeProxyMetrics(Collector):
    """Collects `SyncStats` for one scrape."""

    def __init__(self, stats: SyncStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        durations = HistogramMetricFamily(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "how long a sync took; one sync is for both IP families",
            labels=["ip_family"],
        )
        programming = HistogramMetricFamily(
            "kubeproxy_network_programming_duration_seconds",
            "from the change of a pod or a Service until traffic follows it",
            labels=["ip_family"],
        )
        for family, histogram in stats.programming.items():
            durations.add_metric([family], stats.durations.buckets(), stats.durations.total_s)
            programming.add_metric([family], histogram.buckets(), histogram.total_s)
        yield durations
        yield programming
        for name, text, at in (
            ("last_timestamp_seconds", "when the last sync succeeded", stats.synced_at),
            ("last_queued_timestamp_seconds", "when a change was last queued for a sync", stats.queued_at),
        ):
            moments = GaugeMetricFamily(f"kubeproxy_sync_proxy_rules_{name}", text, labels=["ip_family"])
            for family in stats.programming:
                moments.add_metric([family], at.get(family, 0.0))
            yield moments
        for what, changes in stats.changes.items():
            name, of_what = f"kubeproxy_sync_proxy_rules_{what}_changes", f"changes of {what}s"
            yield CounterMetricFamily(name, f"{of_what} received", value=changes.total)
            yield GaugeMetricFamily(f"{name}_pending", f"{of_what} that no sync has applied yet", value=changes.pending)
        no_local = GaugeMetricFamily(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "service ports with endpoints, none of them on this node, where traffic must stay on it",
            labels=["traffic_policy", "ip_family"],
        )
        for (policy, family), count in stats.no_local.items():
            no_local.add_metric([policy, family], count)
        yield no_local
        for path in ("healthz", "livez"):
            answered = CounterMetricFamily(f"kubeproxy_proxy_{path}", f"answers at /{path}", labels=["code"])
            for (of, status), count in stats.answers.items():
                if of == path:
                    answered.add_metric([str(status)], count)
            yield answered
