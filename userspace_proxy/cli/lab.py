"""`userspace-proxy lab`: a shell in a private network with a node, the proxy and simulated pods."""

import sys

import click

from userspace_proxy.cli.options import Value, fails_on
from userspace_proxy.config.settings import SETTINGS
from userspace_proxy.errors import StartError
from userspace_proxy.lab import enter_namespaces

_SEPARATOR = "--"


class _LabCommand(click.Command):
    """A command line whose part after ``--`` is a command of its own."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        at = args.index(_SEPARATOR) if _SEPARATOR in args else len(args)
        ctx.obj = (list(args), args[at + 1 :])
        return super().parse_args(ctx, args[:at])


@click.command(cls=_LabCommand, options_metavar="[OPTIONS]")
@click.argument("paths", nargs=-1, metavar="[PATH...] [-- COMMAND]")
@click.option(
    "--proxy-mode",
    type=Value(SETTINGS["proxy_mode"].kind),
    default="userspace",
    metavar="MODE",
    help="How the proxy serves (default userspace)",
)
@click.pass_context
def lab(ctx: click.Context, paths: tuple[str, ...], proxy_mode: str) -> None:
    """Open a shell (or run COMMAND) in a private network: a client, a node with the proxy, and simulated Pods.

    Pods and the replicas of Deployments in PATH... get an address and a small server. Needs no root, changes nothing on
    this machine and leaves nothing behind. In the shell, lab-help lists what can be typed.
    """
    arguments, command = ctx.obj
    with fails_on(StartError):
        enter_namespaces(["lab", *arguments], {"ip": "iproute2", "nft": "nftables"})

        from userspace_proxy.lab import shell

        code = shell.run(paths, command, proxy_mode)
    sys.exit(code)
