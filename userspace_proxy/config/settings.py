"""The table of settings: one entry for each, with its flag, its default, its unit and the reason for both.

Flags and the reference pages come from this table, and for settings with a ``field`` the file of `run --config` and
/configz, too. So a new setting is one entry here. Flags have kube-proxy's names if the meaning is the same.
"""

import dataclasses
import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from userspace_proxy.config.kinds import (
    ADDRESSES,
    AUTO,
    DNS_ADDRESSES,
    DOMAIN,
    DURATION,
    FILE,
    FOLDER,
    INTERFACE,
    NAME,
    NETWORKS,
    NODE_PORT_ADDRESSES,
    OUTPUT,
    PORT_RANGE,
    SWITCH,
    VERBOSITY,
    Kind,
    address,
    number,
    one_of,
)
from userspace_proxy.config.values import Network, NodePortAddress
from userspace_proxy.model.service import IPVS_SCHEDULERS, SourceIP
from userspace_proxy.modes import MODES

HEALTHZ_PORT, METRICS_PORT = 10_256, 10_249
DEFAULT_STATE_DIR = Path("/var/lib/userspace-proxy")
# The address of cluster DNS in each range, as in kubeadm.
_DNS_HOST = 10
# kubeadm's default range, which the tutorials use.
DEFAULT_SERVICE_RANGES: tuple[Network, ...] = (ipaddress.IPv4Network("10.96.0.0/16"),)
MODE_NAMES = tuple(MODES)
KERNEL_MODES = tuple(mode.name for mode in MODES.values() if mode.kernel_serves)

_T = TypeVar("_T")


class Group(StrEnum):
    """The topics of `run --help`, in its order."""

    SOURCE = "Source of Services"
    MODE = "Mode and rules"
    LOCAL = "Pods of this node, node ports"
    ADDRESSES = "Allocated addresses and ports"
    CONNTRACK = "Conntrack limits (0 keeps the kernel's value; the default beside kube-proxy and for manifests)"
    SYNC = "Sync, stop and handover"
    TCP = "Connections"
    UDP = "UDP flows"
    DNS = "Names"
    ADMIN = "Health and metrics"
    PROCESS = "Processes and logs"


@dataclass(frozen=True, slots=True)
class Setting:
    """The entry of a setting in the table: everything except its name, type and default.

    ``shown`` is the default as help shows it. ``fields``: the fields of a KubeProxyConfiguration with the same meaning,
    each with the modes in which it has an effect; () for every mode. ``commands``: those that have the flag.
    """

    group: Group
    flag: str
    kind: Kind
    help: str
    shown: str
    fields: Mapping[str, tuple[str, ...]]
    commands: tuple[str, ...]


def _setting(
    group: Group,
    flag: str,
    default: _T,
    kind: Kind,
    help: str,  # noqa: A002 - as click calls it
    *,
    shown: str = "",
    field: str | Mapping[str, tuple[str, ...]] = "",
    modes: tuple[str, ...] = (),
    commands: tuple[str, ...] = ("run",),
) -> _T:
    """Return a field of Settings. ``modes``: where the setting has an effect; () for every mode."""
    if modes:
        where = "kernel modes" if modes == KERNEL_MODES else f"{' and '.join(modes)} mode"
        help = f"{where}: {help[0].lower()}{help[1:]}"  # noqa: A001
    if not shown and default is not False and default not in ("", (), None):
        shown = "on" if default is True else kind.show(default)
    fields = field if not isinstance(field, str) else {field: modes} if field else {}
    row = Setting(group, flag, kind, help, shown, fields, commands)
    return dataclasses.field(default=default, metadata={"setting": row})


def _in_sections(name: str, modes: Iterable[str], **other: str) -> Mapping[str, tuple[str, ...]]:
    """Return the fields *name* of the sections of *modes* -> modes. *other*: mode -> another section than its own."""
    fields: dict[str, tuple[str, ...]] = {}
    for mode in modes:
        field = f"{other.get(mode, MODES[mode].config_section)}.{name}"
        fields[field] = (*fields.get(field, ()), mode)
    return fields


