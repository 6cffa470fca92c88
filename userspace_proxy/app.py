"""The composition root: the only file that knows who is who. Start order, signals, stop order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import ipaddress
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from enum import Enum
from pathlib import Path

import msgspec

from userspace_proxy.admin import metrics as exposition
from userspace_proxy.admin.kubeproxy import SyncStats
from userspace_proxy.admin.metrics import ControlStats
from userspace_proxy.admin.server import AdminServer, Health
from userspace_proxy.control.allotments import Allotments, Allotting, Stated
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.decode import is_eligible
from userspace_proxy.control.memory import Memory, StateDir
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.handover import (
    VERSION,
    Conversation,
    Incumbent,
    Present,
    Refused,
    Released,
    TakeOver,
    hand_over,
)
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.sockets import knows_congestion_control
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.instance import Inheritance, end_orphans, running_as, take_lock
from userspace_proxy.interfaces import (
    Capture,
    DataPlane,
    EventType,
    ListenerSpec,
    ObjectEvent,
    Source,
    StateSink,
    WatchStats,
)
from userspace_proxy.logs import AccessLog, recorder
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.proxiers.userspace import ProxyPorts, UserspaceProxier, planned_redirects
from userspace_proxy.rules import iptables, network, nft
from userspace_proxy.rules.kernel import KERNELS, choose_language
from userspace_proxy.rules.notices import NetworkNotices
from userspace_proxy.settings import DEFAULT_STATE_DIR, Network, Settings
from userspace_proxy.sources.files import FileSource, nothing_found, read_once

_CAP_NET_ADMIN = 12
_SETTLE_S = 0.2
_REAP_EVERY_S = 1.0
# Who is told to stop while it hands over waits so long for the successor to begin, or not.
_DECIDE_S = 2.0
_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

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
    app = App(settings)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(app.run())
    if app.ending is Ending.AGAIN:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - a list, no shell


class Ending(Enum):
    """STOP: rules away, connections drained. HANDED_OVER: another process serves. AGAIN: this one is started anew."""

    STOP = "stop"
    HANDED_OVER = "handed over"
    AGAIN = "again"


class App:
    """One running proxy. ``ending``: how it ends, once that is known."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._stop = asyncio.Event()
        self._made_way = asyncio.Event()
        self._decided = asyncio.Event()  # not while we hand over: the successor may serve already, or never
        self._decided.set()
        self._hurried = False
        self._told_to_go = asyncio.Event()
        self._cut: Callable[[], None] | None = None
        self._keeps_on = False  # workers would serve on without us
        self._successors = 0
        self.ending: Ending | None = None

    async def run(self) -> None:
        settings = self._settings
        _require_net_admin()
        children = _children()
        loop = asyncio.get_running_loop()
        for signum in _STOPS:
            loop.add_signal_handler(signum, self._on_signal)
        loop.add_signal_handler(signal.SIGUSR2, self._on_start_anew)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, (*_STOPS, signal.SIGUSR2))  # what came while we started anew
        async with contextlib.AsyncExitStack() as stack:
            try:
                language = choose_language(settings.rules)
            except SyncError as error:
                raise StartError(str(error)) from None
            kernel = KERNELS[language]()
            source, sources = await _open_source(settings, stack)
            state_dir = _open_state_dir(settings.state_dir)
            inheritance = await take_lock(sources, settings.take_over, settings.workers)
            lock = stack.enter_context(contextlib.closing(inheritance.lock))
            plane = _make_plane(settings, stack)
            inherited = await self._inherit(plane, inheritance)
            memory = state_dir.load() if state_dir else Memory()
            allotting = _allotting(settings, memory)
            known_ports = {spec.name.key: spec.proxy_port for spec in inherited}
            ports = ProxyPorts(*settings.proxy_port_range, {**memory.proxy_ports, **known_ports})
            tracker = Tracker(allotting, settings.service_proxy_name, Node(settings.node_name), settings.source_ip)

            self._cut = plane.cut
            proxier = UserspaceProxier(plane, kernel, ports, await self._first_capture())
            proxier.adopt(inherited)
            saver = _Saver(state_dir, allotting, ports)
            controller = Controller(
                source,
                tracker,
                _WithRoutes(proxier, settings.service_cluster_ip_ranges),
                Pacer(loop.time, settings.min_sync_period_s, settings.sync_period_s),
                after_sync=saver.save_soon,
            )

            async def hand_over_to(asked: TakeOver, conversation: Conversation) -> None:
                await self._hand_over_to(asked, conversation, proxier, plane, lock)

            incumbent = Incumbent(lock, Present(VERSION, os.getpid(), sources), hand_over_to)
            stack.callback(incumbent.close)

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
                return Health(
                    not reason,
                    reason,
                    controller.synced_at,
                    problems,
                    alive=controller.failing_since is None and not self._stop.is_set(),
                    degraded=_degraded(source.watches, settings.degraded_after_s),
                    node_eligible=is_eligible(tracker.node) if settings.follows_cluster else None,
                )

            async def metrics() -> bytes:
                stats = ControlStats(
                    service_ports=proxier.service_ports,
                    rule_loads=proxier.loads,
                    rule_repairs=proxier.repairs,
                    last_sync_at=controller.synced_at or 0.0,
                    problems=len(source.problems) + len(tracker.problems),
                    unopened=len(proxier.unopened),
                )
                syncs = SyncStats(
                    controller.durations,
                    controller.programming,
                    synced_at=controller.synced_at or 0.0,
                    queued_at=controller.queued_at,
                    answers=admin.answers,
                )
                return exposition.render(await plane.stats(), stats, source.watches, settings.degraded_after_s, syncs)

            admin = AdminServer(health, metrics, "userspace", settings.degraded_status)
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
                        group.create_task(self._note_ready(controller, plane), name="note-ready"),
                        group.create_task(_reap(children), name="reap"),
                    ]
                    await self._stop.wait()
                    for task in tasks:
                        task.cancel()
            finally:
                try:
                    async with asyncio.timeout(_DECIDE_S):
                        await self._decided.wait()
                except TimeoutError:
                    incumbent.give_up()
                if self.ending is Ending.HANDED_OVER:
                    # Nobody is to meet us at the lock any more, nor its name to be ours, while connections drain.
                    incumbent.close()
                    lock.close()
                    await admin.close()
                saver.save()
                await self._end(proxier, plane)
                if self.ending is Ending.AGAIN:
                    # Until the new program can heed them; a stop that came just now would else kill it unheard.
                    signal.pthread_sigmask(signal.SIG_BLOCK, (*_STOPS, signal.SIGUSR2))
        log.info("stopped")

    # ---- from one process to the next

    async def _inherit(self, plane: DataPlane, inheritance: Inheritance) -> list[ListenerSpec]:
        """Serve at the listeners of whoever served before; return them."""
        if not inheritance.conversations:
            if isinstance(plane, RemotePlane):
                plane.keep_on(inheritance.lock)
            return []
        assert isinstance(plane, RemotePlane), "no other asks for it"
        try:
            specs = await plane.adopt(inheritance.listeners)
        except (OSError, SyncError) as error:
            plane.leave()
            inheritance.give_back()
            raise StartError(f"what serves now cannot be taken over, it goes on: {error}") from None
        # Before the others stop accepting, so that a death of ours at any moment leaves somebody who serves.
        plane.keep_on(inheritance.lock)
        self._keeps_on = True
        await inheritance.taken()
        log.info("taken over from another process: %d listeners", len(specs))
        return specs

    async def _note_ready(self, controller: Controller, plane: DataPlane) -> None:
        """From now on there is something that is better left serving than taken away, should we fail."""
        await controller.ready.wait()
        self._keeps_on = isinstance(plane, RemotePlane)

    async def _hand_over_to(
        self,
        asked: TakeOver,
        conversation: Conversation,
        proxier: UserspaceProxier,
        plane: DataPlane,
        lock: socket.socket,
    ) -> None:
        if not isinstance(plane, RemotePlane):
            conversation.send(Refused("it runs with --workers 0; stop it first"))
            return
        if self._stop.is_set() or not self._keeps_on:
            conversation.send(Refused("it just begins or ends; try again"))
            return
        self._decided.clear()
        async with proxier.paused():
            try:
                await plane.stats()  # brings the latest pins with it
                await hand_over(conversation, plane.inheritance(), lock)
                log.info("handed over to process %d; open connections go on here", asked.pid)
                is_told_to_stop = self._stop.is_set()
                self.ending = Ending.HANDED_OVER
                self._successors = asked.workers
                self._stop.set()
            finally:
                self._decided.set()
            if is_told_to_stop:
                self._on_signal()
            await self._made_way.wait()
        conversation.send(Released())
        await conversation.sent()

    async def _end(self, proxier: UserspaceProxier, plane: DataPlane) -> None:
        """End as it was decided; without a decision this is a crash, and what serves goes on where it can."""
        settings = self._settings
        if self.ending is Ending.HANDED_OVER and isinstance(plane, RemotePlane):
            self._made_way.set()
            await plane.close(settings.orphan_timeout_s, successors=self._successors)
            if settings.in_cluster:  # a kubelet starts anew who ends by himself, and we would take back what we gave
                await self._told_to_go.wait()
        elif self.ending is not Ending.STOP and self._keeps_on and isinstance(plane, RemotePlane):
            plane.leave()
        else:
            await proxier.close(settings.drain_timeout_s)
            await _leave_network()

    def _on_signal(self) -> None:
        self._told_to_go.set()
        drain_timeout_s = self._settings.drain_timeout_s
        if not self._stop.is_set() or self.ending is Ending.AGAIN:
            log.info("stopping: rules away, then up to %.3g s for open connections", drain_timeout_s)
            self.ending = Ending.STOP
            self._stop.set()
        elif self._cut is not None and self.ending is Ending.HANDED_OVER and not self._hurried:
            log.info("up to %.3g s more for open connections", drain_timeout_s)
            asyncio.get_running_loop().call_later(drain_timeout_s, self._cut)
            self._hurried = True
        elif self._cut is not None:
            log.info("cutting the connections that are left")
            self._cut()

    def _on_start_anew(self) -> None:
        """Replace this process by a new one of the same command line, which takes over from our workers: an upgrade."""
        if self._stop.is_set():
            return
        if not self._decided.is_set():
            log.error("SIGUSR2 is not heeded: another process takes over just now")
            return
        if not self._keeps_on or "-" in self._settings.paths:
            log.error("SIGUSR2 is not heeded: not ready yet, --workers 0, or the manifests came from stdin")
            return
        log.info("starting anew; workers serve on meanwhile")
        self.ending = Ending.AGAIN
        self._stop.set()

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
            workers=settings.workers,
            orphan_timeout_s=settings.orphan_timeout_s,
            drain_timeout_s=settings.drain_timeout_s,
            splice=settings.splice,
            loop=settings.loop,
            access_log=settings.access_log,
            log_format=settings.log_format,
            verbose=settings.verbose,
        )
    )
    plane.start()
    return plane


