"""The seams. A mode, a rule language, an engine or a source is one class with these few methods."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from enum import Enum
from socket import SocketType
from typing import NamedTuple, Protocol

from userspace_proxy.api import KubernetesObject
from userspace_proxy.model.endpoint import Address, Endpoint, Family
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import (
    L4Protocol,
    ListenerName,
    NamespacedName,
    ObjectReference,
    Scope,
    ServicePortName,
)
from userspace_proxy.model.routes import Route, Sender
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node, Reach

# ---- where wishes come from


class EventType(Enum):
    """SET: here is the latest of this object. DELETE: it is gone. SYNCED: all that was there at the start was told."""

    SET = "set"
    DELETE = "delete"
    SYNCED = "synced"


class Origin(Protocol):
    """Where an object was written, for error messages."""

    def where(self, field: str = "") -> str:
        """Return the place of *field* (a path such as ``spec.ports[0].port``): ``file:line`` for files."""
        ...


@dataclass(frozen=True, slots=True)
class ObjectEvent:
    """One object's latest state; ``kind``, ``name`` and ``origin`` are None for SYNCED only."""

    type: EventType
    kind: str = ""
    name: NamespacedName | None = None
    object: KubernetesObject | None = None
    origin: Origin | None = None


@dataclass(slots=True)
class WatchStats:
    """How well a source hears of one kind: wall-clock seconds, and counts since the start.

    ``heard_at``: when the last word came, None before the first. ``failing_since``: since when it is not as it
    should be, None when it is; ``why`` says how.
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
        """Return whether it has been failing for longer than *after_s*."""
        return self.failing_since is not None and now - self.failing_since > after_s

    def failure(self) -> str:
        """Return what is wrong, and since when."""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.failing_since))
        return f"{self.kind} cannot be followed since {since}: {self.why}"


class Source(Protocol):
    """Tells what the cluster wants: every object once, then SYNCED once, then each change, for ever.

    A batch belongs together and is applied at once. A source never raises for what it reads: it
    reports, keeps the last good version, and goes on.
    """

    def events(self) -> AsyncIterator[Sequence[ObjectEvent]]: ...

    @property
    def problems(self) -> Mapping[str, str]:
        """What cannot be read now: place -> what is wrong. Empty when all is well."""
        ...

    @property
    def watches(self) -> Sequence[WatchStats]:
        """How well each kind is heard, where somebody has to be listened to; empty for files."""
        ...


# ---- what makes a state true


class Recorder(Protocol):
    """Tells people what they should know of an object: an Event of the cluster's, or a line of the log."""

    def normal(self, regarding: ObjectReference, reason: str, note: str) -> None:
        """Say *note*; nothing is wrong. *reason* is a word in capitals and lower case: ``Starting``."""
        ...

    def warn(self, regarding: ObjectReference, reason: str, note: str, *, is_logged: bool = False) -> None:
        """Say that somebody should look. May be called again for what has been said: it is told once.

        *is_logged*: the log has it already.
        """
        ...


class StateSink(Protocol):
    """Takes each new state."""

    async def sync(self, state: ProxyState) -> None:
        """Make *state* true, comparing it with what is held, so that a failed sync can be repeated.

        Raises:
            SyncError: refused; what was in force before still is.
        """
        ...


class Retrying(Protocol):
    """What is tried again until it can be done."""

    @property
    def error(self) -> str:
        """Why it cannot be done, "" where it can."""
        ...

    @property
    def failing_since(self) -> float | None:
        """Since which wall-clock second."""
        ...


class Proxier(StateSink, Protocol):
    """A mode: userspace, or one in which the kernel serves."""

    @property
    def service_ports(self) -> int:
        """How many are held."""
        ...

    @property
    def unopened(self) -> Mapping[ListenerName, str]:
        """Listeners that could not be opened, and why."""
        ...

    @property
    def loads(self) -> int:
        """How often rules were loaded."""
        ...

    @property
    def repairs(self) -> int:
        """How often rules were loaded again as somebody else had changed them."""
        ...

    @property
    def keeper(self) -> Retrying:
        """Who does so."""
        ...

    async def keep_rules(self) -> None:
        """Load our rules again whenever somebody else removed or changed them. Runs until cancelled."""
        ...

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Return a block during which nothing is changed."""
        ...

    async def close(self, drain_timeout_s: float) -> None:
        """Take the rules away, then stop serving; open connections get *drain_timeout_s* to end."""
        ...


# ---- rules in the kernel

# The mark on our own packets to backends, which rules pass by. One bit, none of those that kube-proxy (0x4000,
# 0x8000), Cilium (0x0f00) and Calico (0xffff0000) use.
OWN_MARK = 0x2000
# Set beside OWN_MARK on our packets that carry a client's own address; alone, on what backends answer to these.
TRANSPARENT_MARK = 0x1000


class Capture(Enum):
    """How packets to a portal come to us: REDIRECT to the incoming interface's address, or DNAT to one on ``lo``."""

    REDIRECT = "redirect"
    ADDRESS = "address"


