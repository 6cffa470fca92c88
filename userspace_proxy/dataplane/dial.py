"""Find a backend for one client: pick, connect, and on failure pick another, before any byte is read.

Written with callbacks: no task and no future. A refused dial is followed by the next one at once. If a dial has not
answered after RACE_S, a second one begins beside it, and the first to answer wins.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial
from socket import SocketType
from typing import TYPE_CHECKING, Protocol

from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.poller import FAILED, HANGUP, READ, WRITE
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, is_self_connected, stream_socket
from userspace_proxy.dataplane.suspects import PROOF_S
from userspace_proxy.model.endpoint import Address

if TYPE_CHECKING:
    from userspace_proxy.dataplane.listener import BaseListener

# A second endpoint is dialled if the first has not answered for this long. At most two dials are open: a third ends
# the older one.
RACE_S = 0.25
# After all endpoints were dialled, slow ones are dialled again at this interval. Each gets 2.3 s, as two are open.
PATIENCE_S = 1.15
# A client is reset after this time if no endpoint answers.
BUDGET_S = 15.0
# The most dials for one client that eject no endpoint, so that a client does not try thousands of ejected endpoints.
# Dials that eject one need no bound: there is one for each endpoint and ejection, however many clients there are.
DIALS_MAX = 128
# After this number of immediate failures the event loop handles other connections first.
_DIALS_A_TURN = 8

# If no descriptor is left for a backend socket, the dial is repeated this often, after this pause.
STARVED_MAX = 100
STARVED_RETRY_S = 0.1

# Indexes into the deadlines of a data plane.
RACE, PATIENCE, PROOF = range(3)
# Rounds of an attempt: the kind of endpoints to dial beside one that has not answered.
_OPEN, _DOUBTFUL, _SLOW = range(3)

NO_ENDPOINT = "no endpoint"

_UNDER_WAY = (errno.EINPROGRESS, 0)
# Events of a backend that has sent bytes, or its end.
_SPOKE = READ | HANGUP

log = logging.getLogger(__name__)


class DialingConnection(Protocol):
    """The connection that needs a backend."""

    def on_connected(self, backend: SocketType, pick: Pick, events: int) -> None:
        """Take over *backend*, which the poller watches. *events*: those that its handler has already received."""

    def on_failed(self, reason: str) -> None:
        """Give up: no endpoint could be connected, for *reason*."""


class Deadlines:
    """Calls `Dial.on_timeout` of each dial not removed in time. One timer serves all dials with the same timeout."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after_s: float) -> None:
        self._loop = loop
        self._after_s = after_s
        self._until: dict[Dial, float] = {}  # in order of time, because all timeouts are equal
        self._armed = False

    def add(self, dial: Dial) -> None:
        self._until[dial] = until = self._loop.time() + self._after_s
        if not self._armed:
            self._arm(until)

    def remove(self, dial: Dial) -> None:
        self._until.pop(dial, None)

    def _arm(self, until: float) -> None:
        self._armed = True
        self._loop.call_at(until, self._expire)

    def _expire(self) -> None:
        self._armed = False
        now = self._loop.time()
        expired = []
        for dial, until in self._until.items():
            if until > now:
                self._arm(until)
                break
            expired.append(dial)
        for dial in expired:
            if self._until.pop(dial, None) is not None:
                dial.on_timeout()


def deadlines(loop: asyncio.AbstractEventLoop) -> tuple[Deadlines, ...]:
    """Return the deadlines of the first round, those of later rounds, and those of connected suspects."""
    return Deadlines(loop, RACE_S), Deadlines(loop, PATIENCE_S), Deadlines(loop, PROOF_S)


