"""Explains where the next connection to a Service goes, or why clients cannot reach it, with the fix.

The search for an obstacle follows a connection: the Service, its endpoints, policies, the listener, the rules, other
programs' rules, dials. The first obstacle explains the later ones.
"""

import contextlib
import ipaddress
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass

from userspace_proxy import api
from userspace_proxy.config.settings import DEFAULT_SERVICE_RANGES
from userspace_proxy.control import decode
from userspace_proxy.control.lint.index import Index
from userspace_proxy.control.lint.no_endpoints import REFUSED, endpoints_of, refusals
from userspace_proxy.errors import ConfigError, SyncError
from userspace_proxy.host.firewalls import find_blocking_firewall
from userspace_proxy.host.foreign_rules import Packet, read_foreign_rules
from userspace_proxy.host.other_proxies import find_other_proxy
from userspace_proxy.model.answers import Candidate, Explanation, Obstacle, Unused
from userspace_proxy.model.details import DetailsRequest, EndpointDetails, ServicePortDetails
from userspace_proxy.model.endpoint import Address, Endpoint, family_of, join_address
from userspace_proxy.model.names import ListenerName, NamespacedName, Scope
from userspace_proxy.model.probe import EndpointCondition, EndpointHealth
from userspace_proxy.model.routes import Refusal, Route, Sender
from userspace_proxy.model.service import Balance, Portal, ServicePort, internal_portals, load_balancer_portals
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import usable_endpoints
from userspace_proxy.modes.plans import Plan, allowed_to_dial, plan
from userspace_proxy.runtime.inspection import Parameters, asked_name, by_address, condition
from userspace_proxy.runtime.running import RunningProxy
from userspace_proxy.sources.documents import Manifest
from userspace_proxy.sources.lines import Document, Place

# The most Pods of a namespace that are compared with a selector.
_PODS_MAX = 2_000
# The most endpoints that are named one by one.
_UNUSED_MAX = 100
# Stands for a client that is not named.
_ANY_CLIENT = {4: "0.0.0.0", 6: "::"}  # noqa: S104 - nothing is bound


@dataclass(frozen=True, slots=True)
class _Case:
    """One question: a service port at one portal, for one client ("" for any), and what is known of both."""

    service_port: ServicePort
    desired: tuple[Endpoint, ...]
    state: ProxyState
    portal: Portal
    client: str
    sender: Sender
    plan: Plan
    route: Route
    health: Mapping[Address, EndpointHealth]
    details: ServicePortDetails | None

    @property
    def candidates(self) -> tuple[Endpoint, ...]:
        """The endpoints of the portal's family to which its route leads."""
        if isinstance(self.route.to, Refusal):
            return ()
        usable = self.plan.listeners[self.route.to].usable
        return tuple(endpoint for endpoint in usable if family_of(endpoint.ip) == self.portal.family)


