"""The composition root: the parts of a running proxy, and the order in which they start and stop.

Read it from top to bottom: `App.run` is the life of the process, `Proxy.__init__` the list of parts. What is specific
to a mode is in its `Mode` (`modes/__init__.py`), never decided here.
"""

import asyncio
import contextlib
import functools
import gc
import logging
import os
import socket
from collections.abc import Callable, Coroutine

from userspace_proxy import __version__
from userspace_proxy.admin.control_socket import NAME as SOCKET_NAME
from userspace_proxy.admin.control_socket import ControlSocket
from userspace_proxy.admin.health_checks import ServiceHealthChecks
from userspace_proxy.admin.server import AdminServer
from userspace_proxy.config.configz import configz
from userspace_proxy.config.settings import DEFAULT_SERVICE_RANGES, Settings
from userspace_proxy.control.advice import Advisor
from userspace_proxy.control.controller import Controller
from userspace_proxy.control.dns_endpoints import DnsEndpoints
from userspace_proxy.control.journal import Journal
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.pacer import Pacer
from userspace_proxy.control.state_writer import StateWriter
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.dataplane.handover import VERSION, Incumbent, Present
from userspace_proxy.dns.sink import DnsSink
from userspace_proxy.dns.sockets import is_of_dns
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.host.firewalls import find_blocking_firewall
from userspace_proxy.model.names import NamespacedName, ObjectReference
from userspace_proxy.modes import MODES
from userspace_proxy.modes.mode import Mode, ProxierRequest
from userspace_proxy.probes.filter import HealthFilter
from userspace_proxy.runtime.cleanup import remove_others, require_net_admin
from userspace_proxy.runtime.desired_state import lint_options, make_allocations, make_proxy_ports
from userspace_proxy.runtime.inspection import Inspection
from userspace_proxy.runtime.lifecycle import Ending, Lifecycle, child_processes, kept_listeners, reap, restart_with
from userspace_proxy.runtime.node_network import NodeRoutes, follow_addresses, follow_routing_rules, leave_network
from userspace_proxy.runtime.node_setup import NodeSetup, set_up_node
from userspace_proxy.runtime.reports import Reports
from userspace_proxy.runtime.running import RunningProxy
from userspace_proxy.runtime.why import Explainer
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
    gc.disable()  # until the first sync: objects made before it stay, and searching them would double the time
    app = App(settings)
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(app.run())
        if app.lifecycle.ending is Ending.RESTART:
            runner.run(runner.get_loop().shutdown_default_executor())
            restart_with(app.kept_listeners)


