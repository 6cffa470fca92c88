"""/healthz and /livez for load balancers and kubelets, /metrics for Prometheus.

Two addresses, as kube-proxy has them: health on every address, all else on loopback (behaviours Z1-Z5).
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from userspace_proxy.admin.limited import Limited, Seats, stay_anonymous
from userspace_proxy.admin.metrics import slis
from userspace_proxy.errors import StartError
from userspace_proxy.model.freshness import FamilyHealth
from userspace_proxy.printable import printable

_HINTS = {errno.EADDRINUSE: "another program has it", errno.EACCES: "a port below 1024 is for root"}
_HEADERS = {"X-Content-Type-Options": "nosniff"}
_EXPOSITION = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
# So many problems are told, and so many characters of each.
_TOLD_MAX, _SHOWN_MAX = 50, 500
_LATE = "a sync was asked for long ago, and none has been completed since"


@dataclass(frozen=True, slots=True)
class Health:
    """What is known of our work.

    ``families``: whether syncs keep up, by IP family. ``waiting``: why no traffic is to come yet, or any more; "" when
    it may. ``failing``: why the last sync or repair failed and since when; health ends only with a sync that fails for
    long. ``stopped``: why the data plane serves nothing at this moment. ``problems`` are worth a look and no reason to
    be replaced; ``findings`` are what `check` finds besides, for clients on this host alone. ``degraded`` says what is
    served by a last good state that gets old. ``node_eligible``: whether load balancers may send traffic to this node;
    None where there is no Node to ask.
    """

    families: Mapping[str, FamilyHealth]
    waiting: str = ""
    failing: str = ""
    problems: Sequence[str] = ()
    findings: Sequence[str] = ()
    degraded: Sequence[str] = ()
    node_eligible: bool | None = None
    stopped: str = ""

    @property
    def keeps_up(self) -> bool:
        """Whether there is no reason to be replaced."""
        return not self.stopped and all(family.healthy for family in self.families.values())

    @property
    def updated_at(self) -> float | None:
        return max((f.updated_at for f in self.families.values() if f.updated_at is not None), default=None)


class AdminServer:
    """Serves both addresses until closed."""

    def __init__(
        self,
        health: Callable[[], Health],
        metrics: Callable[[Mapping[tuple[str, int], int]], AsyncIterator[bytes]],
        mode: str,
        config: Mapping[str, object],
        degraded_status: int = 200,
    ) -> None:
        self._health = health
        self._metrics = metrics
        self._mode = mode
        self._config = config
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
            {
                "/metrics": self._get_metrics,
                "/metrics/slis": self._get_slis,
                "/healthz": self._ping,
                "/proxyMode": self._get_mode,
                "/configz": self._get_config,
            },
        )

    async def _serve(self, flag: str, address: str, routes: dict[str, Any]) -> None:
        if not address:
            return
        host, port = split_address(address, flag)
        seats = Seats()
        app = web.Application(middlewares=[seats.note])
        app.on_response_prepare.append(stay_anonymous)
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await runner.setup()
        self._runners.append(runner)
        try:
            # [::] is both families, as in Go; by two sockets, so that IPv4 clients keep addresses of their family.
            hosts = (host, "0.0.0.0") if host == "::" else host  # noqa: S104 - as asked
            self._servers.append(await asyncio.get_running_loop().create_server(Limited(runner, seats), hosts, port))
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "this host does not have it")
            raise StartError(f"{flag} {address} cannot be bound: {hint}; choose another, or '' for none") from None

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        """Say whether load balancers may send traffic here."""
        health = self._health()
        is_ready = health.keeps_up and not health.waiting
        is_well = is_ready and health.node_eligible is not False
        status = 503 if not is_well else self._degraded_status if health.degraded else 200
        self.answers["healthz", status] += 1
        said = {} if health.node_eligible is None else {"nodeEligible": health.node_eligible}
        return _answer(health, status, is_ready, said, is_open=is_loopback(request.remote))

    async def _livez(self, request: web.Request) -> web.Response:
        """Say whether the process does its work; a kubelet replaces one that does not."""
        health = self._health()
        status = 200 if health.keeps_up else 503
        self.answers["livez", status] += 1
        return _answer(health, status, health.keeps_up, {}, is_open=is_loopback(request.remote))

    async def _ping(self, _request: web.Request) -> web.Response:
        """Say that this address answers, as kube-proxy's does; health is told at the other one."""
        return web.Response(text="ok", headers=_HEADERS)

    async def _get_metrics(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EXPOSITION)
        await response.prepare(request)
        if request.method != "HEAD":
            async for part in self._metrics(self.answers):
                await response.write(part)
        return response

    async def _get_slis(self, _request: web.Request) -> web.Response:
        return web.Response(body=slis(self._health().families), headers=_EXPOSITION)

    async def _get_config(self, _request: web.Request) -> web.Response:
        return web.json_response(self._config, headers=_HEADERS)

    async def _get_mode(self, _request: web.Request) -> web.Response:
        return web.Response(text=self._mode, headers=_HEADERS)


def _answer(health: Health, status: int, healthy: bool, said: Mapping[str, object], *, is_open: bool) -> web.Response:
    """Return *health* as kube-proxy's JSON; if *is_open* with the reasons, which name objects, files and versions."""
    now = time.time()
    body: dict[str, object] = {
        "lastUpdated": _rfc3339(now if status == 200 else health.updated_at),
        "currentTime": _rfc3339(now),
        **said,
        "healthy": healthy,
        "status": {
            family: {"lastUpdated": _rfc3339(of_it.updated_at), "healthy": of_it.healthy}
            for family, of_it in health.families.items()
        },
    }
    if is_open:
        reason = "; ".join(why for why in (health.waiting, health.stopped, health.failing) if why) or _LATE
        body |= {"reason": printable(reason, _SHOWN_MAX)} if not healthy else {}
        body |= {"failing": printable(health.failing, _SHOWN_MAX)} if health.failing else {}
        for name in ("degraded", "problems", "findings"):
            told = getattr(health, name)
            more = [f"and {len(told) - _TOLD_MAX} more"] if len(told) > _TOLD_MAX else []
            body |= {name: [printable(each, _SHOWN_MAX) for each in told[:_TOLD_MAX]] + more} if told else {}
    text = msgspec.json.encode(body).decode()
    return web.Response(text=text, status=status, content_type="application/json", headers=_HEADERS)


def is_loopback(ip: str | None) -> bool:
    return ip is not None and (ip == "::1" or ip.removeprefix("::ffff:").startswith("127."))


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
