"""argv -> Settings: one function a command, and the exit codes.

0 done, 1 the input or the world is wrong (said in one line on stderr), 2 usage.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from userspace_proxy import __version__, values
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.explain.command import EXPLAINING, show
from userspace_proxy.model.service import IPVS_SCHEDULERS, SourceIP
from userspace_proxy.settings import Settings

if TYPE_CHECKING:
    from userspace_proxy.configuration import Configuration
    from userspace_proxy.control.contract import Answer
    from userspace_proxy.control.lint import Finding

_DEFAULTS = Settings()
log = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., Any])


def _fail(message: object) -> NoReturn:
    click.echo(f"userspace-proxy: {message}", err=True)
    sys.exit(1)


# ---- values


class _Value(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
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


_CIDRS = _Value("CIDR[,CIDR]", values.networks)
_PORT_RANGE = _Value("A-B", values.port_range)
_SECONDS = _Value("DURATION", values.seconds)
_INTERFACE = _Value("NAME", values.interface_name)
_NODE_PORT_ADDRESSES = _Value("addresses", lambda text: values.node_port_addresses(text.split(",")))


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
        _fail(error)
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
_PATHS = click.argument("paths", nargs=-1, metavar="PATH...", required=True)
_SOURCES = _options(
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
        type=_SECONDS,
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
_CLUSTER_IPS = click.option(
    "--service-cluster-ip-range",
    "service_cluster_ip_ranges",
    type=_CIDRS,
    default=",".join(map(str, _DEFAULTS.service_cluster_ip_ranges)),
    show_default=True,
    help="Where Services that state no clusterIP get one from; one range a family.",
)
_LOAD_BALANCER_POOL = click.option(
    "--load-balancer-pool",
    type=_CIDRS,
    default=_DEFAULTS.load_balancer_pool,
    show_default="none",
    help="Where Services of type LoadBalancer without an ingress IP get one from; one range a family.",
)
_SOURCE_IP = click.option(
    "--source-ip",
    type=click.Choice([SourceIP.NODE.value, SourceIP.TRANSPARENT.value]),
    default=_DEFAULTS.source_ip.value,
    show_default=True,
    callback=lambda _context, _option, value: SourceIP(value),
    help="Whose address backends see of Services without the annotation userspace-proxy/source-ip.",
)
_RULES = click.option(
    "--rules",
    type=click.Choice(["auto", "nftables", "iptables"]),
    default=_DEFAULTS.rules,
    show_default=True,
    help="The rule language.",
)
_PROXY_PORTS = click.option(
    "--proxy-port-range",
    type=_PORT_RANGE,
    default="-".join(map(str, _DEFAULTS.proxy_port_range)),
    show_default=True,
    help="Local ports that rules redirect to.",
)

_CAPTURE = click.option(
    "--capture",
    type=click.Choice(["auto", "redirect", "address"]),
    default=_DEFAULTS.capture,
    show_default=True,
    help="REDIRECT, or DNAT to a private address on lo (where interfaces have none of their own).",
)
_STATE_DIR = click.option(
    "--state-dir",
    type=click.Path(path_type=Path),
    show_default="/var/lib/userspace-proxy where writable",
    help="Remembers allocated addresses, node ports and proxy ports.",
)


def _proxy_mode(*more: str) -> Callable[[_Function], _Function]:
    return click.option(
        "--proxy-mode",
        type=click.Choice(["userspace", "nftables", "iptables", "ipvs", *more]),
        default=_DEFAULTS.proxy_mode,
        show_default=True,
        help="Who serves: sockets of ours, or the kernel, by nftables rules, kube-proxy's iptables chains, or IPVS.",
    )


_PROXY_MODE = _proxy_mode()

_KERNEL_MODES = _options(
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
)

_LOCAL_TRAFFIC = _options(
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
        type=_SECONDS,
        show_default="24h in kube-proxy's place, else 0",
        help="Until conntrack forgets idle TCP connections; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-tcp-timeout-close-wait",
        "conntrack_tcp_timeout_close_wait_s",
        type=_SECONDS,
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
        type=_SECONDS,
        default=_shown(_DEFAULTS.conntrack_udp_timeout_s),
        show_default=True,
        help="Until conntrack forgets UDP flows without an answer; 0 leaves alone what is set.",
    ),
    click.option(
        "--conntrack-udp-timeout-stream",
        "conntrack_udp_timeout_stream_s",
        type=_SECONDS,
        default=_shown(_DEFAULTS.conntrack_udp_timeout_stream_s),
        show_default=True,
        help="The same for answered ones.",
    ),
)

_RUN_OPTIONS = _options(
    _CONFIG,
    _PROXY_MODE,
    _KERNEL_MODES,
    _LOCAL_TRAFFIC,
    _CONNTRACK,
    _RULES,
    _CAPTURE,
    _CLUSTER_IPS,
    _LOAD_BALANCER_POOL,
    _SOURCE_IP,
    _PROXY_PORTS,
    _STATE_DIR,
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
        type=_SECONDS,
        default=_shown(_DEFAULTS.min_sync_period_s),
        show_default=True,
        help="At least so long between two rule loads.",
    ),
    click.option(
        "--sync-period",
        "sync_period_s",
        type=_SECONDS,
        default=_shown(_DEFAULTS.sync_period_s),
        show_default=True,
        help="At most so long until a failed sync is tried again.",
    ),
    click.option(
        "--drain-timeout",
        "drain_timeout_s",
        type=_SECONDS,
        default=_shown(_DEFAULTS.drain_timeout_s),
        show_default=True,
        help="What open connections get when the proxy stops.",
    ),
    click.option(
        "--orphan-timeout",
        "orphan_timeout_s",
        type=_SECONDS,
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
        type=_SECONDS,
        default=_shown(_DEFAULTS.idle_timeout_s),
        show_default=True,
        help="Ends connections on which nothing moves; 0 for never.",
    ),
    click.option(
        "--half-closed-timeout",
        "half_closed_timeout_s",
        type=_SECONDS,
        default=_shown(_DEFAULTS.half_closed_timeout_s),
        show_default=True,
        help="Ends connections whose one direction has ended while nothing moves in the other; 0 for never.",
    ),
    click.option(
        "--dead-peer-timeout",
        "dead_peer_timeout_s",
        type=_SECONDS,
        default=_shown(_DEFAULTS.dead_peer_timeout_s),
        show_default=True,
        help="Ends connections whose peer is gone without a word.",
    ),
    click.option(
        "--udp-timeout",
        "udp_timeout_s",
        type=_SECONDS,
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


# ---- commands


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="userspace-proxy", message="%(prog)s %(version)s")
def commands() -> None:
    """A userspace-mode Kubernetes service proxy.

    No client sees a dead backend, and the proxy can say why it chose what it chose.
    """


@commands.command()
@_SOURCES
@_RUN_OPTIONS
def run(configuration: Configuration | None, **options: Any) -> None:
    """Serve Services on this node: those in PATH... (manifest files, folders of them, - for stdin), or a cluster's."""
    from userspace_proxy import app
    from userspace_proxy.logs import configure_logging

    settings = settings_from(configuration, options)
    configure_logging(settings.log_format, verbose=settings.verbose)
    if configuration is not None and configuration.named:
        log.warning("--config: no meaning here, and nothing done about it: %s", ", ".join(configuration.named))
    try:
        app.run(settings)
    except* (StartError, SyncError) as errors:
        _fail(_first(errors))


