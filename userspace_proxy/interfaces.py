"""The Protocols between parts, and the values that cross them.

A mode, a rule language, a splice engine or a source is one class with the few methods of its Protocol.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from socket import SocketType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from userspace_proxy.api import KubernetesObject
from userspace_proxy.model.details import Details, DetailsRequest
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.names import (
    L4Protocol,
    ListenerName,
    NamespacedName,
    ObjectReference,
    Scope,
    ServicePortName,
)
from userspace_proxy.model.routes import Sender
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.state import ProxyState

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# ---- sources of desired state


class EventType(Enum):
    """SET: the latest version of an object. DELETE: the object is gone. SYNCED: the initial list is complete."""

    SET = "set"
    DELETE = "delete"
    SYNCED = "synced"


class Origin(Protocol):
    """The place where an object is defined, for error messages."""

    def where(self, field: str = "") -> str:
        """Return the place of *field* (a path such as ``spec.ports[0].port``); for files, ``file:line``."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """One change of one object. ``kind``, ``name`` and ``origin`` are set for every type but SYNCED."""

    type: EventType
    kind: str = ""
    name: NamespacedName | None = None
    object: KubernetesObject | None = None
    origin: Origin | None = None


@dataclass(slots=True)
class WatchStats:
    """The state of a source's watch on one kind. Times are wall-clock seconds; counts start at the process's start.

    ``heard_at``: time of the last event or bookmark, None before the first. ``failing_since``: when the watch began to
    fail, None while it works. ``why``: the reason.
    """

    kind: str
    heard_at: float | None = None
    failing_since: float | None = None
    why: str = ""
    events: int = 0
    restarts: int = 0
    relists: int = 0
    expired: int = 0

    def is_dead(self, now: float, after_s: float) -> bool:
        """Return whether the watch has failed for longer than *after_s*."""
        return self.failing_since is not None and now - self.failing_since > after_s

    def failure(self) -> str:
        """Return the failure as text: what fails, since when and why."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.failing_since))
        return f"{self.kind} cannot be followed since {since}: {self.why}"


class Source(Protocol):
    """Yields every object once, then SYNCED once, then each change, until cancelled.

    The events of one batch belong together and are applied at once. A source never raises because of its input: it
    reports the problem, keeps the last good version, and continues.
    """

    def events(self) -> AsyncIterator[Sequence[ObjectEvent]]: ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Inputs that cannot be read now: place -> reason. Empty if there are none."""
        ...

    @property
    def watches(self) -> Sequence[WatchStats]:
        """The state of the watch on each kind. Empty for files."""
        ...


# ---- sinks of desired state


class Recorder(Protocol):
    """Reports on an object to users: by an Event in the cluster, or by a line in the log."""

    def normal(self, regarding: ObjectReference, reason: str, note: str) -> None:
        """Report *note* as normal. *reason* is one word in CamelCase, such as ``Starting``."""
        ...

    def warn(self, regarding: ObjectReference, reason: str, note: str, *, is_logged: bool = False) -> None:
        """Report *note* as a warning. A repeated call with the same warning reports it once.

        *is_logged*: the caller has logged it already.
        """
        ...


class StateSink(Protocol):
    """Applies each new desired state."""

    async def sync(self, state: ProxyState) -> None:
        """Apply *state*, comparing it with the current state, so that a failed sync can be repeated.

        Raises:
            SyncError: the state was refused; the previous one stays in force.
        """
        ...


class Retrying(Protocol):
    """An operation that is retried until it succeeds."""

    @property
    def error(self) -> str:
        """The last error, "" after success."""
        ...

    @property
    def failing_since(self) -> float | None:
        """The wall-clock second of the first failure since the last success."""
        ...


class Proxier(StateSink, Protocol):
    """Applies desired state in one mode: in userspace, or by kernel rules."""

    @property
    def service_ports(self) -> int:
        """The number of service ports that are held."""
        ...

    @property
    def unopened(self) -> Mapping[ListenerName, str]:
        """Listeners that could not be opened, each with the reason."""
        ...

    def proxy_port(self, listener: ListenerName) -> int:
        """Return the local port to which the listener's traffic is redirected, 0 if there is none."""
        ...

    @property
    def loads(self) -> int:
        """The number of rule loads."""
        ...

    @property
    def repairs(self) -> int:
        """The number of times rules were loaded again because another program changed them."""
        ...

    async def is_intact(self) -> bool:
        """Return whether the kernel still has the rules that were loaded."""
        ...

    @property
    def repairer(self) -> Retrying:
        """The retry state of these repairs."""
        ...

    def metrics(self) -> Iterable[Metric]:
        """Return the metrics of this mode that other modes do not have."""
        ...

    async def run(self) -> None:
        """Keep the state true, e.g. load rules again that another program changed. Runs until cancelled."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Return a context manager; within its block nothing is changed."""
        ...

    async def close(self, drain_timeout_s: float) -> None:
        """Remove the rules, then stop serving. Open connections get *drain_timeout_s* to end."""
        ...


# ---- rules in the kernel

