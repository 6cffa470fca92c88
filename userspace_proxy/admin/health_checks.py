"""Health-check node ports: load balancers query here whether this node has endpoints of a Service (behaviours H1-H4).

The ports are open to all clients on purpose. A connection carries one response. So no client holds one idle, and none
is left to be reset when the port closes or another process takes over.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Mapping

from aiohttp import web
from aiohttp.typedefs import Handler

from userspace_proxy.admin.limited import ConnectionSlots, LimitedFactory, make_runner
from userspace_proxy.dataplane.sockets import bind_listener
from userspace_proxy.model.health_check import HealthCheck, health_checks
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.state import ProxyState

_EVERYWHERE = ("",)
_BACKLOG = 128
_LAST_ANSWERS_S = 0.5
_LOOK_EVERY_S = 0.01
_PAUSE_S = 1.0

log = logging.getLogger(__name__)


class ServiceHealthChecks:
    """A state sink: keeps the health-check node port of each Service open.

    *addresses* is called when a port is to be opened; if it returns none, ports are open at every address. *on_failure*
    is called once for each port that cannot be opened, and again if the reason changes. ``failures``: the current ones.
    """

    def __init__(
        self,
        proxy_healthy: Callable[[], bool],
        on_failure: Callable[[NamespacedName, str], None] = lambda _service, _reason: None,
        addresses: Callable[[], Iterable[str]] = tuple,
    ) -> None:
        self._proxy_healthy = proxy_healthy
        self._on_failure = on_failure
        self._addresses = addresses
        self._open: dict[NamespacedName, _Port] = {}
        self._adopted: dict[tuple[str, int], socket.socket] = {}
        self._slots = ConnectionSlots()
        self.failures: dict[NamespacedName, str] = {}

    async def sync(self, state: ProxyState) -> None:
        """Answer for the endpoints of *state*. Call this after the proxier: traffic can then reach the endpoints."""
        await self.serve(health_checks(state))

    async def serve(self, wanted: Mapping[NamespacedName, HealthCheck]) -> None:
        """Open, close and update ports to match *wanted*.

        Ports are closed first, so that another Service can take them. kube-proxy opens ports first and sets counts
        later, so that a new port reports 0 for a moment. Here a port never reports too few. A port that cannot be
        opened is retried at the next sync.
        """
        addresses = (tuple(self._addresses()) if wanted else ()) or _EVERYWHERE
        for service, port in list(self._open.items()):
            check = wanted.get(service)
            if check is None or (check.port, addresses) != (port.number, port.addresses):
                await self._open.pop(service).close()
        self._close_adopted({(address, check.port) for check in wanted.values() for address in addresses})
        for service, check in wanted.items():
            if service in self._open:
                self._open[service].local_endpoints = check.local_endpoints
            else:
                await self._try_open(service, check, addresses)
        for service in self.failures.keys() - wanted.keys():
            del self.failures[service]

    async def _try_open(self, service: NamespacedName, check: HealthCheck, addresses: tuple[str, ...]) -> None:
        port = _Port(service, check, addresses, self._proxy_healthy, self._slots)
        try:
            await port.open(lambda address: self._adopted.pop((address, check.port), None))
        except OSError as error:
            reason = f"health-check node port {check.port} cannot be opened: {error.strerror or error}"
            if self.failures.get(service) != reason:
                self.failures[service] = reason
                log.warning("%s: %s; it is tried again", service, reason)
                self._on_failure(service, reason)
        else:
            self._open[service] = port
            self.failures.pop(service, None)

    # ---- from one process to the next

    def listeners(self) -> list[socket.socket]:
        """Return the sockets for a successor to `adopt`. While it holds them, clients wait in the accept queue."""
        return [sock for port in self._open.values() for sock in port.listeners]

    def adopt(self, listeners: Iterable[socket.socket]) -> None:
        """Take over *listeners*. The first sync serves those that are wanted and closes the others."""
        for sock in listeners:
            address, port = sock.getsockname()[:2]
            everywhere = ipaddress.ip_address(address).is_unspecified
            self._adopted["" if everywhere else address, port] = sock

    def _close_adopted(self, wanted: Collection[tuple[str, int]] = ()) -> None:
        for key in self._adopted.keys() - wanted:
            self._adopted.pop(key).close()

    async def close(self) -> None:
        """Stop listening, and answer the clients that are already connected."""
        self._close_adopted()
        ports = list(self._open.values())
        self._open.clear()
        for port in ports:
            port.stop_listening()
        if not ports:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_LAST_ANSWERS_S):
                while any(port.has_clients for port in ports):  # noqa: ASYNC110 - aiohttp has no event for it
                    await asyncio.sleep(_LOOK_EVERY_S)
        for port in ports:
            await port.close()


class _Port:
    """The health-check node port of one Service, at all its addresses."""

    def __init__(
        self,
        service: NamespacedName,
        check: HealthCheck,
        addresses: tuple[str, ...],
        proxy_healthy: Callable[[], bool],
        slots: ConnectionSlots,
    ) -> None:
        self._service = service
        self._proxy_healthy = proxy_healthy
        self.number = check.port
        self.addresses = addresses
        self.local_endpoints = check.local_endpoints
        self.listeners: list[socket.socket] = []
        # No routes: the middleware answers every path and method.
        app = web.Application(middlewares=[slots.note, self._answer])
        self._runner = make_runner(app, _LAST_ANSWERS_S)
        self._limited = LimitedFactory(self._runner, slots)
        self._loop = asyncio.get_running_loop()
        self._connecting: set[asyncio.Task[None]] = set()

    async def open(self, find_adopted: Callable[[str], socket.socket | None]) -> None:
        """Listen at every address.

        Raises:
            OSError: one address cannot be bound; none stays open.
        """
        try:
            for address in self.addresses:
                self.listeners.append(find_adopted(address) or _listen(address, self.number))
            await self._runner.setup()
            for listener in self.listeners:
                listener.setblocking(False)
                self._watch(listener)
        except BaseException:
            await self.close()
            raise
        log.info("%s: serving health checks at port %d", self._service, self.number)

    def _watch(self, listener: socket.socket) -> None:
        if listener in self.listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        """Accept one client.

        `create_server` cannot do this: its close resets clients that asyncio has just accepted.
        """
        try:
            client, _ = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another process accepted it, or the client is gone
            return
        except OSError as error:
            log.warning("%s: cannot accept health checks, retrying: %s", self._service, error.strerror)
            self._loop.remove_reader(listener.fileno())
            self._loop.call_later(_PAUSE_S, self._watch, listener)
            return
        task = asyncio.create_task(self._connect(client), name="health check")
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)

    async def _connect(self, client: socket.socket) -> None:
        try:
            await self._loop.connect_accepted_socket(self._limited, client)
        except OSError:
            client.close()

    def stop_listening(self) -> None:
        while self.listeners:
            listener = self.listeners.pop()
            self._loop.remove_reader(listener.fileno())
            listener.close()

    @property
    def has_clients(self) -> bool:
        return bool(self._connecting) or (self._runner.server is not None and bool(self._runner.server.connections))

    async def close(self) -> None:
        self.stop_listening()
        await asyncio.gather(*self._connecting)
        if self._runner.server is not None:
            for connection in self._runner.server.connections:
                connection.force_close()  # sent no request yet; complete responses are with the kernel
        await self._runner.cleanup()

    @web.middleware
    async def _answer(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        healthy = self._proxy_healthy()
        body = {
            "service": {"namespace": self._service.namespace, "name": self._service.name},
            "localEndpoints": self.local_endpoints,
            "serviceProxyHealthy": healthy,
        }
        answer = web.Response(
            body=json.dumps(body, indent="\t").encode(),
            status=200 if self.local_endpoints and healthy else 503,
            content_type="application/json",
            headers={
                "X-Content-Type-Options": "nosniff",
                "X-Load-Balancing-Endpoint-Weight": str(self.local_endpoints),
            },
        )
        answer.force_close()
        return answer


def _listen(address: str, port: int) -> socket.socket:
    if not address:
        sock = bind_listener(socket.SOCK_STREAM, port)
        sock.listen(_BACKLOG)
        return sock
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=_BACKLOG)
