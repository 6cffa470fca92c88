"""What settings mean in parts: which tables a mode has, who is a pod here, who allots addresses."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from userspace_proxy.control.allotments import Allotments, Allotting, Stated
from userspace_proxy.control.memory import Memory, StateDir
from userspace_proxy.errors import StartError
from userspace_proxy.interfaces import (
    Capture,
    KernelTables,
    PodDetector,
)
from userspace_proxy.proxiers.kernel import KernelProxier
from userspace_proxy.proxiers.plans import NodeRules
from userspace_proxy.rules import network
from userspace_proxy.rules.element_tables import ElementTables
from userspace_proxy.rules.ipvs_kernel import IpvsTables
from userspace_proxy.rules.kube_chains import Manner
from userspace_proxy.rules.kube_kernel import IptablesTables
from userspace_proxy.rules.slots import SlotTable
from userspace_proxy.settings import DEFAULT_STATE_DIR, Settings

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
    # What a cluster has its cluster IPs from is not known here, unless somebody says so.
    cidrs = () if settings.follows_cluster else tuple(map(str, settings.service_cluster_ip_ranges))
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


def make_allotting(settings: Settings, memory: Memory) -> Allotting:
    """Return who says which Service has which addresses and node ports: a cluster's API, or we ourselves."""
    if settings.follows_cluster:
        return Stated()
    return Allotments(settings.service_cluster_ip_ranges, memory, settings.load_balancer_pool)


def open_state_dir(folder: Path | None) -> StateDir | None:
    try:
        return StateDir(folder or DEFAULT_STATE_DIR)
    except OSError as error:
        if folder is not None:
            raise StartError(f"--state-dir {folder}: {(error.strerror or str(error)).lower()}") from None
        log.info("%s cannot be written: allocated cluster IPs may move at a restart (--state-dir)", DEFAULT_STATE_DIR)
        return None
