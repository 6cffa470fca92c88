"""`userspace-proxy cleanup`: remove every rule, route and address of the proxy from this network namespace."""

import click

from userspace_proxy.cli.options import fails_on
from userspace_proxy.errors import StartError, SyncError


@click.command()
def cleanup() -> None:
    """Remove every rule, route and address of the proxy, also after a crash, and change nothing else."""
    import asyncio

    from userspace_proxy.runtime.cleanup import remove_all

    with fails_on(StartError, SyncError):
        asyncio.run(remove_all())
    click.echo("nothing of userspace-proxy is left in this network namespace")
