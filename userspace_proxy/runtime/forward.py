"""The parts of `forward`: a data plane in this process with listeners of its own for the ports of one Service.

Needs no capability and loads no rules: clients dial the listeners themselves. Desired state comes from the same sources
as in `run`, reduced to the Service.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from userspace_proxy import api
from userspace_proxy.api.events import ObjectEvent
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.decode import SERVICE_NAME_LABEL
from userspace_proxy.control.dns_endpoints import DnsEndpoints
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.sockets import open_listener
from userspace_proxy.errors import StartError
from userspace_proxy.interfaces import Source
from userspace_proxy.logs import recorder
from userspace_proxy.model.endpoint import Endpoint, family_of, join_address
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import serving_endpoints, usable_endpoints
from userspace_proxy.model.watch_stats import WatchStats
from userspace_proxy.probes.filter import HealthFilter
from userspace_proxy.runtime.desired_state import open_services, unless_stopped

# A Service's own addresses have no meaning here. These stand for them (RFC 5737, RFC 3849), one of each family.
_NO_IPS = ["192.0.2.1", "2001:db8::1"]
_LOOPBACK = {"localhost": ("127.0.0.1", "::1")}
_LOOK_S = 0.1
_LINES_A_LOOK = 50
_REACH_S = 3.0
_REACHED_MAX = 5
_WARN_EVERY_S = 10.0

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ForwardedPort:
    """One port to forward. ``local``: 0 for any free port. ``port``: number or name. ``protocol``: None for either."""

    local: int | None
    port: str
    protocol: L4Protocol | None = None

    @classmethod
    def read(cls, text: str) -> ForwardedPort:
        """Parse *text*, in the form ``[LOCAL:]PORT[/tcp|/udp]``.

        Raises:
            ValueError: *text* has another form.
        """
        ports, _, protocol = text.partition("/")
        local, colon, port = ports.rpartition(":")
        if not port or protocol.upper() not in ("", *L4Protocol) or not (local.isdecimal() or not local):
            raise ValueError(f"{text!r} is not [LOCAL:]PORT[/tcp|/udp]")
        if any(part.isdecimal() and int(part) > 65_535 for part in (local, port)) or port == "0":
            raise ValueError(f"{text!r} has a port above 65535, or the port 0 of a Service")
        number = int(local) if local else (0 if colon else None)
        return cls(number, port, L4Protocol(protocol.upper()) if protocol else None)

    def is_of(self, service_port: ServicePort) -> bool:
        wanted = str(service_port.port) if self.port.isdecimal() else service_port.name.port_name
        return self.port == wanted and self.protocol in (None, service_port.name.protocol)


@dataclass(frozen=True, slots=True)
class ForwardRequest:
    """The Service to forward to, its ports, and the options of `forward`.

    ``addresses``: where to listen; "localhost" means the loopback addresses of both families, if this host has them.
    ``verbose``: log each connection.
    """

    service: NamespacedName
    ports: Sequence[ForwardedPort]
    addresses: Sequence[str] = ("localhost",)
    paths: Sequence[str] = ()
    kubeconfig: Path | None = None
    verbose: bool = False


class ServiceSource:
    """A Source of the one Service *name* from *source*, without the fields that would prevent forwarding to it.

    Cluster IPs, node ports, labels and, unless it is ExternalName, the type are removed. So headless Services and
    Services that another proxy serves can be forwarded to, too.
    """

    def __init__(self, source: Source, name: NamespacedName) -> None:
        self._source = source
        self._name = name
        self.external_name = ""

    @property
    def problems(self) -> Mapping[str, str]:
        return self._source.problems

    @property
    def watches(self) -> Sequence[WatchStats]:
        return self._source.watches

    async def events(self) -> AsyncGenerator[Sequence[ObjectEvent]]:
        async for events in self._source.events():
            yield [self._reduced(event) for event in events if event.kind != "Service" or event.name == self._name]

    def _reduced(self, event: ObjectEvent) -> ObjectEvent:
        given = event.object
        if isinstance(given, api.EndpointSlice):
            labels = given.metadata.labels or {}
            labels = {name: label for name, label in labels.items() if name == SERVICE_NAME_LABEL}
            given = msgspec.structs.replace(given, metadata=msgspec.structs.replace(given.metadata, labels=labels))
        elif isinstance(given, api.Service) and given.spec is not None:
            spec = given.spec
            self.external_name = (spec.external_name or "") if spec.type == "ExternalName" else ""
            ports = [msgspec.structs.replace(port, node_port=None) for port in spec.ports or ()]
            given = api.Service(
                msgspec.structs.replace(given.metadata, labels=None),
                api.objects.ServiceSpec(
                    type="ExternalName" if self.external_name else None,
                    selector=spec.selector,
                    cluster_ip=_NO_IPS[0],
                    cluster_ips=_NO_IPS,
                    ports=ports,
                    session_affinity=spec.session_affinity,
                    session_affinity_config=spec.session_affinity_config,
                    publish_not_ready_addresses=spec.publish_not_ready_addresses,
                ),
            )
        return replace(event, object=given)


@dataclass(slots=True)
class _Forward:
    """Listeners of one forwarded port, by address. ``printed``: connections printed; ``failed``: those that failed."""

    asked: ForwardedPort
    service_port: ServicePort
    local: int
    names: Mapping[str, ListenerName]
    printed: int = 0
    failed: int = 0


class Forwarder:
    """The StateSink that gives the listeners of *request* their endpoints. *say*: prints a line to the user."""

    def __init__(self, request: ForwardRequest, plane: LocalPlane, say: Callable[[str], None]) -> None:
        self._request = request
        self._plane = plane
        self._say = say
        self._forwards: list[_Forward] = []
        self._state = ProxyState()
        self._warned_at = -_WARN_EVERY_S

    async def sync(self, state: ProxyState) -> None:
        self._state = state
        for forward in self._forwards:
            given = state.endpoints.get(forward.service_port.name, ())
            usable = _of_one_family(usable_endpoints(given))
            backends = Backends(usable, serving_endpoints(given))
            service_port = state.service_ports.get(forward.service_port.name, forward.service_port)
            if service_port != forward.service_port:
                forward.service_port = service_port
                for at, name in forward.names.items():
                    self._plane.configure(_spec(service_port, name, forward.local, at))
            await self._plane.update(dict.fromkeys(forward.names.values(), backends))

    async def open(self) -> None:
        """Open every listener, and print its address.

        Raises:
            StartError: the Service has no such port, or a local port cannot be opened.
        """
        ports = [port for name, port in self._state.service_ports.items() if name.service == self._request.service]
        for asked in self._request.ports:
            service_port = next((port for port in ports if asked.is_of(port)), None)
            if service_port is None:
                has = ", ".join(f"{port.port}/{port.name.protocol} {port.name.port_name}".strip() for port in ports)
                protocol = f"/{asked.protocol}" if asked.protocol else ""
                raise StartError(f"Service {self._request.service} has no port {asked.port}{protocol}; it has {has}")
            self._forwards.append(self._open(asked, service_port))
        await self.sync(self._state)
        for forward in self._forwards:
            target_ports = {endpoint.port for endpoint in self._usable(forward)}
            to = target_ports.pop() if len(target_ports) == 1 else forward.service_port.port
            udp = "/udp" if forward.service_port.name.protocol is L4Protocol.UDP else ""
            for at in forward.names:
                self._say(f"Forwarding from {join_address(at, forward.local)} -> {to}{udp}")

    def _open(self, asked: ForwardedPort, service_port: ServicePort) -> _Forward:
        local = service_port.port if asked.local is None else asked.local
        names: dict[str, ListenerName] = {}
        for at in itertools.chain.from_iterable(_LOOPBACK.get(each, (each,)) for each in self._request.addresses):
            try:
                local, names[at] = self._listen(service_port, local, at)
            except OSError as error:
                if at == "::1" and names:  # a host without IPv6, as with kubectl
                    continue
                reason = f"cannot listen at {join_address(at, local)}: {(error.strerror or str(error)).lower()}"
                raise StartError(f"{reason}; give another LOCAL port, or another --address") from None
        return _Forward(asked, service_port, local, names)

    def _listen(self, service_port: ServicePort, local: int, at: str) -> tuple[int, ListenerName]:
        """Listen at port *local* of the address *at*; return the port, and the listener's name. Raises OSError."""
        service, port_name, protocol = service_port.name
        sock = open_listener(protocol, local, Limits().dead_peer_timeout_s, at=at)
        local = sock.getsockname()[1]
        shown = f"{port_name}@{join_address(at, local)}"
        name = ListenerName(ServicePortName(service, shown, protocol))
        self._plane.serve(_spec(service_port, name, local, at), sock)
        return local, name

    def _usable(self, forward: _Forward) -> tuple[Endpoint, ...]:
        return _of_one_family(usable_endpoints(self._state.endpoints.get(forward.service_port.name, ())))

    # ---- output for the user

    async def run(self) -> None:
        """Print which connections are handled, and why any of them fails. Runs until cancelled."""
        for forward in self._forwards:
            await self._warn_if_unreachable(forward)
        while True:
            await asyncio.sleep(_LOOK_S)
            for forward in self._forwards:
                counts = [self._plane.listeners[name].counters for name in forward.names.values()]
                handled = sum(c.accepted + c.flows_total for c in counts)
                failed = sum(c.failed for c in counts)
                for line in _handled(handled - forward.printed, forward.local):
                    self._say(line)
                has_failed = failed > forward.failed
                forward.printed, forward.failed = handled, failed
                if has_failed and asyncio.get_running_loop().time() - self._warned_at > _WARN_EVERY_S:
                    await self._warn_if_unreachable(forward)

    async def _warn_if_unreachable(self, forward: _Forward) -> None:
        """Warn if there is no endpoint, or none of the first few can be dialled from here."""
        service, usable = self._request.service, self._usable(forward)
        self._warned_at = asyncio.get_running_loop().time()
        if not usable:
            log.warning("%s has no ready endpoint; connections are refused until it has one", service)
            return
        dials = (_dial(endpoint, forward.service_port.name.protocol) for endpoint in usable[:_REACHED_MAX])
        failures = await asyncio.gather(*dials)
        if all(failures):
            log.warning(
                "no endpoint of %s can be reached from here (%s); run this on a node of the cluster, add a route to its"
                " pods by way of a node, or use kubectl port-forward, which goes through the API server",
                service,
                ", ".join(f"{endpoint}: {why}" for endpoint, why in zip(usable, failures, strict=False)),
            )


