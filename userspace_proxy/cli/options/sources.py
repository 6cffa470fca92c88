"""Options that say what is served: manifests or a cluster, and addresses for those who state none."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from userspace_proxy.cli.options.reading import CIDRS, DEFAULTS, SECONDS, fail, shown, together
from userspace_proxy.config.settings import DEFAULT_SERVICE_RANGES
from userspace_proxy.errors import StartError
from userspace_proxy.model.service import SourceIP

if TYPE_CHECKING:
    from userspace_proxy.config.kubeproxy_config import Configuration


def _read_configuration(ctx: click.Context, _: click.Parameter, path: Path | None) -> Configuration | None:
    """Make what the file says the defaults of the other flags, so that what is given on the command line wins."""
    if path is None:
        return None
    from userspace_proxy.config.kubeproxy_config import read_configuration

    try:
        configuration = read_configuration(path)
    except StartError as error:
        fail(error)
    ctx.default_map = {name: value for name, value in configuration.settings.items() if name != "kubeconfig"}
    return configuration


CONFIG = click.option(
    "--config",
    "configuration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    is_eager=True,
    callback=_read_configuration,
    help="A KubeProxyConfiguration; flags win over it.",
)
HOSTNAME = click.option(
    "--hostname-override",
    metavar="NAME",
    default=DEFAULTS.hostname_override,
    show_default="the host's name",
    help="This node's name in the cluster.",
)
PROXY_NAME = click.option(
    "--service-proxy-name",
    metavar="NAME",
    default=DEFAULTS.service_proxy_name,
    show_default="those without the label",
    help="Serve only Services labelled service.kubernetes.io/service-proxy-name: NAME.",
)
PATHS = click.argument("paths", nargs=-1, metavar="PATH...", required=True)
SOURCES = together(
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
    HOSTNAME,
    PROXY_NAME,
    click.option(
        "--degraded-after",
        "degraded_after_s",
        type=SECONDS,
        default=shown(DEFAULTS.degraded_after_s),
        show_default=True,
        help="/healthz says degraded when the API could not be followed for so long.",
    ),
    click.option(
        "--degraded-status",
        type=click.Choice(["200", "503"]),
        default=str(DEFAULTS.degraded_status),
        show_default=True,
        help="What /healthz answers then; 503 takes every node out of its load balancers when the API is down.",
    ),
)
CLUSTER_IPS = click.option(
    "--service-cluster-ip-range",
    "service_cluster_ip_ranges",
    type=CIDRS,
    default=DEFAULTS.service_cluster_ip_ranges,
    show_default=f"{', '.join(map(str, DEFAULT_SERVICE_RANGES))} for manifests",
    help="Where cluster IPs are from; one range a family. Packets to the rest of it are not forwarded.",
)
LOAD_BALANCER_POOL = click.option(
    "--load-balancer-pool",
    type=CIDRS,
    default=DEFAULTS.load_balancer_pool,
    show_default="none",
    help="Where Services of type LoadBalancer without an ingress IP get one from; one range a family.",
)
SOURCE_IP = click.option(
    "--source-ip",
    type=click.Choice([SourceIP.NODE.value, SourceIP.TRANSPARENT.value]),
    default=DEFAULTS.source_ip.value,
    show_default=True,
    callback=lambda _context, _option, value: SourceIP(value),
    help="Whose address backends see of Services without the annotation userspace-proxy/source-ip.",
)