# Mark on our packets to backends; the rules skip them. One bit, used neither by kube-proxy (0x4000, 0x8000) nor by
# Cilium (0x0f00) or Calico (0xffff0000).
OWN_MARK = 0x2000
# With OWN_MARK: our packets that carry a client's address. Alone: the replies of backends to these.
TRANSPARENT_MARK = 0x1000


class Capture(Enum):
    """How packets to a portal reach the proxy port.

    REDIRECT: at the address of the incoming interface. ADDRESS: by DNAT to an address on ``lo``.
    """

    REDIRECT = "redirect"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class PodDetector:
    """Tells whether a packet comes from a pod: its source is in one of ``cidrs``, or it arrives at ``interface``.

    ``interface`` is a name, or a prefix of names if it ends with ``*``. One of the two fields is set.
    """

    cidrs: tuple[str, ...] = ()
    interface: str = ""


# Value in place of a proxy port: packets are dropped.
DROPPED = 0


@dataclass(frozen=True, slots=True)
class Redirects:
    """The rules of userspace mode: the proxy port for each portal, or DROPPED.

    ``exceptions``: take precedence over ``ports`` for packets of these senders. ``allowed``: the CIDRs that may dial
    these portals; packets from elsewhere are dropped. ``node_ports_on``: CIDRs of node addresses that serve node
    ports; all addresses of a family serve them if it has no CIDR here.
    ``transparent``: some listener uses its clients' addresses towards backends, so replies must be routed to this host.
    ``refuse_port``: a port without a listener. Packets to portals without endpoints go there, and the kernel refuses
    them: with a reset for TCP, with port unreachable for UDP.
    """

    ports: Mapping[Portal, int] = field(default_factory=dict)
    names: Mapping[Portal, ServicePortName] = field(default_factory=dict)
    refuse_port: int = 0
    capture: Capture = Capture.REDIRECT
    exceptions: Mapping[Sender, Mapping[Portal, int]] = field(default_factory=dict)
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    node_ports_on: tuple[str, ...] = ()
    pods: PodDetector | None = None
    transparent: bool = False


