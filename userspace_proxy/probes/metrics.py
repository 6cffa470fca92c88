"""Prometheus metrics of active health checks. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import ServicePortName

RESULTS = ("success", "failure", "timeout", "skipped")


@dataclass(slots=True)
class ProbeStats:
    """Counts of probes by result, how long successful ones took, and how late the last one began."""

    results: dict[str, int] = field(default_factory=lambda: dict.fromkeys(RESULTS, 0))
    durations: Histogram = field(default_factory=lambda: Histogram(SYNC_BOUNDS_S))
    targets: int = 0
    late_s: float = 0.0


def probe_metrics(stats: ProbeStats, unhealthy: Mapping[ServicePortName, int]) -> Iterator[Metric]:
    """Yield the metrics of *stats*, and the number of unhealthy endpoints of each service port with a check."""
    gauge = GaugeMetricFamily(
        "userspace_proxy_unhealthy_endpoints",
        "endpoints whose probes failed, of a service port with a health check",
        labels=["namespace", "service", "port", "protocol"],
    )
    for name, count in unhealthy.items():
        gauge.add_metric([name.service.namespace, name.service.name, name.port_name, str(name.protocol)], count)
    yield gauge
    yield GaugeMetricFamily("userspace_proxy_probed_endpoints", "endpoints that are probed", value=stats.targets)
    counts = CounterMetricFamily("userspace_proxy_probes", "probes of endpoints, by result", labels=["result"])
    for result, count in stats.results.items():
        counts.add_metric([result], count)
    yield counts
    yield HistogramMetricFamily(
        "userspace_proxy_probe_duration_seconds",
        "how long probes took to succeed",
        stats.durations.buckets(),
        stats.durations.total_s,
    )
    text = "how late the last probe began; much, if this node has too many"
    yield GaugeMetricFamily("userspace_proxy_probe_delay_seconds", text, value=stats.late_s)