@commands.command()
@_PATHS
@click.option(
    "--contract",
    "with_contract",
    is_flag=True,
    help="Say first what becomes of each field: honoured, approximated or ignored; how, or why.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A list of {file, line, field, problem, mend, object}; with --contract that is {findings}, beside {fields}.",
)
def check(paths: tuple[str, ...], *, with_contract: bool, as_json: bool) -> None:
    """Say what is wrong with the manifests in PATH..., where, and how to mend it; exit 1 if anything is."""
    from dataclasses import asdict

    from userspace_proxy.control.contract import answers
    from userspace_proxy.control.lint import lint
    from userspace_proxy.sources.files import nothing_found, read_once

    try:
        manifests, problems = read_once(paths)
    except StartError as error:
        _fail(error)
    fields = answers(manifests) if with_contract else []
    findings = lint(manifests, problems)
    if as_json:
        found: Any = [asdict(finding) for finding in findings]
        if with_contract:
            found = {"fields": [asdict(answer) for answer in fields], "findings": found}
        click.echo(json.dumps(found, indent=2))
    elif sys.stdout.isatty():
        _show_contract(fields)
        _show(findings)
    else:
        for line in (*fields, *findings):
            click.echo(line)
    if findings:
        sys.exit(1)
    if not manifests:
        _fail(nothing_found(paths))
    if not as_json:
        click.echo(f"{_count(len(manifests), 'object')}, nothing wrong")


def _show(findings: Sequence[Finding]) -> None:
    """Print *findings* in colours, three lines each, for a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        is_named = not finding.object or finding.problem.startswith(finding.object)
        said = finding.problem if is_named else f"{finding.object}: {finding.problem}"
        place = Text(finding.where, "bold")
        console.print(place.append(f"  {finding.field}", "cyan") if finding.field else place)
        console.print(Text("  ").append(said, "red"))
        if finding.mend:
            console.print(Text("  ").append(finding.mend, "dim"))
    if findings:
        files = _count(len({finding.file for finding in findings}), "file")
        console.print(Text(f"{_count(len(findings), 'problem')} in {files}", "bold"))


_COLOURS = {"honoured": "green", "approximated": "yellow", "ignored": "dim", "unknown": "red"}


def _show_contract(fields: Sequence[Answer]) -> None:
    """Print what becomes of *fields*, a table for each object, for a terminal."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for (file, thing), group in groupby(fields, lambda answer: (answer.file, answer.object)):
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(overflow="fold")
        for answer in group:
            colour = _COLOURS[answer.treatment]
            table.add_row(Text(answer.field, "cyan"), Text(answer.treatment, colour), Text(answer.how, "dim"))
        console.print(Text.assemble((thing, "bold"), (f"  {file}", "dim")), table, "", sep="\n")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"


