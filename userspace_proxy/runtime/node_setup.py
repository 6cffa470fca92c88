"""Prepare this node, and take it over from the process that served it before."""

import contextlib
import logging
import math
import socket
import sys
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from userspace_proxy.config.settings import Settings
from userspace_proxy.config.values import Network
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.memory import StateDir
from userspace_proxy.control.pools import NodePort
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.handover import HandoverPlane
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.sockets import BACKLOG, knows_congestion_control
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.dns.sink import DnsSink, end_processes
from userspace_proxy.dns.sockets import open_sockets
from userspace_proxy.dns.wire import DnsSettings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.host import network
from userspace_proxy.host.capture import choose_capture
from userspace_proxy.host.sysctls import KUBE_PROXY, ConntrackLimits
from userspace_proxy.interfaces import Source
from userspace_proxy.logs import AccessLog, drop_count, recorder, require_writable
from userspace_proxy.model.listeners import ListenerSpec
from userspace_proxy.model.redirects import Capture, PodDetector
from userspace_proxy.model.service import SourceIP
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.mode import Mode, PreparedMode
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.runtime.desired_state import open_source, open_state_dir, unless_stopped
from userspace_proxy.runtime.instance_lock import InstanceLock, check_take_over, end_orphans, take_lock
from userspace_proxy.runtime.lifecycle import Lifecycle, is_dry_run
from userspace_proxy.runtime.node_network import tune_conntrack, widen_queues
from userspace_proxy.sources.events import EventRecorder, node_reference

_Number = TypeVar("_Number", int, float)

# For how long the ports at which this node listens are taken for known.
_LOOK_HOLDS_S = 0.2

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class NodeSetup:
    """A node that has been prepared, and that this process serves from now on.

    ``sources``: the identity of ``source``. ``inherited``: the listeners of the predecessor, which ``plane`` serves
    already. ``tune_conntrack`` sets conntrack's limits; ``is_tuned``: conntrack was loaded, and its limits are set.
    """

    prepared: PreparedMode
    source: Source
    sources: list[str]
    events: EventRecorder
    state_dir: StateDir | None
    lock: InstanceLock
    tune_conntrack: Callable[[], bool]
    is_tuned: bool
    plane: HandoverPlane
    inherited: list[ListenerSpec]
    node: Node
    hosts: Hosts
    rules: NodeRules
    dns: DnsSink | None


async def set_up_node(
    settings: Settings,
    mode: Mode,
    lifecycle: Lifecycle,
    of_dns: Sequence[socket.socket],
    stack: contextlib.AsyncExitStack,
) -> NodeSetup:
    """Prepare the node, and take it over from the process that serves it, if there is one.

    *of_dns*: sockets of cluster DNS from before a restart in place.

    Raises:
        StartError: the node cannot be served or taken over; the predecessor continues to serve.
    """
    # 1. Every check that can fail, before the predecessor yields.
    try:
        prepared = await mode.prepare(settings)
        node = Node(settings.node_name, addresses=await network.host_addresses())
    except SyncError as error:
        raise StartError(str(error)) from None
    if (obstacle := prepared.transparent_obstacle) and settings.source_ip is SourceIP.TRANSPARENT:
        raise StartError(f"--source-ip transparent: clients' addresses cannot be kept on this node: {obstacle}")
    source, sources, events = await unless_stopped(lifecycle.stop, open_source(settings, stack))
    state_dir = open_state_dir(settings.state_dir)
    workers = 0 if mode.kernel_serves else settings.workers
    if is_dry_run():
        await check_take_over(sources, settings.take_over, workers)
        sys.exit()
    # 2. The lock, and with it the listeners of the predecessor.
    if mode.kernel_serves:
        await end_orphans()  # sockets of workers have no use here
    lock = await take_lock(sources, settings.take_over, workers)
    stack.enter_context(contextlib.closing(lock))
    # 3. The node's addresses and limits.
    try:
        capture = "redirect" if mode.kernel_serves else settings.capture  # kernel modes capture nothing
        rules = node_rules(settings, mode, await choose_capture(capture))
    except SyncError as error:
        raise StartError(str(error)) from None
    if "primary" in rules.node_port_addresses:
        on = ", ".join(rules.node_ports_on(node)) or "no address"
        log.info("node ports are served at %s, unless the Node object states other addresses", on)
    widen_queues(BACKLOG)

    def tune() -> bool:
        reference = node_reference(settings.node_name)
        return tune_conntrack(
            conntrack_limits(settings), lambda note: events.warn(reference, "FailedToSetConntrack", note)
        )

    is_tuned = tune()  # before the data plane, which reads conntrack's UDP time-outs
    # 4. The data plane, which serves at the predecessor's listeners from now on.
    plane = make_plane(settings, mode, stack)
    dns = await make_dns(settings, rules, [*of_dns, *lock.cluster_dns], stack)
    inherited = await lifecycle.take_over(plane, lock)
    if dns is not None:  # from now on no predecessor needs its addresses
        stack.push_async_callback(remove_dns_addresses, dns)
    hosts = await look_at_hosts(dns.held if dns is not None else ())
    if not settings.follows_cluster:
        warn_of_shared_networks(settings.service_ranges, hosts.networks)
    return NodeSetup(
        prepared, source, sources, events, state_dir, lock, tune, is_tuned, plane, inherited, node, hosts, rules, dns
    )


