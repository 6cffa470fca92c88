"""`userspace-proxy demo`: a Service and its failing endpoints, in private namespaces."""

import click

from userspace_proxy.cli.options import fails_on
from userspace_proxy.errors import StartError


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print only the result, as JSON")
def demo(*, as_json: bool) -> None:
    """Show what the proxy does, in private namespaces. Needs no root and no cluster."""
    from userspace_proxy import demo as show

    with fails_on(StartError):
        show.enter(["--json"] if as_json else [])
        show.run(as_json=as_json)