def _spec(service_port: ServicePort, name: ListenerName, local: int, at: str) -> ListenerSpec:
    return ListenerSpec(replace(service_port, name=name.service_port), local, at=at)


def _of_one_family(endpoints: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return the IPv4 endpoints, or if there are none, all: a dual-stack pod is one endpoint."""
    return tuple(endpoint for endpoint in endpoints if family_of(endpoint.ip) == 4) or endpoints


def _handled(count: int, local: int) -> Iterator[str]:
    for _ in range(min(count, _LINES_A_LOOK)):
        yield f"Handling connection for {local}"
    if count > _LINES_A_LOOK:
        yield f"Handling {count - _LINES_A_LOOK} more connections for {local}"


async def _dial(endpoint: Endpoint, protocol: L4Protocol) -> str:
    """Return why *endpoint* cannot be dialled, or ""; for UDP only whether there is a route to it."""
    kind = socket.SOCK_DGRAM if protocol is L4Protocol.UDP else socket.SOCK_STREAM
    with socket.socket(socket.AF_INET6 if family_of(endpoint.ip) == 6 else socket.AF_INET, kind) as sock:
        sock.setblocking(False)
        try:
            async with asyncio.timeout(_REACH_S):
                await asyncio.get_running_loop().sock_connect(sock, endpoint.address)
        except TimeoutError:
            return "no answer"
        except OSError as error:
            return (error.strerror or str(error)).lower()
    return ""


async def forward(request: ForwardRequest, say: Callable[[str], None]) -> None:
    """Forward until SIGINT or SIGTERM.

    Raises:
        StartError: there is no such Service or port, a local port cannot be opened, or the source cannot be read.
    """
    stop = asyncio.Event()
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    async with contextlib.AsyncExitStack() as stack:
        opening = open_services(request.paths, request.kubeconfig, request.service, stack)
        source = ServiceSource(await unless_stopped(stop, opening), request.service)
        plane = LocalPlane(Limits(), recorder(None, verbose=request.verbose))
        stack.push_async_callback(plane.close, 0.0)
        forwarder = Forwarder(request, plane, say)
        health_filter = HealthFilter(lambda: controller.sync_again())
        stack.callback(health_filter.close)
        tracker = Tracker(Allocations(), transparent_obstacle="forward has one address for all clients")
        now = asyncio.get_running_loop().time
        controller = Controller(
            DnsEndpoints(source) if request.paths else source,
            tracker,
            [forwarder],
            Pacer(now, 0.0, 30.0),
            filtered=health_filter.apply,
        )
        async with asyncio.TaskGroup() as group:
            following = group.create_task(controller.run(), name="controller")
            stopping = group.create_task(stop.wait(), name="stop")
            ready = group.create_task(controller.ready.wait(), name="ready")
            await asyncio.wait([stopping, ready], return_when=asyncio.FIRST_COMPLETED)
            tasks = [following, stopping, ready]
            if not stop.is_set():
                _require_service(request.service, controller.synced, tracker, source)
                await forwarder.open()
                tasks.append(group.create_task(forwarder.run(), name="tell"))
                await stop.wait()
            for task in tasks:
                task.cancel()


def _require_service(name: NamespacedName, state: ProxyState, tracker: Tracker, source: ServiceSource) -> None:
    if any(port_name.service == name for port_name in state.service_ports):
        return
    if source.external_name:
        raise StartError(f"Service {name} is an external name; dial {source.external_name} itself")
    if problem := tracker.problems.get(name) or next(iter(source.problems.values()), ""):
        raise StartError(problem)
    raise StartError(f"there is no Service {name}; -n chooses another namespace")