@dataclass(slots=True, eq=False)
class Dial:
    """Dials endpoints until one connects or none is left.

    1. Dial each endpoint that is not ejected: the next one when the last has failed or has been silent for RACE_S.
       The first dial of an attempt may be the trial of an ejected endpoint.
    2. Dial ejected endpoints: at once if all dials have failed, after PATIENCE_S beside an open dial.
    3. Dial slow endpoints again, one every PATIENCE_S: the network may be slow, not the endpoint dead.
    4. Fail after BUDGET_S, or DIALS_MAX dials that ejected nothing. While a dial is open, a deadline is always set.

    A connected suspect has to prove itself first: not to reset the connection for PROOF_S, or to send a byte.
    """

    client_ip: str
    _listener: BaseListener
    _caller: DialingConnection
    _header: bytes = b""  # sent to the backend before the bytes of the client
    _tried: dict[Address, bool] | None = None  # address -> whether to dial it again
    _dials: int = 0
    _round: int = _OPEN
    _give_up_at: float = 0.0  # known from the first failure on
    _first: Address | None = None  # the endpoint that was chosen first; set at the first failure or timeout
    _first_failed: bool = False
    _starved: int = 0  # times this host had no descriptor for the backend's socket
    _open: dict[SocketType, Pick] = field(default_factory=dict)  # the open dials, the older one first
    _proving: dict[SocketType, int] | None = None  # connected suspects, with the events so far
    _timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Dial until a dial is under way or connected, or all have failed. May call the caller before it returns."""
        pick = self._next()
        if pick is not None or not self._open:
            self._dial(pick)

    def resume(self, pick: Pick, code: int) -> None:
        """Dial another endpoint, because the endpoint of *pick* broke its connection before a byte passed.

        *code*: the error number of the break.
        """
        self._note_failure(pick, code)
        self.start()

    def leave_endpoints(self, addresses: Collection[Address]) -> None:
        """Give up the dials to *addresses*, which were removed, and dial another endpoint if none is left."""
        left = [sock for sock, pick in self._open.items() if pick.endpoint.address in addresses]
        for sock in left:
            self._close(sock)
        if left and not self._open:
            self.start()

    def _dial(self, pick: Pick | None) -> None:
        """Dial the endpoint of *pick*. If it fails at once, continue with the next ones."""
        turns_left = _DIALS_A_TURN
        while pick is not None:
            if self._connect(pick):
                return
            turns_left -= 1
            pick = self._next() if turns_left else None
        if self._open:
            self._wait()
        elif turns_left:
            self._caller.on_failed("no endpoint could be reached" if self._tried else NO_ENDPOINT)
        else:
            self._timer = self._listener.context.loop.call_later(0, self.start)

    def _next(self) -> Pick | None:
        """Return the endpoint to dial now, or None if there is none. Count it as a retry if it is not the first."""
        picker, tried = self._listener.picker, self._tried
        if tried is None:
            return picker.pick(self.client_ip)
        if self._dials >= DIALS_MAX or self._listener.context.loop.time() >= self._give_up_at:
            return None
        alone = not self._open
        pick = picker.pick_another(self.client_ip, tried, doubtful=alone or self._round > _OPEN)
        if pick is None and (alone or self._round == _SLOW) and any(tried.values()):
            # All were dialled, and some were only slow: dial these again, unless their dial is still open.
            self._round = _SLOW
            under_way = {one.endpoint.address for one in self._open.values()}
            self._tried = {address: again for address, again in tried.items() if not again or address in under_way}
            pick = picker.pick_another(self.client_ip, self._tried, doubtful=True)
        if pick is not None:
            self._listener.counters.retries += 1
            pick.counters.retries += 1
        return pick

    def _connect(self, pick: Pick) -> bool:
        """Begin to connect. Return False if that failed at once and the next endpoint is to be dialled."""
        context, address = self._listener.context, pick.endpoint.address
        if self._open and not context.connections.fits(1):
            self._wait()  # no descriptor is left: the open dial continues alone
            return True
        try:
            sock = stream_socket(address, context.limits.congestion_control)
        except OSError as error:
            self._wait_for_descriptors(error)
            return True
        self._dials += 1
        transparent = self._listener.transparent
        if transparent is not None and transparent.concerns(self.client_ip, address[0]):
            try:
                transparent.speak_as(sock, self.client_ip)
            except OSError as error:
                sock.close()
                self.cut()
                self._caller.on_failed(f"the client's address cannot be used: {error.strerror}")
                return True
        try:
            code = sock.connect_ex(address)
            if code in _UNDER_WAY:
                context.poller.watch(sock, partial(self._on_events, sock, pick))
        except OSError as error:
            code = error.errno or errno.EIO
        if code not in _UNDER_WAY:
            sock.close()
            self._note_failure(pick, code)
            return False
        pick.counters.dialling += 1
        if self._tried is None:
            context.deadlines[RACE].add(self)
        else:
            self._tried[address] = True
            self._wait()
            if self._open:
                context.connections.races += 1
        self._open[sock] = pick
        return True

    # ---- results of a dial

    def _on_events(self, sock: SocketType, pick: Pick, events: int) -> None:
        if events & FAILED:
            # Without an error, these are events of a closed socket that had the same number (see poller.py).
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(sock, code)
        elif self._proving is not None and sock in self._proving:
            if events & _SPOKE:
                self._win(sock, pick, events | self._proving[sock])
        elif events & WRITE:
            code = 0
            if is_self_connected(sock, pick.endpoint.address):
                code = errno.ECONNREFUSED
            elif self._header:
                code = self._send_header(sock)
            if code:
                self._fail(sock, code)
            elif pick.endpoint.address in self._listener.suspects and not events & _SPOKE:
                self._let_prove(sock, events)
            else:
                self._win(sock, pick, events)

    def _let_prove(self, sock: SocketType, events: int) -> None:
        """Send nothing to the connected suspect for PROOF_S: it may reset the connection."""
        # The ACK that `stream_socket` holds back; the endpoint accepts the connection when it arrives.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._proving is None:
            self._proving = {}
            self._clear_deadlines()  # that of a race could come before the end of the proof
            self._listener.context.deadlines[PROOF].add(self)
        self._proving[sock] = events

    def _win(self, sock: SocketType, pick: Pick, events: int) -> None:
        """Give the connected *sock* to the caller, and close the other dial."""
        context = self._listener.context
        if self._tried is None and self._proving is None:
            context.deadlines[RACE].remove(self)
        else:
            self._clear_deadlines()
            self._proving = None
            if len(self._open) > 1:
                self._end_race(sock)
        del self._open[sock]
        pick.counters.dialling -= 1
        listener, endpoint = self._listener, pick.endpoint
        if listener.picker.report_success(endpoint, listener.seen_client(self.client_ip, endpoint)):
            log.info("endpoint %s takes connections again", endpoint)
        if self._first_failed:
            listener.picker.pin(self.client_ip, endpoint)
        self._caller.on_connected(sock, pick, events)

    def _end_race(self, winner: SocketType) -> None:
        """Close the dial that *winner* has overtaken."""
        older, newer = self._open
        loser = older if winner is newer else newer
        pick = self._close(loser)
        listener, endpoint = self._listener, pick.endpoint
        seen_client = listener.seen_client(self.client_ip, endpoint)
        if loser is older and listener.picker.report_overtaken(endpoint, seen_client):
            listener.note_ejection(pick, os.strerror(errno.ETIMEDOUT))

    def _send_header(self, sock: SocketType) -> int:
        """Send the whole header and return 0, or return the error. A retry sends it from the start to another backend.

        The send buffer is empty, so there is room for it.
        """
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # the client's bytes follow
            return 0 if sock.send(self._header) == len(self._header) else errno.ENOBUFS
        except OSError as error:
            return error.errno or errno.EIO

    def _fail(self, sock: SocketType, code: int) -> None:
        """Note that the dial of *sock* failed, and continue with another endpoint."""
        self._note_failure(self._close(sock), code)
        self.start()

    def on_timeout(self) -> None:
        """Dial another endpoint, wait longer, or give up, because no dial has been answered in time."""
        if self._proving is not None:
            sock = next(iter(self._proving))  # the one that has been connected for longest
            self._win(sock, self._open[sock], self._proving[sock])
            return
        now = self._listener.context.loop.time()
        if self._tried is None:
            (pick,) = self._open.values()
            self._tried = self._begin_retries(pick, now - RACE_S)
        if now >= self._give_up_at:
            for sock in list(self._open):
                self._note_failure(self._close(sock), errno.ETIMEDOUT)
            self._caller.on_failed("no endpoint could be reached")
            return
        another = self._next()
        if another is None and self._round == _DOUBTFUL:
            self._round = _SLOW
            another = self._next()
        if another is None:
            if self._round == _OPEN:
                self._round = _DOUBTFUL
            self._wait(PATIENCE)
            return
        if len(self._open) > 1:
            self._note_failure(self._close(next(iter(self._open))), errno.ETIMEDOUT, again=True)
        self._dial(another)

    def _wait(self, how: int = RACE) -> None:
        """Set the deadline for the next `on_timeout`, replacing the current one."""
        self._clear_deadlines()
        self._listener.context.deadlines[PATIENCE if self._round == _SLOW else how].add(self)

    def _clear_deadlines(self) -> None:
        for deadline in self._listener.context.deadlines:
            deadline.remove(self)

    def _begin_retries(self, first: Pick, began_at: float) -> dict[Address, bool]:
        """Note the pick that was dialled first, and when to give up. Return the endpoints tried so far."""
        self._first = first.endpoint.address
        self._give_up_at = began_at + BUDGET_S
        return {self._first: True}

    def _note_failure(self, pick: Pick, code: int, *, again: bool = False) -> None:
        """Count a failed dial to the endpoint of *pick*. *again*: it may be dialled once more for this connection."""
        endpoint, counters = pick.endpoint, self._listener.counters
        if self._tried is None:
            self._tried = self._begin_retries(pick, self._listener.context.loop.time())
        self._tried[endpoint.address] = again
        self._first_failed = self._first_failed or endpoint.address == self._first
        counters.dial_failures += 1
        pick.counters.dial_failures += 1
        if code == errno.EADDRNOTAVAIL:
            counters.port_exhaustions += 1
        if code in LOCAL_SHORTAGES:
            error = OSError(code, f"connecting to {endpoint}: {os.strerror(code)}")
            self._listener.context.connections.note_shortage(error)
        elif self._listener.hold_against(pick, self.client_ip, os.strerror(code)):
            self._dials -= 1
            if len(self._tried) > DIALS_MAX:
                del self._tried[endpoint.address]  # its ejection keeps it from being dialled again

    def _wait_for_descriptors(self, error: OSError) -> None:
        """Let the open dial continue alone. Without one, retry later: the client is unread, so it can wait."""
        self._listener.context.connections.note_shortage(error)
        if self._open:
            self._wait()
            return
        self._starved += 1
        if self._starved > STARVED_MAX:
            self._caller.on_failed("out of descriptors")
            return
        self._timer = self._listener.context.loop.call_later(STARVED_RETRY_S, self.start)

    def cut(self) -> None:
        """Stop without calling the caller."""
        if self._timer is not None:
            self._timer.cancel()
        for sock in list(self._open):
            self._close(sock)

    def _close(self, sock: SocketType) -> Pick:
        """Close the dial of *sock*, and return its pick."""
        context, pick = self._listener.context, self._open.pop(sock)
        pick.counters.dialling -= 1
        context.poller.close(sock)
        if self._proving is not None and self._proving.pop(sock, None) is not None and not self._proving:
            self._proving = None
        if self._open:
            context.connections.races -= 1
        else:
            self._clear_deadlines()
        return pick
