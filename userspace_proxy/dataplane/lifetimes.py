"""How long the connections of one service port wait for an endpoint, and how long they live: its `ConnectionPolicy`.

Only service ports with a policy have this. One task looks at all of them every PERIOD_S while there is something to
wait for, so that no connection has a timer of its own. Between two looks, an endpoint's removal costs one walk over the
connections of its service port.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from userspace_proxy.dataplane.peers import silence
from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.dataplane.slices import SLICE_S, in_slices
from userspace_proxy.interfaces import Splice
from userspace_proxy.model.counters import Counters
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.listeners import Backends
from userspace_proxy.model.service import ConnectionPolicy

if TYPE_CHECKING:
    from userspace_proxy.dataplane.tcp import TcpConnection

PERIOD_S = 0.25
# Connections are closed at ages that differ by up to this share, so that they do not all return at once.
JITTER = 0.1
# A connection is idle after this time without a byte in either direction, with everything acknowledged.
IDLE_S = 1.0
# The answer to a request comes within this time, or never.
ANSWER_S = 10.0
# Most clients that pause do so for whole seconds. Close between two of these, so that no request crosses the FIN.
_BETWEEN_REQUESTS = 0.2, 0.8
WAITING_MAX = 1_024
_RELEASED_A_TURN = 32
# How long connections leave their endpoint in one turn. The kernel then closes their sockets, which takes much longer.
LEAVING_S = SLICE_S / 10

log = logging.getLogger(__name__)


class PolicyLoop:
    """Looks at the service ports of a data plane on which a policy has something to do."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now = now
        self._watched: set[Lifetimes] = set()
        self._task: asyncio.Task[None] | None = None

    def watch(self, lifetimes: Lifetimes) -> None:
        """Look at *lifetimes* until it is done."""
        self._watched.add(lifetimes)
        if self._task is None:
            self._task = asyncio.create_task(self._keep(), name="connection policies")

    async def _keep(self) -> None:
        while self._watched:
            await asyncio.sleep(PERIOD_S)
            for lifetimes in list(self._watched):
                await self._look_at(lifetimes)
        self._task = None

    async def _look_at(self, lifetimes: Lifetimes) -> None:
        try:
            await lifetimes.look(self.now())
        except Exception:
            log.exception("a bug: a connection policy was not applied")
        if lifetimes.is_done:
            self._watched.discard(lifetimes)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()