@dataclass(frozen=True, slots=True)
class Explainer:
    """Explains which endpoint a client gets, or why it gets none, from the state of *proxy* and of the kernel."""

    proxy: RunningProxy

    async def why(self, given: Parameters) -> Explanation:
        """Explain the next connection of ``client`` ("" for any) to ``port`` (name, number or "" for the first one).

        Raises:
            ValueError: ``client`` is no IP address, or no Service is named.
        """
        name, port, client = asked_name(given), given.get("port", ""), given.get("client", "")
        try:
            client = str(ipaddress.ip_address(client)) if client else ""
        except ValueError:
            raise ValueError(f"{client!r} is no IP address") from None
        state = self.proxy.controller.synced
        ports = [p for n, p in state.service_ports.items() if n.service == name]
        service_port = next((p for p in ports if port in ("", p.name.port_name, str(p.port))), None)
        if service_port is None:
            obstacle = self._unserved(name, port, ports)
            return Explanation(str(name), port, "", client, self.proxy.mode.name, [], [], "none", obstacle)
        case = await self._case(service_port, client, state)
        first_obstacle = await anext(self._obstacles(case), None)
        return Explanation(
            str(name),
            f"{service_port.name.port_name or service_port.port}/{service_port.name.protocol}",
            str(case.portal),
            client,
            self.proxy.mode.name,
            [] if first_obstacle and not case.candidates else self._next(case),
            self._unused(case),
            await self._rules_state(),
            first_obstacle,
            self._unknown(case),
            list(self._notes(case)),
        )

    # ---- where it goes

    async def _case(self, service_port: ServicePort, client: str, state: ProxyState) -> _Case:
        node = state.node
        family = family_of(client) if client else None
        its = [portal for portal in internal_portals(service_port) if family in (None, portal.family)]
        portal = (its or list(internal_portals(service_port)))[0]
        made = plan(
            service_port, state.endpoints[service_port.name], node, detects_pods=self.proxy.rules.detects_pods(node)
        )
        sender = self._sender(client, state)
        routes = {route.sender: route for route in made.routes if route.portal == portal}
        asked = client or _ANY_CLIENT[portal.family]
        details = await self.proxy.plane.details(DetailsRequest((service_port.name,), asked))
        return _Case(
            service_port,
            self.proxy.tracker.endpoints_of(service_port.name),
            state,
            portal,
            client,
            sender,
            made,
            routes.get(sender) or routes[Sender.ANYBODY],
            self.proxy.health_filter.health(service_port.name),
            next(iter(details.service_ports), None),
        )

    def _sender(self, client: str, state: ProxyState) -> Sender:
        if not client or client in state.node.addresses:
            return Sender.NODE if client else Sender.ANYBODY
        detector = self.proxy.rules.detector(state.node)
        cidrs = [ipaddress.ip_network(cidr) for cidr in (detector.cidrs if detector else ())]
        return Sender.POD if any(ipaddress.ip_address(client) in cidr for cidr in cidrs) else Sender.ANYBODY

    def _next(self, case: _Case) -> list[Candidate]:
        if not self.proxy.mode.kernel_serves and case.details is not None:
            of_listeners, to = dict(case.details.choices), case.route.to
            choices = of_listeners.get(to, ()) if isinstance(to, ListenerName) else ()
            if case.client or case.service_port.balance is not Balance.SOURCE_HASH:
                return [Candidate(join_address(*c.address), round(c.probability, 4), c.why) for c in choices]
        weights = self._weights(case)
        shares = {endpoint: weights.get(endpoint.ip, 1) for endpoint in case.candidates}
        if not any(shares.values()):  # weights are ignored then
            shares = dict.fromkeys(shares, 1)
        total = sum(shares.values())
        mode = self.proxy.mode
        why = mode.choice if mode.kernel_serves else "by the hash of the client's address; give --client"
        return [Candidate(str(endpoint), round(share / total, 4), why) for endpoint, share in shares.items() if share]

    def _weights(self, case: _Case) -> Mapping[str, int]:
        return dict(case.service_port.weights) if "weights" in self.proxy.mode.annotations else {}

    def _unused(self, case: _Case) -> list[Unused]:
        """Return why each of the other endpoints does not get the next connection."""
        chosen = {candidate.endpoint for candidate in self._next(case)} if case.candidates else set()
        seen, weights = by_address(case.details), self._weights(case)
        found = []
        for endpoint in case.desired:
            if str(endpoint) not in chosen:
                details = seen.get(endpoint.address, EndpointDetails(endpoint.address))
                found.append(Unused(str(endpoint), self._why_not(case, endpoint, details, weights)))
        more = len(found) - _UNUSED_MAX
        return [*found[:_UNUSED_MAX], *([Unused("...", f"and {more} more")] if more > 0 else [])]

    def _why_not(self, case: _Case, endpoint: Endpoint, seen: EndpointDetails, weights: Mapping[str, int]) -> str:
        state, reason, _ = condition(endpoint, seen, case.health.get(endpoint.address))
        if family_of(endpoint.ip) != case.portal.family:
            return f"an IPv{family_of(endpoint.ip)} endpoint, and the portal is IPv{case.portal.family}"
        if state == "ejected":
            return f"ejected by failed dials: {reason}"
        if state != "ready":
            return f"{state}: {reason}"
        if endpoint not in case.candidates:
            scope = case.route.to.scope if isinstance(case.route.to, ListenerName) else None
            is_local = scope is Scope.LOCAL or (scope is None and case.service_port.internal_local)
            if is_local:
                return f"on node {endpoint.node_name or '(unknown)'}, and the traffic policy is Local"
            return "topology hints give it to other nodes or zones"
        if weights.get(endpoint.ip, 1) == 0:
            return "its weight is 0"
        return "it is not its turn"

    def _unknown(self, case: _Case) -> list[str]:
        if not self.proxy.mode.kernel_serves:
            workers = case.details.workers if case.details is not None else 1
            return [f"which of {workers} workers accepts the connection; each chooses by itself"] if workers > 1 else []
        unknown = ["whether an endpoint answers: the kernel does not tell; a probe does (userspace-proxy/health-check)"]
        if case.service_port.affinity_timeout_s is not None:
            unknown.append("which endpoint a client has by session affinity: it is in the kernel")
        return unknown

    def _notes(self, case: _Case) -> Iterator[str]:
        """Yield what is wrong for clients of other portals, or probably wrong."""
        if problem := self.proxy.tracker.problems.get(case.service_port.name.service):
            yield problem
        if not usable_endpoints(case.desired):
            return
        others = [r for r in case.plan.routes if r.portal != case.portal and r.sender is Sender.ANYBODY]
        if refused := sorted({str(route.portal) for route in others if isinstance(route.to, Refusal)}):
            node = case.state.node.name or "without a name"
            why = f"externalTrafficPolicy is Local, and no endpoint is on this node ({node})"
            yield f"clients of {', '.join(refused)} are refused: {why}"
        for error in self._lint(case):
            yield f"{error.reason}; {error.fix}" if error.fix else error.reason

    async def _rules_state(self) -> str:
        if self.proxy.proxier.repairer.error:
            return f"not as they should be, and cannot be loaded: {self.proxy.proxier.repairer.error}"
        try:
            is_intact = await self.proxy.proxier.is_intact()
        except SyncError as error:
            return f"cannot be looked at: {error}"
        return "loaded" if is_intact else "removed or changed by another program; they are being loaded again"

    # ---- why it cannot be reached

    def _unserved(self, name: NamespacedName, port: str, ports: Sequence[ServicePort]) -> Obstacle:
        service = self.proxy.tracker.services.get(name)
        if ports:
            names = ", ".join(p.name.port_name or str(p.port) for p in ports)
            return Obstacle(f"it has no port {port}", f"its ports are {names}")
        if problem := self.proxy.tracker.problems.get(name):
            return Obstacle(problem, "correct the manifest; 'userspace-proxy check' says more")
        if service is None:
            fix = "see 'userspace-proxy get services -A'; name its namespace with -n"
            return Obstacle("there is no such Service here", fix)
        if service.spec is not None and service.spec.type == "ExternalName":
            return Obstacle("an ExternalName Service is a DNS name; no proxy serves it", "resolve it: run --dns")
        if decode.is_headless(service):
            reason = "a headless Service has no cluster IP; no proxy serves it"
            return Obstacle(reason, "resolve its name: run --dns")
        label = "service.kubernetes.io/service-proxy-name"
        return Obstacle(f"its label {label} names another proxy", "see --service-proxy-name")

    async def _obstacles(self, case: _Case) -> AsyncIterator[Obstacle]:
        """Yield why clients cannot reach the service port, along a connection's way."""
        name = case.service_port.name
        if not usable_endpoints(case.desired):
            yield self._no_endpoint(case)
        if isinstance(case.route.to, Refusal):
            yield self._refusal(case)
        if obstacle := self._source_ranges(case):
            yield obstacle
        for listener, why in {**self.proxy.proxier.unopened, **self.proxy.plane.unserved}.items():
            if listener.service_port == name:
                yield Obstacle(f"this proxy could not open its listener: {why}", "see docs/reference/limits.md")
        if self.proxy.plane.failing:
            yield Obstacle(f"the data plane serves nothing: {self.proxy.plane.failing}", "see the log of the proxy")
        if (rules := await self._rules_state()) != "loaded":
            yield Obstacle(f"the rules in the kernel: {rules}", "stop the program that changes them, or wait a second")
        portal = case.portal
        protocol = portal.protocol.lower()
        if where := await find_other_proxy(
            portal.ip, portal.port, protocol, shares_chains=self.proxy.mode.shares_kube_proxys_chains
        ):
            yield Obstacle(f"another proxy's rules take the packets: {where}", "stop kube-proxy, and remove its rules")
        with contextlib.suppress(SyncError):
            if stopped := await self._foreign_rules(case):
                yield Obstacle(*stopped)
        if obstacle := self._dials(case):
            yield obstacle
        settings = self.proxy.settings
        ranges = (*settings.service_ranges, *DEFAULT_SERVICE_RANGES)  # of a cluster no range may be known
        with contextlib.suppress(SyncError, ValueError):
            for traffic in self.proxy.mode.firewalled_traffic:
                for found in await find_blocking_firewall(traffic, str(ranges[0])):
                    yield Obstacle(f"a firewall of this node drops {traffic.name}", found)

    def _no_endpoint(self, case: _Case) -> Obstacle:
        """Return why no endpoint is usable, as `check` finds it."""
        for error in self._lint(case):
            return Obstacle(error.reason.removeprefix(f"{REFUSED}: "), error.fix or f"see {error.field}")
        return Obstacle("it has no usable endpoint", "add ready Pods with its labels, or an EndpointSlice")

    def _lint(self, case: _Case) -> Iterator[ConfigError]:
        """Yield what `check` finds on the endpoints of the service port."""
        name = case.service_port.name.service
        if (service := self.proxy.tracker.services.get(name)) is None:
            return
        index = Index()
        manifest = _manifest("Service", name, service)
        index.add(manifest)
        for piece in self.proxy.tracker.related(name, _PODS_MAX):
            kind = type(piece).__name__
            at = NamespacedName(piece.metadata.namespace or name.namespace, piece.metadata.name)
            index.add(_manifest(kind, at, piece))
        ports = {
            at: port
            for at, spec in enumerate((service.spec.ports if service.spec else None) or ())
            if (port := case.state.service_ports.get(case.service_port.name._replace(port_name=spec.name or "")))
        }
        for _, error in refusals(index, manifest, service, endpoints_of(index, name, service, ports)):
            yield error

    def _refusal(self, case: _Case) -> Obstacle:
        node = case.state.node.name
        unhealthy = [e for e in case.desired if e.address in case.health]
        unhealthy = [e for e in unhealthy if case.health[e.address].condition is EndpointCondition.UNHEALTHY]
        if unhealthy and len(unhealthy) == len(case.desired):
            reason = case.health[unhealthy[0].address].reason
            return Obstacle(f"all endpoints are unhealthy by probes ({reason}), and panic=off", "fix them or the check")
        policy = "internalTrafficPolicy" if case.service_port.internal_local else "externalTrafficPolicy"
        if case.service_port.internal_local:
            reason = f"{policy} is Local, and no endpoint is on this node ({node or 'without a name'})"
            return Obstacle(reason, f"run a Pod here, or write '{policy}: Cluster'; see --hostname-override")
        family = case.portal.family
        return Obstacle(f"no endpoint is IPv{family}, as the portal is", "give the Service and its Pods one family")

    def _source_ranges(self, case: _Case) -> Obstacle | None:
        service_port, client = case.service_port, case.client
        if not client or not service_port.source_ranges:
            return None
        for portal in (each for each in load_balancer_portals(service_port) if each.family == family_of(client)):
            allowed = allowed_to_dial(service_port, portal, case.state.node)
            if allowed and not any(ipaddress.ip_address(client) in ipaddress.ip_network(cidr) for cidr in allowed):
                reason = f"loadBalancerSourceRanges ({', '.join(service_port.source_ranges)}) excludes {client}"
                return Obstacle(f"{reason} at {portal}", "add a range with the client, or dial the cluster IP")
        return None

    async def _foreign_rules(self, case: _Case) -> tuple[str, str] | None:
        """Return which rules of another program stop a connection on its way, and the fix."""
        portal, hooks = case.portal, {traffic.hook for traffic in self.proxy.mode.firewalled_traffic}
        family, protocol = "ip6" if portal.family == 6 else "ip", portal.protocol.lower()
        rules = await read_foreign_rules(family)
        begin = "output" if case.sender is Sender.NODE else "prerouting"
        portal_packet = Packet(f"traffic to {portal}", begin, family, protocol, case.client, portal.ip, portal.port)
        way = [portal_packet]
        if self.proxy.mode.kernel_serves and "input" in hooks:
            way.append(portal_packet._replace(hook="input"))
        elif not self.proxy.mode.kernel_serves and isinstance(case.route.to, ListenerName):
            port = self.proxy.proxier.proxy_port(case.route.to)
            way.append(Packet("redirected traffic", "input", family, protocol, case.client, "", port, True))
        if found := next(filter(None, map(rules.against, way)), None):
            return found
        to_endpoints = [
            Packet(f"traffic to {endpoint}", "output", family, protocol, "", endpoint.ip, endpoint.port)
            for endpoint in case.candidates[:_UNUSED_MAX]
        ]
        if "input" not in hooks:
            to_endpoints = [packet._replace(hook="forward", is_translated=True) for packet in to_endpoints]
        stopped = [rules.against(packet) for packet in to_endpoints]
        return stopped[0] if stopped and all(stopped) else None

    def _dials(self, case: _Case) -> Obstacle | None:
        """Return why no candidate can be dialled: no route to any, or all ejected."""
        errors = [_route_error(endpoint.ip) for endpoint in case.candidates[:_UNUSED_MAX]]
        if errors and all(errors):
            return Obstacle(f"this node has no route to {case.candidates[0].ip}: {errors[0]}", "see 'ip route get'")
        seen = by_address(case.details)
        failures = [each for e in case.candidates if (each := seen.get(e.address)) and _is_failing(each)]
        if failures and len(failures) == len(case.candidates):
            last = max(failures, key=lambda each: each.failed_at)
            fix = f"see whether a process listens at port {last.address[1]} there, and whether a firewall is between"
            return Obstacle(
                f"every endpoint fails: the last dial of {join_address(*last.address)}: {last.last_failure}", fix
            )
        return None


def _route_error(ip: str) -> str:
    """Return why this node cannot send to *ip*, "" if it has a route. Nothing is sent."""
    with socket.socket(socket.AF_INET6 if ":" in ip else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.connect((ip, 9))
        except OSError as error:
            return error.strerror or str(error)
    return ""


def _is_failing(seen: EndpointDetails) -> bool:
    """Return whether the endpoint's dials fail: the last endpoint of a service port is never ejected."""
    return bool(seen.ejected_until) or (bool(seen.last_failure) and not seen.opened)


def _manifest(kind: str, name: NamespacedName, given: api.KubernetesObject) -> Manifest:
    return Manifest(kind, name, given, None, Place(Document(str(name), 1, "")))
