"""/healthz and /livez for load balancers and kubelets, /metrics for Prometheus.

Two addresses, as kube-proxy has them: health on every address, all else on loopback.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

from userspace_proxy.admin.limited import Limited
from userspace_proxy.errors import StartError

_HINTS = {errno.EADDRINUSE: "another program has it", errno.EACCES: "a port below 1024 is for root"}
_HEADERS = {"X-Content-Type-Options": "nosniff"}


@dataclass(frozen=True, slots=True)
class Health:
    """Whether we do our work; ``reason`` says why not. ``problems`` are worth a look and no reason to be replaced.

    ``alive``: whether there is no reason to be replaced, though the first state may still be waited for.
    ``degraded`` says what is served by a last good state that gets old. ``node_eligible``: whether load balancers may
    send traffic to this node; None where there is no Node to ask.
    """

    healthy: bool
    reason: str = ""
    last_updated: float | None = None
    problems: list[str] = field(default_factory=list)
    alive: bool | None = None  # None: as healthy
    degraded: list[str] = field(default_factory=list)
    node_eligible: bool | None = None


class AdminServer:
    """Serves both addresses until closed."""

    def __init__(
        self,
        health: Callable[[], Health],
        metrics: Callable[[], Awaitable[bytes]],
        mode: str,
        degraded_status: int = 200,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._mode = mode
        self._degraded_status = degraded_status
        self.answers: Counter[tuple[str, int]] = Counter()  # of /healthz and /livez, by status
        self._runners: list[web.AppRunner] = []
        self._servers: list[asyncio.Server] = []

    async def start(self, healthz_address: str, metrics_address: str) -> None:
        """Bind both addresses; "" for none.

        Raises:
            StartError: one is taken or cannot be bound.
        """
        if healthz_address and healthz_address == metrics_address:
            raise StartError(
                f"--healthz-bind-address and --metrics-bind-address are both {healthz_address}; choose two"
            )
        await self._serve("--healthz-bind-address", healthz_address, {"/healthz": self._healthz, "/livez": self._livez})
        await self._serve(
            "--metrics-bind-address",
            metrics_address,
            {"/metrics": self._get_metrics, "/healthz": self._healthz, "/proxyMode": self._get_mode},
        )

    async def _serve(self, flag: str, address: str, routes: dict[str, Any]) -> None:
        if not address:
            return
        host, port = split_address(address, flag)
        app = web.Application()
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._runners.append(runner)
        try:
            self._servers.append(await asyncio.get_running_loop().create_server(Limited(runner), host, port))
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "this host does not have it")
            raise StartError(f"{flag} {address} cannot be bound: {hint}; choose another, or '' for none") from None

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        """Say whether load balancers may send traffic here."""
        health = self._health()
        is_well = health.healthy and health.node_eligible is not False
        status = 503 if not is_well else self._degraded_status if health.degraded else 200
        self.answers["healthz", status] += 1
        return _answer(health, status, health.node_eligible)

    async def _livez(self, _request: web.Request) -> web.Response:
        """Say whether the process does its work; a kubelet replaces one that does not."""
        health = self._health()
        status = 200 if health.healthy or health.alive else 503
        self.answers["livez", status] += 1
        return _answer(health, status)

    async def _get_metrics(self, _request: web.Request) -> web.Response:
        return web.Response(
            body=await self._metrics(), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
        )

    async def _get_mode(self, _request: web.Request) -> web.Response:
        return web.Response(text=self._mode, headers=_HEADERS)


def _answer(health: Health, status: int, node_eligible: bool | None = None) -> web.Response:
    """Return *health* as kube-proxy's JSON, with what it never said."""
    now = time.time()
    body: dict[str, object] = {
        "lastUpdated": _rfc3339(now if status == 200 else health.last_updated),
        "currentTime": _rfc3339(now),
        "healthy": health.healthy,
    }
    if node_eligible is not None:
        body["nodeEligible"] = node_eligible
    for name in ("reason", "degraded", "problems"):
        if said := getattr(health, name):
            body[name] = said
    text = msgspec.json.encode(body).decode()
    return web.Response(text=text, status=status, content_type="application/json", headers=_HEADERS)


def split_address(address: str, flag: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:10249``, ``[::1]:10249`` or ``:10249``.

    Raises:
        StartError: it is none of these.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise StartError(f"{flag} {address!r} is no address and port; write it as 127.0.0.1:10249 is written")
    if int(port) > 65_535:
        raise StartError(f"{flag} {address!r}: {port} is not a port; the highest is 65535")
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - ":10256" means every address, as in Go


def _rfc3339(at: float | None) -> str | None:
    return None if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