_RENDER, _CHECK = ("run", "render"), ("run", "check", "render")
# Commands that print how pods find Services.
_NAMES = ("env", "names")


@dataclass(frozen=True, slots=True)
class Settings:
    """The settings of `run`, of which other commands use some."""

    # A table. The formatter would make eight lines of each entry.
    # fmt: off
    # Exactly one of the three is given.
    paths: tuple[str, ...] = ()
    kubeconfig: Path | None = _setting(Group.SOURCE, "--kubeconfig", None, FILE,
        "Serve the Services of the cluster that this file names", field="clientConnection.kubeconfig")
    in_cluster: bool = _setting(Group.SOURCE, "--in-cluster", False, SWITCH,
        "Serve the cluster of this pod, by its service account")
    hostname_override: str = _setting(Group.SOURCE, "--hostname-override", "", NAME,
        "Name of this node in the cluster", shown="the host's name", field="hostnameOverride",
        commands=("run", "check"))
    service_proxy_name: str = _setting(Group.SOURCE, "--service-proxy-name", "", NAME,
        "Serve only Services with the label service.kubernetes.io/service-proxy-name: NAME",
        commands=("run", "check"))

    proxy_mode: str = _setting(
        Group.MODE, "--proxy-mode", "userspace", one_of(*MODE_NAMES, metavar="MODE"),
        f"Mode: {', '.join(MODE_NAMES)}", field={"mode": KERNEL_MODES})
    masquerade_all: bool = _setting(Group.MODE, "--masquerade-all", False, SWITCH,
        "Masquerade all traffic to cluster IPs",
        field=_in_sections("masqueradeAll", KERNEL_MODES, ipvs="iptables"),
        modes=KERNEL_MODES, commands=_RENDER)
    masquerade_bit: int = _setting(Group.MODE, "--iptables-masquerade-bit", 14, number(0, 31),
        "Bit of the packet mark that requests masquerading", field="iptables.masqueradeBit", modes=("iptables",),
        commands=_RENDER)
    localhost_nodeports: bool = _setting(Group.MODE, "--iptables-localhost-nodeports", True, SWITCH,
        "Serve node ports at 127.0.0.1", field="iptables.localhostNodePorts", modes=("iptables",), commands=_RENDER)
    # In turns, as in kube-proxy.
    ipvs_scheduler: str = _setting(Group.MODE, "--ipvs-scheduler", "rr", one_of(*IPVS_SCHEDULERS, metavar="NAME"),
        "Default of the annotation userspace-proxy/ipvs-scheduler", field="ipvs.scheduler", modes=("ipvs",),
        commands=_RENDER)
    # In ipvs mode Services' addresses are the node's own. Linux answers ARP for them on every interface.
    ipvs_strict_arp: bool = _setting(Group.MODE, "--ipvs-strict-arp", False, SWITCH,
        "Answer ARP only on the interface of the address", field="ipvs.strictARP",
        modes=("ipvs",), commands=_RENDER)
    rules: str = _setting(Group.MODE, "--rules", "auto", one_of("auto", "nftables", "iptables"),
        "Rule language; auto: nftables if it is installed", commands=_RENDER)
    # "auto": REDIRECT, unless an interface has no address of its own.
    capture: str = _setting(Group.MODE, "--capture", "auto", one_of("auto", "redirect", "address"),
        "auto: REDIRECT if interfaces have addresses, else DNAT to lo", commands=_RENDER)

    # Without an address range or an interface no client counts as a pod of this node.
    detect_local_mode: str = _setting(
        Group.LOCAL, "--detect-local-mode", "ClusterCIDR",
        one_of("ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix", metavar="HOW"),
        "ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix", field="detectLocalMode", commands=_RENDER)
    cluster_cidrs: tuple[Network, ...] = _setting(Group.LOCAL, "--cluster-cidr", (), NETWORKS,
        "Pod addresses, for ClusterCIDR; one range per IP family", field="clusterCIDR", commands=_RENDER)
    pod_bridge_interface: str = _setting(Group.LOCAL, "--pod-bridge-interface", "", INTERFACE,
        "Bridge of this node's pods, for BridgeInterface", field="detectLocal.bridgeInterface", commands=_RENDER)
    pod_interface_name_prefix: str = _setting(Group.LOCAL, "--pod-interface-name-prefix", "", INTERFACE,
        "Prefix of the interfaces of this node's pods, for InterfaceNamePrefix",
        field="detectLocal.interfaceNamePrefix", commands=_RENDER)
    nodeport_addresses: tuple[NodePortAddress, ...] = _setting(
        Group.LOCAL, "--nodeport-addresses", (), NODE_PORT_ADDRESSES,
        "Where node ports are served; primary: the Node object's addresses", shown="all", field="nodePortAddresses",
        commands=_RENDER)

    # (): DEFAULT_SERVICE_RANGES for manifests; a cluster's range is not known.
    service_cluster_ip_ranges: tuple[Network, ...] = _setting(
        Group.ADDRESSES, "--service-cluster-ip-range", (), NETWORKS,
        "Cluster IPs, one range per IP family", shown=f"{', '.join(map(str, DEFAULT_SERVICE_RANGES))} for manifests",
        commands=(*_CHECK, *_NAMES))
    # None by default, because the addresses have to be routed to this node.
    load_balancer_pool: tuple[Network, ...] = _setting(Group.ADDRESSES, "--load-balancer-pool", (), NETWORKS,
        "Addresses for LoadBalancer Services without an ingress IP", shown="none", commands=_CHECK)
    # Below the ephemeral ports (32768-60999), which connections to backends need, and the node ports (30000-32767).
    proxy_port_range: tuple[int, int] = _setting(Group.ADDRESSES, "--proxy-port-range", (10_000, 29_999), PORT_RANGE,
        "Local ports that rules redirect to", field="portRange", commands=_RENDER)
    # None: the default folder if it can be written, else nothing is stored.
    state_dir: Path | None = _setting(Group.ADDRESSES, "--state-dir", None, FOLDER,
        "Folder that keeps allocated addresses", shown=f"{DEFAULT_STATE_DIR}", commands=(*_RENDER, *_NAMES))
    # Off: the file says what runs in the cluster, and a state that is too old sends clients astray.
    cache_state: bool = _setting(Group.ADDRESSES, "--cache-state", False, SWITCH,
        "Keep the cluster's last state in --state-dir; start with it if the API is down")
    max_state_age_s: float = _setting(Group.ADDRESSES, "--max-state-age", 86_400.0, DURATION,
        "Do not start with a state older than this; 0 for any age")

    # None: kube-proxy's value in its place (see `conntrack_limits`).
    conntrack_max_per_core: int | None = _setting(Group.CONNTRACK, "--conntrack-max-per-core", None, number(0),
        "Maximum of connections per core", shown="32768 in kube-proxy's place", field="conntrack.maxPerCore")
    conntrack_min: int | None = _setting(Group.CONNTRACK, "--conntrack-min", None, number(0),
        "Minimum of that maximum", shown="131072 in kube-proxy's place", field="conntrack.min")
    conntrack_tcp_timeout_established_s: float | None = _setting(
        Group.CONNTRACK, "--conntrack-tcp-timeout-established", None, DURATION,
        "Expiry of idle connections", shown="24h in kube-proxy's place", field="conntrack.tcpEstablishedTimeout")
    conntrack_tcp_timeout_close_wait_s: float | None = _setting(
        Group.CONNTRACK, "--conntrack-tcp-timeout-close-wait", None, DURATION,
        "Expiry of half-closed connections", shown="1h in kube-proxy's place", field="conntrack.tcpCloseWaitTimeout")
    conntrack_tcp_be_liberal: bool = _setting(Group.CONNTRACK, "--conntrack-tcp-be-liberal", False, SWITCH,
        "Accept TCP packets outside of the window", field="conntrack.tcpBeLiberal")
    conntrack_udp_timeout_s: float = _setting(Group.CONNTRACK, "--conntrack-udp-timeout", 0.0, DURATION,
        "Expiry of UDP flows without a reply", field="conntrack.udpTimeout")
    conntrack_udp_timeout_stream_s: float = _setting(Group.CONNTRACK, "--conntrack-udp-timeout-stream", 0.0, DURATION,
        "Expiry of UDP flows with replies", field="conntrack.udpStreamTimeout")

    # Endpoint changes load no rules and wait 2 ms.
    min_sync_period_s: float = _setting(Group.SYNC, "--min-sync-period", 0.05, DURATION,
        "Minimum time between two rule loads", field=_in_sections("minSyncPeriod", MODES))
    sync_period_s: float = _setting(Group.SYNC, "--sync-period", 30.0, DURATION,
        "Maximum time until a failed sync is repeated", field=_in_sections("syncPeriod", MODES))
    # A small part of the 30 s that Kubernetes gives a stopping pod.
    drain_timeout_s: float = _setting(Group.SYNC, "--drain-timeout", 5.0, DURATION,
        "Time for open connections to end when the proxy stops")
    # Kernel modes serve on for ever without kube-proxy. An hour is enough to see the alarm and to start another one.
    orphan_timeout_s: float = _setting(Group.SYNC, "--orphan-timeout", 3_600.0, DURATION,
        "How long workers serve without their control process; 0 ends them")
    take_over: str = _setting(Group.SYNC, "--take-over", "auto", one_of("auto", "always", "never"),
        "Take a running proxy's listeners; auto: if orphaned or of same PATH")

    # "transparent", the client's own address, changes this node's routing.
    source_ip: SourceIP = _setting(
        Group.TCP, "--source-ip", SourceIP.NODE, one_of(SourceIP.NODE, SourceIP.TRANSPARENT, read=SourceIP),
        "Source address at backends, if no userspace-proxy/source-ip is set", commands=_CHECK)
    # kube-proxy's conntrack values: 24 h established, 1 h half-closed.
    idle_timeout_s: float = _setting(Group.TCP, "--idle-timeout", 86_400.0, DURATION,
        "End connections without traffic; 0 for never")
    half_closed_timeout_s: float = _setting(Group.TCP, "--half-closed-timeout", 3_600.0, DURATION,
        "End half-closed connections without traffic; 0 for never")
    # As long as conntrack keeps a connection whose peer acknowledges nothing (docs/decisions/dead-peers.md).
    dead_peer_timeout_s: float = _setting(Group.TCP, "--dead-peer-timeout", 300.0, DURATION,
        "End connections whose peer is silent; they survive 5/6 of this time")
    # No limit: behind a NAT, or on a node, many clients have one address.
    connections_per_client: int = _setting(Group.TCP, "--connections-per-client", 0, number(0),
        "Maximum of connections from one address or IPv6 /64; 0 for no limit")
    # BBR paces what it sends, which halves bulk between containers; cubic does not.
    congestion_control: str = _setting(Group.TCP, "--congestion-control", "", NAME,
        "TCP congestion control towards clients and backends", shown="the host's")
    splice: str = _setting(Group.TCP, "--splice", "auto", one_of("auto", "copy"),
        "auto: splice(2) for bulk, copy for small messages; copy: copy all")

    # None: conntrack's timeouts, because a flow that conntrack forgot cannot be answered.
    udp_timeout_s: float | None = _setting(Group.UDP, "--udp-timeout", None, DURATION,
        "End idle flows after this time", shown="conntrack's timeouts", field="udpIdleTimeout")
    udp_flows_per_service: int = _setting(Group.UDP, "--udp-flows-per-service", 32_768, number(1),
        "Maximum of flows; above it the client's longest idle flow ends")
    udp_port_rest_s: float = _setting(Group.UDP, "--udp-port-rest", 30.0, DURATION,
        "Pause before a local port is reused, so that late replies are dropped")

    # Off: a node of a cluster has a DNS server. Pods of kubeadm's clusters ask the tenth address of the range.
    dns: tuple[str, ...] = _setting(Group.DNS, "--dns", (), DNS_ADDRESSES,
        "Answer queries for names of Services, at the range's tenth address or at ADDRESS")
    cluster_domain: str = _setting(Group.DNS, "--cluster-domain", "cluster.local", DOMAIN,
        "Domain of the names of Services", commands=("run", "names"))
    # (): the servers of resolv.conf, read again when it changes.
    dns_upstream: tuple[str, ...] = _setting(Group.DNS, "--dns-upstream", (), ADDRESSES,
        "Servers for other names, for this node and its pods", shown="those of /etc/resolv.conf")

    # kube-proxy's addresses: health for load balancers on every address, metrics on loopback.
    healthz_bind_address: str = _setting(
        Group.ADMIN, "--healthz-bind-address", f"0.0.0.0:{HEALTHZ_PORT}", address(HEALTHZ_PORT),
        "/healthz and /livez; [::] for both IP families, '' for none", field="healthzBindAddress")
    metrics_bind_address: str = _setting(
        Group.ADMIN, "--metrics-bind-address", f"127.0.0.1:{METRICS_PORT}", address(METRICS_PORT),
        "/metrics, /proxyMode and /configz; '' for none", field="metricsBindAddress")
    # Prometheus keeps each series of each node. The default is 1,250 endpoints; Services are always shown.
    # None: in the folder of --state-dir.
    control_socket: Path | None = _setting(Group.ADMIN, "--control-socket", None, FILE,
        "Unix socket for get, describe and why", shown="control.sock in --state-dir")
    metrics_endpoint_series: int = _setting(Group.ADMIN, "--metrics-endpoint-series", 10_000, number(0),
        "Hide endpoints in /metrics beyond this many series; 0 hides all")
    # A bookmark comes every minute: three missed ones are no accident. Not 503, or an outage of the API would take
    # every node out of its load balancers.
    degraded_after_s: float = _setting(Group.ADMIN, "--degraded-after", 180.0, DURATION,
        "/healthz says degraded after this time without the API")
    degraded_status: int = _setting(Group.ADMIN, "--degraded-status", 200, one_of("200", "503", read=int),
        "Status of /healthz then; 503 takes all nodes out of load balancers")

    loop: str = _setting(Group.PROCESS, "--loop", "uvloop", one_of("uvloop", "asyncio"),
        "Event loop; asyncio is slower")
    # 1: control work delays no packet, and turns are exact. Each more has a rotation and clients of its own.
    workers: int = _setting(Group.PROCESS, "--workers", 1, number(0, 64),
        "Data-plane processes, up to 64; 0 serves in the control process, for debugging")
    log_format: str = _setting(Group.PROCESS, "--log-format", "text", one_of("text", "json"),
        "Format of the log on stderr and of the access log", field="logging.format")
    access_log: str = _setting(Group.PROCESS, "--access-log", "", OUTPUT,
        "Write a line for each ended connection and flow; - for stdout")
    verbose: bool = _setting(Group.PROCESS, "-v, --verbose", False, VERBOSITY,
        "Log each sync and each connection", field="logging.verbosity")

    @property
    def follows_cluster(self) -> bool:
        """Whether Services come from a cluster's API."""
        return self.in_cluster or self.kubeconfig is not None

    @property
    def service_ranges(self) -> tuple[Network, ...]:
        """The ranges of cluster IPs, or () if they are not known."""
        return self.service_cluster_ip_ranges or (() if self.follows_cluster else DEFAULT_SERVICE_RANGES)

    @property
    def dns_addresses(self) -> tuple[str, ...]:
        """The addresses at which cluster DNS answers; () for none."""
        return tuple(str(network[_DNS_HOST]) for network in self.service_ranges) if self.dns == AUTO else self.dns

    @property
    def node_name(self) -> str:
        """This node's name in the cluster, found as kube-proxy finds it."""
        return (self.hostname_override or socket.gethostname()).strip().lower()


SETTINGS: Mapping[str, Setting] = {
    each.name: each.metadata["setting"] for each in dataclasses.fields(Settings) if each.metadata
}


def fields_in(mode: str) -> dict[str, tuple[str, Kind]]:
    """Return the KubeProxyConfiguration fields that have an effect in *mode*: path -> (name of the setting, kind)."""
    return {
        path: (name, setting.kind)
        for name, setting in SETTINGS.items()
        for path, modes in setting.fields.items()
        if not modes or mode in modes
    }