class LoadedRules(Protocol):
    """Our rules in the kernel."""

    async def reload(self) -> None:
        """Load all held rules again, after another program changed or removed them."""
        ...

    async def remove(self) -> None:
        """Remove all rules of this program, including those of other processes. No error if there are none."""
        ...

    async def is_intact(self) -> bool:
        """Return whether the kernel still has the rules that were loaded."""
        ...

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Call *on_change* whenever another program may have changed the rules, until `unwatch`."""
        ...

    def unwatch(self) -> None: ...


class Kernel(LoadedRules, Protocol):
    """Holds the rules of userspace mode, in one rule language."""

    language: str

    async def load(self, redirects: Redirects) -> None:
        """Put *redirects* in force. The cost follows the number of changes.

        Raises:
            SyncError: the kernel refused; the previous rules stay (iptables: in each refused table and family).
        """
        ...


# ---- sockets


class Backends(NamedTuple):
    """The endpoints of one listener: ``usable`` for new traffic, ``serving`` for UDP flows that may stay.

    Contains both IP families. A client only gets endpoints of its own family.
    """

    usable: tuple[Endpoint, ...]
    serving: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """A service port, the local port that accepts its traffic, and the scope of its endpoints.

    ``at``: the address of a listener that clients dial themselves, and whose endpoints may have the other family. ""
    if clients come by a portal.
    """

    service_port: ServicePort
    proxy_port: int
    scope: Scope = Scope.CLUSTER
    transparent: bool = False
    at: str = ""

    @property
    def name(self) -> ListenerName:
        return ListenerName(self.service_port.name, self.scope, self.transparent)


@dataclass(slots=True)
class Counters:
    """Counters of one service port: plain ints that the hot path increments and a scrape reads.

    ``refused``: connections to the proxy port that did not come by a portal. ``limited``: connections refused because
    their client or service port had too many open. ``port_exhaustions``: dials for which every local port towards the
    endpoint was in use. ``sources_refused``: dials for which the kernel refused the client's address as source.
    ``unanswered``: connections that a backend reset before it sent a byte. ``closed_by_removal``, ``closed_by_age``:
    connections that ended by the Service's policy. ``waiting``: connections that wait for an endpoint now;
    ``waits_released``, ``waits_expired``, ``waits_abandoned``: those for which one came, none came in time, or whose
    client left.
    """

    accepted: int = 0
    open: int = 0
    bytes_to_backends: int = 0
    bytes_to_clients: int = 0
    dial_failures: int = 0
    retries: int = 0
    ejections: int = 0
    failed: int = 0
    refused: int = 0
    limited: int = 0
    port_exhaustions: int = 0
    sources_refused: int = 0
    unanswered: int = 0
    closed_by_removal: int = 0
    closed_by_age: int = 0
    waiting: int = 0
    waits_released: int = 0
    waits_expired: int = 0
    waits_abandoned: int = 0
    flows: int = 0
    flows_total: int = 0
    flows_evicted: int = 0
    datagrams_dropped: int = 0
    pins: int = 0
    endpoints: int = 0
    ejected: int = 0
    starting: int = 0


@dataclass(slots=True)
class EndpointCounters:
    """Counters of one endpoint of a service port: plain ints, as in `Counters`.

    ``opened``, ``open``: TCP connections or UDP flows to the endpoint. ``dialling``: TCP connections that may become
    open. ``retries``: those that came after another endpoint had failed.
    """

    opened: int = 0
    open: int = 0
    dialling: int = 0
    bytes_to_backends: int = 0
    bytes_to_clients: int = 0
    dial_failures: int = 0
    retries: int = 0
    ejections: int = 0


class ServiceStats(NamedTuple):
    """The counters of one service port, and of its endpoints if requested."""

    name: ServicePortName
    counters: Counters
    endpoints: list[tuple[Address, EndpointCounters]]


@dataclass(slots=True)
class PlaneStats:
    """The data plane's counters at one moment.

    ``endpoints``: all endpoints, and removed ones that still have open connections. If there are too many, it is empty
    and ``hidden_endpoints`` has their number.
    """

    services: Mapping[ServicePortName, Counters]
    endpoints: Mapping[ServicePortName, Mapping[Address, EndpointCounters]] = field(default_factory=dict)
    hidden_endpoints: int = 0
    connections_open: int = 0
    accept_paused: int = 0
    local_shortages: int = 0
    access_lines_dropped: int = 0
    log_lines_dropped: int = 0
    worker_restarts: int = 0


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """One ended connection or flow. ``why``: the reason for the choice of endpoint. ``how``: how it ended."""

    service_port: ServicePortName
    client: Address
    portal: Portal | None
    endpoint: Endpoint | None
    why: str
    bytes_to_backend: int
    bytes_to_client: int
    duration_s: float
    how: str

    @property
    def protocol(self) -> L4Protocol:
        return self.service_port.protocol


# Prefix of the reason if a listener cannot be opened on any port now, but may be later.
NO_ROOM = "no room"


class DataPlane(Protocol):
    """Owns every socket, in this process or in worker processes."""

    @property
    def failing(self) -> str:
        """The reason why the data plane, or part of it, serves nothing now; "" if all of it serves."""
        ...

    @property
    def unserved(self) -> Mapping[ListenerName, str]:
        """Open listeners that a new worker had no room for, each with the reason. They are retried."""
        ...

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        """Open a listener for each spec. Give listeners that are already open their new portals and affinity.

        Returns the reason for each listener that could not be opened.
        """
        ...

    async def reserve(self, port: int) -> str:
        """Hold *port* so that the kernel refuses its clients. Return the reason on failure, "" on success."""
        ...

    async def update(self, backends: Mapping[ListenerName, Backends]) -> None:
        """Give listeners their endpoints, effective from the next connection or datagram."""
        ...

    async def retire(self, names: Sequence[ListenerName]) -> None:
        """Close these listeners. Their open connections continue until they end or are drained."""
        ...

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        """Return all counters. Includes those of endpoints, unless there are more than *endpoints_max*."""
        ...

    async def details(self, request: DetailsRequest) -> Details:
        """Return what is known of the service ports of *request*, their next choices and open connections."""
        ...

    def cut(self) -> None:
        """Reset every open connection now."""
        ...

    async def close(self, drain_timeout_s: float) -> None:
        """Close every listener, give open connections *drain_timeout_s* to end, and reset the rest."""
        ...


# How a connection ended if the backend reset it while the client was open and no byte had come from the backend.
UNANSWERED = "reset by backend before it sent a byte"
# Called with an error number, and bytes that were read from the client but not sent.
OnUnused = Callable[[int, bytes], None]


class Splice(Protocol):
    """One connection that a splice engine serves."""

    @property
    def bytes_to_backend(self) -> int: ...

    @property
    def bytes_to_client(self) -> int: ...

    @property
    def half_closed(self) -> bool:
        """Whether one direction has ended while the other continues."""
        ...

    @property
    def sockets(self) -> tuple[SocketType, SocketType]:
        """The client's and the backend's socket, for inspection only."""
        ...

    def cut(self, reason: str) -> None:
        """Reset both sides now; ``on_end`` is called before this returns."""
        ...

    def close(self, how: str) -> None:
        """End both sides with a FIN now; ``on_end`` is called before this returns."""
        ...


class Splicer(Protocol):
    """A splice engine: moves bytes between two connected sockets until both directions have ended."""

    def start(
        self,
        client: SocketType,
        backend: SocketType,
        on_end: Callable[[str], None],
        told: int | None = None,
        on_unused: OnUnused | None = None,
        unsent: bytes = b"",
    ) -> Splice:
        """Take ownership of both sockets; when the connection ends, close them and call *on_end* once.

        *on_end* gets how it ended, and is never called before this returns. *told*: the poller already watches the
        backend's socket, and these events of it were delivered to its handler before. The sockets may be blocking.
        *on_unused* is called instead of *on_end* if the backend's connection breaks while the client is open and no
        byte has passed. The client's socket is then the caller's again, muted in the poller.
        *unsent*: bytes of the client that the backend gets first.

        Raises:
            OSError: this host lacks resources; *on_end* is not called, and the caller still owns the sockets.
        """
        ...
