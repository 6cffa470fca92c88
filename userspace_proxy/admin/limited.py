"""What clients of an HTTP port that is open to everybody can make us hold, bounded."""

from __future__ import annotations

import asyncio

from aiohttp import web

_CONNECTIONS_MAX = 64
_CONNECTION_LIFE_S = 30.0


class Limited:
    """Makes the protocol of a new connection, for so many at once and for so long each."""

    def __init__(self, runner: web.AppRunner) -> None:
        self._server = runner.server

    def __call__(self) -> asyncio.BaseProtocol:
        assert self._server is not None
        if len(self._server.connections) >= _CONNECTIONS_MAX:
            return _Refusal()
        handler = self._server()
        asyncio.get_running_loop().call_later(_CONNECTION_LIFE_S, _end, handler)
        return handler


class _Refusal(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()


def _end(handler: web.RequestHandler) -> None:
    if handler.transport is not None:
        handler.transport.close()
