"""One TCP listener: accept, pick an endpoint, dial it, splice.

No byte is read from the client before a backend is connected. A failed dial can therefore be retried on another
endpoint, and a slow backend pushes back on the client through the kernel.
"""

import errno
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from socket import SocketType

from userspace_proxy.dataplane.context import PlaneContext, Shared
from userspace_proxy.dataplane.dial import NO_ENDPOINT, Dial
from userspace_proxy.dataplane.lifetimes import Lifetimes, end_idle, idle_units
from userspace_proxy.dataplane.listener import BaseListener
from userspace_proxy.dataplane.peers import has_left
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.poller import HANGUP
from userspace_proxy.dataplane.sockets import (
    LOCAL_SHORTAGES,
    accept,
    original_destination,
    packed,
    prepare_listener,
    reset_on_close,
    unpacked,
)
from userspace_proxy.interfaces import Splice
from userspace_proxy.model.access_record import UNANSWERED
from userspace_proxy.model.details import ConnectionDetails
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.service import ConnectionPolicy, Portal, portals

ACCEPTS_A_TURN = 32
# A service port that has used up its share of descriptors lets new clients wait. If no connection ends for this time,
# they are reset: one of them may belong to a loop through the proxy that all these connections are part of.
CROWDED_S = 5.0
_CROWDED_RETRY_S = 0.1


class TcpListener(BaseListener):
    """The listener at one proxy port of a TCP service port."""

    def __init__(self, spec: ListenerSpec, sock: socket.socket, context: PlaneContext, shared: Shared) -> None:
        super().__init__(spec, sock, context, shared)
        self._family = int(sock.family)
        self._crowded_since = self._crowded_at = -inf
        prepare_listener(sock, context.limits.dead_peer_timeout_s)  # it may come from another process

    def begin(self) -> None:
        """Begin to accept; no effect once closed."""
        if self.sock.fileno() >= 0:
            self.context.poller.accept_from(self.sock, self._accept)

    def configure(self, spec: ListenerSpec) -> None:
        super().configure(spec)
        self._portals: dict[bytes, Portal] | None = None  # made for the first connection
        self._dialled = packed(spec.at, spec.proxy_port) if spec.at else None
        policy, shared, context = spec.service_port.connections, self.shared, self.context
        if shared.lifetimes is None and policy != ConnectionPolicy():
            open_now = (connection for connection in context.connections if connection.listener.shared is shared)
            shared.lifetimes = Lifetimes(context.policy_loop, context.poller, self.counters, open_now)
        if shared.lifetimes is not None:
            shared.lifetimes.set_policy(policy)

    def update(self, backends: Backends) -> None:
        """Apply new endpoints. Connections to removed ones go on, unless the connection policy says otherwise."""
        before, shared = self.picker.endpoints, self.shared
        self.picker.set_endpoints(backends.usable)
        if shared.lifetimes is not None:
            shared.lifetimes.on_endpoints(before, shared.memory.addresses(), backends)
            if backends.usable:
                shared.lifetimes.release()

    def leave(self) -> None:
        """Stop accepting: another process accepts at the same socket.

        Clients that wait for an endpoint are reset, as this process learns of no more endpoints. They can dial again.
        """
        if self.sock.fileno() >= 0:
            self.context.poller.leave(self.sock)
            self.sock.close()
            self._fail_waiting("handed over")

    def close(self) -> None:
        """Stop listening. Open connections continue; those in the accept queue are accepted first."""
        if self.sock.fileno() < 0:
            return
        self.context.poller.leave(self.sock)
        while self._accept():
            pass
        self.sock.close()
        self._fail_waiting("service gone")

    def _fail_waiting(self, why: str) -> None:
        if self.shared.lifetimes is not None:
            for connection in [c for c in self.shared.lifetimes.waiting if c.listener is self]:
                connection.on_failed(why)

    def _accept(self) -> bool:
        """Accept up to a turn's number of connections. Return whether there may be more."""
        context, listener, family = self.context, self.sock, self._family
        connections = context.connections
        share = connections.share(self.counters.open)
        if share <= 0:
            if context.poller.accepting:
                self._wait_for_share()
            return False
        self._crowded_since = inf
        for _ in range(min(ACCEPTS_A_TURN, share)):
            try:
                sock, client = accept(listener, family)
            except BlockingIOError:
                return False
            except OSError as error:
                if error.errno in LOCAL_SHORTAGES:
                    connections.note_shortage(error)
                    return False
                continue  # an error of this client alone: it is gone, or a firewall blocked it
            TcpConnection(self, sock, client, context, context.now()).begin()
        return True

    def _wait_for_share(self) -> None:
        """Leave new clients in the accept queue for a moment. Reset them if the shortage lasts."""
        context, now = self.context, self.context.now()
        context.connections.note_crowd(str(self.name))
        if now - self._crowded_at > 2 * CROWDED_S or self._crowded_since > now:
            self._crowded_since = now
        self._crowded_at = now
        if now - self._crowded_since >= CROWDED_S:
            self._refuse_waiting()
        context.poller.leave(self.sock)
        context.loop.call_later(_CROWDED_RETRY_S, self.begin)

    def _refuse_waiting(self) -> None:
        for _ in range(ACCEPTS_A_TURN):
            try:
                client, _ = accept(self.sock, self._family)
            except OSError:
                return
            self.counters.limited += 1
            reset_on_close(client)
            client.close()

    def note_reset(self, pick: Pick) -> bool:
        """Note that the endpoint of *pick* has reset a connection before it sent a byte. Return whether to eject it."""
        address = pick.endpoint.address
        return address in self.picker.endpoints and self.suspects.note_reset(address, self.context.now())

    def header(self, client: Address, dialled: bytes | None) -> bytes:
        """Return the PROXY protocol header that backends get before the bytes of *client*; b"" for none."""
        return self._header_of(client, unpacked(dialled)) if self._header_of and dialled else b""

    def dialled_by(self, client: SocketType, client_ip: str) -> bytes | None:
        """Return the address that *client* dialled, as `packed`, or None if it is not known."""
        return self._dialled or original_destination(client, client_ip)

    def portal_of(self, dialled: bytes | None) -> Portal | None:
        """Return the portal at the address *dialled*, or None if it is not a portal of this service port."""
        if dialled is None:
            return None
        if self._portals is None:
            self._portals = self._packed_portals()
        # A portal at this very address, or a node port on every address.
        return self._portals.get(dialled) or self._portals.get(dialled[:2] + bytes(len(dialled) - 2))

    def _packed_portals(self) -> dict[bytes, Portal]:
        spec = self.spec
        if self._dialled:
            return {self._dialled: Portal(spec.at, spec.proxy_port, spec.name.protocol)}
        return {packed(portal.ip, portal.port): portal for portal in portals(spec.service_port)}


