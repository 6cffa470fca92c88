"""Desired state without its unhealthy endpoints, for every mode alike."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from userspace_proxy.model.endpoint import FAMILIES, Address, Endpoint, Family, family_of, join_address
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.probe import EndpointHealth, ProbeSpec
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.probes.prober import Prober, ProbeStats, Target

# Bound for the memory and the sockets that Services can make this node use. It has time for 1,000 probes a second.
TARGETS_MAX = 20_000
_USERS_SHOWN_MAX = 3

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Checked:
    """A service port with a health check: its endpoints, its targets by endpoint address, and its healthy endpoints."""

    service_port: ServicePort
    given: tuple[Endpoint, ...]
    node_name: str
    targets: dict[Address, Target]
    healthy: tuple[Endpoint, ...] = ()
    all_unhealthy: frozenset[Family] = frozenset()
    is_outdated: bool = True

    def is_of(self, service_port: ServicePort, given: tuple[Endpoint, ...], node_name: str) -> bool:
        return self.service_port is service_port and self.given is given and self.node_name == node_name


class HealthFilter:
    """Probes the endpoints of Services with a health check, and takes unhealthy ones out of desired state.

    *on_change*: called when desired state is to be filtered again. *warn*: called with the Service, a reason in
    CamelCase and a note if all endpoints of a service port are unhealthy.
    """

    def __init__(
        self,
        on_change: Callable[[], None],
        warn: Callable[[NamespacedName, str, str], None] = lambda _service, _reason, _note: None,
    ) -> None:
        self._on_change = on_change
        self._warn = warn
        self._prober = Prober(self._note_verdict)
        self._targets: dict[tuple[Address, ProbeSpec], Target] = {}
        self._checked: dict[ServicePortName, _Checked] = {}
        self._is_full = False
        self._seen: Mapping[ServicePortName, ServicePort] = {}
        self._probed: dict[ServicePortName, ServicePort] = {}

    def close(self) -> None:
        """Stop all probes. The last verdicts stay."""
        self._prober.close()

    def apply(self, desired: ProxyState) -> ProxyState:
        """Return *desired* without unhealthy endpoints. From now on, probe the endpoints of its service ports.

        An unhealthy endpoint is treated as removed: traffic policies, hints and the fall-back to terminating endpoints
        apply to the others. If all endpoints of a service port and an IP family are unhealthy, all of them are used,
        unless ``panic=off``.
        """
        if desired.service_ports is not self._seen:
            self._seen = desired.service_ports
            self._probed = {name: port for name, port in self._seen.items() if port.probe is not None}
        wanted = self._probed
        for name in self._checked.keys() - wanted.keys():
            self._leave(name, self._checked.pop(name).targets)
        if not wanted:
            return desired
        endpoints = dict(desired.endpoints)
        for name, service_port in wanted.items():
            checked, given = self._checked.get(name), endpoints[name]
            if checked is None or not checked.is_of(service_port, given, desired.node.name):
                checked = self._check(service_port, given, desired.node.name)
            if checked.is_outdated:
                self._filter(checked)
            endpoints[name] = checked.healthy
        return replace(desired, endpoints=MappingProxyType(endpoints))

    def health(self, name: ServicePortName) -> Mapping[Address, EndpointHealth]:
        """Return the health of the endpoints of *name* that are probed."""
        checked = self._checked.get(name)
        return {address: target.health for address, target in checked.targets.items()} if checked else {}

    # ---- what is probed

    def _check(self, service_port: ServicePort, given: tuple[Endpoint, ...], node_name: str) -> _Checked:
        """Probe those of *given* that may take traffic from this node. Targets that stay keep their state."""
        assert service_port.probe is not None
        name, probe = service_port.name, service_port.probe
        spec = replace(probe, panic=True)  # it concerns the verdicts' use, not the probes
        is_local = service_port.internal_local and not service_port.is_externally_accessible
        targets: dict[Address, Target] = {}
        for endpoint in given:
            is_usable = endpoint.ready or (endpoint.serving and endpoint.terminating)
            is_here = not is_local or endpoint.node_name == node_name
            address = endpoint.ip, probe.port or endpoint.port
            if is_usable and is_here and (target := self._target(address, spec)) is not None:
                targets[endpoint.address] = target
                target.users.add(name)
        checked = _Checked(service_port, given, node_name, targets)
        if (before := self._checked.get(name)) is not None:
            kept = set(targets.values())
            self._leave(name, {address: t for address, t in before.targets.items() if t not in kept})
            checked.all_unhealthy = before.all_unhealthy
        self._checked[name] = checked
        return checked

    def _target(self, address: Address, spec: ProbeSpec) -> Target | None:
        """Return the target that probes *address* by *spec*, a new one if needed, or None at the limit."""
        if (address, spec) not in self._targets and not self._is_at_limit():
            self._targets[address, spec] = self._prober.add(address, spec)
        return self._targets.get((address, spec))

    def _is_at_limit(self) -> bool:
        was_full, self._is_full = self._is_full, len(self._targets) >= TARGETS_MAX
        if self._is_full and not was_full:
            log.warning("more than %d endpoints are to be probed; the others count as healthy", TARGETS_MAX)
        return self._is_full

    def _leave(self, name: ServicePortName, targets: Mapping[Address, Target]) -> None:
        for target in set(targets.values()):
            target.users.discard(name)
            if not target.users:
                del self._targets[target.address, target.spec]
                self._prober.remove(target)

    # ---- verdicts

    def _note_verdict(self, target: Target) -> None:
        for name in target.users:
            self._checked[name].is_outdated = True
        shown = ", ".join(map(str, sorted(target.users)[:_USERS_SHOWN_MAX]))
        more = len(target.users) - _USERS_SHOWN_MAX
        log.log(
            logging.INFO if target.is_healthy else logging.WARNING,
            "%s%s: endpoint %s is %s: %s",
            shown,
            f" and {more} more" if more > 0 else "",
            join_address(*target.address),
            target.health.condition,
            target.health.reason,
        )
        self._on_change()

    def _filter(self, checked: _Checked) -> None:
        """Work out the endpoints of *checked* that are left; without unhealthy ones they stay the same object."""
        checked.is_outdated = False
        unhealthy = {address for address, target in checked.targets.items() if not target.is_healthy}
        probed = {family: {a for a in checked.targets if family_of(a[0]) == family} for family in FAMILIES}
        all_unhealthy = frozenset(family for family, its in probed.items() if its and its <= unhealthy)
        probe = checked.service_port.probe
        panics = all_unhealthy if probe is not None and probe.panic else frozenset()
        checked.healthy = checked.given
        if any(family_of(ip) not in panics for ip, _ in unhealthy):
            checked.healthy = tuple(e for e in checked.given if e.address not in unhealthy or family_of(e.ip) in panics)
        self._tell_all_unhealthy(checked, all_unhealthy, "none is used, by panic=off" if not panics else "all are used")

    def _tell_all_unhealthy(self, checked: _Checked, families: frozenset[Family], effect: str) -> None:
        before, checked.all_unhealthy = checked.all_unhealthy, families
        name = checked.service_port.name
        for family in sorted(families - before):
            note = f"every IPv{family} endpoint of {name} is unhealthy; {effect}"
            log.warning("%s", note)
            self._warn(name.service, "EndpointsUnhealthy", note)
        for family in sorted(before - families):
            log.info("an IPv%d endpoint of %s is healthy again", family, name)

    def metrics(self) -> list[Metric]:
        """Return the metrics of all probes and verdicts now."""
        unhealthy = {
            name: sum(not target.is_healthy for target in checked.targets.values())
            for name, checked in self._checked.items()
        }
        return list(probe_metrics(self._prober.stats, unhealthy))


def probe_metrics(stats: ProbeStats, unhealthy: Mapping[ServicePortName, int]) -> Iterator[Metric]:
    """Yield the metrics of *stats*, and the number of unhealthy endpoints of each service port with a check."""
    gauge = GaugeMetricFamily(
        "userspace_proxy_unhealthy_endpoints",
        "endpoints whose probes failed, of a service port with a health check",
        labels=["namespace", "service", "port", "protocol"],
    )
    for name, count in unhealthy.items():
        gauge.add_metric([name.service.namespace, name.service.name, name.port_name, str(name.protocol)], count)
    yield gauge
    yield GaugeMetricFamily("userspace_proxy_probed_endpoints", "endpoints that are probed", value=stats.targets)
    counts = CounterMetricFamily("userspace_proxy_probes", "probes of endpoints, by result", labels=["result"])
    for result, count in stats.results.items():
        counts.add_metric([result], count)
    yield counts
    yield HistogramMetricFamily(
        "userspace_proxy_probe_duration_seconds",
        "how long probes took to succeed",
        stats.durations.buckets(),
        stats.durations.total_s,
    )
    text = "how late the last probe began; much, if this node has too many"
    yield GaugeMetricFamily("userspace_proxy_probe_delay_seconds", text, value=stats.late_s)
