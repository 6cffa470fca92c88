"""The command line: one file for each command. Exit codes: 0 done, 1 the input or the environment is wrong, 2 usage.

Code 1 comes with one line on stderr. A command imports what it runs only when it runs.
"""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from userspace_proxy import __version__

HELP_WIDTH = 120  # columns outside of a terminal

# Command -> module, in the order of the help.
COMMANDS = {
    "run": "run",
    "get": "ask",
    "describe": "ask",
    "why": "ask",
    "check": "check",
    "render": "render",
    "forward": "forward",
    "env": "names",
    "names": "names",
    "lab": "lab",
    "demo": "demo",
    "compare": "compare",
    "trace": "trace",
    "cleanup": "cleanup",
}


class _Commands(click.Group):
    """Imports a command when it is asked for: all of them take as long as a short command."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load(cmd_name) if cmd_name in COMMANDS else None


def load(name: str) -> click.Command:
    """Import the command *name*. Raises KeyError."""
    command: click.Command = getattr(import_module(f"{__name__}.{COMMANDS[name]}"), name)
    return command


@click.group(
    cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH + 2}
)
@click.version_option(__version__, "--version", prog_name="userspace-proxy", message="%(prog)s %(version)s")
def commands() -> None:
    """A userspace-mode Kubernetes service proxy.

    No client sees a dead backend, and the proxy can say why it chose what it chose.
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A command that fails ends the process."""
    width = None if sys.stdout.isatty() else HELP_WIDTH
    color = False if os.environ.get("NO_COLOR") else None  # https://no-color.org; click itself does not know it
    commands.main(args=arguments, prog_name="userspace-proxy", terminal_width=width, color=color)
