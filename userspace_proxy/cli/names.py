"""`userspace-proxy env` and `userspace-proxy names`: how processes find Services without cluster DNS."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from userspace_proxy.cli.options import GroupedCommand, fails_on, setting_options, settings_of
from userspace_proxy.errors import StartError

if TYPE_CHECKING:
    from userspace_proxy.config.settings import Settings
    from userspace_proxy.control.pod_names import KnownService
    from userspace_proxy.model.names import NamespacedName

_NAMESPACE = click.option(
    "-n", "--namespace", default="default", metavar="NAME", help="Namespace of the processes (default default)"
)
_PATHS = click.argument("paths", nargs=-1, metavar="[PATH...]")
_KUBECONFIG = click.option(
    "--kubeconfig",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Login to a cluster (default, without PATH: $KUBECONFIG or ~/.kube/config)",
)


@click.command(cls=GroupedCommand, params=setting_options("env"))
@_PATHS
@_NAMESPACE
@_KUBECONFIG
def env(*, namespace: str, **options: Any) -> None:
    """Print the variables that the kubelet sets for Services in a pod, from manifests in PATH... or a cluster."""
    from userspace_proxy.control.pod_names import environment

    _, services = _read(options)
    for name, value in environment(services, namespace).items():
        click.echo(f"{name}={value}")


@click.command(cls=GroupedCommand, params=setting_options("names"))
@_PATHS
@_NAMESPACE
@_KUBECONFIG
def names(*, namespace: str, **options: Any) -> None:
    """Print lines for /etc/hosts with the names of Services, from manifests in PATH... or a cluster."""
    from userspace_proxy.control.pod_names import hosts_lines

    settings, services = _read(options)
    for line in hosts_lines(services, namespace, settings.cluster_domain):
        click.echo(line)


def _read(options: Mapping[str, Any]) -> tuple[Settings, Mapping[NamespacedName, KnownService]]:
    import asyncio

    from userspace_proxy.logs import configure_logging
    from userspace_proxy.runtime.known_services import known_services

    settings = settings_of(options)
    if settings.paths and settings.kubeconfig:
        raise click.UsageError("give PATH... or --kubeconfig FILE, not both")
    configure_logging("text")
    with fails_on(StartError):
        return settings, asyncio.run(known_services(settings))
    raise AssertionError("fails_on ends the process")
