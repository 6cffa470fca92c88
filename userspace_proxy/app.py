"""The composition root: the only file that knows who is who. Start order, signals, stop order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from userspace_proxy.admin import metrics as exposition
from userspace_proxy.admin.metrics import ControlStats
from userspace_proxy.admin.server import AdminServer, Health
from userspace_proxy.control.cluster_ips import ClusterIPs
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.memory import Memory, StateDir
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.instance import answer, lock_instance, running_as, running_instance
from userspace_proxy.interfaces import Capture, DataPlane, EventType, ObjectEvent, StateSink
from userspace_proxy.logs import AccessLog, recorder
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.proxiers.userspace import ProxyPorts, UserspaceProxier, planned_redirects
from userspace_proxy.rules import iptables, network, nft
from userspace_proxy.rules.kernel import KERNELS, choose_language
from userspace_proxy.rules.notices import NetworkNotices
from userspace_proxy.settings import DEFAULT_STATE_DIR, Network, Settings
from userspace_proxy.sources.files import FileSource, nothing_found, read_once

_CAP_NET_ADMIN = 12
_SETTLE_S = 0.2

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until a signal says stop.

    Raises:
        StartError: the proxy cannot run here; nothing was left behind.
    """
    factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    if settings.loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    gc.disable()  # until the first sync: what is made before it is kept, and looking for garbage in it is half the time
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(App(settings).run())


