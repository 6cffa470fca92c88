"""`userspace-proxy run`: flags over a configuration file over defaults, then serve."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from userspace_proxy.cli.options import GroupedCommand, fails_on, file_option, setting_options, settings_of
from userspace_proxy.config.settings import Settings
from userspace_proxy.errors import StartError, SyncError

if TYPE_CHECKING:
    from userspace_proxy.config.kubeproxy_config import Configuration

log = logging.getLogger(__name__)

_AUTHORITIES = "SSL_CERT_FILE"

_EXAMPLES = """\
  Serve the manifests of a folder:
    userspace-proxy run manifests/
  Serve the cluster of this pod, in nftables mode:
    userspace-proxy run --in-cluster --proxy-mode nftables
  Serve as kube-proxy is configured:
    userspace-proxy run --config /var/lib/kube-proxy/config.conf
"""


def _read_configuration(ctx: click.Context, _: click.Parameter, path: Path | None) -> Configuration | None:
    """Make what the file says the defaults of the other flags, so that what is given on the command line wins."""
    if path is None:
        return None
    from userspace_proxy.config.kubeproxy_config import read_configuration

    with fails_on(StartError):
        configuration = read_configuration(path)
    ctx.default_map = {name: value for name, value in configuration.settings.items() if name != "kubeconfig"}
    return configuration


@click.command(cls=GroupedCommand, params=setting_options("run"), epilog=_EXAMPLES)
@click.argument("paths", nargs=-1, metavar="[PATH...]")
@file_option(
    "--config",
    "configuration",
    is_eager=True,
    callback=_read_configuration,
    help="Read a KubeProxyConfiguration; flags win over it",
)
def run(configuration: Configuration | None, **options: Any) -> None:
    """Serve Services on this node: from manifests in PATH... (files, folders, - for stdin), or from a cluster."""
    gc.disable()  # what imports make stays, and searching it takes a tenth of their time; `app` goes on without, too

    from userspace_proxy.logs import configure_logging

    with _no_authorities():
        from userspace_proxy.runtime import app

    settings = settings_from(configuration, options)
    configure_logging(settings.log_format, verbose=settings.verbose)
    if configuration is not None and configuration.named:
        log.warning("--config: no meaning here, and nothing done about it: %s", ", ".join(configuration.named))
    with fails_on(StartError, SyncError):
        app.run(settings)


@contextlib.contextmanager
def _no_authorities() -> Iterator[None]:
    """Make OpenSSL find no certificates of authorities.

    aiohttp reads all of this machine twice when it is imported, which takes some 60 ms and 2 MB. Its TLS contexts are
    not used: the connection to an API server has one of its own, which is made later.
    """
    before = os.environ.get(_AUTHORITIES)
    os.environ[_AUTHORITIES] = os.devnull
    try:
        yield
    finally:
        del os.environ[_AUTHORITIES]
        if before is not None:
            os.environ[_AUTHORITIES] = before


def settings_from(configuration: Configuration | None, options: dict[str, Any]) -> Settings:
    """Return the settings: options override the configuration file, and the file overrides the defaults."""
    if configuration is not None and not (options["paths"] or options["kubeconfig"] or options["in_cluster"]):
        # As kube-proxy: a file is for a cluster, and without a kubeconfig for the one whose pod this is.
        options["kubeconfig"] = configuration.settings.get("kubeconfig")
        options["in_cluster"] = options["kubeconfig"] is None
    settings = settings_of(options)
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    """Raise a usage error unless exactly one source is given, with the flags that other flags need."""
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