def node_rules(settings: Settings, mode: Mode, capture: Capture) -> NodeRules:
    """Return the facts about this node that rules need: which senders are its pods, and where node ports are served."""
    interfaces = {
        "BridgeInterface": settings.pod_bridge_interface,
        "InterfaceNamePrefix": f"{settings.pod_interface_name_prefix}*",
    }
    pods = None
    if interface := interfaces.get(settings.detect_local_mode):
        pods = PodDetector(interface=interface)
    elif settings.detect_local_mode == "ClusterCIDR" and settings.cluster_cidrs:
        pods = PodDetector(cidrs=tuple(map(str, settings.cluster_cidrs)))
    addresses = tuple(map(str, settings.nodeport_addresses)) or mode.node_port_addresses
    return NodeRules(capture, pods, settings.detect_local_mode == "NodeCIDR", addresses)


class ListeningPorts:
    """The ports at which this node listens. One look serves all Services of a sync.

    A look walks the kernel's hash tables of sockets (tcp_seq_next in net/ipv4/tcp_ipv4.c), which takes milliseconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._found: frozenset[NodePort] = frozenset()
        self._outdated_at = -math.inf

    def __call__(self) -> frozenset[NodePort]:
        if self._now() >= self._outdated_at:
            self._found = frozenset(NodePort(*port) for port in network.listening_ports())
            self._outdated_at = self._now() + _LOOK_HOLDS_S
        return self._found


def warn_of_shared_networks(ranges: Iterable[Network], attached: Sequence[Network]) -> None:
    """Warn of each of *ranges* that overlaps a network that this node is *attached* to, where hosts have addresses."""
    for addresses in ranges:
        if shared := [each for each in attached if each.overlaps(addresses)]:
            log.warning(
                "Services get addresses of %s, and hosts of this node's network %s may have the same ones; "
                "choose a free range with --service-cluster-ip-range",
                addresses,
                ", ".join(map(str, shared)),
            )


async def look_at_hosts(dns: Collection[str]) -> Hosts:
    """Return the addresses of this node and its neighbours. *dns*: those of cluster DNS."""
    addresses, networks = await network.look_at_networks()
    return Hosts(addresses, networks, ListeningPorts(), dns)


def conntrack_limits(settings: Settings) -> ConntrackLimits:
    """Return the limits to set in conntrack.

    Without flags: kube-proxy's, if this process is in its place. They are not changed beside kube-proxy, which has set
    them, nor with manifest files: a user who tries a few files does not expect a change of the computer.
    """
    usual = KUBE_PROXY if settings.follows_cluster and not settings.service_proxy_name else ConntrackLimits()

    def chosen(given: _Number | None, otherwise: _Number) -> _Number:
        return otherwise if given is None else given

    return ConntrackLimits(
        max_per_core=chosen(settings.conntrack_max_per_core, usual.max_per_core),
        min_entries=chosen(settings.conntrack_min, usual.min_entries),
        tcp_established_s=chosen(settings.conntrack_tcp_timeout_established_s, usual.tcp_established_s),
        tcp_close_wait_s=chosen(settings.conntrack_tcp_timeout_close_wait_s, usual.tcp_close_wait_s),
        tcp_be_liberal=settings.conntrack_tcp_be_liberal,
        udp_s=settings.conntrack_udp_timeout_s,
        udp_stream_s=settings.conntrack_udp_timeout_stream_s,
    )


# ---- the data plane, and cluster DNS


def make_plane(settings: Settings, mode: Mode, stack: contextlib.AsyncExitStack) -> HandoverPlane:
    """Return the data plane.

    It runs in this process with ``--workers 0``, and in modes in which the kernel serves: there it opens nothing.
    """
    if mode.kernel_serves:
        return LocalPlane(Limits())
    try:
        if settings.access_log:
            require_writable(settings.access_log)
    except OSError as error:
        reason = "its folder does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StartError(f"--access-log {settings.access_log}: {reason}") from None
    if settings.workers == 0:
        access_log = AccessLog(settings.access_log, settings.log_format) if settings.access_log else None
        if access_log is not None:
            stack.callback(access_log.close)
        record = recorder(access_log, verbose=settings.verbose)
        return LocalPlane(_limits(settings), record, splice=settings.splice, lines_dropped=drop_count(access_log))
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
        udp_port_rest_s=settings.udp_port_rest_s,
        udp_timeout_s=unanswered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
        udp_stream_timeout_s=answered_s if settings.udp_timeout_s is None else settings.udp_timeout_s,
    )


async def make_dns(
    settings: Settings, rules: NodeRules, inherited: Sequence[socket.socket], stack: contextlib.AsyncExitStack
) -> DnsSink | None:
    """Return cluster DNS, which serves at its addresses from now on, or None without ``--dns``.

    *inherited*: what `DnsSink.inheritance` of the predecessor returned.

    Raises:
        StartError: cluster DNS cannot serve at its addresses.
    """
    channels = [sock for sock in inherited if sock.family == socket.AF_UNIX]
    sockets = [sock for sock in inherited if sock.family != socket.AF_UNIX]
    addresses = settings.dns_addresses
    if not addresses:
        end_processes(channels)
        for sock in sockets:
            sock.close()
        if settings.dns:
            raise StartError("--dns: the range of cluster IPs is not known; give an address, as in --dns 10.96.0.10")
        return None
    sockets = open_sockets(addresses, sockets)
    try:
        for ip in addresses:
            await network.add_own_address(ip)
    except SyncError as error:
        raise StartError(f"--dns: {error}") from None
    wanted = DnsSettings(
        domain=settings.cluster_domain,
        addresses=addresses,
        upstream=settings.dns_upstream or None,
        orphan_timeout_s=settings.orphan_timeout_s,
        loop=settings.loop,
        log_format=settings.log_format,
        verbose=settings.verbose,
    )
    dns = DnsSink(wanted, sockets, channels, rules.pods)
    dns.start()
    stack.push_async_callback(dns.close)
    return dns


async def remove_dns_addresses(dns: DnsSink) -> None:
    """Remove the addresses of *dns* from this node, unless another process serves at them from now on."""
    if not dns.is_left:
        await network.remove_own_addresses()
