"""The composition root: the only file that knows who is who. Start order, stop order."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import socket
from collections.abc import Callable, Coroutine

from userspace_proxy import __version__
from userspace_proxy.admin.health_checks import ServiceHealthChecks, WithHealthChecks
from userspace_proxy.admin.server import AdminServer
from userspace_proxy.config.configz import configz
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.advice import Advisor
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.memory import Memory
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.proxy_ports import ProxyPorts
from userspace_proxy.control.saver import Saver
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.handover import VERSION, Conversation, Incumbent, Present, TakeOver
from userspace_proxy.errors import SyncError
from userspace_proxy.host.firewalls import Hook, find_blocking_firewall
from userspace_proxy.interfaces import Proxier
from userspace_proxy.model.names import NamespacedName, ObjectReference
from userspace_proxy.modes.userspace.loader import KERNELS
from userspace_proxy.modes.userspace.proxier import UserspaceProxier
from userspace_proxy.runtime.cleanup import remove_others, require_net_admin
from userspace_proxy.runtime.lifecycle import Ending, Succession, children, reap, start_anew, was_left
from userspace_proxy.runtime.node_network import WithRoutes, follow_addresses, leave_network, watch_network
from userspace_proxy.runtime.node_setup import Ground, take_ground
from userspace_proxy.runtime.parts import (
    KERNEL_MODES,
    lint_options,
    make_allocations,
    make_kernel_proxier,
    make_proxy_ports,
    warn_unless_forwarding,
)
from userspace_proxy.runtime.reports import Reports
from userspace_proxy.sources.events import node_reference
from userspace_proxy.sources.files import FileSource

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
        succession.heed_signals()
        async with contextlib.AsyncExitStack() as stack:
            ground = await take_ground(settings, succession, stack)
            running = _Running(settings, succession, ground)
            stack.push_async_callback(running.health_checks.close)
            running.health_checks.adopt(listeners + ground.inheritance.health_checks)
            stack.callback(running.incumbent.close)
            stack.push_async_callback(running.admin.close)
            try:
                await running.serve(left)
            finally:
                await succession.decision(running.incumbent)
                if succession.ending is Ending.HANDED_OVER:
                    # No caller is to meet us any more, nor the name to be ours, while connections drain.
                    running.incumbent.close()
                    ground.inheritance.name.close()
                    await running.health_checks.close()
                    await running.admin.close()
                elif succession.ending is Ending.AGAIN:
                    self.left = [sock.dup() for sock in running.health_checks.listeners()]
                running.saver.save()
                await succession.end(ground.plane, running.take_away)
        log.info("stopped")


class _Running:
    """Who is who in a running proxy, from wishes to rules."""

    def __init__(self, settings: Settings, succession: Succession, ground: Ground) -> None:
        self._settings, self._succession, self._ground = settings, succession, ground
        state_dir = ground.state_dir
        memory = state_dir.load() if state_dir else Memory()
        allocations = make_allocations(settings, memory, ground.hosts)
        known_ports = {spec.name.key: spec.proxy_port for spec in ground.inherited}
        ports = make_proxy_ports(settings, {**memory.proxy_ports, **known_ports})
        self.saver = Saver(state_dir, allocations, ports)
        self._tracker = Tracker(
            allocations, settings.service_proxy_name, ground.here, settings.source_ip, ground.obstacle
        )
        self._proxier = self._make_proxier(ports)
        self.health_checks = ServiceHealthChecks(
            self._is_serving,
            lambda service, why: self._warn_of(service, "FailedToStartServiceHealthcheck", why),
            lambda: ground.rules.node_port_ips(self._tracker.here),
        )
        addresses = () if ground.tables is None else ground.here.addresses
        routed = WithRoutes(
            self._proxier,
            settings.service_ranges,
            addresses,
            discarded=(*settings.service_ranges, *settings.load_balancer_pool),
            discards_portals=not settings.follows_cluster,
        )
        self._controller = Controller(
            ground.source,
            self._tracker,
            WithHealthChecks(routed, self.health_checks),
            Pacer(asyncio.get_running_loop().time, settings.min_sync_period_s, settings.sync_period_s),
            after_sync=self._after_sync,
            health_timeout_s=2 * settings.sync_period_s,  # as kube-proxy
        )
        present = Present(VERSION, os.getpid(), ground.sources, workers=1 if ground.tables is None else 0)
        self.incumbent = Incumbent(ground.inheritance.member, present, self._hand_over_to)
        self._advisor = None
        if isinstance(ground.source, FileSource):
            self._advisor = Advisor(lint_options(settings))
            ground.source.observe = self._advisor.note
        reports = Reports(
            settings,
            ground.source,
            self._tracker,
            self._controller,
            self._proxier,
            ground.plane,
            self.health_checks,
            succession.stop.is_set,
            lambda: self._advisor.faults if self._advisor is not None else [],
        )
        self.admin = AdminServer(
            reports.health, reports.metrics, settings.proxy_mode, configz(settings), settings.degraded_status
        )
        succession.cut = ground.plane.cut

    def _make_proxier(self, ports: ProxyPorts) -> Proxier:
        ground = self._ground
        if ground.tables is not None:
            warn_unless_forwarding()
            return make_kernel_proxier(ground.tables, self._settings, ground.rules)
        proxier = UserspaceProxier(ground.plane, KERNELS[ground.language](), ports, ground.rules)
        proxier.adopt(ground.inherited)
        return proxier

    async def serve(self, left: set[int]) -> None:
        """Serve until it is time to end. *left*: processes that drain from before a start anew."""
        settings, ground, proxier = self._settings, self._ground, self._proxier
        await self.admin.start(settings.healthz_bind_address, settings.metrics_bind_address)
        jobs: dict[str, Coroutine[object, object, None]] = {
            "controller": self._controller.run(),
            "events": ground.events.run(),
            "keep-rules": proxier.keep_rules(),
            "saver": self.saver.run(),
            "settle-in": self._settle_in(),
            "note-ready": self._succession.note_ready(self._controller.ready, ground.plane),
            "reap": reap(left),
        }
        if self._advisor is not None:
            jobs["advise"] = self._advisor.run()
        jobs["follow-addresses"] = follow_addresses(self._tracker, self._controller.sync_again)
        if isinstance(proxier, UserspaceProxier):
            jobs["watch-network"] = watch_network(settings.capture, proxier)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job, name=name) for name, job in jobs.items()]
            ground.events.normal(node_reference(settings.node_name), "Starting", f"userspace-proxy {__version__}")
            await self._succession.stop.wait()
            for task in tasks:
                task.cancel()

    async def take_away(self) -> None:
        """Drain connections and leave no rule behind, unless the kernel is to serve on by them."""
        if self._ground.tables is not None and self._succession.ending is not Ending.STOP:
            return
        await self._proxier.close(self._settings.drain_timeout_s)
        await leave_network()

    def _is_serving(self) -> bool:
        """Whether load balancers may count on this node; who hands over says so to the last."""
        return self._controller.failing_since is None and self._succession.ending is not Ending.STOP

    def _warn_of(self, service: NamespacedName, reason: str, note: str) -> None:
        self._ground.events.warn(ObjectReference("Service", service), reason, note, is_logged=True)

    def _after_sync(self) -> None:
        self.saver.save_soon()
        for service, problem in self._tracker.problems.items():
            self._warn_of(service, "NotServedAsWritten", problem)
        for name, why in self._proxier.unopened.items():
            self._warn_of(name.service_port.service, "NotServed", why)

    async def _hand_over_to(self, asked: TakeOver, conversation: Conversation) -> None:
        ground = self._ground
        await self._succession.hand_over_to(
            asked, conversation, self._proxier, ground.plane, ground.inheritance.name, self.health_checks
        )

    async def _settle_in(self) -> None:
        """What is worth doing once, after the first sync."""
        settings = self._settings
        mode, language = settings.proxy_mode, self._ground.language
        await self._controller.attempted.wait()
        # What is there now stays for long: the collector need not walk over it again and again.
        gc.freeze()
        gc.enable()
        await self._controller.ready.wait()
        if self._tracker.node is None and (
            settings.follows_cluster or (settings.hostname_override and self._tracker.knows_other_nodes)
        ):
            log.warning(
                "no Node is called %s: no endpoint is local and no zone known; name this node with --hostname-override",
                settings.node_name,
            )
        if not self._ground.is_tuned:
            self._ground.tune()  # the rules have loaded conntrack
        with contextlib.suppress(SyncError):
            await remove_others(mode, language)
        if mode == "ipvs":  # requests pass INPUT before they are translated, and FORWARD sees answers alone
            return
        hook: Hook = "forward" if mode in KERNEL_MODES else "input"
        what = "forwarded traffic" if hook == "forward" else "redirected traffic"
        with contextlib.suppress(SyncError, ValueError):
            for found in await find_blocking_firewall(hook):
                log.warning("a firewall on this node drops %s: %s", what, found)