@dataclass(frozen=True, slots=True)
class PodDetector:
    """Tells who is a pod: by its address being in one of ``cidrs``, or by the interface that it comes in by.

    ``interface`` is a name; with ``*`` at its end it is the beginning of names. One of the two is given.
    """

    cidrs: tuple[str, ...] = ()
    interface: str = ""


# In place of a proxy port: such packets are dropped.
DROPPED = 0


@dataclass(frozen=True, slots=True)
class Redirects:
    """The rules of userspace mode: for each portal the local port its packets go to, or DROPPED.

    ``exceptions``: what goes before ``ports`` for senders that are told from others. ``allowed``: the CIDRs from which
    these portals may be dialled; who comes from elsewhere is dropped. ``node_ports_on``: the CIDRs of the node's own
    addresses at which node ports are served; where a family has none in it, all are.
    ``transparent``: some listener carries its clients' own addresses to backends, whose answers are to come to us.
    ``refuse_port`` is a port at which nobody listens: portals without endpoints go there, and the
    kernel answers for itself - a reset for TCP, port unreachable for UDP.
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
    """Our rules in the kernel, whatever they say."""

    async def reload(self) -> None:
        """Load the held rules again, whole; for when somebody else changed or removed them."""
        ...

    async def remove(self) -> None:
        """Take away every rule of ours, whoever of us loaded it. Nothing there is no error."""
        ...

    async def is_intact(self) -> bool:
        """Return whether the rules in the kernel still are what was loaded."""
        ...

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Call *on_change* when somebody else may have changed our rules, until `unwatch`."""
        ...

    def unwatch(self) -> None: ...


class Kernel(LoadedRules, Protocol):
    """Holds the rules of userspace mode in one rule language."""

    language: str

    async def load(self, redirects: Redirects) -> None:
        """Make *redirects* the rules in force, at the cost of what changed.

        Raises:
            SyncError: the kernel refused; the rules before are still in force, with iptables in each table and family
                that was refused.
        """
        ...


@dataclass(frozen=True, slots=True)
class Translation:
    """What the kernel does with packets to one service port, in a kernel mode.

    ``routes``: for each portal that is this service port's, by sender; ANYBODY's first. A listener stands for the
    endpoints of its scope in ``reaches``; with ``transparent`` these see the client's address, else this node's.
    ``allowed``: who may dial these portals, where that is not everybody. ``serving``: the endpoints whose UDP flows may
    stay.
    """

    service_port: ServicePort
    routes: tuple[Route, ...]
    reaches: Mapping[Family, Reach]
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    serving: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the rules of a kernel mode say of this node, whatever its Services.

    ``node_ports_on`` as in Redirects. ``service_cidrs``: where cluster IPs are from, as far as that is known.
    """

    node: Node = field(default_factory=Node)
    pods: PodDetector | None = None
    node_ports_on: tuple[str, ...] = ()
    service_cidrs: tuple[str, ...] = ()


class KernelTables(LoadedRules, Protocol):
    """Holds the rules of one kernel mode. ``loads``: by IP family, what came of loading them, where that is counted."""

    mode: str

    @property
    def loads(self) -> Mapping[str, Loads]: ...

    async def prepare(self) -> None:
        """Make ready for the first load. Another of ours may serve this node still: what is his is not touched.

        Raises:
            SyncError: this host cannot have these rules, or somebody else has; nothing was changed.
        """
        ...

    async def load(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        """Make *translations* true, all or nothing, at the cost of *changed*: those that came, differ, or went.

        What was changed when a load was refused is in *changed* of the next, too.

        Raises:
            SyncError: the kernel refused; the rules before are still in force.
        """
        ...


# ---- sockets


class Backends(NamedTuple):
    """The endpoints of one listener: those that may take new traffic, and those whose UDP flows may stay.

    Of both families; a client meets those of its own.
    """

    usable: tuple[Endpoint, ...]
    serving: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """A service port, the local port at which the data plane accepts its traffic, and which part of it."""

    service_port: ServicePort
    proxy_port: int
    scope: Scope = Scope.CLUSTER
    transparent: bool = False

    @property
    def name(self) -> ListenerName:
        return ListenerName(self.service_port.name, self.scope, self.transparent)


@dataclass(slots=True)
class Counters:
    """What one service port has done so far; plain ints that the hot path adds to and the scrape reads.

    ``refused``: came to the proxy port by another way than a portal; ``limited``: their client or service port had too
    many open; ``port_exhaustions``: dials that found every local port towards their endpoint in use;
    ``sources_refused``: those that the kernel did not let speak as their client.
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
    flows: int = 0
    flows_total: int = 0
    flows_evicted: int = 0
    datagrams_dropped: int = 0
    pins: int = 0
    endpoints: int = 0
    ejected: int = 0


