"""The options of commands that serve: names, values, help. Names are kube-proxy's where the meaning is the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from userspace_proxy import values
from userspace_proxy.errors import StartError
from userspace_proxy.model.service import IPVS_SCHEDULERS, SourceIP
from userspace_proxy.settings import Settings

if TYPE_CHECKING:
    from userspace_proxy.configuration import Configuration

_DEFAULTS = Settings()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def fail(message: object) -> NoReturn:
    click.echo(f"userspace-proxy: {message}", err=True)
    sys.exit(1)


# ---- values


class Value(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """What *read* makes of a text; what it is already (a default, a configuration file's), it stays."""

    def __init__(self, name: str, read: Callable[[str], object]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value.strip())
        except ValueError as error:
            self.fail(str(error), param, ctx)


_CIDRS = Value("CIDR[,CIDR]", values.networks)
_PORT_RANGE = Value("A-B", values.port_range)
SECONDS = Value("DURATION", values.seconds)
_INTERFACE = Value("NAME", values.interface_name)
_NODE_PORT_ADDRESSES = Value("addresses", lambda text: values.node_port_addresses(text.split(",")))


def _shown(seconds: float) -> str:
    """Return *seconds* as a person writes them: 24h, 30s, 50ms."""
    if not seconds:
        return "0"
    for unit, size in (("h", 3600), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds * 1000:g}ms"


def _options(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _read_configuration(ctx: click.Context, _: click.Parameter, path: Path | None) -> Configuration | None:
    """Make what the file says the defaults of the other flags, so that what is given on the command line wins."""
    if path is None:
        return None
    from userspace_proxy.configuration import read_configuration

    try:
        configuration = read_configuration(path)
    except StartError as error:
        fail(error)
    ctx.default_map = {name: value for name, value in configuration.settings.items() if name != "kubeconfig"}
    return configuration


_CONFIG = click.option(
    "--config",
    "configuration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    callback=_read_configuration,
    help="A KubeProxyConfiguration; flags win over it.",
)
PATHS = click.argument("paths", nargs=-1, metavar="PATH...", required=True)
SOURCES = _options(
    click.argument("paths", nargs=-1, metavar="[PATH...]"),
    click.option(
        "--kubeconfig",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="Serve the Services of the cluster that FILE names, on this node of it.",
    ),
    click.option(
        "--in-cluster", is_flag=True, help="The same for the cluster whose pod this is, by its service account."
    ),
    click.option(
        "--hostname-override",
        metavar="NAME",
        default=_DEFAULTS.hostname_override,
        show_default="the host's name",
        help="This node's name in the cluster.",
    ),
    click.option(
        "--service-proxy-name",
        metavar="NAME",
        default=_DEFAULTS.service_proxy_name,
        show_default="those without the label",
        help="Serve only Services labelled service.kubernetes.io/service-proxy-name: NAME.",
    ),
    click.option(
        "--degraded-after",
        "degraded_after_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.degraded_after_s),
        show_default=True,
        help="/healthz says degraded when the API could not be followed for so long.",
    ),
    click.option(
        "--degraded-status",
        type=click.Choice(["200", "503"]),
        default=str(_DEFAULTS.degraded_status),
        show_default=True,
        help="What /healthz answers then; 503 takes every node out of its load balancers when the API is down.",
    ),
)
CLUSTER_IPS = click.option(
    "--service-cluster-ip-range",
    "service_cluster_ip_ranges",
    type=_CIDRS,
    default=",".join(map(str, _DEFAULTS.service_cluster_ip_ranges)),
    show_default=True,
    help="Where Services that state no clusterIP get one from; one range a family.",
)
LOAD_BALANCER_POOL = click.option(
    "--load-balancer-pool",
    type=_CIDRS,
    default=_DEFAULTS.load_balancer_pool,
    show_default="none",
    help="Where Services of type LoadBalancer without an ingress IP get one from; one range a family.",
)
SOURCE_IP = click.option(
    "--source-ip",
    type=click.Choice([SourceIP.NODE.value, SourceIP.TRANSPARENT.value]),
    default=_DEFAULTS.source_ip.value,
    show_default=True,
    callback=lambda _context, _option, value: SourceIP(value),
    help="Whose address backends see of Services without the annotation userspace-proxy/source-ip.",
)
RULES = click.option(
    "--rules",
    type=click.Choice(["auto", "nftables", "iptables"]),
    default=_DEFAULTS.rules,
    show_default=True,
    help="The rule language.",
)
PROXY_PORTS = click.option(
    "--proxy-port-range",
    type=_PORT_RANGE,
    default="-".join(map(str, _DEFAULTS.proxy_port_range)),
    show_default=True,
    help="Local ports that rules redirect to.",
)

CAPTURE = click.option(
    "--capture",
    type=click.Choice(["auto", "redirect", "address"]),
    default=_DEFAULTS.capture,
    show_default=True,
    help="REDIRECT, or DNAT to a private address on lo (where interfaces have none of their own).",
)
STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    show_default="/var/lib/userspace-proxy where writable",
    help="Remembers allocated addresses, node ports and proxy ports.",
)


def proxy_mode(*more: str) -> Callable[[_Function], _Function]:
    return click.option(
        "--proxy-mode",
        type=click.Choice(["userspace", "nftables", "iptables", "ipvs", *more]),
        default=_DEFAULTS.proxy_mode,
        show_default=True,
        help="Who serves: sockets of ours, or the kernel, by nftables rules, kube-proxy's iptables chains, or IPVS.",
    )


_PROXY_MODE = proxy_mode()

KERNEL_MODES = _options(
    click.option(
        "--masquerade-all", is_flag=True, help="In kernel modes: endpoints never see who dialled a cluster IP."
    ),
    click.option(
        "--iptables-masquerade-bit",
        "masquerade_bit",
        type=click.IntRange(0, 31),
        default=_DEFAULTS.masquerade_bit,
        show_default=True,
        help="In iptables mode: the bit of packet marks that says that the sender's address is to be replaced.",
    ),
    click.option(
        "--iptables-localhost-nodeports/--no-iptables-localhost-nodeports",
        "localhost_nodeports",
        default=_DEFAULTS.localhost_nodeports,
        show_default=True,
        help="In iptables mode: serve node ports at 127.0.0.1, too.",
    ),
    click.option(
        "--ipvs-scheduler",
        type=click.Choice(IPVS_SCHEDULERS),
        metavar="NAME",
        default=_DEFAULTS.ipvs_scheduler,
        show_default=True,
        help="In ipvs mode: who chooses for Services without the annotation userspace-proxy/ipvs-scheduler.",
    ),
    click.option(
        "--ipvs-strict-arp",
        is_flag=True,
        help="In ipvs mode: answer ARP for addresses of the interface that is asked alone (arp_ignore, arp_announce).",
    ),
)

LOCAL_TRAFFIC = _options(
    click.option(
        "--detect-local-mode",
        type=click.Choice(["ClusterCIDR", "NodeCIDR", "BridgeInterface", "InterfaceNamePrefix"]),
        default=_DEFAULTS.detect_local_mode,
        show_default=True,
        help="How a pod is told from other clients.",
    ),
    click.option(
        "--cluster-cidr",
        "cluster_cidrs",
        type=_CIDRS,
        default=_DEFAULTS.cluster_cidrs,
        help="Addresses of the cluster's pods, for --detect-local-mode ClusterCIDR; one range a family.",
    ),
    click.option(
        "--pod-bridge-interface",
        type=_INTERFACE,
        default=None,
        help="The bridge that this node's pods are at, for --detect-local-mode BridgeInterface.",
    ),
    click.option(
        "--pod-interface-name-prefix",
        type=_INTERFACE,
        default=None,
        help="How the interfaces of this node's pods begin, for --detect-local-mode InterfaceNamePrefix.",
    ),
    click.option(
        "--nodeport-addresses",
        type=_NODE_PORT_ADDRESSES,
        metavar="CIDR,...|primary",
        default=_DEFAULTS.nodeport_addresses,
        show_default="every address of the node",
        help="Where NodePorts are served; primary is what the Node object names.",
    ),
)
_CONNTRACK = _options(
    click.option(
        "--conntrack-max-per-core",
        type=click.IntRange(min=0),
        show_default="32768 in kube-proxy's place, else 0",
        help="Connections that conntrack is to have room for, times cores; 0 leaves alone what there is.",
    ),
    click.option(
        "--conntrack-min",
        type=click.IntRange(min=0),
        show_default="131072 in kube-proxy's place, else 0",
        help="At least for so many, however few cores there are; nothing without the one before.",
    ),
    click.option(
        "--conntrack-tcp-timeout-established",
        "conntrack_tcp_timeout_established_s",
        type=SECONDS,
        show_default="24h in kube-proxy's place, else 0",
        help="Until conntrack forgets idle TCP connections; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-tcp-timeout-close-wait",
        "conntrack_tcp_timeout_close_wait_s",
        type=SECONDS,
        show_default="1h in kube-proxy's place, else 0",
        help="The same for half-closed ones.",
    ),
    click.option(
        "--conntrack-tcp-be-liberal",
        is_flag=True,
        help="Have conntrack let TCP packets outside of the window pass.",
    ),
    click.option(
        "--conntrack-udp-timeout",
        "conntrack_udp_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.conntrack_udp_timeout_s),
        show_default=True,
        help="Until conntrack forgets UDP flows without an answer; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-udp-timeout-stream",
        "conntrack_udp_timeout_stream_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.conntrack_udp_timeout_stream_s),
        show_default=True,
        help="The same for answered ones.",
    ),
)

RUN_OPTIONS = _options(
    _CONFIG,
    _PROXY_MODE,
    KERNEL_MODES,
    LOCAL_TRAFFIC,
    _CONNTRACK,
    RULES,
    CAPTURE,
    CLUSTER_IPS,
    LOAD_BALANCER_POOL,
    SOURCE_IP,
    PROXY_PORTS,
    STATE_DIR,
    click.option(
        "--healthz-bind-address",
        metavar="ADDRESS",
        default=_DEFAULTS.healthz_bind_address,
        show_default=True,
        help="/healthz and /livez; '' for none.",
    ),
    click.option(
        "--metrics-bind-address",
        metavar="ADDRESS",
        default=_DEFAULTS.metrics_bind_address,
        show_default=True,
        help="/metrics, /proxyMode and /configz; '' for none.",
    ),
    click.option(
        "--metrics-endpoint-series",
        type=click.IntRange(min=0),
        default=_DEFAULTS.metrics_endpoint_series,
        show_default=True,
        help="Where endpoints would have more series than this in /metrics, only Services are shown; 0 for never.",
    ),
    click.option(
        "--min-sync-period",
        "min_sync_period_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.min_sync_period_s),
        show_default=True,
        help="At least so long between two rule loads.",
    ),
    click.option(
        "--sync-period",
        "sync_period_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.sync_period_s),
        show_default=True,
        help="At most so long until a failed sync is tried again.",
    ),
    click.option(
        "--drain-timeout",
        "drain_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.drain_timeout_s),
        show_default=True,
        help="What open connections get when the proxy stops.",
    ),
    click.option(
        "--orphan-timeout",
        "orphan_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.orphan_timeout_s),
        show_default=True,
        help="How long workers serve on when the control process has died; 0 ends them with it.",
    ),
    click.option(
        "--take-over",
        type=click.Choice(["auto", "always", "never"]),
        default=_DEFAULTS.take_over,
        show_default=True,
        help="Listeners from a proxy that runs: auto from one that serves the same PATH..., or has lost its control.",
    ),
    click.option(
        "--idle-timeout",
        "idle_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.idle_timeout_s),
        show_default=True,
        help="Ends connections on which nothing moves; 0 for never.",
    ),
    click.option(
        "--half-closed-timeout",
        "half_closed_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.half_closed_timeout_s),
        show_default=True,
        help="Ends connections whose one direction has ended while nothing moves in the other; 0 for never.",
    ),
    click.option(
        "--dead-peer-timeout",
        "dead_peer_timeout_s",
        type=SECONDS,
        default=_shown(_DEFAULTS.dead_peer_timeout_s),
        show_default=True,
        help="Ends connections whose peer is gone without a word.",
    ),
    click.option(
        "--udp-timeout",
        "udp_timeout_s",
        type=SECONDS,
        show_default="conntrack's own",
        help="Ends idle UDP flows.",
    ),
    click.option(
        "--udp-flows-per-service",
        type=click.IntRange(min=1),
        default=_DEFAULTS.udp_flows_per_service,
        show_default=True,
        help="More make the one idle for longest go.",
    ),
    click.option(
        "--connections-per-client",
        type=click.IntRange(min=0),
        default=_DEFAULTS.connections_per_client,
        show_default=True,
        help="More that are open at once from one address (IPv6: one /64) are reset; 0 for any number.",
    ),
    click.option(
        "--congestion-control",
        metavar="NAME",
        default=_DEFAULTS.congestion_control,
        show_default="the host's",
        help="Of TCP, towards clients and backends: cubic is faster than bbr for bulk between containers.",
    ),
    click.option(
        "--loop",
        type=click.Choice(["uvloop", "asyncio"]),
        default=_DEFAULTS.loop,
        show_default=True,
        help="The event loop; asyncio's own is slower.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0, 64),
        default=_DEFAULTS.workers,
        show_default=True,
        help="Data-plane processes, each with clients and a rotation of its own; 0 keeps all in one, for debugging.",
    ),
    click.option(
        "--splice",
        type=click.Choice(["auto", "copy"]),
        default=_DEFAULTS.splice,
        show_default=True,
        help="auto moves bulk by splice(2) and copies small messages; copy copies all.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default=_DEFAULTS.log_format,
        show_default=True,
        help="Of the log on stderr and of the access log.",
    ),
    click.option(
        "--access-log",
        metavar="FILE",
        default="",
        help="A line for each connection and flow that ended; '-' is stdout.",
    ),
    click.option("-v", "--verbose", is_flag=True, help="Log each sync and each connection, too."),
)


def _check(settings: Settings) -> None:
    """Raise a usage error unless exactly one source is given, and what the others need."""
    given = {"PATH...": settings.paths, "--kubeconfig": settings.kubeconfig, "--in-cluster": settings.in_cluster}
    chosen = [name for name, value in given.items() if value]
    if len(chosen) != 1:
        got = f", not {' and '.join(chosen)}" if chosen else ""
        raise click.UsageError(f"give one of PATH..., --kubeconfig FILE and --in-cluster{got}")
    if settings.min_sync_period_s > settings.sync_period_s:
        raise click.UsageError("--min-sync-period must not be longer than --sync-period")
    if settings.detect_local_mode == "BridgeInterface" and not settings.pod_bridge_interface:
        raise click.UsageError("--detect-local-mode BridgeInterface needs --pod-bridge-interface NAME")
    if settings.detect_local_mode == "InterfaceNamePrefix" and not settings.pod_interface_name_prefix:
        raise click.UsageError("--detect-local-mode InterfaceNamePrefix needs --pod-interface-name-prefix NAME")


def settings_from(configuration: Configuration | None, options: dict[str, Any]) -> Settings:
    """Return what the command line says, over what the file says, over the defaults."""
    if configuration is not None and not (options["paths"] or options["kubeconfig"] or options["in_cluster"]):
        # As kube-proxy: a file is for a cluster, and without a kubeconfig for the one whose pod this is.
        options["kubeconfig"] = configuration.settings.get("kubeconfig")
        options["in_cluster"] = options["kubeconfig"] is None
    for name in ("pod_bridge_interface", "pod_interface_name_prefix"):
        options[name] = options[name] or ""
    settings = Settings(**{**options, "degraded_status": int(options["degraded_status"])})
    _check(settings)
    return settings
