"""Answers of the control socket: what is served, by which endpoints, and over which connections."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from userspace_proxy import api
from userspace_proxy.control import decode
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.journal import Journal
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.interfaces import DataPlane
from userspace_proxy.model.answers import (
    ConnectionAnswer,
    Description,
    EndpointAnswer,
    EventAnswer,
    ServiceAnswer,
)
from userspace_proxy.model.details import DetailsRequest, EndpointDetails, ServicePortDetails
from userspace_proxy.model.endpoint import Address, Endpoint, join_address
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.probe import EndpointCondition, EndpointHealth
from userspace_proxy.model.service import ServicePort, portals
from userspace_proxy.modes.mode import Mode
from userspace_proxy.probes.filter import HealthFilter

CONNECTIONS_MAX = 1_000

Selected = Mapping[NamespacedName, list[ServicePort]]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Reads from the parts of a running proxy what they serve. Namespace or name "" stands for all."""

    mode: Mode
    tracker: Tracker
    controller: Controller
    plane: DataPlane
    health_filter: HealthFilter
    journal: Journal

    # ---- get

    def services(self, namespace: str, name: str) -> list[ServiceAnswer]:
        """Return the Services, also those that no proxy serves."""
        served, problems = self._served(namespace, name), self.tracker.problems
        known = ((at, service) for at, service in self.tracker.services.items() if _is_meant(at, namespace, name))
        return [self._service(at, service, served.get(at, []), problems.get(at, "")) for at, service in sorted(known)]

    async def endpoints(self, namespace: str, name: str) -> list[EndpointAnswer]:
        """Return the endpoints of every service port."""
        served = self._served(namespace, name)
        ports = [port for _, its in sorted(served.items()) for port in its]
        details = await self.plane.details(DetailsRequest(tuple(port.name for port in ports)))
        known = {of.name: of for of in details.service_ports}
        return [row for port in ports for row in self._endpoints(port, known.get(port.name))]

    async def connections(self, namespace: str, name: str) -> tuple[list[ConnectionAnswer], int]:
        """Return open connections and flows, the oldest first, and the number of those that are left out."""
        names = tuple(port.name for its in self._served(namespace, name).values() for port in its)
        if not names or self.mode.kernel_serves:
            return [], 0
        everything = not (namespace or name)
        details = await self.plane.details(DetailsRequest(() if everything else names, connections=CONNECTIONS_MAX))
        answers = [
            ConnectionAnswer(
                *c.service_port.service,
                c.service_port.port_name,
                c.service_port.protocol,
                join_address(*c.client[:2]),
                c.portal,
                "" if c.endpoint is None else join_address(*c.endpoint),
                c.why,
                c.age_s,
                c.bytes_to_backend,
                c.bytes_to_client,
            )
            for c in details.connections
        ]
        left_out = len(answers) - CONNECTIONS_MAX
        return answers[:CONNECTIONS_MAX], details.hidden_connections + max(left_out, 0)

    async def describe(self, name: NamespacedName) -> Description | None:
        """Return all that is known of one Service; None if there is none."""
        found = self.services(*name)
        if not found:
            return None
        ports = self._served(*name).get(name, [])
        endpoints = await self.endpoints(*name)
        events = [*self.journal.of(name)]
        for row in endpoints:
            if row.failed_at:
                ejected = "; it is ejected" if row.state == "ejected" else ""
                what = f"a dial of endpoint {row.address} failed: {row.last_failure}{ejected}"
                events.append(EventAnswer(row.failed_at, what))
            if row.since:
                events.append(EventAnswer(row.since, f"endpoint {row.address} is {row.state}: {row.reason}"))
        events.sort(key=lambda event: event.at)
        return Description(found[0], _facts(ports, self.mode), endpoints, events)

    # ---- parts

    def _served(self, namespace: str, name: str) -> dict[NamespacedName, list[ServicePort]]:
        served: dict[NamespacedName, list[ServicePort]] = defaultdict(list)
        for port_name, service_port in self.controller.synced.service_ports.items():
            if _is_meant(port_name.service, namespace, name):
                served[port_name.service].append(service_port)
        return served

    def _service(
        self, name: NamespacedName, service: api.Service, ports: list[ServicePort], problem: str
    ) -> ServiceAnswer:
        spec = service.spec or api.objects.ServiceSpec()
        if spec.type == "ExternalName":
            cluster_ips, external = [], [spec.external_name or ""]
        elif ports:
            cluster_ips = list(ports[0].cluster_ips)
            external = list(dict.fromkeys(ip for p in ports for ip in (*p.load_balancer_ips, *p.external_ips)))
        else:
            cluster_ips, external = ["None"] if decode.is_headless(service) else [], []
        shown = [f"{p.port}{f':{p.node_port}' if p.node_port else ''}/{p.name.protocol}" for p in ports]
        if not ports:
            shown = [f"{p.port}/{p.protocol or 'TCP'}" for p in spec.ports or ()]
        since = _timestamp(service.metadata.creation_timestamp) or self.tracker.since(name)
        kind = spec.type or "ClusterIP"
        return ServiceAnswer(*name, kind, cluster_ips, external, shown, since, dict(spec.selector or {}), problem)

    def _endpoints(self, port: ServicePort, details: ServicePortDetails | None) -> Iterator[EndpointAnswer]:
        seen = {of.address: of for of in details.endpoints} if details is not None else {}
        health, weights = self.health_filter.health(port.name), dict(port.weights)
        desired = self.tracker.endpoints_of(port.name)
        for endpoint in desired:
            of_plane = seen.get(endpoint.address, EndpointDetails(endpoint.address))
            verdict = health.get(endpoint.address)
            state, reason, since = condition(endpoint, of_plane, verdict)
            yield _endpoint_answer(port.name, of_plane, state, reason, since, endpoint.node_name, weights)
        addresses = {endpoint.address for endpoint in desired}
        for address, of_plane in seen.items():
            if address not in addresses:
                yield _endpoint_answer(port.name, of_plane, "removed", "it has open connections", 0.0, "", weights)


