"""Metrics of mode iptables, by kube-proxy's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import GaugeMetricFamily, Metric

from userspace_proxy.model.loads import Loads
from userspace_proxy.modes.kernel_metrics import SYNC, by_family, refused_loads


def iptables_metrics(loads: Mapping[str, Loads]) -> Iterator[Metric]:
    """Yield how many rules there are, by table and IP family, and how many loads the kernel refused."""
    for name, text, rules in (
        ("total", "desired rules", {family: each.rules for family, each in loads.items()}),
        ("last", "rules that the last load wrote", {family: each.written for family, each in loads.items()}),
    ):
        gauge = GaugeMetricFamily(f"{SYNC}_iptables_{name}", text, labels=["table", "ip_family"])
        for family, by_table in rules.items():
            for table, count in by_table.items():
                gauge.add_metric([table, family], count)
        yield gauge
    yield refused_loads("iptables_restore_failures", loads)
    refused = {family: each.refused_changes for family, each in loads.items()}
    yield by_family(f"{SYNC}_iptables_partial_restore_failures", "of these, loads of what differed", refused)
