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
from typing import NamedTuple

from userspace_proxy.dataplane.picker import Picker
from userspace_proxy.dataplane.poller import FAILED, WRITE, Poller
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, backend_socket, is_self_connected
from userspace_proxy.interfaces import Counters
from userspace_proxy.model.endpoint import Address, Endpoint

# As the historic userspace mode waited. The sum, 3.75 s, is the longest that a client waits for a reset.
DIAL_TIMEOUTS_S = (0.25, 0.5, 1.0, 2.0)

# A client that was accepted when no descriptor was left for its backend waits this often, this long.
STARVED_MAX = 100
STARVED_RETRY_S = 0.1

log = logging.getLogger(__name__)


class Connected(NamedTuple):
    """A backend that took the connection, and why it was this one."""

    sock: socket.socket
    endpoint: Endpoint
    why: str


class DialContext(NamedTuple):
    """What all dials of one listener share."""

    poller: Poller
    loop: asyncio.AbstractEventLoop
    picker: Picker
    counters: Counters
    on_shortage: Callable[[OSError], None]


class Dial:
    """Tries endpoints until one connects (*on_connected*) or none is left (*on_failed*, with the reason)."""

    __slots__ = (
        "_attempts",
        "_context",
        "_endpoint",
        "_on_connected",
        "_on_failed",
        "_sock",
        "_starved",
        "_timer",
        "_tried",
        "_waited",
        "_why",
        "client_ip",
    )

    def __init__(
        self,
        client_ip: str,
        context: DialContext,
        on_connected: Callable[[Connected], None],
        on_failed: Callable[[str], None],
    ) -> None:
        self.client_ip = client_ip
        self._context = context
        self._on_connected = on_connected
        self._on_failed = on_failed
        self._tried: dict[Address, bool] = {}  # address -> whether trying it again makes sense
        self._attempts = 0
        self._waited = 0  # time-outs spent
        self._starved = 0  # times this host had no descriptor for the backend's socket
        self._sock: socket.socket | None = None
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Dial until one is under way, connected, or all have failed; the callbacks may come before this returns."""
        while True:
            pick = self._context.picker.pick(self.client_ip, self._tried)
            if pick is None and any(self._tried.values()) and self._waited < len(DIAL_TIMEOUTS_S):
                # Everybody has been asked, and somebody was merely slow: ask the slow ones once more.
                self._tried = {address: again for address, again in self._tried.items() if not again}
                continue
            if pick is None:
                self._on_failed("no endpoint could be reached" if self._tried else "no endpoint")
                return
            if self._attempts:
                self._context.counters.retries += 1
            self._endpoint, self._why = pick
            if self._connect(pick.endpoint.address):
                return

    def _connect(self, address: Address) -> bool:
        """Begin to connect; False when that failed at once and the next endpoint's turn has come."""
        context = self._context
        try:
            sock = backend_socket(socket.SOCK_STREAM, address)
        except OSError as error:
            self._wait_for_descriptors(error)
            return True
        self._attempts += 1
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            code = sock.connect_ex(address)
            if code in (0, errno.EINPROGRESS):
                context.poller.watch(sock, self._on_socket)
        except OSError as error:
            code = error.errno or errno.EIO
        if code in (0, errno.EINPROGRESS):
            self._sock = sock
            self._timer = context.loop.call_later(DIAL_TIMEOUTS_S[self._waited], self._on_timeout)
            return True
        sock.close()
        self._note_failure(code, again=False)
        return False

    def _on_socket(self, events: int) -> None:
        sock = self._sock
        if sock is None:
            return
        if events & FAILED:
            self._fail(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        elif events & WRITE:
            if is_self_connected(sock, self._endpoint.address):
                self._fail(errno.ECONNREFUSED)
                return
            self._stop_timer()
            self._sock = None
            if self._context.picker.report_success(self._endpoint):
                log.info("endpoint %s takes connections again", self._endpoint)
            self._on_connected(Connected(sock, self._endpoint, self._why))

    def _fail(self, code: int) -> None:
        self._let_go()
        self._note_failure(code, again=False)
        self.start()

    def _on_timeout(self) -> None:
        self._let_go()
        self._waited += 1
        self._note_failure(errno.ETIMEDOUT, again=self._waited < len(DIAL_TIMEOUTS_S))
        if self._waited < len(DIAL_TIMEOUTS_S):
            self.start()
        else:
            self._on_failed("no endpoint could be reached")

    def _note_failure(self, code: int, *, again: bool) -> None:
        self._tried[self._endpoint.address] = again
        counters = self._context.counters
        counters.dial_failures += 1
        if code in LOCAL_SHORTAGES:
            self._context.on_shortage(OSError(code, f"connecting to {self._endpoint}: {os.strerror(code)}"))
            return
        if self._context.picker.report_failure(self._endpoint):
            counters.ejections += 1
            log.info("endpoint %s is passed over for a while: %s", self._endpoint, os.strerror(code))

    def _wait_for_descriptors(self, error: OSError) -> None:
        """The client is accepted and unread: it can wait until other connections end."""
        self._context.on_shortage(error)
        self._starved += 1
        if self._starved > STARVED_MAX:
            self._on_failed("out of descriptors")
            return
        self._timer = self._context.loop.call_later(STARVED_RETRY_S, self.start)

    def cut(self) -> None:
        """Stop without calling back."""
        self._let_go()

    def _let_go(self) -> None:
        self._stop_timer()
        if self._sock is not None:
            self._context.poller.close(self._sock)
            self._sock = None

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