def condition(endpoint: Endpoint, seen: EndpointDetails, health: EndpointHealth | None) -> tuple[str, str, float]:
    """Return the state of *endpoint* in one word, the reason, and since when; the time is 0 if it is not known."""
    if endpoint.terminating:
        return "terminating", "the API says that it shuts down", 0.0
    if not endpoint.ready:
        return "not-ready", "the API says that it is not ready", 0.0
    if health is not None and health.condition is EndpointCondition.UNHEALTHY:
        return "unhealthy", health.reason, health.since
    if seen.ejected_until:
        return "ejected", seen.last_failure or "dials failed", 0.0
    return "ready", "", 0.0


def _endpoint_answer(
    name: ServicePortName,
    seen: EndpointDetails,
    state: str,
    reason: str,
    since: float,
    node: str | None,
    weights: Mapping[str, int],
) -> EndpointAnswer:
    return EndpointAnswer(
        *name.service,
        name.port_name,
        join_address(*seen.address),
        state,
        reason,
        since,
        seen.ejected_until,
        node or "",
        weights.get(seen.address[0], 1),
        seen.open,
        seen.opened,
        seen.pins,
        seen.last_failure,
        seen.failed_at,
        seen.share,
    )


def _facts(ports: list[ServicePort], mode: Mode) -> dict[str, str]:
    """Return the facts that all of *ports* have in common, and the portals of each."""
    facts = {"Mode": mode.name}
    for port in ports:
        title = f"Portals {port.name.port_name or port.port}/{port.name.protocol}"
        facts[title] = ", ".join(map(str, portals(port)))
    if ports:
        first = ports[0]
        affinity = first.affinity_timeout_s
        facts["Session Affinity"] = "None" if affinity is None else f"ClientIP, {affinity} s"
        facts["Internal Traffic Policy"] = "Local" if first.internal_local else "Cluster"
        facts["External Traffic Policy"] = "Local" if first.external_local else "Cluster"
        facts["Balancing"] = str(first.balance or "the mode's default")
        facts["Health Check"] = str(first.probe) if first.probe is not None else "none"
        if first.source_ranges:
            facts["Source Ranges"] = ", ".join(first.source_ranges)
    return facts


def _is_meant(name: NamespacedName, namespace: str, wanted: str) -> bool:
    return namespace in ("", name.namespace) and wanted in ("", name.name)


def _timestamp(text: str | None) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def by_address(details: ServicePortDetails | None) -> Mapping[Address, EndpointDetails]:
    """Return the endpoints of *details* by address."""
    return {of.address: of for of in details.endpoints} if details is not None else {}
