"""The command line: one file for each command. Exit codes: 0 done, 1 the input or the environment is wrong, 2 usage.

Code 1 comes with one line on stderr. A command imports what it runs only when it runs.
"""

import os
import sys
from collections.abc import Sequence

import click

from userspace_proxy import __version__
from userspace_proxy.cli.ask import describe, get, why
from userspace_proxy.cli.check import check
from userspace_proxy.cli.cleanup import cleanup
from userspace_proxy.cli.compare import compare
from userspace_proxy.cli.demo import demo
from userspace_proxy.cli.forward import forward
from userspace_proxy.cli.lab import lab
from userspace_proxy.cli.names import env, names
from userspace_proxy.cli.options import HELP_WIDTH
from userspace_proxy.cli.render import render
from userspace_proxy.cli.run import run
from userspace_proxy.cli.trace import trace


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH + 2})
@click.version_option(__version__, "--version", prog_name="userspace-proxy", message="%(prog)s %(version)s")
def commands() -> None:
    """A userspace-mode Kubernetes service proxy.

    No client sees a dead backend, and the proxy can say why it chose what it chose.
    """


for _command in (run, get, describe, why, check, render, forward, env, names, lab, demo, compare, trace, cleanup):
    commands.add_command(_command)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A command that fails ends the process."""
    width = None if sys.stdout.isatty() else HELP_WIDTH
    color = False if os.environ.get("NO_COLOR") else None  # https://no-color.org; click itself does not know it
    commands.main(args=arguments, prog_name="userspace-proxy", terminal_width=width, color=color)
