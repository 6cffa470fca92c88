"""What clients of an HTTP port that is open to everybody can make us hold, and get to see.

Half-sent requests and idle connections make room for whoever comes next, so that no client keeps probes out.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import aiohttp.web_response
from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

# Of this node itself (loopback and kubelet's probes), and as many of all others.
_CONNECTIONS_MAX = 64
# Of these, from one other address; of IPv6 from one /64.
_SHARE = 16
_HEADER_TIMEOUT_S = 5.0
_CONNECTION_LIFE_S = 30.0
# An answer that takes longer makes room, too.
_ANSWER_S = 5.0
_SWEEP_EVERY_S = 1.0

# An answer to a request that cannot be read passes no hook of ours, and would name versions.
aiohttp.web_response.SERVER_SOFTWARE = "userspace-proxy"  # type: ignore[attr-defined]


async def stay_anonymous(_request: web.Request, answer: web.StreamResponse) -> None:
    """Say no more than kube-proxy does: not which versions of what run here."""
    del answer.headers[hdrs.SERVER]


@dataclass(slots=True)
class _Seat:
    """One connection. ``asked_at``: when its request came, while that is answered."""

    handler: web.RequestHandler
    client: object  # None: this node
    since: float
    asked_at: float | None = None
    has_asked: bool = False

    def may_leave(self, now: float) -> bool:
        return self.asked_at is None or now - self.asked_at > _ANSWER_S

    def is_overdue(self, now: float) -> bool:
        age_s = now - self.since
        return age_s > _CONNECTION_LIFE_S or (not self.has_asked and age_s > _HEADER_TIMEOUT_S)

    def end(self) -> None:
        if self.handler.transport is not None:
            self.handler.transport.abort()  # to close is to wait for a client that does not read


class Seats:
    """The connections of one address, or of several that share."""

    def __init__(self) -> None:
        self._seats: dict[web.RequestHandler, _Seat] = {}
        self._is_sweeping = False

    def take(self, handler: web.RequestHandler, peer: Any, own: Any) -> bool:
        """Give a seat to *handler*, of a connection from *peer* to *own*; return False if there is none."""
        client = None if _is_near(peer, own) else _network(peer)
        loop = asyncio.get_running_loop()
        seats = [seat for seat in self._seats.values() if seat.handler.transport is not None]
        rivals = [seat for seat in seats if (seat.client is None) == (client is None)]
        theirs = [seat for seat in rivals if seat.client == client] if client is not None else []
        crowd = theirs if len(theirs) >= _SHARE else rivals if len(rivals) >= _CONNECTIONS_MAX else []
        if crowd and not self._make_room(crowd, loop.time()):
            return False
        self._seats[handler] = _Seat(handler, client, loop.time())
        if not self._is_sweeping:
            self._is_sweeping = True
            loop.call_later(_SWEEP_EVERY_S, self._sweep, loop)
        return True

    def _make_room(self, crowd: Collection[_Seat], now: float) -> bool:
        """End the connection of *crowd* that has been there for longest and that nothing is lost with."""
        leaving = next((seat for seat in crowd if seat.may_leave(now)), None)
        if leaving is None:
            return False
        del self._seats[leaving.handler]
        leaving.end()
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for handler, seat in list(self._seats.items()):
            if seat.is_overdue(now):
                seat.end()
            if handler.transport is None:
                del self._seats[handler]
        self._is_sweeping = bool(self._seats)
        if self._is_sweeping:
            loop.call_later(_SWEEP_EVERY_S, self._sweep, loop)

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Note that a request is being answered."""
        seat = self._seats.get(request.protocol)
        if seat is None:
            return await handler(request)
        seat.asked_at, seat.has_asked = asyncio.get_running_loop().time(), True
        try:
            return await handler(request)
        finally:
            seat.asked_at = None


class Limited:
    """Makes the protocol of a new connection, if there is a seat for it."""

    def __init__(self, runner: web.AppRunner, seats: Seats) -> None:
        self._runner = runner
        self._seats = seats

    def __call__(self) -> asyncio.BaseProtocol:
        assert self._runner.server is not None
        return _Newcomer(self._runner.server(), self._seats)


class _Newcomer(asyncio.Protocol):
    """Finds out who connects, and leaves the rest to *handler*."""

    def __init__(self, handler: web.RequestHandler, seats: Seats) -> None:
        self._handler = handler
        self._seats = seats

    def connection_made(self, transport: Any) -> None:
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if not peer or not own or not self._seats.take(self._handler, peer, own):
            transport.abort()
            return
        transport.set_protocol(self._handler)
        self._handler.connection_made(transport)


def _address(name: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(name[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_near(peer: Any, own: Any) -> bool:
    """Return whether a connection from *peer* to *own* is one of this node with itself.

    No other host can come from the address that it connects to.
    """
    return _address(peer).is_loopback or _address(peer) == _address(own)


def _network(peer: Any) -> object:
    address = _address(peer)
    return address if address.version == 4 else int(address) >> 64
