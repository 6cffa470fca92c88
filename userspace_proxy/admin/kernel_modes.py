"""Metrics of kernel modes, under kube-proxy's names where the meaning is the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.loads import Loads

_SYNC = "kubeproxy_sync_proxy_rules"


@dataclass(frozen=True, slots=True)
class KernelModeStats:
    """Counters of a kernel mode, by IP family. ``loads`` is empty if the mode counts none.

    ``conntrack``: durations of searches for stale UDP flows, for both families. ``forgotten``: stale flows deleted.
    """

    mode: str
    loads: Mapping[str, Loads]
    conntrack: Histogram
    forgotten: Mapping[str, int] = field(default_factory=dict)


class KernelModeMetrics(Collector):
    """Collects `KernelModeStats` for one scrape."""

    def __init__(self, stats: KernelModeStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        loads = self._stats.loads
        if not loads:
            return
        yield _durations("sync_full_proxy_rules", "loads of all rules", {f: each.whole for f, each in loads.items()})
        yield _durations(
            "sync_partial_proxy_rules", "loads of what differed", {f: each.changes for f, each in loads.items()}
        )
        conntrack = dict.fromkeys(loads, self._stats.conntrack)
        yield _durations("conntrack_reconciler_sync", "searches for stale UDP flows, of both IP families", conntrack)
        yield _by_family(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "stale UDP flows deleted from conntrack",
            {family: self._stats.forgotten.get(family, 0) for family in loads},
        )
        yield from self._of_iptables() if self._stats.mode == "iptables" else self._of_nftables()

    def _of_iptables(self) -> Iterator[Metric]:
        loads = self._stats.loads
        for name, text, rules in (
            ("total", "desired rules", {family: each.rules for family, each in loads.items()}),
            ("last", "rules that the last load wrote", {family: each.written for family, each in loads.items()}),
        ):
            gauge = GaugeMetricFamily(f"{_SYNC}_iptables_{name}", text, labels=["table", "ip_family"])
            for family, by_table in rules.items():
                for table, count in by_table.items():
                    gauge.add_metric([table, family], count)
            yield gauge
        refused = {family: each.refused for family, each in loads.items()}
        yield _by_family(f"{_SYNC}_iptables_restore_failures", "loads that the kernel refused", refused)
        refused = {family: each.refused_changes for family, each in loads.items()}
        yield _by_family(f"{_SYNC}_iptables_partial_restore_failures", "of these, loads of what differed", refused)

    def _of_nftables(self) -> Iterator[Metric]:
        refused = {family: each.refused for family, each in self._stats.loads.items()}
        yield _by_family(f"{_SYNC}_nftables_sync_failures", "loads that the kernel refused", refused)


def _durations(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    metric = HistogramMetricFamily(f"kubeproxy_{name}_duration_seconds", f"how long {text} took", labels=["ip_family"])
    for family, histogram in histograms.items():
        metric.add_metric([family], histogram.buckets(), histogram.total_s)
    return metric


def _by_family(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    metric = CounterMetricFamily(name, text, labels=["ip_family"])
    for family, count in counts.items():
        metric.add_metric([family], count)
    return metric
