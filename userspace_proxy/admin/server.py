"""Serve /healthz and /livez for load balancers and kubelets, and /metrics for Prometheus.

Two addresses, as in kube-proxy: health on every address, the rest on loopback (behaviours Z1-Z5).
"""

import asyncio
import errno
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from userspace_proxy.admin.limited import ConnectionSlots, LimitedFactory, make_runner
from userspace_proxy.admin.metrics import slis
from userspace_proxy.errors import StartError
from userspace_proxy.model.sync_health import FamilyHealth
from userspace_proxy.printable import printable

_HINTS = {errno.EADDRINUSE: "another program has it", errno.EACCES: "a port below 1024 is for root"}
_HEADERS = {"X-Content-Type-Options": "nosniff"}
_EXPOSITION = {"Content-Type": "text/plain; version=0.0.4; charset=utf-8"}
# Problems shown, and characters of each.
_LINES_MAX, _SHOWN_MAX = 50, 500
_LATE = "a change has been queued for long, and no sync has succeeded since"


@dataclass(frozen=True, slots=True)
class Health:
    """The health of this process and its data plane.

    ``families``: whether syncs keep up, by IP family. ``waiting``: why this node must get no traffic yet, or any more;
    "" if it may. ``failing``: the failure of the last sync or repair, and since when; it makes the process unhealthy
    only if it lasts. ``stopped``: why the data plane serves nothing now. ``problems``: need attention but are no reason
    for a restart. ``findings``: further results of `check`, shown to local clients only. ``degraded``: what is served
    from an old state. ``node_eligible``: whether load balancers may use this node; None if the Node is unknown.
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
        """Whether there is no reason to restart the process."""
        return not self.stopped and all(family.healthy for family in self.families.values())

    @property
    def updated_at(self) -> float | None:
        return max((f.updated_at for f in self.families.values() if f.updated_at is not None), default=None)


class AdminServer:
    """Serves health at one address and metrics at another, over HTTP, until closed."""

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
        """Bind both addresses. An address of "" is skipped.

        Raises:
            StartError: an address is invalid or cannot be bound.
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
        slots = ConnectionSlots()
        app = web.Application(middlewares=[slots.note])
        for path, handler in routes.items():
            app.router.add_get(path, handler)
        runner = make_runner(app, 0.5)
        await runner.setup()
        self._runners.append(runner)
        try:
            # [::] means both families, as in Go. Two sockets, so that IPv4 clients keep IPv4 addresses.
            hosts = (host, "0.0.0.0") if host == "::" else host  # noqa: S104 - as asked
            self._servers.append(
                await asyncio.get_running_loop().create_server(LimitedFactory(runner, slots), hosts, port)
            )
        except OSError as error:
            hint = _HINTS.get(error.errno or 0, "this host does not have it")
            raise StartError(f"{flag} {address} cannot be bound: {hint}; choose another, or '' for none") from None

    async def close(self) -> None:
        for server in self._servers:
            server.close()
        for runner in self._runners:
            await runner.cleanup()

    async def _healthz(self, request: web.Request) -> web.Response:
        """Answer whether load balancers may send traffic to this node."""
        health = self._health()
        is_ready = health.keeps_up and not health.waiting
        is_well = is_ready and health.node_eligible is not False
        status = 503 if not is_well else self._degraded_status if health.degraded else 200
        self.answers["healthz", status] += 1
        eligible = {} if health.node_eligible is None else {"nodeEligible": health.node_eligible}
        return _answer(health, status, is_ready, eligible, is_open=is_loopback(request.remote))

    async def _livez(self, request: web.Request) -> web.Response:
        """Answer whether the process works; the kubelet restarts one that does not."""
        health = self._health()
        status = 200 if health.keeps_up else 503
        self.answers["livez", status] += 1
        return _answer(health, status, health.keeps_up, {}, is_open=is_loopback(request.remote))

    async def _ping(self, _request: web.Request) -> web.Response:
        """Answer "ok" as kube-proxy does at this address; the real health is at the other address."""
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


def _answer(health: Health, status: int, healthy: bool, more: Mapping[str, object], *, is_open: bool) -> web.Response:
    """Return *health* as kube-proxy's JSON.

    If *is_open*, include the reasons, which contain names of objects and files, and versions.
    """
    now = time.time()
    body: dict[str, object] = {
        "lastUpdated": _rfc3339(now if status == 200 else health.updated_at),
        "currentTime": _rfc3339(now),
        **more,
        "healthy": healthy,
        "status": {
            family: {"lastUpdated": _rfc3339(of_it.updated_at), "healthy": of_it.healthy}
            for family, of_it in health.families.items()
        },
    }
    if is_open:
        body |= _details(health, healthy=healthy)
    text = msgspec.json.encode(body).decode()
    return web.Response(text=text, status=status, content_type="application/json", headers=_HEADERS)


def _details(health: Health, *, healthy: bool) -> dict[str, object]:
    """Return the reasons of *health* that are for this node alone."""
    details: dict[str, object] = {}
    if not healthy:
        reason = "; ".join(filter(None, (health.waiting, health.stopped, health.failing))) or _LATE
        details["reason"] = printable(reason, _SHOWN_MAX)
    if health.failing:
        details["failing"] = printable(health.failing, _SHOWN_MAX)
    for name in ("degraded", "problems", "findings"):
        if lines := getattr(health, name):
            hidden = [f"and {len(lines) - _LINES_MAX} more"] if len(lines) > _LINES_MAX else []
            details[name] = [printable(line, _SHOWN_MAX) for line in lines[:_LINES_MAX]] + hidden
    return details


def is_loopback(ip: str | None) -> bool:
    return ip is not None and (ip == "::1" or ip.removeprefix("::ffff:").startswith("127."))


def split_address(address: str, flag: str) -> tuple[str, int]:
    """Return host and port of ``127.0.0.1:10249``, ``[::1]:10249`` or ``:10249``.

    Raises:
        StartError: *address* has none of these forms.
    """
    host, colon, port = address.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise StartError(f"{flag} {address!r} is no address and port; write it like 127.0.0.1:10249")
    if int(port) > 65_535:
        raise StartError(f"{flag} {address!r}: {port} is not a port; the highest is 65535")
    return host.strip("[]") or "0.0.0.0", int(port)  # noqa: S104 - ":10256" means every address, as in Go


def _rfc3339(at: float | None) -> str | None:
    return None if at is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(at))