class App:
    """One running proxy."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._proxier: UserspaceProxier | None = None

    async def run(self) -> None:
        settings = self._settings
        _require_net_admin()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(signum, self._on_signal)
        async with contextlib.AsyncExitStack() as stack:
            lock = stack.enter_context(contextlib.closing(lock_instance()))
            loop.add_reader(lock.fileno(), answer, lock)
            stack.callback(loop.remove_reader, lock.fileno())
            try:
                language = choose_language(settings.rules)
            except SyncError as error:
                raise StartError(str(error)) from None
            kernel = KERNELS[language]()
            source = FileSource(settings.paths)
            state_dir = _open_state_dir(settings.state_dir)
            memory = state_dir.load() if state_dir else Memory()
            cluster_ips = ClusterIPs(settings.service_cluster_ip_ranges, memory.cluster_ips)
            ports = ProxyPorts(*settings.proxy_port_range, memory.proxy_ports)
            tracker = Tracker(cluster_ips)

            plane = _make_plane(settings, stack)
            proxier = self._proxier = UserspaceProxier(plane, kernel, ports, await self._first_capture())
            saver = _Saver(state_dir, cluster_ips, ports)
            controller = Controller(
                source,
                tracker,
                _WithRoutes(proxier, settings.service_cluster_ip_ranges),
                Pacer(loop.time, settings.min_sync_period_s, settings.sync_period_s),
                after_sync=saver.save_soon,
            )

            def health() -> Health:
                problems = [
                    *source.problems.values(),
                    *tracker.problems.values(),
                    *(f"{name}: {why}" for name, why in proxier.unopened.items()),
                ]
                reason = "" if controller.ready.is_set() else "the first sync is not done"
                if controller.failing_since is not None:
                    since = time.strftime("%H:%M:%S", time.localtime(controller.failing_since))
                    reason = f"since {since}: {controller.error}"
                if self._stop.is_set():
                    reason = "the proxy stops"
                return Health(not reason, reason, controller.synced_at, problems)

            async def metrics() -> bytes:
                stats = ControlStats(
                    service_ports=proxier.service_ports,
                    rule_loads=proxier.loads,
                    rule_repairs=proxier.repairs,
                    last_sync_at=controller.synced_at or 0.0,
                    problems=len(source.problems) + len(tracker.problems),
                    unopened=len(proxier.unopened),
                )
                return exposition.render(await plane.stats(), stats)

            admin = AdminServer(health, metrics, "userspace")
            stack.push_async_callback(admin.close)
            try:
                await admin.start(settings.healthz_bind_address, settings.metrics_bind_address)
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(controller.run(), name="controller"),
                        group.create_task(proxier.keep_rules(), name="keep-rules"),
                        group.create_task(saver.run(), name="saver"),
                        group.create_task(self._watch_network(proxier), name="watch-network"),
                        group.create_task(_settle_in(controller, language), name="settle-in"),
                    ]
                    await self._stop.wait()
                    for task in tasks:
                        task.cancel()
            finally:
                await proxier.close(settings.drain_timeout_s)
                await _leave_network()
                saver.save()
        log.info("stopped")

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            log.info("stopping: rules away, then up to %.3g s for open connections", self._settings.drain_timeout_s)
            self._stop.set()
        elif self._proxier is not None:
            log.info("cutting the connections that are left")
            self._proxier.cut()

    # ---- capture

    async def _first_capture(self) -> Capture:
        asked = self._settings.capture
        if await network.lacks_addresses():
            # The kernel has no source for a local client's packets to a cluster IP, unless we give it one.
            await network.add_local_addresses()
        if asked == "redirect":
            return Capture.REDIRECT
        if asked == "auto" and not await self._unnumbered():
            return Capture.REDIRECT
        await network.add_local_addresses()
        return Capture.ADDRESS

    async def _unnumbered(self) -> list[str]:
        try:
            found = await network.find_unnumbered_interfaces()
        except SyncError as error:
            log.warning("interfaces cannot be looked at, traffic is captured by REDIRECT: %s", error)
            return []
        if found:
            log.info(
                "%s has no IPv4 address, so REDIRECT cannot work there; capturing with a private address on lo instead",
                ", ".join(found[:3]),
            )
        return found

    async def _watch_network(self, proxier: UserspaceProxier) -> None:
        """Change to a private address as soon as an interface comes up at which REDIRECT cannot work."""
        if self._settings.capture != "auto":
            return
        changed = asyncio.Event()
        notices = NetworkNotices(changed.set)
        try:
            while proxier.capture is Capture.REDIRECT:
                await changed.wait()
                await asyncio.sleep(_SETTLE_S)
                changed.clear()
                if await self._unnumbered():
                    await network.add_local_addresses()
                    try:
                        await proxier.set_capture(Capture.ADDRESS)
                    except SyncError as error:
                        log.error("capture could not be changed: %s", error)  # noqa: TRY400
                        await asyncio.sleep(_SETTLE_S)
        finally:
            notices.close()


def _make_plane(settings: Settings, stack: contextlib.AsyncExitStack) -> DataPlane:
    """Return the data plane: in a worker process, or with ``--workers 0`` in this one."""
    try:
        access_log = AccessLog(settings.access_log, settings.log_format) if settings.access_log else None
    except OSError as error:
        reason = "its folder does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StartError(f"--access-log {settings.access_log}: {reason}") from None
    if settings.workers == 0:
        if access_log is not None:
            stack.callback(access_log.close)
        return LocalPlane(_limits(settings), recorder(access_log, verbose=settings.verbose), splice=settings.splice)
    if access_log is not None:
        access_log.close()  # it can be written: the worker does
    plane = RemotePlane(
        WorkerSettings(
            limits=_limits(settings),
            splice=settings.splice,
            loop=settings.loop,
            access_log=settings.access_log,
            log_format=settings.log_format,
            verbose=settings.verbose,
        )
    )
    plane.start()
    return plane


class _WithRoutes:
    """A sink before the proxier: sees to it that this node has a route to every cluster IP."""

    def __init__(self, sink: StateSink, ranges: Iterable[Network]) -> None:
        self._sink = sink
        self._ranges = list(ranges)
        self._routed: set[Network] = set()
        self._known: dict[ServicePortName, ServicePort] = {}

    async def sync(self, state: ProxyState) -> None:
        wanted = set(self._ranges)
        for name, service_port in state.service_ports.items():
            if self._known.get(name) is not service_port:
                for ip in service_port.cluster_ips + service_port.external_ips:
                    address = ipaddress.ip_address(ip)
                    if not any(address in known for known in self._ranges):
                        wanted.add(ipaddress.ip_network(ip))
        self._known = dict(state.service_ports)
        if new := wanted - self._routed:
            self._routed |= new  # one try: what refuses now (a blackhole route of somebody's, say) is no passing fault
            try:
                await network.add_routes(new)
            except SyncError as error:
                log.warning("no route to cluster IPs could be added, clients on this node may fail: %s", error)
        await self._sink.sync(state)


class _Saver:
    """Writes what the next process should remember, shortly after it changed, in a thread."""

    def __init__(self, state_dir: StateDir | None, cluster_ips: ClusterIPs, ports: ProxyPorts) -> None:
        self._state_dir = state_dir
        self._cluster_ips = cluster_ips
        self._ports = ports
        self._saved = (-1, -1)
        self._wanted = asyncio.Event()

    def _changes(self) -> tuple[int, int]:
        return self._cluster_ips.changes, self._ports.changes

    def save_soon(self) -> None:
        if self._changes() != self._saved:
            self._wanted.set()

    def _take(self) -> Memory:
        self._saved = self._changes()
        return Memory(cluster_ips=self._cluster_ips.memory(), proxy_ports=self._ports.memory())

    def save(self) -> None:
        if self._state_dir is not None and self._saved != (-1, -1) and self._changes() != self._saved:
            self._state_dir.save(self._take())

    async def run(self) -> None:
        while self._state_dir is not None:
            await self._wanted.wait()
            self._wanted.clear()
            await asyncio.to_thread(self._state_dir.save, self._take())


async def _settle_in(controller: Controller, language: str) -> None:
    """What is worth doing once, after the first sync."""
    await controller.attempted.wait()
    # What is there now stays for long: the collector need not walk over it again and again.
    gc.freeze()
    gc.enable()
    await controller.ready.wait()
    for other, make in KERNELS.items():
        if other != language:
            with contextlib.suppress(SyncError):
                await make().remove()
    with contextlib.suppress(SyncError, ValueError):
        for found in await network.find_blocking_firewall():
            log.warning("a firewall on this node drops redirected traffic: %s", found)


async def _leave_network() -> None:
    with contextlib.suppress(SyncError):
        await network.remove_routes()
        await network.remove_local_addresses()


def render(settings: Settings) -> tuple[str, bool]:
    """Return the rules that `run` would load for *settings*, in the language asked for; installs nothing.

    Also returns whether all was well; what was not is logged, as `run` does.

    Raises:
        StartError: a path cannot be read, or nothing is in any.
    """
    state_dir = None
    if settings.state_dir is not None:
        state_dir = _open_state_dir(settings.state_dir)
    memory = state_dir.load() if state_dir else Memory()
    tracker = Tracker(ClusterIPs(settings.service_cluster_ip_ranges, memory.cluster_ips))
    manifests, problems = read_once(settings.paths, for_check=False)
    if not manifests and not problems:
        raise StartError(nothing_found(settings.paths))
    for problem in problems:
        log.error("%s", problem)
    tracker.apply(
        ObjectEvent(EventType.SET, manifest.kind, manifest.name, manifest.object, manifest.place)
        for manifest in manifests
        if manifest.object is not None
    )
    capture = Capture.ADDRESS if settings.capture == "address" else Capture.REDIRECT
    ports = ProxyPorts(*settings.proxy_port_range, memory.proxy_ports)
    redirects = planned_redirects(tracker.state(), ports, capture)
    is_well = not problems and not tracker.problems
    if settings.rules != "iptables":
        return nft.table(redirects), is_well
    rules = "".join(
        f"# {tool} --noflush\n{iptables.restore(redirects, family, '')}"
        for family, tool in ((4, "iptables-restore"), (6, "ip6tables-restore"))
    )
    return rules, is_well


async def cleanup() -> None:
    """Remove everything that a proxy of ours, running no more, has left in this network namespace.

    Raises:
        StartError: one is running; or no privilege.
        SyncError: something could not be removed.
    """
    _require_net_admin()
    if (pid := running_instance()) is not None:
        raise StartError(f"userspace-proxy{running_as(pid)} is running; stop it, it takes its rules away itself")
    for make in KERNELS.values():
        await make().remove()
    await network.remove_routes()
    await network.remove_local_addresses()


def _require_net_admin() -> None:
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if not int(effective, 16) >> _CAP_NET_ADMIN & 1:
        raise StartError(
            "changing rules needs CAP_NET_ADMIN; run it with sudo, "
            "or try `userspace-proxy demo`, which needs no privileges"
        )


def _open_state_dir(folder: Path | None) -> StateDir | None:
    try:
        return StateDir(folder or DEFAULT_STATE_DIR)
    except OSError as error:
        if folder is not None:
            raise StartError(f"--state-dir {folder}: {(error.strerror or str(error)).lower()}") from None
        log.info("%s cannot be written: allocated cluster IPs may move at a restart (--state-dir)", DEFAULT_STATE_DIR)
        return None


def _limits(settings: Settings) -> Limits:
    unanswered_s, answered_s = network.conntrack_udp_timeouts()
    return Limits(
        idle_timeout_s=settings.idle_timeout_s,
        half_closed_timeout_s=settings.half_closed_timeout_s,
        dead_peer_timeout_s=settings.dead_peer_timeout_s,
        udp_flows_per_service=settings.udp_flows_per_service,
        udp_timeout_s=unanswered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
        udp_stream_timeout_s=answered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
    )
