"""A scrape in which every metric there is has a value."""

from __future__ import annotations

import re
from typing import NamedTuple

from userspace_proxy.admin.metrics import kubeproxy_metrics, render, watch_metrics
from userspace_proxy.control.controller import Changes
from userspace_proxy.dns.sink import dns_metrics
from userspace_proxy.dns.wire import Counts
from userspace_proxy.model.counters import ControlStats, Counters, EndpointCounters, PlaneStats
from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.sync_health import FAMILY_NAMES, SyncHealth
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.modes.iptables.metrics import iptables_metrics
from userspace_proxy.modes.kernel_metrics import kernel_metrics, refused_loads
from userspace_proxy.probes.filter import probe_metrics
from userspace_proxy.probes.prober import ProbeStats


class Exposed(NamedTuple):
    """``labels``: sorted, without the bounds of histograms."""

    name: str
    type: str
    labels: tuple[str, ...]


def every_metric() -> str:
    """Return the text of a scrape that has every metric."""
    names = [ServicePortName(NamespacedName("shop", "web"), "http", protocol) for protocol in L4Protocol]
    plane = PlaneStats(
        {name: Counters() for name in names}, {name: {("10.0.0.1", 80): EndpointCounters()} for name in names}
    )
    watches = [WatchStats("services")]
    tables = {"nat": 1}
    loads = dict.fromkeys(FAMILY_NAMES, Loads(rules=tables, written=tables))
    scrapes = [
        b"".join(
            render(
                plane,
                ControlStats(),
                watch_metrics(watches, 1.0),
                kubeproxy_metrics(
                    Histogram([1.0]),
                    {family: Histogram([1.0]) for family in FAMILY_NAMES},
                    SyncHealth(1.0),
                    {"service": Changes(), "endpoint": Changes()},
                    {("healthz", 200): 1, ("livez", 200): 1},
                    {("internal", "IPv4"): 0},
                ),
                kernel_metrics(loads, Histogram([1.0]), {}),
                own,
            )
        ).decode()
        for own in (
            iptables_metrics(loads),
            [
                refused_loads("nftables_sync_failures", loads),
                *probe_metrics(ProbeStats(), {names[0]: 0}),
                *dns_metrics(Counts([("udp", "1", "A", "NOERROR", 1)]), 0),
            ],
        )
    ]
    return "".join(scrapes)


def exposed(text: str, *, whole: bool = True) -> list[Exposed]:
    """Return what *text* exposes, in its order. *whole*: every metric has a value."""
    types = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in types}
    seen = set()
    for name, said in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.MULTILINE):
        family = name if name in types else re.sub(r"_(bucket|sum|count)$", "", name)
        labels[family] |= set(re.findall(r'(\w+)="', said)) - {"le"}
        seen.add(family)
    assert seen == types.keys() or not whole, "a metric without a value"
    return [Exposed(name, types[name], tuple(sorted(labels[name]))) for name in types]
