"""`userspace-proxy trace`: follow a real packet through the hooks, chains and rules of this node."""

import re
from pathlib import Path
from typing import Any

import click

from userspace_proxy.cli.ask import NAMESPACE, SOCKET, portal_of
from userspace_proxy.cli.options import Value, fails_on, file_option
from userspace_proxy.config.kinds import DURATION
from userspace_proxy.errors import StartError

# A Service's name, perhaps with a port; no address has a letter before its first colon and no other colon.
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?(:[-a-z0-9]+)?")


@click.command()
@click.argument("portal", metavar="IP:PORT[/udp]|NAME[:PORT]")
@click.option("--udp", is_flag=True, help="Same as /udp after the port")
@click.option("--wait", is_flag=True, help="Follow the next packet of another client, instead of sending one")
@click.option(
    "--timeout", "timeout_s", type=Value(DURATION), default="30s", help="Time to wait for the packet (default 30s)"
)
@click.option("--from", "client_ip", metavar="IP", default="", help="Wait for a packet from this address")
@click.option(
    "--from-pod", metavar="PID|NAME", help="Send the packet from the network namespace of a process, or a named one"
)
@file_option("--svg", help="Draw the packet's path to this file")
@click.option("--wide", is_flag=True, help="Draw packets side by side, for a wide screen")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON")
@NAMESPACE
@SOCKET
def trace(
    portal: str,
    *,
    udp: bool,
    svg: Path | None,
    wide: bool,
    as_json: bool,
    namespace: str,
    control_socket: Path,
    **whence: Any,
) -> None:
    """Show the hooks, chains and rules that a real packet to a portal meets on this node.

    The portal is an address, or the name of a Service that a running proxy serves.
    """
    if _NAME.fullmatch(portal):
        portal = portal_of(portal, namespace, control_socket)
        udp = udp or portal.endswith("/udp")
        portal = portal.removesuffix("/tcp").removesuffix("/udp")
    from userspace_proxy.trace import command

    try:
        request = command.request(f"{portal.removesuffix('/udp')}/udp" if udp else portal, **whence)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with fails_on(StartError):
        command.run(request, as_json=as_json, svg=svg, wide=wide, say=lambda text: click.echo(text, err=True))