class App:
    """Runs one proxy process from start to end.

    ``kept_listeners``: listeners that stay open during a restart in place.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._mode = MODES[settings.proxy_mode]
        self.kept_listeners: list[socket.socket] = []
        self.lifecycle = Lifecycle(settings, kernel_serves=self._mode.kernel_serves)

    async def run(self) -> None:
        """Start, serve, and stop in the reverse order."""
        lifecycle = self.lifecycle
        require_net_admin()
        draining, listeners = child_processes(), kept_listeners()
        lifecycle.install_signal_handlers()
        async with contextlib.AsyncExitStack() as stack:
            of_dns = [sock for sock in listeners if is_of_dns(sock)]
            node = await set_up_node(self._settings, self._mode, lifecycle, of_dns, stack)
            proxy = Proxy(self._settings, self._mode, node, lifecycle)
            stack.push_async_callback(proxy.health_checks.close)
            proxy.health_checks.adopt([sock for sock in listeners if sock not in of_dns] + node.lock.health_checks)
            stack.callback(proxy.incumbent.close)
            stack.push_async_callback(proxy.admin.close)
            stack.push_async_callback(proxy.control_socket.close)
            try:
                await proxy.serve(draining)
            finally:
                await lifecycle.wait_for_handover(proxy.incumbent)
                if lifecycle.ending is Ending.HANDED_OVER:
                    # While connections drain, no caller may reach this process, and the successor needs the name.
                    proxy.incumbent.close()
                    node.lock.name.close()
                    await proxy.health_checks.close()
                    await proxy.admin.close()
                    await proxy.control_socket.close()
                    if node.dns is not None:
                        node.dns.leave()
                elif lifecycle.ending is Ending.RESTART:
                    of_dns = node.dns.inheritance() if node.dns is not None else []
                    self.kept_listeners = [sock.dup() for sock in (*proxy.health_checks.listeners(), *of_dns)]
                    if node.dns is not None:
                        node.dns.leave()
                proxy.state_writer.save()
                await lifecycle.end(node.plane, proxy.remove_rules)
        log.info("stopped")


class Proxy:
    """The parts of a running proxy, from desired state to rules."""

    def __init__(self, settings: Settings, mode: Mode, node: NodeSetup, lifecycle: Lifecycle) -> None:
        self._settings, self._mode, self._node, self._lifecycle = settings, mode, node, lifecycle
        # What is allocated, and remembered over restarts.
        memory = node.state_dir.load() if node.state_dir else SavedAllocations()
        inherited_ports = {spec.name.key: spec.proxy_port for spec in node.inherited}
        allocations = make_allocations(settings, memory, node.hosts)
        ports = make_proxy_ports(settings, {**memory.proxy_ports, **inherited_ports})
        self.state_writer = StateWriter(node.state_dir, allocations, ports)
        # Objects to desired state.
        self._tracker = Tracker(
            allocations,
            settings.service_proxy_name,
            node.node,
            settings.source_ip,
            node.prepared.transparent_obstacle,
            has_names=node.dns is not None,
        )
        self._health_filter = HealthFilter(lambda: self._controller.sync_again(), self._warn_of)
        # Desired state made true: sinks, in order.
        self._routes = NodeRoutes(
            settings.service_ranges,
            node.node.addresses if mode.kernel_serves else (),
            discarded=(*settings.service_ranges, *settings.load_balancer_pool),
            discards_portals=not settings.follows_cluster,
        )
        self._proxier = node.prepared.make_proxier(ProxierRequest(node.plane, ports, node.rules, node.inherited))
        self.health_checks = ServiceHealthChecks(
            self._is_healthy,
            lambda service, why: self._warn_of(service, "FailedToStartServiceHealthcheck", why),
            lambda: node.rules.node_port_ips(self._tracker.here),
        )
        journal = Journal()
        # In a cluster, a name would give writers of Services the rights of writers of EndpointSlices (CVE-2021-25740).
        source = node.source if settings.follows_cluster else DnsEndpoints(node.source)
        self._controller = Controller(
            source,
            self._tracker,
            (self._routes, self._proxier, self.health_checks, *([node.dns] if node.dns else ())),
            Pacer(asyncio.get_running_loop().time, settings.min_sync_period_s, settings.sync_period_s),
            after_sync=self._after_sync,
            health_timeout_s=2 * settings.sync_period_s,  # as kube-proxy
            filtered=self._health_filter.apply,
            journal=journal,
            loads=lambda: self._proxier.loads,
        )
        running = RunningProxy(
            settings,
            mode,
            node.rules,
            source,
            self._tracker,
            self._controller,
            journal,
            self._health_filter,
            self._proxier,
            node.plane,
            self.health_checks,
            node.dns,
        )
        # Hand-over to a successor.
        present = Present(VERSION, os.getpid(), node.sources, workers=0 if mode.kernel_serves else 1)
        hand_over_to = functools.partial(lifecycle.hand_over_to, running, node.lock.name)
        self.incumbent = Incumbent(node.lock.member, present, hand_over_to)
        lifecycle.cut = node.plane.cut
        # For operators: findings of manifests, health, metrics, answers to questions.
        self._advisor = None
        if isinstance(node.source, FileSource):
            self._advisor = Advisor(lint_options(settings))
            node.source.observer = self._advisor
        reports = Reports(running, lifecycle.stop.is_set, lambda: self._advisor.faults if self._advisor else [])
        self.admin = AdminServer(
            reports.health, reports.metrics, settings.proxy_mode, configz(settings), settings.degraded_status
        )
        self.control_socket = ControlSocket({**Inspection(running).questions(), "why": Explainer(running).why})

    async def serve(self, draining: set[int]) -> None:
        """Serve until the process is to end. *draining*: workers from before a restart in place."""
        settings, node = self._settings, self._node
        await self.admin.start(settings.healthz_bind_address, settings.metrics_bind_address)
        await self._listen_for_questions()
        jobs: dict[str, Coroutine[object, object, None]] = {
            "controller": self._controller.run(),
            "events": node.events.run(),
            "proxier": self._proxier.run(),
            "state writer": self.state_writer.run(),
            "follow-addresses": follow_addresses(self._tracker, self._controller.sync_again, self._routes.add_missing),
            "follow-routing-rules": follow_routing_rules(self._routes.discard_again),
            "first-sync": self._after_first_sync(),
            "note-ready": self._lifecycle.note_ready(self._controller.ready, node.plane),
            "reap": reap(draining),
        }
        if node.dns is not None:
            jobs["dns"] = self._watch_dns(node.dns)
        if self._advisor is not None:
            jobs["advise"] = self._advise(self._advisor)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(job, name=name) for name, job in jobs.items()]
            node.events.normal(node_reference(settings.node_name), "Starting", f"userspace-proxy {__version__}")
            await self._lifecycle.stop.wait()
            for task in tasks:
                task.cancel()
        self._health_filter.close()

    async def _listen_for_questions(self) -> None:
        """Open the control socket. Without a place for it, serve without one."""
        path, state_dir = self._settings.control_socket, self._node.state_dir
        place = path or (state_dir.folder / SOCKET_NAME if state_dir is not None else None)
        try:
            if place is not None:
                await self.control_socket.start(place)
            else:
                log.info("get, describe and why have no socket to ask at: no folder for it can be written")
        except StartError as error:
            if path is not None:
                raise
            log.warning("get, describe and why have no socket to ask at: %s", error)

    async def remove_rules(self) -> None:
        """Drain connections and remove every rule, unless the kernel should continue to serve by the rules."""
        if self._mode.kernel_serves and self._lifecycle.ending is not Ending.STOP:
            return
        await self._proxier.close(self._settings.drain_timeout_s)
        await leave_network()

    def _is_healthy(self) -> bool:
        """Return whether the node is ready for load balancers. Stays true during a hand-over."""
        return self._controller.failing_since is None and self._lifecycle.ending is not Ending.STOP

    def _warn_of(self, service: NamespacedName, reason: str, note: str) -> None:
        self._node.events.warn(ObjectReference("Service", service), reason, note, is_logged=True)

    def _after_sync(self) -> None:
        self.state_writer.save_soon()
        for service, problem in self._tracker.problems.items():
            self._warn_of(service, "NotServedAsWritten", problem)
        for name, why in self._proxier.unopened.items():
            self._warn_of(name.service_port.service, "NotServed", why)

    async def _watch_dns(self, dns: DnsSink) -> None:
        try:
            await dns.run()
        except StartError:
            self._lifecycle.ending = Ending.STOP  # nothing is to stay behind
            raise

    async def _advise(self, advisor: Advisor) -> None:
        """Check manifests from the first sync on: beside the checks, it would take longer."""
        await self._controller.attempted.wait()
        await advisor.run()

    async def _after_first_sync(self) -> None:
        """Do once what can wait until the first sync."""
        settings, node = self._settings, self._node
        await self._controller.attempted.wait()
        # Objects of now live long: keep the garbage collector from scanning them in every collection.
        gc.freeze()
        gc.set_threshold(700)  # the default of Python 3.11; `__main__` has raised it for short commands
        gc.enable()
        await self._controller.ready.wait()
        if self._tracker.node is None and (
            settings.follows_cluster or (settings.hostname_override and self._tracker.knows_other_nodes)
        ):
            log.warning(
                "no Node is called %s: no endpoint is local and no zone known; name this node with --hostname-override",
                settings.node_name,
            )
        if not node.is_tuned:
            node.tune_conntrack()  # the rules have loaded conntrack
        try:
            await remove_others(self._mode, node.prepared)
        except SyncError as error:
            log.warning("rules of another mode may stay; stop this and run `userspace-proxy cleanup`: %s", error)
        await network.remove_own_addresses(keep=settings.dns_addresses)
        # Of a cluster no range may be known.
        ranges = (*settings.service_ranges, *self._controller.synced.service_cidrs, *DEFAULT_SERVICE_RANGES)
        with contextlib.suppress(SyncError, ValueError):
            for traffic in self._mode.firewalled_traffic:
                for found in await find_blocking_firewall(traffic, str(ranges[0])):
                    log.warning("a firewall on this node drops %s: %s", traffic.name, found)
