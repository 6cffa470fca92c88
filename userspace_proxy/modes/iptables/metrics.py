"""Metrics of iptables mode, under kube-proxy's names."""

from collections.abc import Iterator, Mapping

from prometheus_client.core import Metric

from userspace_proxy.admin.families import by_family, family
from userspace_proxy.model.loads import Loads
from userspace_proxy.modes.kernel_metrics import SYNC, refused_loads


def iptables_metrics(loads: Mapping[str, Loads]) -> Iterator[Metric]:
    """Yield the numbers of rules, by table and IP family, and of loads that the kernel refused."""
    for name, text, rules in (
        ("total", "desired rules", {ip_family: each.rules for ip_family, each in loads.items()}),
        ("last", "rules that the last load wrote", {ip_family: each.written for ip_family, each in loads.items()}),
    ):
        counts = (((table, of), count) for of, by_table in rules.items() for table, count in by_table.items())
        yield family(f"{SYNC}_iptables_{name}", text, ("table", "ip_family"), counts, rises=False)
    yield refused_loads("iptables_restore_failures", loads)
    refused = {ip_family: each.refused_changes for ip_family, each in loads.items()}
    yield by_family(f"{SYNC}_iptables_partial_restore_failures", "of these, loads of changes only", refused)
