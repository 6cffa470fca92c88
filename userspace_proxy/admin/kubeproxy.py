"""Metrics under kube-proxy's names where the meaning is the same, so that its dashboards and alerts keep working."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from prometheus_client.core import Metric

from userspace_proxy.admin.families import by_family, durations, family, single
from userspace_proxy.model.histogram import Histogram


class ChangeStats(Protocol):
    """Counts of changes: all, and those that no sync has applied yet."""

    @property
    def total(self) -> int: ...

    @property
    def pending(self) -> int: ...


@dataclass(frozen=True, slots=True)
class SyncStats:
    """The data of kube-proxy's sync metrics.

    ``synced_at``, ``queued_at``: wall-clock seconds of the last sync and of the last queued change, by IP family.
    ``programming``: time from the change of a pod until traffic follows it, by IP family. ``changes``: of Services and
    endpoints. ``answers``: by path and status. ``no_local``: service ports with policy Local that have no endpoint on
    this node, by policy and family.
    """

    durations: Histogram
    programming: Mapping[str, Histogram]
    synced_at: Mapping[str, float] = field(default_factory=dict)
    queued_at: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, ChangeStats] = field(default_factory=dict)
    answers: Mapping[tuple[str, int], int] = field(default_factory=dict)
    no_local: Mapping[tuple[str, str], int] = field(default_factory=dict)


def kubeproxy_metrics(stats: SyncStats) -> Iterator[Metric]:
    """Yield the metrics of *stats* for one scrape."""
    prefix = "kubeproxy_sync_proxy_rules"
    of_both = dict.fromkeys(stats.programming, stats.durations)
    yield durations(f"{prefix}_duration_seconds", "how long a sync took; one sync is for both IP families", of_both)
    yield durations(
        "kubeproxy_network_programming_duration_seconds",
        "from the change of a pod or a Service until traffic follows it",
        stats.programming,
    )
    for name, text, at in (
        ("last_timestamp_seconds", "when the last sync succeeded", stats.synced_at),
        ("last_queued_timestamp_seconds", "when a change was last queued for a sync", stats.queued_at),
    ):
        seconds = {ip_family: at.get(ip_family, 0.0) for ip_family in stats.programming}
        yield by_family(f"{prefix}_{name}", text, seconds, rises=False)
    for what, changes in stats.changes.items():
        name, of_what = f"{prefix}_{what}_changes", f"changes of {what}s"
        yield single(name, f"{of_what} received", changes.total, rises=True)
        yield single(f"{name}_pending", f"{of_what} that no sync has applied yet", changes.pending, rises=False)
    yield family(
        f"{prefix}_no_local_endpoints_total",
        "service ports with endpoints, none of them on this node, where traffic must stay on it",
        ("traffic_policy", "ip_family"),
        stats.no_local.items(),
        rises=False,
    )
    for path in ("healthz", "livez"):
        answers = [((str(status),), count) for (of, status), count in stats.answers.items() if of == path]
        yield family(f"kubeproxy_proxy_{path}", f"answers at /{path}", ("code",), answers, rises=True)