@commands.command()
@_PATHS
@EXPLAINING
@_proxy_mode("all")
@_KERNEL_MODES
@_LOCAL_TRAFFIC
@_RULES
@_CAPTURE
@_CLUSTER_IPS
@_LOAD_BALANCER_POOL
@_SOURCE_IP
@_PROXY_PORTS
@_STATE_DIR
def render(paths: tuple[str, ...], *, service: str, with_explanations: bool, as_json: bool, **options: Any) -> None:
    """Print the rules that `run` would load for PATH..., and install nothing; exit 1 if anything is wrong there."""
    from userspace_proxy import app
    from userspace_proxy.logs import configure_logging

    configure_logging("text")
    settings = Settings(paths=paths, **options)
    try:
        if service or with_explanations or as_json or settings.proxy_mode == "all":
            found, is_well = app.explain(settings, service)
            show(found, explains=with_explanations, as_json=as_json)
        else:
            rules, is_well = app.render(settings)
            click.echo(rules, nl=False)
    except StartError as error:
        _fail(error)
    if not is_well:
        sys.exit(1)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON, nothing else.")
def demo(*, as_json: bool) -> None:
    """Show what the proxy does, in private namespaces: no root, no cluster, nothing left behind."""
    from userspace_proxy import demo as show

    try:
        show.enter(["--json"] if as_json else [])
        show.run(as_json=as_json)
    except StartError as error:
        _fail(error)


def _names(known: Callable[[], Sequence[str]]) -> _Value:
    """Comma-separated names out of *known*, which is asked only when there is something to read."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known()]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known())}")
        return names

    return _Value("NAME,...", read)


def _known_modes() -> Sequence[str]:
    from userspace_proxy.compare.command import MODE_NAMES

    return MODE_NAMES


def _known_cases() -> Sequence[str]:
    from userspace_proxy.compare.command import CASE_NAMES

    return CASE_NAMES


@commands.command()
@click.option("--quick", is_flag=True, help="2 minutes instead of 10, with more noise.")
@click.option("--duration", "duration_s", type=_SECONDS, help="How long to measure.  [default: 10m]")
@click.option("--modes", type=_names(_known_modes), default=(), show_default="all", help="Beside the direct way.")
@click.option(
    "--cases",
    type=_names(_known_cases),
    default=(),
    show_default="all",
    help="Of latency, rates, throughput, system-calls, services, failures.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure there.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report there.")
def compare(
    *,
    quick: bool,
    duration_s: float | None,
    modes: tuple[str, ...],
    cases: tuple[str, ...],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure all modes side by side on this machine, and say what that means: no root, nothing left behind."""
    from userspace_proxy.compare import command

    if duration_s is not None and duration_s <= 0:
        raise click.UsageError("--duration must be more than nothing")
    default_s = command.QUICK_S if quick else command.DEFAULT_S
    try:
        command.enter(sys.argv[1:])
        command.run(command.Request(duration_s or default_s, modes, cases), json_file, html_file)
    except StartError as error:
        _fail(error)


@commands.command()
@click.argument("portal", metavar="IP:PORT[/udp]")
@click.option("--udp", is_flag=True, help="The same as /udp behind the port.")
@click.option("--wait", is_flag=True, help="Follow the next packet of somebody else, instead of sending one.")
@click.option("--timeout", "timeout_s", type=_SECONDS, default="30s", show_default=True, help="Wait so long for it.")
@click.option("--from", "client_ip", metavar="IP", default="", help="Wait for a packet from this address.")
@click.option("--from-pod", metavar="PID|NAME", help="Send it from the network namespace of a process, or a named one.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the packet's way there, too.")
@click.option("--wide", is_flag=True, help="Draw its packets side by side: for a projector, not for a phone.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
def trace(portal: str, *, udp: bool, svg: Path | None, wide: bool, as_json: bool, **whence: Any) -> None:
    """Show which hooks, chains and rules a real packet to a portal meets here, as the kernel tells it."""
    from userspace_proxy.trace import command

    try:
        request = command.request(f"{portal.removesuffix('/udp')}/udp" if udp else portal, **whence)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        command.run(request, as_json=as_json, svg=svg, wide=wide, say=lambda text: click.echo(text, err=True))
    except StartError as error:
        _fail(error)


@commands.command()
def cleanup() -> None:
    """Remove every rule, route and address of ours, whatever crashed. Nothing else is touched."""
    from userspace_proxy import app

    try:
        asyncio.run(app.cleanup())
    except (StartError, SyncError) as error:
        _fail(error)
    click.echo("nothing of userspace-proxy is left in this network namespace")


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; never returns where a command fails."""
    commands.main(args=arguments, prog_name="userspace-proxy")