@dataclass(slots=True)
class EndpointCounters:
    """What one endpoint of a service port has had so far; plain ints, too.

    ``opened``, ``open``: TCP connections to it, or UDP flows. ``retries``: clients that came to it after another one
    had failed them.
    """

    opened: int = 0
    open: int = 0
    bytes_to_backends: int = 0
    bytes_to_clients: int = 0
    dial_failures: int = 0
    retries: int = 0
    ejections: int = 0


class ServiceStats(NamedTuple):
    """The counters of one service port, and of its endpoints where these are wanted."""

    name: ServicePortName
    counters: Counters
    endpoints: list[tuple[Address, EndpointCounters]]


@dataclass(slots=True)
class PlaneStats:
    """The data plane's counters at one moment.

    ``endpoints``: of all endpoints, and of those that are gone while connections to them are open; empty where they
    are too many, and ``hidden_endpoints`` says how many.
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
    """One connection or flow that has ended. ``why``: the reason for this endpoint; ``how``: how it ended."""

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


# Why a listener cannot be opened begins so where no other port would help, but there may be room later.
NO_ROOM = "no room"


class DataPlane(Protocol):
    """Owns every socket. The same calls, whether it lives in this process or in a worker."""

    @property
    def failing(self) -> str:
        """Why part of it or all serves nothing at this moment; "" if all serves."""
        ...

    @property
    def unserved(self) -> Mapping[ListenerName, str]:
        """Open listeners that a new worker had no room for, and why; they are tried again."""
        ...

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        """Open a listener for each spec, or give the open one its new portals and affinity.

        Returns why not, for each that could not be opened: the reason as text.
        """
        ...

    async def reserve(self, port: int) -> str:
        """Hold *port* so that the kernel refuses whoever dials it; return why that cannot be ("" when held)."""
        ...

    async def update(self, backends: Mapping[ListenerName, Backends]) -> None:
        """Give listeners their endpoints, from the next connection and datagram on."""
        ...

    async def retire(self, names: Sequence[ListenerName]) -> None:
        """Close these listeners; their open connections live on until they end or are drained."""
        ...

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        """Return what was counted; of the endpoints too, unless there are more than *endpoints_max*."""
        ...

    def cut(self) -> None:
        """End every open connection now, with resets."""
        ...

    async def close(self, drain_timeout_s: float) -> None:
        """Close every listener, give open connections *drain_timeout_s* to end, cut the rest."""
        ...


class Splice(Protocol):
    """One connection in an engine's hands."""

    @property
    def bytes_to_backend(self) -> int: ...

    @property
    def bytes_to_client(self) -> int: ...

    @property
    def half_closed(self) -> bool:
        """One direction has ended, the other goes on."""
        ...

    @property
    def sockets(self) -> tuple[SocketType, SocketType]:
        """The client's and the backend's socket, for looking at only."""
        ...

    def cut(self, reason: str) -> None:
        """End it now, with a reset to both sides; ``on_end`` is called before this returns."""
        ...


class Splicer(Protocol):
    """An engine: moves bytes between two connected non-blocking sockets until both directions have ended."""

    def start(
        self, client: SocketType, backend: SocketType, on_end: Callable[[str], None], told: int | None = None
    ) -> Splice:
        """Take over both sockets; close them and call *on_end* with how it ended, exactly once, after this returned.

        *told*: the poller watches the backend's socket already, and these events of it were told to the handler
        before. The sockets may be blocking ones.

        Raises:
            OSError: this host has no room for it; *on_end* is not called, and the sockets are still the caller's.
        """
        ...
