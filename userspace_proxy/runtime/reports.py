"""Health and metrics, gathered from all parts of a running proxy."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy.admin.metrics import SERIES_AN_ENDPOINT, kubeproxy_metrics, render, watch_metrics
from userspace_proxy.admin.server import Health
from userspace_proxy.control.decode import is_eligible
from userspace_proxy.logs import log_lines_dropped
from userspace_proxy.model.counters import ControlStats
from userspace_proxy.model.locality import without_local_endpoints
from userspace_proxy.runtime.running import RunningProxy
from userspace_proxy.sources.cached import CachedSource


@dataclass(frozen=True, slots=True)
class Reports:
    """Asks every part of *proxy* at each scrape. ``findings``: the faults that `check` finds in the manifests."""

    proxy: RunningProxy
    is_stopping: Callable[[], bool]
    findings: Callable[[], Sequence[str]]

    def health(self) -> Health:
        proxy, controller, source, now = self.proxy, self.proxy.controller, self.proxy.source, time.time()
        # Unlike kube-proxy: a load balancer must not send traffic yet, and a DaemonSet's roll-out must wait.
        waiting = "" if controller.ready.is_set() else "the first sync is not done"
        if self.is_stopping():
            waiting = "the proxy stops"
        failing = [
            f"since {time.strftime('%H:%M:%S', time.localtime(each.failing_since))}: {each.error}"
            for each in (controller, proxy.proxier.repairer)
            if each.failing_since is not None
        ]
        return Health(
            controller.sync_health.of_families(),
            waiting,
            "; ".join(failing),
            stopped=proxy.plane.failing,
            problems=[
                *source.problems.values(),
                *proxy.tracker.problems.values(),
                *(f"{name}: {why}" for name, why in {**proxy.proxier.unopened, **proxy.plane.unserved}.items()),
                *(f"{service}: {why}" for service, why in proxy.health_checks.failures.items()),
            ],
            findings=self.findings(),
            degraded=[
                *([source.stale] if isinstance(source, CachedSource) and source.stale else []),
                *(w.failure() for w in source.watches if w.is_dead(now, proxy.settings.degraded_after_s)),
            ],
            node_eligible=is_eligible(proxy.tracker.node) if proxy.settings.follows_cluster else None,
        )

    async def metrics(self, answers: Mapping[tuple[str, int], int]) -> AsyncIterator[bytes]:
        """Yield the text of one scrape. *answers*: counts of the answers of /healthz and /livez, by status."""
        proxy, controller, proxier = self.proxy, self.proxy.controller, self.proxy.proxier
        settings = proxy.settings
        control = ControlStats(
            service_ports=proxier.service_ports,
            rule_loads=proxier.loads,
            rule_repairs=proxier.repairs,
            last_sync_at=controller.synced_at or 0.0,
            problems=len(proxy.source.problems) + len(proxy.tracker.problems),
            unopened=len({**proxier.unopened, **proxy.plane.unserved}),
            is_plane_failing=bool(proxy.plane.failing),
            sync_failures=controller.failures,
            sync_failing_s=_seconds_since(controller.failing_since),
            repair_failing_s=_seconds_since(proxier.repairer.failing_since),
        )
        plane = await proxy.plane.stats(settings.metrics_endpoint_series // SERIES_AN_ENDPOINT)
        plane.log_lines_dropped += log_lines_dropped()  # figures of this process
        parts = render(
            plane,
            control,
            watch_metrics(proxy.source.watches, settings.degraded_after_s),
            kubeproxy_metrics(
                controller.durations,
                controller.programming,
                controller.sync_health,
                controller.changes,
                dict(answers),
                without_local_endpoints(controller.synced),
            ),
            proxier.metrics(),
            proxy.health_filter.metrics(),
            await proxy.dns.metrics() if proxy.dns is not None else (),
        )
        # In a thread: 10,000 Services are 150,000 lines, and changes of endpoints need not wait for these.
        while (part := await asyncio.to_thread(next, parts, b"")) != b"":
            yield part


def _seconds_since(at: float | None) -> float:
    return 0.0 if at is None else time.time() - at
