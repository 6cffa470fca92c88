"""`userspace-proxy env` and `userspace-proxy names`: how processes find Services without cluster DNS."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from userspace_proxy.cli.ask import NAMESPACE, SOCKET, ask
from userspace_proxy.cli.options import GroupedCommand, fails_on, file_option, setting_options, settings_of
from userspace_proxy.errors import StartError
from userspace_proxy.printable import printable

if TYPE_CHECKING:
    from userspace_proxy.config.settings import Settings
    from userspace_proxy.control.pod_names import KnownService
    from userspace_proxy.model.names import NamespacedName

    Render = Callable[[Mapping[NamespacedName, KnownService], Settings], list[str]]

_PATHS = click.argument("paths", nargs=-1, metavar="[PATH...]")
_KUBECONFIG = file_option("--kubeconfig", help="Ask the cluster that this file names")


@click.command(cls=GroupedCommand, params=setting_options("env"))
@_PATHS
@NAMESPACE
@_KUBECONFIG
@SOCKET
@click.pass_context
def env(ctx: click.Context, /, *, namespace: str, control_socket: Path, **options: Any) -> None:
    """Print the variables that the kubelet sets for Services in a pod.

    Of the manifests in PATH..., a cluster, or without both, of the running proxy or kubectl's cluster.
    """
    from userspace_proxy.control.pod_names import environment

    def lines(services: Mapping[NamespacedName, KnownService], _: Settings) -> list[str]:
        return [f"{name}={value}" for name, value in environment(services, namespace).items()]

    _print(ctx, control_socket, settings_of(options), {"namespace": namespace}, lines)


@click.command(cls=GroupedCommand, params=setting_options("names"))
@_PATHS
@NAMESPACE
@_KUBECONFIG
@SOCKET
@click.pass_context
def names(ctx: click.Context, /, *, namespace: str, control_socket: Path, **options: Any) -> None:
    """Print lines for /etc/hosts with the names of Services.

    Of the manifests in PATH..., a cluster, or without both, of the running proxy or kubectl's cluster.
    """
    from userspace_proxy.control.pod_names import hosts_lines

    def lines(services: Mapping[NamespacedName, KnownService], settings: Settings) -> list[str]:
        return list(hosts_lines(services, namespace, settings.cluster_domain))

    settings = settings_of(options)
    _print(ctx, control_socket, settings, {"namespace": namespace, "domain": settings.cluster_domain}, lines)


def _print(
    ctx: click.Context, control_socket: Path, settings: Settings, parameters: Mapping[str, str], render: Render
) -> None:
    """Print the answer of the proxy at *control_socket* if no other source is given, or else what *render* returns."""
    if settings.paths and settings.kubeconfig:
        raise click.UsageError("give PATH... or --kubeconfig FILE, not both")
    is_named = ctx.get_parameter_source("control_socket") is not ParameterSource.DEFAULT
    if not settings.paths and not settings.kubeconfig and (is_named or os.access(control_socket, os.W_OK)):
        found = ask(control_socket, ctx.info_name or "", **parameters)["items"]
    else:
        import asyncio

        from userspace_proxy.logs import configure_logging
        from userspace_proxy.runtime.desired_state import known_services

        configure_logging("text")
        with fails_on(StartError):
            found = render(asyncio.run(known_services(settings)), settings)
    click.echo("".join(f"{printable(line)}\n" for line in found), nl=False)
