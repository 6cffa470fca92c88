"""Answers of the control socket: what is served, by which endpoints, and over which connections."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime

from userspace_proxy import api
from userspace_proxy.admin.control_socket import Question
from userspace_proxy.control import decode
from userspace_proxy.control.pod_names import environment, hosts_lines, known_services
from userspace_proxy.model.answers import ConnectionAnswer, Description, EndpointAnswer, EventAnswer, ServiceAnswer
from userspace_proxy.model.details import DetailsRequest, EndpointDetails, ServicePortDetails
from userspace_proxy.model.endpoint import Address, Endpoint, join_address
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.probe import EndpointCondition, EndpointHealth
from userspace_proxy.model.service import ServicePort, portals
from userspace_proxy.modes.mode import Mode
from userspace_proxy.runtime.running import RunningProxy

CONNECTIONS_MAX = 1_000
DEFAULT_NAMESPACE = "default"

Parameters = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Inspection:
    """Answers questions about what *proxy* serves. Without a namespace or a name, an answer covers all of them."""

    proxy: RunningProxy

    def questions(self) -> dict[str, Question]:
        """Return the questions of `get`, `describe`, `env` and `names`: path -> function of the parameters."""
        return {
            "services": self.services,
            "endpoints": self.endpoints,
            "connections": self.connections,
            "description": self.describe,
            "env": self.environment,
            "names": self.hosts_lines,
        }

    async def services(self, given: Parameters) -> list[ServiceAnswer]:
        """Return the Services, also those that no proxy serves."""
        tracker, served = self.proxy.tracker, self._served(given)
        return [
            self._service(name, service, served.get(name, []), tracker.problems.get(name, ""))
            for name, service in sorted(tracker.services.items())
            if _is_selected(name, given)
        ]

    async def endpoints(self, given: Parameters) -> list[EndpointAnswer]:
        """Return the endpoints of the selected service ports, or of all if *given* selects none."""
        ports = [port for _, its in sorted(self._served(given).items()) for port in its]
        details = await self.proxy.plane.details(DetailsRequest(tuple(port.name for port in ports)))
        by_name = {of.name: of for of in details.service_ports}
        return [row for port in ports for row in self._endpoints(port, by_name.get(port.name))]

    async def connections(self, given: Parameters) -> dict[str, object]:
        """Return open connections and flows, the oldest first, and the number of those that are left out."""
        names = tuple(port.name for its in self._served(given).values() for port in its)
        if not names or self.proxy.mode.kernel_serves:
            return {"items": [], "hidden": 0}
        is_selection = bool(given.get("namespace") or given.get("name"))
        request = DetailsRequest(names if is_selection else (), connections=CONNECTIONS_MAX)
        details = await self.proxy.plane.details(request)
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
        left_out = max(len(answers) - CONNECTIONS_MAX, 0)
        return {"items": answers[:CONNECTIONS_MAX], "hidden": details.hidden_connections + left_out}

    async def describe(self, given: Parameters) -> Description:
        """Return one Service with its settings, endpoints and events. Raises LookupError if it does not exist."""
        name = asked_name(given)
        given = {"namespace": name.namespace, "name": name.name}
        if not (services := await self.services(given)):
            raise LookupError(f"there is no Service {name}")
        endpoints = await self.endpoints(given)
        events = [*self.proxy.journal.of(name)]
        for row in endpoints:
            if row.failed_at:
                ejected = "; it is ejected" if row.state == "ejected" else ""
                what = f"a dial of endpoint {row.address} failed: {row.last_failure}{ejected}"
                events.append(EventAnswer(row.failed_at, what))
            if row.since:
                events.append(EventAnswer(row.since, f"endpoint {row.address} is {row.state}: {row.reason}"))
        events.sort(key=lambda event: event.at)
        return Description(services[0], _facts(self._served(given).get(name, []), self.proxy.mode), endpoints, events)

    async def environment(self, given: Parameters) -> list[str]:
        """Return the variables that the kubelet sets, as lines."""
        found = environment(known_services(self.proxy.tracker), given.get("namespace") or DEFAULT_NAMESPACE)
        return [f"{name}={value}" for name, value in found.items()]

    async def hosts_lines(self, given: Parameters) -> list[str]:
        """Return lines for /etc/hosts with the names of Services."""
        namespace, domain = given.get("namespace") or DEFAULT_NAMESPACE, given.get("domain") or "cluster.local"
        return list(hosts_lines(known_services(self.proxy.tracker), namespace, domain))

    # ---- parts

    def _served(self, given: Parameters) -> dict[NamespacedName, list[ServicePort]]:
        served: dict[NamespacedName, list[ServicePort]] = defaultdict(list)
        for port_name, service_port in self.proxy.controller.synced.service_ports.items():
            if _is_selected(port_name.service, given):
                served[port_name.service].append(service_port)
        return served

    def _service(
        self, name: NamespacedName, service: api.Service, ports: list[ServicePort], problem: str
    ) -> ServiceAnswer:
        spec = service.spec or api.objects.ServiceSpec()
        cluster_ips: list[str] = []
        external: list[str] = []
        shown = [f"{p.port}/{p.protocol or 'TCP'}" for p in spec.ports or ()]
        if spec.type == "ExternalName":
            external = [spec.external_name or ""]
        elif ports:
            cluster_ips = list(ports[0].cluster_ips)
            external = list(dict.fromkeys(ip for p in ports for ip in (*p.load_balancer_ips, *p.external_ips)))
            shown = [f"{p.port}{f':{p.node_port}' if p.node_port else ''}/{p.name.protocol}" for p in ports]
        elif decode.is_headless(service):
            cluster_ips = ["None"]
        since = _timestamp(service.metadata.creation_timestamp) or self.proxy.tracker.since(name)
        kind = spec.type or "ClusterIP"
        return ServiceAnswer(*name, kind, cluster_ips, external, shown, since, dict(spec.selector or {}), problem)

    def _endpoints(self, port: ServicePort, details: ServicePortDetails | None) -> Iterator[EndpointAnswer]:
        """Yield the endpoints of *port*: those of desired state, then removed ones that have connections."""
        seen, health, weights = by_address(details), self.proxy.health_filter.health(port.name), dict(port.weights)
        desired = {endpoint.address: endpoint for endpoint in self.proxy.tracker.endpoints_of(port.name)}
        for address in dict.fromkeys((*desired, *seen)):
            of_plane, endpoint = seen.get(address, EndpointDetails(address)), desired.get(address)
            state, reason, since = "removed", "it has open connections", 0.0
            if endpoint is not None:
                state, reason, since = condition(endpoint, of_plane, health.get(address))
            yield EndpointAnswer(
                *port.name.service,
                port.name.port_name,
                join_address(*address),
                state,
                reason,
                since,
                of_plane.ejected_until,
                (endpoint and endpoint.node_name) or "",
                weights.get(address[0], 1),
                of_plane.open,
                of_plane.opened,
                of_plane.pins,
                of_plane.last_failure,
                of_plane.failed_at,
                of_plane.share,
            )


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


def asked_name(given: Parameters) -> NamespacedName:
    """Return the name of the Service in *given*. Raises ValueError if *given* names none."""
    if not given.get("name"):
        raise ValueError("give the Service's name")
    return NamespacedName(given.get("namespace") or DEFAULT_NAMESPACE, given["name"])


def _is_selected(name: NamespacedName, given: Parameters) -> bool:
    return given.get("namespace", "") in ("", name.namespace) and given.get("name", "") in ("", name.name)


def _timestamp(text: str | None) -> float:
    try:
        return datetime.fromisoformat(text).timestamp() if text else 0.0
    except ValueError:
        return 0.0


def by_address(details: ServicePortDetails | None) -> Mapping[Address, EndpointDetails]:
    """Return the endpoints of *details* by address."""
    return {of.address: of for of in details.endpoints} if details is not None else {}