async def _open_source(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[Source, list[str]]:
    """Return where wishes come from, and what tells whether two processes serve the same."""
    if not settings.follows_cluster:
        return FileSource(settings.paths), _identity(settings.paths)
    from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
    from userspace_proxy.sources.login import ApiTransport
    from userspace_proxy.sources.reflector import Pace

    transport = ApiTransport(settings.kubeconfig)
    stack.push_async_callback(transport.close)
    url = await transport.open()
    following = reflectors(transport, settings.node_name, settings.service_proxy_name, Pace(), random.Random())  # noqa: S311 - jitter
    log.info("following %s as node %s", url, settings.node_name)
    whose = f" for {settings.service_proxy_name}" if settings.service_proxy_name else ""
    return KubernetesSource(following), [f"{url}{whose}"]


def _allotting(settings: Settings, memory: Memory) -> Allotting:
    """Return who says which Service has which addresses and node ports: a cluster's API, or we ourselves."""
    if settings.follows_cluster:
        return Stated()
    return Allotments(settings.service_cluster_ip_ranges, memory, settings.load_balancer_pool)


def _degraded(watches: Iterable[WatchStats], after_s: float) -> list[str]:
    """Return what a source has not been able to hear of for longer than *after_s*."""
    now = time.time()
    return [watch.failure() for watch in watches if watch.is_dead(now, after_s)]


def _identity(paths: Iterable[str]) -> list[str]:
    """Return what tells whether two processes serve the same; what comes from stdin is never the same."""
    return [f"stdin of process {os.getpid()}" if path == "-" else os.path.realpath(path) for path in paths]


def _children() -> set[int]:
    """Return the processes that are children of ours, from before a start anew: what drains there ends some time."""
    try:
        return {int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()}
    except OSError:  # a kernel without CONFIG_PROC_CHILDREN
        return set()


async def _reap(left: set[int]) -> None:
    """Wait for them, so that nothing is left of them."""
    while left:
        left = {pid for pid in left if _is_running_child(pid)}
        await asyncio.sleep(_REAP_EVERY_S)


def _is_running_child(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == 0
    except ChildProcessError:
        return False


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

    def __init__(self, state_dir: StateDir | None, allotting: Allotting, ports: ProxyPorts) -> None:
        self._state_dir = state_dir
        self._allotting = allotting
        self._ports = ports
        self._saved = (-1, -1)
        self._wanted = asyncio.Event()

    def _changes(self) -> tuple[int, int]:
        return self._allotting.changes, self._ports.changes

    def save_soon(self) -> None:
        if self._changes() != self._saved:
            self._wanted.set()

    def _take(self) -> Memory:
        self._saved = self._changes()
        return msgspec.structs.replace(self._allotting.memory(), proxy_ports=self._ports.memory())

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
    tracker = Tracker(_allotting(settings, memory), here=Node(settings.node_name), source_ip=settings.source_ip)
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
    if (present := await end_orphans()) is not None:
        raise StartError(f"userspace-proxy{running_as(present)} is running; stop it, it takes its rules away itself")
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
    name = settings.congestion_control
    if name and not knows_congestion_control(name):
        raise StartError(
            f"--congestion-control {name}: not on this host (modprobe tcp_{name}?);"
            " sysctl net.ipv4.tcp_available_congestion_control lists what is"
        )
    unanswered_s, answered_s = network.conntrack_udp_timeouts()
    return Limits(
        idle_timeout_s=settings.idle_timeout_s,
        half_closed_timeout_s=settings.half_closed_timeout_s,
        dead_peer_timeout_s=settings.dead_peer_timeout_s,
        connections_per_client=settings.connections_per_client,
        congestion_control=settings.congestion_control,
        udp_flows_per_service=settings.udp_flows_per_service,
        udp_timeout_s=unanswered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
        udp_stream_timeout_s=answered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
    )