@dataclass(slots=True)
class _Past:
    """What few connections have been through: a wait, a break after which their dial continues, unsent bytes."""

    has_waited: bool = False
    dial: Dial | None = None
    unsent: bytes = b""


@dataclass(slots=True, eq=False)
class TcpConnection:
    """One client's connection, from accept to end."""

    listener: TcpListener
    _client: SocketType
    client: Address
    _context: PlaneContext
    started_at: float
    _portal: Portal | None = None
    _dial: Dial | None = None
    splice: Splice | None = None  # None while the backend is being dialled
    _pick: Pick | None = None
    _counted: tuple[int, int] = (0, 0)
    _past: _Past | None = None

    def begin(self) -> None:
        """Dial a backend. Reset the client if it did not come by a portal, or has too many connections."""
        listener = self.listener
        dialled = listener.dialled_by(self._client, self.client[0])
        self._portal = portal = listener.portal_of(dialled)
        if dialled is None or portal is None:
            # The client dialled the proxy port itself. The guard rule refuses that, unless a foreign DNAT led here.
            listener.counters.refused += 1
            self._refuse()
            return
        counters = listener.counters
        if not self._context.connections.add(self):
            counters.limited += 1
            self._refuse()
            return
        counters.accepted += 1
        counters.open += 1
        if (lifetimes := listener.shared.lifetimes) is not None:
            lifetimes.add(self)
        self._dial = dial = self._new_dial(dialled)
        dial.start()

    def _new_dial(self, dialled: bytes | None) -> Dial:
        listener = self.listener
        return Dial(self.client[0], listener, self, listener.header(self.client, dialled))

    def on_connected(self, backend: SocketType, pick: Pick, events: int) -> None:
        self._dial = None
        self._pick = pick
        pick.counters.opened += 1
        pick.counters.open += 1
        unsent = b"" if self._past is None else self._past.unsent
        try:
            splicer = self._context.splicer
            self.splice = splicer.start(self._client, backend, self._on_end, events, self._on_unused, unsent)
        except OSError as error:
            self._context.poller.close(backend)
            self._context.connections.note_shortage(error)
            self.on_failed("out of memory for events")

    def on_failed(self, reason: str) -> None:
        self._dial = None
        lifetimes = self.listener.shared.lifetimes
        if reason is NO_ENDPOINT and lifetimes is not None and lifetimes.wait(self):
            try:
                self._context.poller.watch(self._client, self._on_events_of_waiting)
            except OSError as error:
                self._context.connections.note_shortage(error)
            else:
                return
        self.listener.counters.failed += 1
        self._refuse()
        self._on_end(reason)

    def _refuse(self) -> None:
        reset_on_close(self._client)
        self._context.poller.close(self._client)

    def _on_unused(self, code: int, unsent: bytes) -> None:
        """Dial another endpoint: the chosen one broke the connection before a byte passed."""
        pick, listener = self._pick, self.listener
        assert pick is not None
        pick.counters.open -= 1
        self.splice = self._pick = None
        self._context.connections.note_new_backend(self)
        listener.note_reset(pick)
        past = self._past = self._past or _Past()
        if past.dial is None:
            past.dial = self._new_dial(listener.dialled_by(self._client, self.client[0]))
        past.unsent = unsent
        self._dial = past.dial
        self._dial.resume(pick, code)

    # ---- while there is no endpoint

    def _on_events_of_waiting(self, events: int) -> None:
        """End the wait of a client that has left or closed its sending side: both look alike."""
        if events & HANGUP and has_left(self._client):
            self.listener.counters.waits_abandoned += 1
            self._refuse()
            self._on_end("client left while it waited for an endpoint")

    def dial(self) -> None:
        """Dial an endpoint now that there is one."""
        self.listener.counters.waits_released += 1
        self._past = _Past(has_waited=True)
        self._context.poller.mute(self._client)  # the splice watches it
        self._dial = dial = self._new_dial(self.listener.dialled_by(self._client, self.client[0]))
        dial.start()

    def _on_end(self, how: str) -> None:
        context, listener = self._context, self.listener
        counters = listener.counters
        context.connections.remove(self)
        if (lifetimes := listener.shared.lifetimes) is not None:
            lifetimes.remove(self)
        counters.open -= 1
        if (pick := self._pick) is not None:
            pick.counters.open -= 1
            self.count_bytes()
            self.splice = None
            if self._counted[1]:
                if listener.suspects:
                    listener.suspects.note_answer(pick.endpoint.address, self.started_at)
            elif how is UNANSWERED:
                counters.unanswered += 1
                if listener.note_reset(pick):
                    listener.hold_against(pick, self.client[0], os.strerror(errno.ECONNRESET))
        if context.access_log is not None:
            listener.record(self.client, self._portal, pick, self._why(), self._counted, self.started_at, how)

    def _why(self) -> str:
        why = self._pick.why if self._pick else ""
        return f"{why}, after a wait" if why and self._past and self._past.has_waited else why

    def count_bytes(self) -> None:
        """Add the bytes moved since the last call to the counters; a connection may stay open for days."""
        splice, pick = self.splice, self._pick
        if splice is None or pick is None:
            return
        before, self._counted = self._counted, (splice.bytes_to_backend, splice.bytes_to_client)
        self.listener.count(pick.counters, before, self._counted)

    def details(self) -> ConnectionDetails:
        """Return the addresses, age and byte counts of this connection."""
        splice, pick = self.splice, self._pick
        return ConnectionDetails(
            self.listener.name.service_port,
            self.client,
            "" if self._portal is None else str(self._portal),
            None if pick is None else pick.endpoint.address,
            "" if pick is None else pick.why,
            self._context.now() - self.started_at,
            0 if splice is None else splice.bytes_to_backend,
            0 if splice is None else splice.bytes_to_client,
        )

    # ---- for the sweep, the drain and the policy

    def leave_endpoints(self, addresses: Collection[Address], *, at_once: bool) -> None:
        """End the connection if its endpoint is one of *addresses*. If that is still being dialled, dial another.

        *at_once*: by a reset; otherwise an idle connection ends with a FIN.
        """
        if self._dial is not None:
            self._dial.leave_endpoints(addresses)
        elif self.splice is not None and self._pick and self._pick.endpoint.address in addresses:
            self.listener.counters.closed_by_removal += 1
            if not at_once and idle_units(self.splice):
                end_idle(self.splice, "closed by on-endpoint-removal")
            else:
                self.splice.cut("reset by on-endpoint-removal")

    def cut(self, reason: str) -> None:
        """Reset both sides now."""
        if self.splice is not None:
            self.splice.cut(reason)
        elif self._dial is not None or self._is_waiting():
            if self._dial is not None:
                self._dial.cut()
                self._dial = None
            self._refuse()
            self._on_end(reason)

    def _is_waiting(self) -> bool:
        lifetimes = self.listener.shared.lifetimes
        return lifetimes is not None and self in lifetimes.waiting
