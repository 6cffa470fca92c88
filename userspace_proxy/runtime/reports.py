"""Health and metrics, gathered from all parts of a running proxy."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy.admin import metrics as exposition
from userspace_proxy.admin.health_checks import ServiceHealthChecks
from userspace_proxy.admin.kubeproxy import SyncStats
from userspace_proxy.admin.metrics import SERIES_AN_ENDPOINT, ControlStats
from userspace_proxy.admin.server import Health
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.decode import is_eligible
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dns.metrics import dns_metrics
from userspace_proxy.dns.sink import ClusterDns
from userspace_proxy.interfaces import DataPlane, Proxier, Source
from userspace_proxy.logs import log_lines_dropped
from userspace_proxy.model.locality import without_local_endpoints
from userspace_proxy.probes.filter import HealthFilter
from userspace_proxy.sources.cached import CachedSource


@dataclass(frozen=True, slots=True)
class Reports:
    """Asks every part at each scrape. ``findings``: the faults that `check` finds in the manifests."""

    settings: Settings
    source: Source
    tracker: Tracker
    controller: Controller
    proxier: Proxier
    plane: DataPlane
    health_checks: ServiceHealthChecks
    health_filter: HealthFilter
    is_stopping: Callable[[], bool]
    findings: Callable[[], Sequence[str]] = list
    dns: ClusterDns | None = None

    def health(self) -> Health:
        controller, source, now = self.controller, self.source, time.time()
        # Unlike kube-proxy: a load balancer must not send traffic yet, and a DaemonSet's roll-out must wait.
        waiting = "" if controller.ready.is_set() else "the first sync is not done"
        if self.is_stopping():
            waiting = "the proxy stops"
        failing = [
            f"since {time.strftime('%H:%M:%S', time.localtime(each.failing_since))}: {each.error}"
            for each in (controller, self.proxier.repairer)
            if each.failing_since is not None
        ]
        return Health(
            controller.sync_health.of_families(),
            waiting,
            "; ".join(failing),
            stopped=self.plane.failing,
            problems=[
                *source.problems.values(),
                *self.tracker.problems.values(),
                *(f"{name}: {why}" for name, why in {**self.proxier.unopened, **self.plane.unserved}.items()),
                *(f"{service}: {why}" for service, why in self.health_checks.failures.items()),
            ],
            findings=self.findings(),
            degraded=[
                *([source.stale] if isinstance(source, CachedSource) and source.stale else []),
                *(w.failure() for w in source.watches if w.is_dead(now, self.settings.degraded_after_s)),
            ],
            node_eligible=is_eligible(self.tracker.node) if self.settings.follows_cluster else None,
        )

    async def metrics(self, answers: Mapping[tuple[str, int], int]) -> AsyncIterator[bytes]:
        """Yield the text of one scrape. *answers*: counts of the answers of /healthz and /livez, by status."""
        controller, proxier, source = self.controller, self.proxier, self.source
        control = ControlStats(
            service_ports=proxier.service_ports,
            rule_loads=proxier.loads,
            rule_repairs=proxier.repairs,
            last_sync_at=controller.synced_at or 0.0,
            problems=len(source.problems) + len(self.tracker.problems),
            unopened=len({**proxier.unopened, **self.plane.unserved}),
            is_plane_failing=bool(self.plane.failing),
            sync_failures=controller.failures,
            sync_failing_s=_seconds_since(controller.failing_since),
            repair_failing_s=_seconds_since(proxier.repairer.failing_since),
        )
        syncs = SyncStats(
            controller.durations,
            controller.programming,
            synced_at=controller.sync_health.updated_at,
            queued_at=controller.sync_health.queued_at,
            changes=controller.changes,
            answers=dict(answers),
            no_local=without_local_endpoints(controller.synced),
        )
        plane = await self.plane.stats(self.settings.metrics_endpoint_series // SERIES_AN_ENDPOINT)
        plane.log_lines_dropped += log_lines_dropped()  # figures of this process
        degraded_after_s = self.settings.degraded_after_s
        of_dns = dns_metrics(await self.dns.counts(), self.dns.restarts) if self.dns is not None else ()
        of_others = itertools.chain(proxier.metrics(), self.health_filter.metrics(), of_dns)
        parts = exposition.render(plane, control, source.watches, degraded_after_s, syncs, of_others)
        # In a thread: 10,000 Services are 150,000 lines, and changes of endpoints need not wait for these.
        while (part := await asyncio.to_thread(next, parts, b"")) != b"":
            yield part


def _seconds_since(at: float | None) -> float:
    return 0.0 if at is None else time.time() - at
