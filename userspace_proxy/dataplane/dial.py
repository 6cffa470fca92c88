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
        ...

    def on_failed(self, reason: str) -> None: ...


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
    _sock: SocketType | None = None  # to `_pick`; the older one of two
    _newer: tuple[SocketType, Pick] | None = None
    _proving: dict[SocketType, int] | None = None  # connected suspects, with the events so far
    _timer: asyncio.TimerHandle | None = None
    _pick: Pick = field(init=False)

    def start(self) -> None:
        """Dial until a dial is under way or connected, or all have failed. May call the caller before it returns."""
        pick = self._next()
        if pick is not None:
            self._dial(pick)
        elif self._sock is None:
            self._caller.on_failed("no endpoint could be reached" if self._tried else NO_ENDPOINT)

    def resume(self, pick: Pick, code: int) -> None:
        """Dial another endpoint, because the endpoint of *pick* broke its connection before a byte passed.

        *code*: the error number of the break.
        """
        self._note_failure(pick, code)
        self.start()

    def leave_endpoints(self, addresses: Collection[Address]) -> None:
        """Give up the dials to *addresses*, which were removed, and dial another endpoint if none is left."""
        left = [(sock, pick) for sock, pick in self._open() if pick.endpoint.address in addresses]
        for sock, pick in left:
            self._close(sock, pick)
        if left and self._sock is None:
            self.start()

    def _dial(self, pick: Pick) -> None:
        """Dial the endpoint of *pick*. If it fails at once, continue with the next ones."""
        following: Pick | None = pick
        turn = 0
        while following is not None:
            turn += 1
            if self._tried is not None:
                self._listener.counters.retries += 1
                following.counters.retries += 1
            if self._connect(following):
                return
            if turn == _DIALS_A_TURN and self._sock is None:
                self._timer = self._listener.context.loop.call_later(0, self.start)
                return
            following = self._next() if turn < _DIALS_A_TURN else None
        if self._sock is None:
            self._caller.on_failed("no endpoint could be reached")
        else:
            self._wait()

    def _next(self) -> Pick | None:
        """Return the endpoint to dial now, or None if there is none."""
        picker, tried = self._listener.picker, self._tried
        if tried is None:
            return picker.pick(self.client_ip)
        if self._dials >= DIALS_MAX or self._listener.context.loop.time() >= self._give_up_at:
            return None
        alone = self._sock is None
        pick = picker.pick_another(self.client_ip, tried, doubtful=alone or self._round > _OPEN)
        if pick is None and (alone or self._round == _SLOW) and any(tried.values()):
            # All were dialled, and some were only slow: dial these again, unless their dial is still open.
            self._round = _SLOW
            under_way = {one.endpoint.address for _, one in self._open()}
            self._tried = {address: again for address, again in tried.items() if not again or address in under_way}
            pick = picker.pick_another(self.client_ip, self._tried, doubtful=True)
        return pick

    def _connect(self, pick: Pick) -> bool:
        """Begin to connect. Return False if that failed at once and the next endpoint is to be dialled."""
        context, address = self._listener.context, pick.endpoint.address
        beside = self._sock is not None
        if beside and not context.connections.begin_race():
            self._wait()  # no descriptor is left: the open dial continues alone
            return True
        try:
            sock = stream_socket(address, context.limits.congestion_control)
        except OSError as error:
            if beside:
                context.connections.end_race()
                context.connections.note_shortage(error)
                self._wait()
            else:
                self._wait_for_descriptors(error)
            return True
        self._dials += 1
        transparent = self._listener.transparent
        if transparent is not None and transparent.concerns(self.client_ip, address[0]):
            try:
                transparent.speak_as(sock, self.client_ip)
            except OSError as error:
                self._drop(sock, beside=beside)
                self.cut()
                self._caller.on_failed(f"the client's address cannot be used: {error.strerror}")
                return True
        try:
            code = sock.connect_ex(address)
            if code in _UNDER_WAY:
                context.poller.watch(sock, self._on_newer if beside else self._on_socket)
        except OSError as error:
            code = error.errno or errno.EIO
        if code not in _UNDER_WAY:
            self._drop(sock, beside=beside)
            self._note_failure(pick, code)
            return False
        pick.counters.dialling += 1
        if beside:
            self._newer = sock, pick
        else:
            self._sock, self._pick = sock, pick
        if self._tried is None:
            context.deadlines[RACE].add(self)
        else:
            self._tried[address] = True
            self._wait()
        return True

    def _drop(self, sock: SocketType, *, beside: bool) -> None:
        sock.close()
        if beside:
            self._listener.context.connections.end_race()

    # ---- results of a dial

    def _on_socket(self, events: int) -> None:
        if self._sock is not None:
            self._on_events(self._sock, self._pick, events)

    def _on_newer(self, events: int) -> None:
        if self._newer is not None:
            self._on_events(*self._newer, events)

    def _on_events(self, sock: SocketType, pick: Pick, events: int) -> None:
        if events & FAILED:
            # Without an error, these are events of a closed socket that had the same number (see poller.py).
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(sock, pick, code)
        elif self._proving is not None and sock in self._proving:
            if events & _SPOKE:
                self._win(sock, pick, events | self._proving[sock])
        elif events & WRITE:
            if is_self_connected(sock, pick.endpoint.address):
                self._fail(sock, pick, errno.ECONNREFUSED)
                return
            if self._header and (code := self._send_header(sock)):
                self._fail(sock, pick, code)
                return
            if pick.endpoint.address in self._listener.shared.suspects and not events & _SPOKE:
                self._let_prove(sock, events)
            else:
                self._win(sock, pick, events)

    def _let_prove(self, sock: SocketType, events: int) -> None:
        """Send nothing to the connected suspect for PROOF_S: it may reset the connection."""
        # The ACK that `stream_socket` holds back; the endpoint accepts the connection when it arrives.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        if self._proving is None:
            self._proving = {}
            self._listener.context.deadlines[PROOF].add(self)
        self._proving[sock] = events

    def _win(self, sock: SocketType, pick: Pick, events: int) -> None:
        context = self._listener.context
        if self._tried is None and self._proving is None:
            context.deadlines[RACE].remove(self)
        else:
            self._clear_deadlines()
            self._proving = None
        if self._newer is not None:
            self._end_race(sock)
        self._sock = None
        pick.counters.dialling -= 1
        listener, endpoint = self._listener, pick.endpoint
        if listener.picker.report_success(endpoint, listener.seen_client(self.client_ip, endpoint)):
            log.info("endpoint %s takes connections again", endpoint)
        if self._first_failed:
            listener.picker.pin(self.client_ip, endpoint)
        self._caller.on_connected(sock, pick, events)

    def _end_race(self, winner: SocketType) -> None:
        """Close the dial that *winner* has overtaken."""
        assert self._newer is not None
        assert self._sock is not None
        is_older = winner is self._newer[0]
        loser, pick = (self._sock, self._pick) if is_older else self._newer
        self._newer = None
        context = self._listener.context
        pick.counters.dialling -= 1
        context.connections.end_race()
        context.poller.close(loser)
        listener, endpoint = self._listener, pick.endpoint
        if is_older and listener.picker.report_overtaken(endpoint, listener.seen_client(self.client_ip, endpoint)):
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

    def _fail(self, sock: SocketType, pick: Pick, code: int, *, again: bool = False) -> None:
        """Note that the dial to the endpoint of *pick* failed, and continue with another one."""
        self._close(sock, pick)
        self._note_failure(pick, code, again=again)
        self.start()

    def on_timeout(self) -> None:
        """Dial another endpoint, wait longer, or give up, because no dial has been answered in time."""
        if self._proving is not None:
            sock, pick = next(dial for dial in self._open() if dial[0] in self._proving)
            self._win(sock, pick, self._proving[sock])
        if self._sock is None:
            return
        now = self._listener.context.loop.time()
        if self._tried is None:
            self._first = self._pick.endpoint.address
            self._tried = {self._first: True}
            self._give_up_at = now + BUDGET_S - RACE_S
        if now >= self._give_up_at:
            for sock, pick in self._open():
                self._close(sock, pick)
                self._note_failure(pick, errno.ETIMEDOUT)
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
        if self._newer is not None:
            sock, pick = self._sock, self._pick
            self._close(sock, pick)
            self._note_failure(pick, errno.ETIMEDOUT, again=True)
        self._dial(another)

    def _open(self) -> list[tuple[SocketType, Pick]]:
        """Return the open dials, the older one first."""
        older = [] if self._sock is None else [(self._sock, self._pick)]
        return older if self._newer is None else [*older, self._newer]

    def _wait(self, how: int = RACE) -> None:
        """Set the deadline for the next `on_timeout`, replacing the current one."""
        self._clear_deadlines()
        self._listener.context.deadlines[PATIENCE if self._round == _SLOW else how].add(self)

    def _clear_deadlines(self) -> None:
        for deadline in self._listener.context.deadlines:
            deadline.remove(self)

    def _note_failure(self, pick: Pick, code: int, *, again: bool = False) -> None:
        endpoint, counters = pick.endpoint, self._listener.counters
        if self._tried is None:
            self._first = endpoint.address
            self._tried = {}
            self._give_up_at = self._listener.context.loop.time() + BUDGET_S
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
        """Retry later: the client is accepted but unread, so it can wait until other connections end."""
        self._listener.context.connections.note_shortage(error)
        self._starved += 1
        if self._starved > STARVED_MAX:
            self._caller.on_failed("out of descriptors")
            return
        self._timer = self._listener.context.loop.call_later(STARVED_RETRY_S, self.start)

    def cut(self) -> None:
        """Stop without calling the caller."""
        if self._timer is not None:
            self._timer.cancel()
        for sock, pick in self._open():
            self._close(sock, pick)

    def _close(self, sock: SocketType, pick: Pick) -> None:
        """Close the dial of *sock*. If it was the older one, the newer one takes its place."""
        context = self._listener.context
        pick.counters.dialling -= 1
        context.poller.close(sock)
        if self._proving is not None and self._proving.pop(sock, None) is not None and not self._proving:
            self._proving = None
        if self._newer is None:
            self._sock = None
            self._clear_deadlines()
            return
        context.connections.end_race()
        if sock is self._sock:
            self._sock, self._pick = self._newer
            context.poller.hand_over(self._sock, self._on_socket)
        self._newer = None
