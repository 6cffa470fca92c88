"""Metrics of kernel modes, under kube-proxy's names where the meaning is the same.

What one mode alone has is yielded by its tables (`KernelRules.metrics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.loads import Loads

SYNC = "kubeproxy_sync_proxy_rules"


def kernel_metrics(loads: Mapping[str, Loads], conntrack: Histogram, forgotten: Mapping[str, int]) -> Iterator[Metric]:
    """Yield what every kernel mode tells, by IP family; nothing if the mode counts no *loads*.

    *conntrack*: durations of searches for stale UDP flows, for both families. *forgotten*: stale flows deleted.
    """
    if not loads:
        return
    yield _durations("sync_full_proxy_rules", "loads of all rules", {f: each.whole for f, each in loads.items()})
    yield _durations(
        "sync_partial_proxy_rules", "loads of what differed", {f: each.changes for f, each in loads.items()}
    )
    yield _durations(
        "conntrack_reconciler_sync",
        "searches for stale UDP flows, of both IP families",
        dict.fromkeys(loads, conntrack),
    )
    yield by_family(
        "kubeproxy_conntrack_reconciler_deleted_entries",
        "stale UDP flows deleted from conntrack",
        {family: forgotten.get(family, 0) for family in loads},
    )


def refused_loads(name: str, loads: Mapping[str, Loads]) -> Metric:
    """Return the counter *name* of loads that the kernel refused."""
    refused = {family: each.refused for family, each in loads.items()}
    return by_family(f"{SYNC}_{name}", "loads that the kernel refused", refused)


def by_family(name: str, text: str, counts: Mapping[str, int]) -> Metric:
    """Return the counter *name* with a value for each IP family."""
    metric = CounterMetricFamily(name, text, labels=["ip_family"])
    for family, count in counts.items():
        metric.add_metric([family], count)
    return metric


def _durations(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    metric = HistogramMetricFamily(f"kubeproxy_{name}_duration_seconds", f"how long {text} took", labels=["ip_family"])
    for family, histogram in histograms.items():
        metric.add_metric([family], histogram.buckets(), histogram.total_s)
    return metric
