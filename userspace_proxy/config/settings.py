"""Every knob: its default, its unit and the reason for both. Read by cli and app only.

Flags have kube-proxy's names wherever the meaning is the same.
"""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass
from pathlib import Path

from userspace_proxy.config.values import Network, NodePortAddress
from userspace_proxy.model.service import SourceIP

HEALTHZ_PORT, METRICS_PORT = 10_256, 10_249
DEFAULT_STATE_DIR = Path("/var/lib/userspace-proxy")
# kubeadm's default range, which the tutorials use.
DEFAULT_SERVICE_RANGES: tuple[Network, ...] = (ipaddress.IPv4Network("10.96.0.0/16"),)


@dataclass(frozen=True, slots=True)
class Settings:
    """What `run` is told."""

    # Where wishes come from: one of the three.
    paths: tuple[str, ...] = ()
    kubeconfig: Path | None = None
    in_cluster: bool = False

    # "": what this host calls itself.
    hostname_override: str = ""
    # "": the Services that name no proxy; else exactly those that name this one.
    service_proxy_name: str = ""
    # A bookmark comes every minute: three missed ones are no accident. Not 503, or an outage of the API would take
    # every node out of its load balancers.
    degraded_after_s: float = 180.0
    degraded_status: int = 200

    # "userspace": sockets of ours serve; else the kernel does, by rules of this kind.
    proxy_mode: str = "userspace"
    # In kernel modes: endpoints see this node's address, whoever dialled a cluster IP.
    masquerade_all: bool = False
    # In iptables mode: the bit of packet marks that says "masquerade"; node ports at 127.0.0.1, too.
    masquerade_bit: int = 14
    localhost_nodeports: bool = True
    # In ipvs mode: who chooses where no annotation says it. In turns, as kube-proxy has it.
    ipvs_scheduler: str = "rr"
    # Services' addresses are this node's own there; whether it answers ARP for them on every interface, as Linux does.
    ipvs_strict_arp: bool = False

    # Who is a pod of this node, and who is not. None of the addresses given: nobody can be told from another.
    detect_local_mode: str = "ClusterCIDR"
    cluster_cidrs: tuple[Network, ...] = ()
    pod_bridge_interface: str = ""
    pod_interface_name_prefix: str = ""
    # Where NodePorts are served; (): at every address of the node. "primary": the Node object's.
    nodeport_addresses: tuple[NodePortAddress, ...] = ()

    # Limits of conntrack; 0 leaves alone what the kernel has. None: kube-proxy's value in its place (see `conntrack`).
    conntrack_max_per_core: int | None = None
    conntrack_min: int | None = None
    conntrack_tcp_timeout_established_s: float | None = None
    conntrack_tcp_timeout_close_wait_s: float | None = None
    conntrack_tcp_be_liberal: bool = False
    conntrack_udp_timeout_s: float = 0.0
    conntrack_udp_timeout_stream_s: float = 0.0

    # Rules. "auto": nftables where it is installed; REDIRECT unless an interface has no address of its own.
    rules: str = "auto"
    capture: str = "auto"

    # (): for manifests that of DEFAULT_SERVICE_RANGES; a cluster's is not known.
    service_cluster_ip_ranges: tuple[Network, ...] = ()
    # Where Services of type LoadBalancer get an address from; none by default, as it has to lead to this node.
    load_balancer_pool: tuple[Network, ...] = ()
    # Whose address endpoints see of Services that say nothing of it; the client's own changes this node's routing.
    source_ip: SourceIP = SourceIP.NODE
    # Below the ephemeral ports (32768-60999), which connections to backends need, and the NodePorts (30000-32767).
    proxy_port_range: tuple[int, int] = (10_000, 29_999)
    # Remembers what was allocated: addresses, node ports, proxy ports. None: the default folder if it can be written,
    # else nothing is remembered.
    state_dir: Path | None = None

    # kube-proxy's addresses: health for load balancers on every address, metrics on loopback. "" for none.
    healthz_bind_address: str = f"0.0.0.0:{HEALTHZ_PORT}"
    metrics_bind_address: str = f"127.0.0.1:{METRICS_PORT}"
    # Of /metrics: Prometheus keeps each series of each node. About 1,400 endpoints; Services are always shown.
    metrics_endpoint_series: int = 10_000

    # Rule loads are at least so far apart; endpoint changes load none and wait 5 ms at most.
    min_sync_period_s: float = 0.05
    # A failed sync is tried again at least so often.
    sync_period_s: float = 30.0
    # Kubernetes gives a stopping pod 30 s; ours asks for little of it.
    drain_timeout_s: float = 5.0

    # Kernel modes serve on for ever when kube-proxy dies; an hour is enough to see the alarm and to start another one.
    orphan_timeout_s: float = 3_600.0
    # "auto": from workers without a control process, and from a proxy that serves the same manifests.
    take_over: str = "auto"

    # kube-proxy's conntrack values: 24 h established, 1 h half-closed. 0 for never.
    idle_timeout_s: float = 86_400.0
    half_closed_timeout_s: float = 3_600.0
    # As long as conntrack keeps a connection whose peer acknowledges nothing (docs/decisions/dead-peers.md).
    dead_peer_timeout_s: float = 300.0
    # None: what conntrack has, because a flow that conntrack forgot cannot be answered.
    udp_timeout_s: float | None = None
    udp_flows_per_service: int = 32_768
    udp_port_rest_s: float = 30.0

    loop: str = "uvloop"
    # Data-plane processes: 1, so that control work stands in no packet's way, and turns are exact; each more has a
    # rotation of its own, and always the same clients. 0 keeps all in one process, for debugging.
    workers: int = 1
    # Off: behind a NAT, or on a node, many clients have one address.
    connections_per_client: int = 0
    # The host's own. BBR paces what it sends, which halves bulk between containers; cubic does not.
    congestion_control: str = ""
    # "auto": small messages are copied, bulk is moved by splice(2); "copy": all is copied.
    splice: str = "auto"
    log_format: str = "text"
    verbose: bool = False
    access_log: str = ""

    @property
    def follows_cluster(self) -> bool:
        """Whether wishes come from a cluster's API."""
        return self.in_cluster or self.kubeconfig is not None

    @property
    def service_ranges(self) -> tuple[Network, ...]:
        """Where cluster IPs are from; () where that is not known."""
        return self.service_cluster_ip_ranges or (() if self.follows_cluster else DEFAULT_SERVICE_RANGES)

    @property
    def node_name(self) -> str:
        """This node's name in the cluster, found as kube-proxy finds it."""
        return (self.hostname_override or socket.gethostname()).strip().lower()
