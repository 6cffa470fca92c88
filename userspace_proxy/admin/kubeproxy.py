"""Metrics by kube-proxy's own names, where the meaning is the same: its dashboards and alerts go on working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from userspace_proxy.model.histogram import Histogram


class ChangeStats(Protocol):
    """Changes that were heard of: all of them, and those that no sync has brought yet."""

    @property
    def total(self) -> int: ...

    @property
    def pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SyncStats:
    """What kube-proxy tells of its syncs: durations, and wall-clock seconds of the last one and the last wish for one.

    ``programming``, ``synced_at``, ``queued_at``: by IP family. ``programming``: from the change of a pod until traffic
    follows it. ``changes``: of a service, of an endpoint. ``answers``: by path and status. ``no_local``: by policy and
    family, the service ports whose traffic has no endpoint on this node where it must stay on it.
    """

    durations: Histogram
    programming: Mapping[str, Histogram]
    synced_at: Mapping[str, float] = field(default_factory=dict)
    queued_at: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, ChangeStats] = field(default_factory=dict)
    answers: Mapping[tuple[str, int], int] = field(default_factory=dict)
    no_local: Mapping[tuple[str, str], int] = field(default_factory=dict)


class KubeProxyMetrics(Collector):
    """One scrape of them."""

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
            ("last_queued_timestamp_seconds", "when a sync was last wished for", stats.queued_at),
        ):
            moments = GaugeMetricFamily(f"kubeproxy_sync_proxy_rules_{name}", text, labels=["ip_family"])
            for family in stats.programming:
                moments.add_metric([family], at.get(family, 0.0))
            yield moments
        for what, changes in stats.changes.items():
            name, of_what = f"kubeproxy_sync_proxy_rules_{what}_changes", f"changes of {what}s"
            yield CounterMetricFamily(name, f"{of_what} that were heard of", value=changes.total)
            yield GaugeMetricFamily(f"{name}_pending", f"{of_what} that no sync has brought yet", value=changes.pending)
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
