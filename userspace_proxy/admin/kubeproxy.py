"""Metrics under kube-proxy's names where the meaning is the same, so that its dashboards and alerts keep working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import Metric

from userspace_proxy.admin.families import by_family, durations, family, single
from userspace_proxy.model.histogram import Histogram
from userspace_proxy.model.sync_health import SyncHealth


class ChangeStats(Protocol):
    """Counts of changes: all, and those that no sync has applied yet."""

    @property
    def total(self) -> int: ...

    @property
    def pending(self) -> int: ...


def kubeproxy_metrics(
    syncs: Histogram,
    programming: Mapping[str, Histogram],
    sync_health: SyncHealth,
    changes: Mapping[str, ChangeStats],
    answers: Mapping[tuple[str, int], int],
    no_local: Mapping[tuple[str, str], int],
) -> Iterator[Metric]:
    """Yield kube-proxy's sync metrics for one scrape.

    *syncs*: how long they took. *programming*: time from the change of a pod until traffic follows it, by IP family.
    *changes*: of Services and endpoints. *answers*: by path and status. *no_local*: service ports with policy Local
    that have no endpoint on this node, by policy and family.
    """
    prefix = "kubeproxy_sync_proxy_rules"
    of_both = dict.fromkeys(programming, syncs)
    yield durations(f"{prefix}_duration_seconds", "how long a sync took; one sync is for both IP families", of_both)
    yield durations(
        "kubeproxy_network_programming_duration_seconds",
        "from the change of a pod or a Service until traffic follows it",
        programming,
    )
    for name, text, at in (
        ("last_timestamp_seconds", "when the last sync succeeded", sync_health.updated_at),
        ("last_queued_timestamp_seconds", "when a change was last queued for a sync", sync_health.queued_at),
    ):
        seconds = {ip_family: at.get(ip_family, 0.0) for ip_family in programming}
        yield by_family(f"{prefix}_{name}", text, seconds, rises=False)
    for what, counts in changes.items():
        name, of_what = f"{prefix}_{what}_changes", f"changes of {what}s"
        yield single(name, f"{of_what} received", counts.total, rises=True)
        yield single(f"{name}_pending", f"{of_what} that no sync has applied yet", counts.pending, rises=False)
    yield family(
        f"{prefix}_no_local_endpoints_total",
        "service ports with endpoints, none of them on this node, where traffic must stay on it",
        ("traffic_policy", "ip_family"),
        no_local.items(),
        rises=False,
    )
    for path in ("healthz", "livez"):
        by_code = [((str(status),), count) for (of, status), count in answers.items() if of == path]
        yield family(f"kubeproxy_proxy_{path}", f"answers at /{path}", ("code",), by_code, rises=True)
