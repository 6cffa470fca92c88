"""`userspace-proxy forward`: reach a Service at a local port, as with `kubectl port-forward`, balanced."""

import contextlib
import ipaddress
from pathlib import Path

import click

from userspace_proxy.cli.options import GroupedCommand, fails_on, file_option
from userspace_proxy.errors import StartError

_EXAMPLES = """\
  Reach port 80 of the Service web at 127.0.0.1:8080, with the login of ~/.kube/config:
    userspace-proxy forward svc/web 8080:80
  Reach the Service of a manifest, at any free port:
    userspace-proxy forward -f manifests/ svc/web :http
  Reach UDP and TCP, from other computers too:
    userspace-proxy forward svc/dns 5353:53/udp 5353:53/tcp --address 0.0.0.0
"""
_KINDS = ("svc", "service", "services")


def _read_addresses(_ctx: click.Context, _param: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    addresses = tuple(address.strip() for text in given for address in text.split(","))
    for address in addresses:
        try:
            if address != "localhost":
                ipaddress.ip_address(address)
        except ValueError:
            raise click.BadParameter(f"{address!r} is neither an IP address nor localhost") from None
    return addresses


@click.command(cls=GroupedCommand, epilog=_EXAMPLES)
@click.argument("service", metavar="svc/NAME")
@click.argument("ports", nargs=-1, required=True, metavar="[LOCAL:]PORT[/udp]...")
@click.option("-n", "--namespace", default="default", metavar="NAME", help="Namespace of the Service (default default)")
@click.option("-f", "--filename", "paths", multiple=True, metavar="PATH", help="Manifests in place of a cluster")
@file_option("--kubeconfig", help="Login to the cluster (default $KUBECONFIG or ~/.kube/config)")
@click.option(
    "--address",
    "addresses",
    multiple=True,
    default=["localhost"],
    metavar="IP",
    callback=_read_addresses,
    help="Address to listen at (default localhost)",
)
@click.option("-v", "--verbose", is_flag=True, help="Log each change of endpoints and each connection")
def forward(
    service: str,
    ports: tuple[str, ...],
    *,
    namespace: str,
    paths: tuple[str, ...],
    kubeconfig: Path | None,
    addresses: tuple[str, ...],
    verbose: bool,
) -> None:
    """Forward local ports to the endpoints of a Service: balanced, with failover, also while a rollout replaces them.

    Needs no root. The endpoints must be reachable from here.
    """
    import asyncio
    import logging

    import uvloop

    from userspace_proxy.logs import LineWriter, configure_logging
    from userspace_proxy.model.names import NamespacedName
    from userspace_proxy.runtime import forward as forwarding

    kind, _, name = service.rpartition("/")
    if kind not in ("", *_KINDS):
        raise click.UsageError(f"{service} is no Service; give svc/NAME")
    try:
        asked = [forwarding.ForwardedPort.read(port) for port in ports]
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    if paths and kubeconfig:
        raise click.UsageError("give -f PATH or --kubeconfig FILE, not both")
    configure_logging("text", verbose=verbose)
    if not verbose:
        logging.getLogger("userspace_proxy").setLevel(logging.WARNING)
    request = forwarding.ForwardRequest(NamespacedName(namespace, name), asked, addresses, paths, kubeconfig, verbose)
    out = LineWriter("forward", lambda: 1, lambda _: None, lambda _: None)  # never wait for the reader of stdout
    with contextlib.closing(out), fails_on(StartError), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(forwarding.forward(request, lambda line: out.put(f"{line}\n".encode())))
