"""Limit the connections that clients of a public HTTP port can hold, and the details that responses disclose.

Half-sent requests and idle connections are evicted for new ones, so that no client can lock out health probes.
"""

import asyncio
import ipaddress
import logging
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import aiohttp.web_response
from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler

# Limit for connections of this node (loopback and the kubelet's probes), and again for those of all other hosts.
_CONNECTIONS_MAX = 64
# Limit for connections of one other client: an IPv4 address or an IPv6 /64.
_SHARE = 16
_HEADER_TIMEOUT_S = 5.0
_CONNECTION_LIFE_S = 30.0
# A connection whose response takes longer may be evicted, too.
_ANSWER_S = 5.0
_SWEEP_EVERY_S = 1.0

# Responses to malformed requests skip `_remove_server_header`, so the default must not disclose versions either.
aiohttp.web_response.SERVER_SOFTWARE = "userspace-proxy"  # type: ignore[attr-defined]


_FAULTS_OF_CLIENTS = (HttpProcessingError, web.RequestPayloadError, ConnectionError)


def _is_own_fault(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], _FAULTS_OF_CLIENTS))


# aiohttp logs a traceback for each malformed request and each client that leaves early: any client could fill the log.
logging.getLogger("aiohttp.server").addFilter(_is_own_fault)


def make_runner(app: web.Application, shutdown_timeout_s: float) -> web.AppRunner:
    """Return a runner of *app* that discloses no versions, as kube-proxy, and decompresses no request bodies.

    They are not used, and 1 MB of compressed zeros would stop the event loop for a second.
    """
    app.on_response_prepare.append(_remove_server_header)
    return web.AppRunner(app, access_log=None, auto_decompress=False, shutdown_timeout=shutdown_timeout_s)


async def _remove_server_header(_request: web.Request, answer: web.StreamResponse) -> None:
    del answer.headers[hdrs.SERVER]


@dataclass(slots=True)
class _Slot:
    """One connection. ``request_at``: when the request that is being answered arrived."""

    handler: web.RequestHandler
    client: object  # None: this node
    since: float
    request_at: float | None = None
    has_sent_request: bool = False

    def is_evictable(self, now: float) -> bool:
        return self.request_at is None or now - self.request_at > _ANSWER_S

    def is_overdue(self, now: float) -> bool:
        age_s = now - (self.request_at or self.since)  # a scrape that begins late is not cut
        return age_s > _CONNECTION_LIFE_S or (not self.has_sent_request and age_s > _HEADER_TIMEOUT_S)

    def end(self) -> None:
        if self.handler.transport is not None:
            self.handler.transport.abort()  # close() would wait for a client that does not read


class ConnectionSlots:
    """The connections of one address, or of several that share the limits."""

    def __init__(self) -> None:
        self._slots: dict[web.RequestHandler, _Slot] = {}
        self._is_sweeping = False

    def take(self, handler: web.RequestHandler, peer: Any, own: Any) -> bool:
        """Give a slot to *handler*, for a connection from *peer* to *own*. Return False if none is free."""
        client = None if _is_from_this_node(peer, own) else _client_key(peer)
        loop = asyncio.get_running_loop()
        slots = [slot for slot in self._slots.values() if slot.handler.transport is not None]
        rivals = [slot for slot in slots if (slot.client is None) == (client is None)]
        theirs = [slot for slot in rivals if slot.client == client] if client is not None else []
        candidates = theirs if len(theirs) >= _SHARE else rivals if len(rivals) >= _CONNECTIONS_MAX else []
        if candidates and not self._make_room(candidates, loop.time()):
            return False
        self._slots[handler] = _Slot(handler, client, loop.time())
        if not self._is_sweeping:
            self._is_sweeping = True
            loop.call_later(_SWEEP_EVERY_S, self._sweep, loop)
        return True

    def _make_room(self, candidates: Collection[_Slot], now: float) -> bool:
        """Evict the oldest connection of *candidates* that loses no response. Return False if there is none."""
        evicted = next((slot for slot in candidates if slot.is_evictable(now)), None)
        if evicted is None:
            return False
        del self._slots[evicted.handler]
        evicted.end()
        return True

    def _sweep(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        for handler, slot in list(self._slots.items()):
            if slot.is_overdue(now):
                slot.end()
            if handler.transport is None:
                del self._slots[handler]
        self._is_sweeping = bool(self._slots)
        if self._is_sweeping:
            loop.call_later(_SWEEP_EVERY_S, self._sweep, loop)

    @web.middleware
    async def note(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Middleware: note that a request is being answered."""
        slot = self._slots.get(request.protocol)
        if slot is None:
            return await handler(request)
        slot.request_at, slot.has_sent_request = asyncio.get_running_loop().time(), True
        try:
            return await handler(request)
        finally:
            slot.request_at = None


class LimitedFactory:
    """Protocol factory: makes the protocol of a new connection, which is aborted if no slot is free."""

    def __init__(self, runner: web.AppRunner, slots: ConnectionSlots) -> None:
        self._runner = runner
        self._slots = slots

    def __call__(self) -> asyncio.BaseProtocol:
        assert self._runner.server is not None
        return _NewConnection(self._runner.server(), self._slots)


class _NewConnection(asyncio.Protocol):
    """Takes a slot for the connection, then passes it to *handler*."""

    def __init__(self, handler: web.RequestHandler, slots: ConnectionSlots) -> None:
        self._handler = handler
        self._slots = slots

    def connection_made(self, transport: Any) -> None:
        peer, own = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        if not peer or not own or not self._slots.take(self._handler, peer, own):
            transport.abort()
            return
        transport.set_protocol(self._handler)
        self._handler.connection_made(transport)


def _address(name: Any) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    address = ipaddress.ip_address(name[0].partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return mapped or address


def _is_from_this_node(peer: Any, own: Any) -> bool:
    """Return whether a connection from *peer* to *own* comes from this node.

    No other host can have the address that it connects to as its own.
    """
    return _address(peer).is_loopback or _address(peer) == _address(own)


def _client_key(peer: Any) -> object:
    """Return the key of a client: its IPv4 address, or the /64 of its IPv6 address."""
    address = _address(peer)
    return address if address.version == 4 else int(address) >> 64
