"""One client's way to a backend: pick, connect, and on failure pick another - before any byte is read.

Callback style: no task, no future. A dial that is refused costs nothing and the next endpoint is tried at
once; a dial that vanishes costs its time-out, and these grow, because a slow network is no dead one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable
from socket import SocketType
from typing import NamedTuple, Protocol

from userspace_proxy.dataplane.picker import Pick, Picker
from userspace_proxy.dataplane.poller import FAILED, WRITE, Poller
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, is_self_connected, stream_socket
from userspace_proxy.dataplane.transparent import Transparent
from userspace_proxy.interfaces import Counters
from userspace_proxy.model.endpoint import Address

# As the historic userspace mode waited. The sum, 3.75 s, is the longest that a client waits for a reset.
DIAL_TIMEOUTS_S = (0.25, 0.5, 1.0, 2.0)

# A client that was accepted when no descriptor was left for its backend waits this often, this long.
STARVED_MAX = 100
STARVED_RETRY_S = 0.1

_UNDER_WAY = (errno.EINPROGRESS, 0)

log = logging.getLogger(__name__)


class Caller(Protocol):
    """Who wants a backend."""

    def on_connected(self, backend: SocketType, pick: Pick, told: int) -> None:
        """Take over *backend*, which the poller watches; *told* are the events that it has told already."""
        ...

    def on_failed(self, reason: str) -> None: ...


class Deadlines:
    """Calls `Dial.on_timeout` of those that were not removed in time; one timer for all that wait equally long."""

    def __init__(self, loop: asyncio.AbstractEventLoop, after_s: float) -> None:
        self._loop = loop
        self._after_s = after_s
        self._until: dict[Dial, float] = {}  # in the order of time, as everybody waits equally long
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
    """Return one for each of DIAL_TIMEOUTS_S."""
    return tuple(Deadlines(loop, after_s) for after_s in DIAL_TIMEOUTS_S)


class DialContext(NamedTuple):
    """What all dials of one listener share."""

    poller: Poller
    loop: asyncio.AbstractEventLoop
    deadlines: tuple[Deadlines, ...]
    picker: Picker
    counters: Counters
    on_shortage: Callable[[OSError], None]
    congestion_control: str = ""
    transparent: Transparent | None = None  # where backends see the client's own address


class Dial:
    """Tries endpoints until one connects or none is left."""

    __slots__ = (
        "_attempts",
        "_caller",
        "_context",
        "_header",
        "_pick",
        "_sock",
        "_starved",
        "_timer",
        "_tried",
        "_waited",
        "client_ip",
    )

    _pick: Pick

    def __init__(self, client_ip: str, context: DialContext, caller: Caller, header: bytes = b"") -> None:
        """*header* is what a backend gets before all that the client sends."""
        self.client_ip = client_ip
        self._header = header
        self._context = context
        self._caller = caller
        self._tried: dict[Address, bool] | None = None  # address -> whether trying it again makes sense
        self._attempts = 0
        self._waited = 0  # time-outs spent
        self._starved = 0  # times this host had no descriptor for the backend's socket
        self._sock: SocketType | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Dial until one is under way, connected, or all have failed; the caller may be told before this returns."""
        while True:
            tried = self._tried
            pick = self._context.picker.pick(self.client_ip, tried or ())
            if pick is None:
                if tried and any(tried.values()) and self._waited < len(DIAL_TIMEOUTS_S):
                    # Everybody has been asked, and somebody was merely slow: ask the slow ones once more.
                    self._tried = {address: again for address, again in tried.items() if not again}
                    continue
                self._caller.on_failed("no endpoint could be reached" if tried else "no endpoint")
                return
            if self._attempts:
                self._context.counters.retries += 1
                pick.counters.retries += 1
            self._pick = pick
            if self._connect(pick.endpoint.address):
                return

    def _connect(self, address: Address) -> bool:
        """Begin to connect; False when that failed at once and the next endpoint's turn has come."""
        context = self._context
        try:
            sock = stream_socket(address, context.congestion_control)
        except OSError as error:
            self._wait_for_descriptors(error)
            return True
        self._attempts += 1
        transparent = context.transparent
        if transparent is not None and transparent.concerns(self.client_ip, address[0]):
            try:
                transparent.speak_as(sock, self.client_ip)
            except OSError as error:
                sock.close()
                self._caller.on_failed(f"the client's address cannot be used: {error.strerror}")
                return True
        try:
            code = sock.connect_ex(address)
            if code in _UNDER_WAY:
                context.poller.watch(sock, self._on_socket)
        except OSError as error:
            code = error.errno or errno.EIO
        if code in _UNDER_WAY:
            self._sock = sock
            context.deadlines[self._waited].add(self)
            return True
        sock.close()
        self._note_failure(code, again=False)
        return False

    def _on_socket(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        if events & FAILED:
            # Without an error these were the events of a closed socket whose number this one has (see poller.py).
            if code := sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(code)
        elif events & WRITE:
            context, pick = self._context, self._pick
            if is_self_connected(sock, pick.endpoint.address):
                self._fail(errno.ECONNREFUSED)
                return
            if self._header and (code := self._send_header(sock)):
                self._fail(code)
                return
            context.deadlines[self._waited].remove(self)
            self._sock = None
            if context.picker.report_success(pick.endpoint):
                log.info("endpoint %s takes connections again", pick.endpoint)
            self._caller.on_connected(sock, pick, events)

    def _send_header(self, sock: SocketType) -> int:
        """Send the header, whole, and return 0; or return why not: then another backend has it from its beginning.

        There is room for it: nothing was sent yet.
        """
        try:
            return 0 if sock.send(self._header) == len(self._header) else errno.ENOBUFS
        except OSError as error:
            return error.errno or errno.EIO

    def _fail(self, code: int) -> None:
        self._let_go()
        self._note_failure(code, again=False)
        self.start()

    def on_timeout(self) -> None:
        """What is dialled now has had its time."""
        self._let_go()
        self._waited += 1
        self._note_failure(errno.ETIMEDOUT, again=self._waited < len(DIAL_TIMEOUTS_S))
        if self._waited < len(DIAL_TIMEOUTS_S):
            self.start()
        else:
            self._caller.on_failed("no endpoint could be reached")

    def _note_failure(self, code: int, *, again: bool) -> None:
        endpoint = self._pick.endpoint
        if self._tried is None:
            self._tried = {}
        self._tried[endpoint.address] = again
        counters = self._context.counters
        counters.dial_failures += 1
        self._pick.counters.dial_failures += 1
        if code == errno.EADDRNOTAVAIL:
            counters.port_exhaustions += 1
        if code in LOCAL_SHORTAGES:
            self._context.on_shortage(OSError(code, f"connecting to {endpoint}: {os.strerror(code)}"))
            return
        if self._context.picker.report_failure(endpoint):
            counters.ejections += 1
            self._pick.counters.ejections += 1
            log.info("endpoint %s is passed over for a while: %s", endpoint, os.strerror(code))

    def _wait_for_descriptors(self, error: OSError) -> None:
        """The client is accepted and unread: it can wait until other connections end."""
        self._context.on_shortage(error)
        self._starved += 1
        if self._starved > STARVED_MAX:
            self._caller.on_failed("out of descriptors")
            return
        self._timer = self._context.loop.call_later(STARVED_RETRY_S, self.start)

    def cut(self) -> None:
        """Stop without telling the caller."""
        if self._timer is not None:
            self._timer.cancel()
        self._let_go()

    def _let_go(self) -> None:
        if self._sock is not None:
            self._context.deadlines[self._waited].remove(self)
            self._context.poller.close(self._sock)
            self._sock = None
