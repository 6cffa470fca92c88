"""Metrics of kernel modes, under kube-proxy's names where the meaning is the same.

The metrics that only one mode has come from its rules (`KernelRules.metrics`).
"""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from userspace_proxy.admin.families import by_family, durations
from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.loads import Loads

SYNC = "kubeproxy_sync_proxy_rules"


def kernel_metrics(loads: Mapping[str, Loads], conntrack: Histogram, forgotten: Mapping[str, int]) -> Iterator[Metric]:
    """Yield the metrics that every kernel mode has, by IP family.

    *conntrack*: durations of searches for stale UDP flows, for both families. *forgotten*: stale flows deleted.
    """
    for name, text, histograms in (
        ("sync_full_proxy_rules", "loads of all rules", {family: each.whole for family, each in loads.items()}),
        ("sync_partial_proxy_rules", "loads of changes only", {family: each.changes for family, each in loads.items()}),
        ("conntrack_reconciler_sync", "searches for stale UDP flows of both families", dict.fromkeys(loads, conntrack)),
    ):
        yield durations(f"kubeproxy_{name}_duration_seconds", f"how long {text} took", histograms)
    yield by_family(
        "kubeproxy_conntrack_reconciler_deleted_entries",
        "stale UDP flows deleted from conntrack",
        {family: forgotten.get(family, 0) for family in loads},
    )


def refused_loads(name: str, loads: Mapping[str, Loads]) -> Metric:
    """Return the counter *name* of loads that the kernel refused."""
    refused = {family: each.refused for family, each in loads.items()}
    return by_family(f"{SYNC}_{name}", "loads that the kernel refused", refused)
