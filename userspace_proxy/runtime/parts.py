"""What settings mean in parts: where wishes come from, which plane and tables serve them, and within which limits."""

from __future__ import annotations

import contextlib
import logging
import os
import random
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

from userspace_proxy.config.settings import DEFAULT_STATE_DIR, Settings
from userspace_proxy.control.allocations import Allocations, ManifestAllocations, StatedAllocations
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.lint import LintOptions
from userspace_proxy.control.memory import Memory, StateDir
from userspace_proxy.control.pools import NodePort
from userspace_proxy.control.proxy_ports import KUBERNETES_PORTS, ProxyPorts
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.plane import LocalPlane
from userspace_proxy.dataplane.remote import RemotePlane
from userspace_proxy.dataplane.sockets import knows_congestion_control
from userspace_proxy.dataplane.wire import WorkerSettings
from userspace_proxy.errors import StartError
from userspace_proxy.host import network
from userspace_proxy.host.sysctls import KUBE_PROXY, ConntrackLimits
from userspace_proxy.interfaces import Capture, DataPlane, KernelTables, PodDetector, Source
from userspace_proxy.logs import AccessLog, drop_count, recorder, require_writable
from userspace_proxy.modes.iptables.chains import Manner
from userspace_proxy.modes.iptables.loader import IptablesTables
from userspace_proxy.modes.ipvs.loader import IpvsTables
from userspace_proxy.modes.kernel_proxier import KernelProxier
from userspace_proxy.modes.plans import NodeRules
from userspace_proxy.modes.slots.element_tables import ElementTables
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.sources.events import EventRecorder
from userspace_proxy.sources.files import FileSource

_Number = TypeVar("_Number", int, float)

log = logging.getLogger(__name__)

# Mode -> what has its rules in the kernel. In userspace mode sockets of ours serve, and rules lead to them.
KERNEL_MODES: dict[str, Callable[[Settings], KernelTables]] = {
    "nftables": lambda _: ElementTables("nftables", SlotTable()),
    "iptables": lambda settings: IptablesTables(manner_of(settings)),
    "ipvs": lambda settings: IpvsTables(settings.ipvs_scheduler, strict_arp=settings.ipvs_strict_arp),
}


def manner_of(settings: Settings) -> Manner:
    return Manner(
        masquerade_bit=settings.masquerade_bit,
        localhost_node_ports=settings.localhost_nodeports,
        drops_invalid=not settings.conntrack_tcp_be_liberal,
    )


def make_kernel_proxier(tables: KernelTables, settings: Settings, rules: NodeRules) -> KernelProxier:
    cidrs = tuple(map(str, settings.service_ranges))
    return KernelProxier(tables, rules, masquerade_all=settings.masquerade_all, service_cidrs=cidrs)


def warn_unless_forwarding() -> None:
    if not network.forwards():
        log.warning("this node forwards no packets (sysctl net.ipv4.ip_forward): only its own processes are served")


def node_rules_of(settings: Settings, capture: Capture) -> NodeRules:
    """Return what rules say of this node: who is a pod of its, and where node ports are."""
    interfaces = {
        "BridgeInterface": settings.pod_bridge_interface,
        "InterfaceNamePrefix": f"{settings.pod_interface_name_prefix}*",
    }
    pods = None
    if interface := interfaces.get(settings.detect_local_mode):
        pods = PodDetector(interface=interface)
    elif settings.detect_local_mode == "ClusterCIDR" and settings.cluster_cidrs:
        pods = PodDetector(cidrs=tuple(map(str, settings.cluster_cidrs)))
    addresses = tuple(map(str, settings.nodeport_addresses))
    if settings.proxy_mode == "nftables" and not addresses:
        addresses = ("primary",)  # as kube-proxy does in this mode
    return NodeRules(capture, pods, settings.detect_local_mode == "NodeCIDR", addresses)


def make_allocations(settings: Settings, memory: Memory, hosts: Hosts | None = None) -> Allocations:
    """Return who says which Service has which addresses and node ports: a cluster's API, or we ourselves."""
    if settings.follows_cluster:
        return StatedAllocations(settings.service_ranges, hosts)
    return ManifestAllocations(settings.service_ranges, memory, settings.load_balancer_pool, hosts)


async def look_at_hosts() -> Hosts:
    """Return what belongs to this node and its neighbours."""
    addresses, networks = await network.look_at_networks()
    return Hosts(addresses, networks, lambda: {NodePort(*port) for port in network.listening_ports()})


def lint_options(settings: Settings) -> LintOptions:
    """Return by which rules manifests are checked while they are served."""
    return LintOptions(
        settings.service_ranges,
        settings.load_balancer_pool,
        settings.service_proxy_name,
        settings.source_ip,
        settings.proxy_mode,
        settings.node_name,
        names_unserved=True,
    )


def make_proxy_ports(settings: Settings, remembered: Mapping[str, int]) -> ProxyPorts:
    reserved = KUBERNETES_PORTS | network.reserved_ports()
    return ProxyPorts(*settings.proxy_port_range, remembered, reserved)


def open_state_dir(folder: Path | None) -> StateDir | None:
    try:
        return StateDir(folder or DEFAULT_STATE_DIR)
    except OSError as error:
        if folder is not None:
            raise StartError(f"--state-dir {folder}: {(error.strerror or str(error)).lower()}") from None
        log.info("%s cannot be written: allocated cluster IPs may move at a restart (--state-dir)", DEFAULT_STATE_DIR)
        return None


def make_plane(settings: Settings, stack: contextlib.AsyncExitStack) -> DataPlane:
    """Return the data plane: in a worker process, or with ``--workers 0`` in this one."""
    try:
        if settings.access_log:
            require_writable(settings.access_log)
    except OSError as error:
        reason = "its folder does not exist" if isinstance(error, FileNotFoundError) else error.strerror
        raise StartError(f"--access-log {settings.access_log}: {reason}") from None
    if settings.workers == 0 or settings.proxy_mode in KERNEL_MODES:
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


async def open_source(settings: Settings, stack: contextlib.AsyncExitStack) -> tuple[Source, list[str], EventRecorder]:
    """Return where wishes come from, what tells whether two processes serve the same, and whom to tell Events."""
    if not settings.follows_cluster:
        return FileSource(settings.paths), _identity(settings.paths), EventRecorder()
    from userspace_proxy.sources.kubernetes import KubernetesSource, reflectors
    from userspace_proxy.sources.login import ApiTransport
    from userspace_proxy.sources.reflector import Pace

    transport = ApiTransport(settings.kubeconfig)
    stack.push_async_callback(transport.close)
    url = await transport.open()
    following = reflectors(transport, settings.node_name, settings.service_proxy_name, Pace(), random.Random())  # noqa: S311 - jitter
    log.info("following %s as node %s", url, settings.node_name)
    whose = f" for {settings.service_proxy_name}" if settings.service_proxy_name else ""
    return KubernetesSource(following), [f"{url}{whose}"], EventRecorder(transport.write, settings.node_name)


def _identity(paths: Iterable[str]) -> list[str]:
    """Return what tells whether two processes serve the same; what comes from stdin is never the same."""
    return [f"stdin of process {os.getpid()}" if path == "-" else os.path.realpath(path) for path in paths]


def conntrack_limits(settings: Settings) -> ConntrackLimits:
    """Return what conntrack is to be set to.

    Without flags: as kube-proxy does it, in its place. Where kube-proxy runs beside us, the node is as it has set
    it; and who tries a few files on his own computer does not expect it to be changed.
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
