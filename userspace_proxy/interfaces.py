"""The Protocols between parts. The values that cross them are in `model/`.

A mode, a rule language, a splice engine or a source is one class with the few methods of its Protocol.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from socket import SocketType
from typing import TYPE_CHECKING, Protocol

from userspace_proxy.api.events import ObjectEvent
from userspace_proxy.model.counters import PlaneStats
from userspace_proxy.model.details import Details, DetailsRequest
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import ListenerName
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.watch_stats import WatchStats

if TYPE_CHECKING:
    from prometheus_client.core import Metric


class Source(Protocol):
    """Yields every object once, then SYNCED once, then each change, until cancelled.

    The events of one batch belong together and are applied at once. A source never raises because of its input: it
    reports the problem, keeps the last good version, and continues.
    """

    def events(self) -> AsyncIterator[Sequence[ObjectEvent]]: ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Inputs that cannot be read now: place -> reason. Empty if there are none."""

    @property
    def watches(self) -> Sequence[WatchStats]:
        """The state of the watch on each kind. Empty for files."""


class StateSink(Protocol):
    """Applies each new desired state."""

    async def sync(self, state: ProxyState) -> None:
        """Apply *state*, comparing it with the current state, so that a failed sync can be repeated.

        Raises:
            SyncError: the state was refused; the previous one stays in force.
        """


class Retrying(Protocol):
    """An operation that is retried until it succeeds."""

    @property
    def error(self) -> str:
        """The last error, "" after success."""

    @property
    def failing_since(self) -> float | None:
        """The wall-clock second of the first failure since the last success."""


class Proxier(StateSink, Protocol):
    """Applies desired state in one mode: in userspace, or by kernel rules."""

    @property
    def service_ports(self) -> int:
        """The number of service ports in the last applied state."""

    @property
    def unopened(self) -> Mapping[ListenerName, str]:
        """Listeners that could not be opened, each with the reason."""

    def proxy_port(self, listener: ListenerName) -> int:
        """Return the local port to which the listener's traffic is redirected, 0 if there is none."""

    @property
    def loads(self) -> int:
        """The number of rule loads since the start."""

    @property
    def repairs(self) -> int:
        """The number of times rules were loaded again because another program changed them."""

    async def is_intact(self) -> bool:
        """Return whether the kernel still has the rules that were loaded."""

    @property
    def repairer(self) -> Retrying:
        """The retry state of the repairs of rules."""

    def metrics(self) -> Iterable[Metric]:
        """Return the metrics of this mode that other modes do not have."""

    async def run(self) -> None:
        """Restore what other programs change, such as rules that they removed. Runs until cancelled."""

    def paused(self) -> AbstractAsyncContextManager[None]:
        """Return a context manager. No rule is loaded or repaired within its block."""

    async def close(self, drain_timeout_s: float) -> None:
        """Remove the rules, then stop serving. Open connections get *drain_timeout_s* to end."""


class LoadedRules(Protocol):
    """The rules that this program has loaded into the kernel."""

    async def reload(self) -> None:
        """Load all held rules again, after another program changed or removed them."""

    async def remove(self) -> None:
        """Remove all rules of this program, including those of other processes. No error if there are none."""

    async def is_intact(self) -> bool:
        """Return whether the kernel still has the rules that were loaded."""

    async def watch(self, on_change: Callable[[], None]) -> None:
        """Call *on_change* whenever another program may have changed the rules, until `unwatch`."""

    def unwatch(self) -> None: ...


class DataPlane(Protocol):
    """Owns every socket, in this process or in worker processes."""

    @property
    def failing(self) -> str:
        """The reason why the data plane, or part of it, serves nothing now; "" if all of it serves."""

    @property
    def unserved(self) -> Mapping[ListenerName, str]:
        """Open listeners that a new worker had no room for, each with the reason. They are retried."""

    async def open(self, specs: Sequence[ListenerSpec]) -> Mapping[ListenerName, str]:
        """Open a listener for each spec. Give listeners that are already open their new portals and affinity.

        Returns the reason for each listener that could not be opened.
        """

    async def reserve(self, port: int) -> str:
        """Hold *port* so that the kernel refuses its clients. Return the reason on failure, "" on success."""

    async def update(self, backends: Mapping[ListenerName, Backends]) -> None:
        """Give listeners their endpoints, effective from the next connection or datagram."""

    async def retire(self, names: Sequence[ListenerName]) -> None:
        """Close these listeners. Their open connections continue until they end or are drained."""

    async def stats(self, endpoints_max: int = 0) -> PlaneStats:
        """Return all counters. Includes those of endpoints, unless there are more than *endpoints_max*."""

    async def details(self, request: DetailsRequest) -> Details:
        """Return the endpoints of the service ports in *request*, their next choices, and open connections."""

    def cut(self) -> None:
        """Reset every open connection now."""

    async def close(self, drain_timeout_s: float) -> None:
        """Close every listener, give open connections *drain_timeout_s* to end, and reset the rest."""


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

    @property
    def sockets(self) -> tuple[SocketType, SocketType]:
        """The client's and the backend's socket, for inspection only."""

    def cut(self, reason: str) -> None:
        """Reset both sides now; ``on_end`` is called before this returns."""

    def close(self, how: str) -> None:
        """End both sides with a FIN now; ``on_end`` is called before this returns."""


class Splicer(Protocol):
    """A splice engine: moves bytes between two connected sockets until both directions have ended."""

    def start(
        self,
        client: SocketType,
        backend: SocketType,
        on_end: Callable[[str], None],
        events: int,
        on_unused: OnUnused | None = None,
        unsent: bytes = b"",
    ) -> Splice:
        """Take ownership of both sockets; when the connection ends, close them and call *on_end* once.

        *on_end* gets how it ended, and is never called before this returns. The poller already watches the backend's
        socket; *events* are those that were delivered to its handler before. The sockets may be blocking.
        *on_unused* is called instead of *on_end* if the backend's connection breaks while the client is open and no
        byte has passed. The client's socket is then the caller's again, muted in the poller.
        *unsent*: bytes of the client that the backend gets first.

        Raises:
            OSError: this host lacks resources; *on_end* is not called, and the caller still owns the sockets.
        """
