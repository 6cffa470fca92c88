"""Metrics by kube-proxy's own names, where the meaning is the same: its dashboards and alerts go on working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from userspace_proxy.model.histogram import Histogram


@dataclass(slots=True)
class SyncStats:
    """What kube-proxy tells of its syncs: durations, and wall-clock seconds of the last one and the last wish for one.

    ``programming``: by IP family, from the change of a pod until traffic follows it. ``answers``: by path and status.
    """

    durations: Histogram
    programming: Mapping[str, Histogram]
    synced_at: float = 0.0
    queued_at: float = 0.0
    answers: Mapping[tuple[str, int], int] = field(default_factory=dict)


class KubeProxyMetrics(Collector):
    """One scrape of them."""

    def __init__(self, stats: SyncStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats
        yield HistogramMetricFamily(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "how long a sync took, both IP families in one",
            buckets=stats.durations.buckets(),
            sum_value=stats.durations.total_s,
        )
        programming = HistogramMetricFamily(
            "kubeproxy_network_programming_duration_seconds",
            "from the change of a pod or a Service until traffic follows it",
            labels=["ip_family"],
        )
        for family, histogram in stats.programming.items():
            programming.add_metric([family], histogram.buckets(), histogram.total_s)
        yield programming
        for name, text, value in (
            ("last_timestamp_seconds", "when the last sync succeeded", stats.synced_at),
            ("last_queued_timestamp_seconds", "when a sync was last wished for", stats.queued_at),
        ):
            yield GaugeMetricFamily(f"kubeproxy_sync_proxy_rules_{name}", text, value=value)
        for path in ("healthz", "livez"):
            answered = CounterMetricFamily(f"kubeproxy_proxy_{path}", f"answers at /{path}", labels=["code"])
            for (of, status), count in stats.answers.items():
                if of == path:
                    answered.add_metric([str(status)], count)
            yield answered
