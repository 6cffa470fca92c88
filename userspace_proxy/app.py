"""The composition root: the only file that knows who is who. Start order, stop order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable

from userspace_proxy import __version__
from userspace_proxy.admin.health_checks import ServiceHealthChecks, WithHealthChecks
from userspace_proxy.admin.server import AdminServer
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.memory import Memory
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.saver import Saver
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.handover import VERSION, Conversation, Incumbent, Present, TakeOver
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.sockets import BACKLOG
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.instance import end_orphans, take_lock
from userspace_proxy.kube_config import configz
from userspace_proxy.model.names import NamespacedName, ObjectReference
from userspace_proxy.model.service import SourceIP
from userspace_proxy.model.topology import Node
from userspace_proxy.node_network import (
    WithRoutes,
    first_capture,
    leave_network,
    tune_conntrack,
    watch_network,
    widen_queues,
)
from userspace_proxy.parts import (
    KERNEL_MODES,
    conntrack_limits,
    make_allotting,
    make_kernel_proxier,
    make_plane,
    node_rules_of,
    open_source,
    open_state_dir,
    warn_unless_forwarding,
)
from userspace_proxy.proxiers.kernel import KernelProxier
from userspace_proxy.proxiers.proxy_ports import ProxyPorts
from userspace_proxy.proxiers.userspace import UserspaceProxier
from userspace_proxy.removal import remove_others, require_net_admin
from userspace_proxy.reports import Reports
from userspace_proxy.rules import network
from userspace_proxy.rules.firewalls import find_blocking_firewall
from userspace_proxy.rules.kernel import KERNELS, choose_language
from userspace_proxy.settings import Settings
from userspace_proxy.sources.events import node_reference
from userspace_proxy.succession import Ending, Succession, children, reap, start_anew, was_left

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
    if app.succession.ending is Ending.AGAIN:
        start_anew(app.left)


class App:
    """One running proxy. ``succession``: how it ends. ``left``: listeners for who is started anew in its place."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.left: list[socket.socket] = []
        self.succession = Succession(
            drain_timeout_s=settings.drain_timeout_s,
            orphan_timeout_s=settings.orphan_timeout_s,
            can_start_anew="-" not in settings.paths,
            is_kept_running=settings.in_cluster,
            kernel_serves=settings.proxy_mode in KERNEL_MODES,
        )

    async def run(self) -> None:
        settings, succession = self._settings, self.succession
        require_net_admin()
        left, listeners = children(), was_left()
        loop = asyncio.get_running_loop()
        succession.heed_signals()
        async with contextlib.AsyncExitStack() as stack:
            make_tables = KERNEL_MODES.get(settings.proxy_mode)
            tables = make_tables(settings) if make_tables is not None else None
            try:
                if tables is not None:
                    await tables.prepare()
                language = choose_language(settings.rules) if tables is None else ""
            except SyncError as error:
                raise StartError(str(error)) from None
            source, sources, events = await open_source(settings, stack)
            node = node_reference(settings.node_name)
            state_dir = open_state_dir(settings.state_dir)
            if tables is not None:
                await end_orphans()  # no worker's sockets are of use here
            inheritance = await take_lock(sources, settings.take_over, settings.workers if tables is None else 0)
            lock = stack.enter_context(contextlib.closing(inheritance.lock))
            widen_queues(BACKLOG)

            def tune() -> bool:
                limits = conntrack_limits(settings)
                return tune_conntrack(limits, lambda note: events.warn(node, "FailedToSetConntrack", note))

            is_tuned = tune()  # before the plane, which takes over conntrack's time-outs of UDP
            plane = make_plane(settings, stack) if tables is None else LocalPlane(Limits())  # nothing to open
            inherited = await succession.inherit(plane, inheritance)
            memory = state_dir.load() if state_dir else Memory()
            allotting = make_allotting(settings, memory)
            known_ports = {spec.name.key: spec.proxy_port for spec in inherited}
            ports = ProxyPorts(*settings.proxy_port_range, {**memory.proxy_ports, **known_ports})
            here = Node(settings.node_name, addresses=await network.host_addresses())
            obstacle = "; ".join(await network.transparent_obstacles(language)) if tables is None else ""
            if obstacle and settings.source_ip is SourceIP.TRANSPARENT:
                raise StartError(f"--source-ip transparent: clients' addresses cannot be kept on this node: {obstacle}")
            tracker = Tracker(allotting, settings.service_proxy_name, here, settings.source_ip, obstacle)

            succession.cut = plane.cut
            rules = node_rules_of(settings, await first_capture(settings.capture))
            proxier: UserspaceProxier | KernelProxier
            if tables is None:
                proxier = UserspaceProxier(plane, KERNELS[language](), ports, rules)
                proxier.adopt(inherited)
            else:
                warn_unless_forwarding()
                proxier = make_kernel_proxier(tables, settings, rules)

            def is_serving() -> bool:
                """Whether load balancers may count on this node; who hands over says so to the last."""
                return controller.failing_since is None and succession.ending is not Ending.STOP

            def warn_of(service: NamespacedName, reason: str, note: str) -> None:
                events.warn(ObjectReference("Service", service), reason, note, is_logged=True)

            def after_sync() -> None:
                saver.save_soon()
                for service, problem in tracker.problems.items():
                    warn_of(service, "NotServedAsWritten", problem)
                for name, why in proxier.unopened.items():
                    warn_of(name.service_port.service, "NotServed", why)

            health_checks = ServiceHealthChecks(
                is_serving,
                lambda service, why: warn_of(service, "FailedToStartServiceHealthcheck", why),
                lambda: rules.node_port_ips(tracker.here),
            )
            stack.push_async_callback(health_checks.close)
            health_checks.adopt(listeners + inheritance.health_checks)
            saver = Saver(state_dir, allotting, ports)
            controller = Controller(
                source,
                tracker,
                WithHealthChecks(
                    WithRoutes(proxier, settings.service_cluster_ip_ranges, () if tables is None else here.addresses),
                    health_checks,
                ),
                Pacer(loop.time, settings.min_sync_period_s, settings.sync_period_s),
                after_sync=after_sync,
                health_timeout_s=2 * settings.sync_period_s,  # as kube-proxy
            )

            async def hand_over_to(asked: TakeOver, conversation: Conversation) -> None:
                await succession.hand_over_to(asked, conversation, proxier, plane, lock, health_checks)

            async def take_away() -> None:
                if tables is not None and succession.ending is not Ending.STOP:
                    return  # the kernel serves on until somebody takes our place
                await proxier.close(settings.drain_timeout_s)
                await leave_network()

            present = Present(VERSION, os.getpid(), sources, workers=1 if tables is None else 0)
            incumbent = Incumbent(lock, present, hand_over_to)
            stack.callback(incumbent.close)

            reports = Reports(
                settings, source, tracker, controller, proxier, plane, health_checks, succession.stop.is_set
            )
            admin = AdminServer(
                reports.health, reports.metrics, settings.proxy_mode, configz(settings), settings.degraded_status
            )
            stack.push_async_callback(admin.close)
            try:
                await admin.start(settings.healthz_bind_address, settings.metrics_bind_address)
                async with asyncio.TaskGroup() as group:
                    tasks = [
                        group.create_task(controller.run(), name="controller"),
                        group.create_task(events.run(), name="events"),
                        group.create_task(proxier.keep_rules(), name="keep-rules"),
                        group.create_task(saver.run(), name="saver"),
                        group.create_task(
                            _settle_in(controller, settings.proxy_mode, language, None if is_tuned else tune),
                            name="settle-in",
                        ),
                        group.create_task(succession.note_ready(controller.ready, plane), name="note-ready"),
                        group.create_task(reap(left), name="reap"),
                    ]
                    if isinstance(proxier, UserspaceProxier):
                        watching = watch_network(settings.capture, proxier)
                        tasks.append(group.create_task(watching, name="watch-network"))
                    events.normal(node, "Starting", f"userspace-proxy {__version__}")
                    await succession.stop.wait()
                    for task in tasks:
                        task.cancel()
            finally:
                await succession.decision(incumbent)
                if succession.ending is Ending.HANDED_OVER:
                    # Nobody is to meet us at the lock any more, nor its name to be ours, while connections drain.
                    incumbent.close()
                    lock.close()
                    await health_checks.close()
                    await admin.close()
                elif succession.ending is Ending.AGAIN:
                    self.left = [sock.dup() for sock in health_checks.listeners()]
                saver.save()
                await succession.end(plane, take_away)
        log.info("stopped")


async def _settle_in(controller: Controller, mode: str, language: str, tune: Callable[[], object] | None) -> None:
    """What is worth doing once, after the first sync; *tune* where that is still to be done."""
    await controller.attempted.wait()
    # What is there now stays for long: the collector need not walk over it again and again.
    gc.freeze()
    gc.enable()
    await controller.ready.wait()
    if tune is not None:
        tune()  # the rules have loaded conntrack
    with contextlib.suppress(SyncError):
        await remove_others(mode, language)
    if mode in KERNEL_MODES:
        return
    with contextlib.suppress(SyncError, ValueError):
        for found in await find_blocking_firewall():
            log.warning("a firewall on this node drops redirected traffic: %s", found)