class Lifetimes:
    """Applies the policy of one service port to its connections."""

    def __init__(
        self, policy_loop: PolicyLoop, poller: Poller, counters: Counters, open_now: Iterable[TcpConnection]
    ) -> None:
        """Make it. *open_now*: the connections that are open already, oldest first."""
        self._policy_loop = policy_loop
        self._poller = poller
        self._counters = counters
        self._policy = ConnectionPolicy()
        # Oldest first, with the number of bytes that an old connection had moved at the last look.
        self._open: dict[TcpConnection, int] = dict.fromkeys(open_now, -1)
        self._removed_at: dict[Address, float] = {}
        self._wait_until: dict[TcpConnection, float] = {}
        self._released: list[TcpConnection] = []

    def set_policy(self, policy: ConnectionPolicy) -> None:
        """Apply *policy* from now on, to open connections, too. A waiting client keeps the time that it was given."""
        self._policy = policy
        if policy.drain_s is None:
            self._removed_at.clear()
        self._policy_loop.watch(self)

    def add(self, connection: TcpConnection) -> None:
        self._open[connection] = -1
        if self._policy.max_age_s:
            self._policy_loop.watch(self)

    def remove(self, connection: TcpConnection) -> None:
        self._open.pop(connection, None)
        self._wait_until.pop(connection, None)

    @property
    def is_done(self) -> bool:
        """Whether no connection needs another look until something changes."""
        return not (self._removed_at or self._wait_until or (self._policy.max_age_s and self._open))

    async def look(self, now: float) -> None:
        """Close what has to be closed at *now*."""
        async for connection, until in in_slices(list(self._wait_until.items()), self._policy_loop.now):
            if now >= until and connection in self._wait_until:
                self._counters.waits_expired += 1
                connection.on_failed("no endpoint came in time")
        self._leave_removed(now)
        if not self._policy.max_age_s:
            return
        youngest_at = now - self._policy.max_age_s * (1 - JITTER)
        old = list(itertools.takewhile(lambda connection: connection.started_at <= youngest_at, self._open))
        async for connection in in_slices(old, self._policy_loop.now):
            self._end_if_too_old(connection, now)

    # ---- removed endpoints

    def on_endpoints(self, before: Collection[Address], present: Collection[Address], backends: Backends) -> None:
        """Apply the policy to endpoints that were removed: those in *before*, but not in *present* (of all listeners).

        An endpoint that is still ready in *backends* left for another reason, such as a topology hint. It is ignored.
        """
        for address in present if self._removed_at else ():
            self._removed_at.pop(address, None)
        if self._policy.drain_s is None:
            return
        ready = {endpoint.address for endpoint in backends.serving if endpoint.ready}
        gone = [address for address in before if address not in present and address not in ready]
        if gone:
            now = self._policy_loop.now()
            self._removed_at.update(dict.fromkeys(gone, now))
            self._leave_removed(now)
            self._policy_loop.watch(self)

    def _leave_removed(self, now: float) -> None:
        drain_s = self._policy.drain_s
        if drain_s is None or not self._removed_at:
            return
        due = {address for address, at in self._removed_at.items() if now - at >= drain_s}
        for address in due:
            del self._removed_at[address]
        if due:
            self._leave_some(iter(list(self._open)), due, at_once=not drain_s)

    def _leave_some(self, connections: Iterator[TcpConnection], due: Collection[Address], *, at_once: bool) -> None:
        """Let *connections* leave the endpoints that are *due*, in each turn for LEAVING_S."""
        until = self._policy_loop.now() + LEAVING_S
        for connection in connections:
            connection.leave_endpoints(due, at_once=at_once)
            if self._policy_loop.now() >= until:
                self._poller.again(partial(self._leave_some, connections, due, at_once=at_once))
                return

    # ---- old connections

    def _end_if_too_old(self, connection: TcpConnection, now: float) -> None:
        splice, policy = connection.splice, self._policy
        overdue_s = now - connection.started_at - policy.max_age_s * _jitter(connection.client)
        if splice is None or connection not in self._open or overdue_s < 0:
            return
        if policy.force_s is not None and overdue_s >= policy.force_s:
            self._counters.closed_by_age += 1
            splice.cut("reset by max-connection-age")
            return
        moved = splice.bytes_to_backend + splice.bytes_to_client
        if moved != self._open[connection]:
            self._open[connection] = moved
            return
        earliest, latest = _BETWEEN_REQUESTS
        if earliest <= idle_units(splice) % 1 < latest:
            self._counters.closed_by_age += 1
            end_idle(splice, "closed by max-connection-age")

    # ---- connections without an endpoint

    @property
    def waiting(self) -> Collection[TcpConnection]:
        """The connections that wait for an endpoint."""
        return self._wait_until.keys()

    def wait(self, connection: TcpConnection) -> bool:
        """Let *connection* wait for an endpoint. Return False if it may not, or too many wait."""
        until = connection.started_at + self._policy.wait_s
        if until <= self._policy_loop.now() or len(self._wait_until) >= WAITING_MAX:
            return False
        self._wait_until[connection] = until
        self._policy_loop.watch(self)
        return True

    def release(self) -> None:
        """Let waiting connections dial, some in each turn, because there are endpoints now."""
        if self._wait_until:
            if not self._released:
                self._poller.again(self._release_some)
            self._released = list(self._wait_until)

    def _release_some(self) -> None:
        some, self._released = self._released[:_RELEASED_A_TURN], self._released[_RELEASED_A_TURN:]
        if self._released:
            self._poller.again(self._release_some)
        for connection in some:
            if self._wait_until.pop(connection, None) is not None:
                connection.dial()


def idle_units(splice: Splice) -> float:
    """Return the connection's idle time as a multiple of IDLE_S; 0.0 if it is not idle.

    A half-closed connection is never idle: its client would take our FIN for the end of the answer. A connection whose
    client waits for an answer is not idle before ANSWER_S.
    """
    if splice.half_closed:
        return 0.0
    silent_s, is_asked = silence(*splice.sockets)
    is_asked |= bool(splice.bytes_to_backend and not splice.bytes_to_client)
    return silent_s / IDLE_S if silent_s >= (ANSWER_S if is_asked else IDLE_S) else 0.0


def end_idle(splice: Splice, how: str) -> None:
    """End an idle connection with a FIN, at once: a request must not come between the decision and the FIN."""
    with contextlib.suppress(OSError):
        splice.sockets[0].shutdown(socket.SHUT_WR)  # the poller closes sockets later in its turn
    splice.close(how)


def _jitter(client: Address) -> float:
    """Return the factor for the maximum age of a connection of *client*."""
    return 1 - JITTER + 2 * JITTER * (hash(client) % 1024) / 1024
