"""All that `run` takes, and the settings that become of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from userspace_proxy.cli.options.reading import DEFAULTS, HEALTHZ_ADDRESS, METRICS_ADDRESS, SECONDS, shown, together
from userspace_proxy.cli.options.rules import (
    CAPTURE,
    CONNTRACK,
    KERNEL_MODES,
    LOCAL_TRAFFIC,
    PROXY_PORTS,
    RULES,
    STATE_DIR,
    proxy_mode,
)
from userspace_proxy.cli.options.sources import CLUSTER_IPS, CONFIG, LOAD_BALANCER_POOL, SOURCE_IP
from userspace_proxy.config.settings import Settings

if TYPE_CHECKING:
    from userspace_proxy.config.kubeproxy_config import Configuration

RUN_OPTIONS = together(
    CONFIG,
    proxy_mode(),
    KERNEL_MODES,
    LOCAL_TRAFFIC,
    CONNTRACK,
    RULES,
    CAPTURE,
    CLUSTER_IPS,
    LOAD_BALANCER_POOL,
    SOURCE_IP,
    PROXY_PORTS,
    STATE_DIR,
    click.option(
        "--healthz-bind-address",
        type=HEALTHZ_ADDRESS,
        default=DEFAULTS.healthz_bind_address,
        show_default=True,
        help="/healthz and /livez, at 10256 where no port is given; [::] is both IP families; '' for none.",
    ),
    click.option(
        "--metrics-bind-address",
        type=METRICS_ADDRESS,
        default=DEFAULTS.metrics_bind_address,
        show_default=True,
        help="/metrics, /proxyMode and /configz, at 10249 where no port is given; '' for none.",
    ),
    click.option(
        "--metrics-endpoint-series",
        type=click.IntRange(min=0),
        default=DEFAULTS.metrics_endpoint_series,
        show_default=True,
        help="Where endpoints would have more series than this in /metrics, only Services are shown; 0 for never.",
    ),
    click.option(
        "--min-sync-period",
        "min_sync_period_s",
        type=SECONDS,
        default=shown(DEFAULTS.min_sync_period_s),
        show_default=True,
        help="At least so long between two rule loads.",
    ),
    click.option(
        "--sync-period",
        "sync_period_s",
        type=SECONDS,
        default=shown(DEFAULTS.sync_period_s),
        show_default=True,
        help="At most so long until a failed sync is tried again.",
    ),
    click.option(
        "--drain-timeout",
        "drain_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.drain_timeout_s),
        show_default=True,
        help="What open connections get when the proxy stops.",
    ),
    click.option(
        "--orphan-timeout",
        "orphan_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.orphan_timeout_s),
        show_default=True,
        help="How long workers serve on when the control process has died; 0 ends them with it.",
    ),
    click.option(
        "--take-over",
        type=click.Choice(["auto", "always", "never"]),
        default=DEFAULTS.take_over,
        show_default=True,
        help="Listeners from a proxy that runs: auto from one that serves the same PATH..., or has lost its control.",
    ),
    click.option(
        "--idle-timeout",
        "idle_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.idle_timeout_s),
        show_default=True,
        help="Ends connections on which nothing moves; 0 for never.",
    ),
    click.option(
        "--half-closed-timeout",
        "half_closed_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.half_closed_timeout_s),
        show_default=True,
        help="Ends connections whose one direction has ended while nothing moves in the other; 0 for never.",
    ),
    click.option(
        "--dead-peer-timeout",
        "dead_peer_timeout_s",
        type=SECONDS,
        default=shown(DEFAULTS.dead_peer_timeout_s),
        show_default=True,
        help="Ends connections whose peer has not answered for this long; an outage of five sixths of it is survived.",
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
        default=DEFAULTS.udp_flows_per_service,
        show_default=True,
        help="More make the client's flow that was idle for longest go.",
    ),
    click.option(
        "--udp-port-rest",
        "udp_port_rest_s",
        type=SECONDS,
        default=shown(DEFAULTS.udp_port_rest_s),
        show_default=True,
        help="How long the local port of a UDP flow is not used again: late answers would reach another client.",
    ),
    click.option(
        "--connections-per-client",
        type=click.IntRange(min=0),
        default=DEFAULTS.connections_per_client,
        show_default=True,
        help="More that are open at once from one address (IPv6: one /64) are reset; 0 for any number.",
    ),
    click.option(
        "--congestion-control",
        metavar="NAME",
        default=DEFAULTS.congestion_control,
        show_default="the host's",
        help="Of TCP, towards clients and backends: cubic is faster than bbr for bulk between containers.",
    ),
    click.option(
        "--loop",
        type=click.Choice(["uvloop", "asyncio"]),
        default=DEFAULTS.loop,
        show_default=True,
        help="The event loop; asyncio's own is slower.",
    ),
    click.option(
        "--workers",
        type=click.IntRange(0, 64),
        default=DEFAULTS.workers,
        show_default=True,
        help="Data-plane processes, each with clients and a rotation of its own; 0 keeps all in one, for debugging.",
    ),
    click.option(
        "--splice",
        type=click.Choice(["auto", "copy"]),
        default=DEFAULTS.splice,
        show_default=True,
        help="auto moves bulk by splice(2) and copies small messages; copy copies all.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default=DEFAULTS.log_format,
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
