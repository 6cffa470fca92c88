"""The options of `render` that show rules one Service or mode at a time, and the showing."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from userspace_proxy.modes.reasons.lines import Explained

_Function = TypeVar("_Function", bound=Callable[..., Any])


def EXPLAINING(function: _Function) -> _Function:  # noqa: N802 - as cli.py calls its options
    """Add the options to a command."""
    for option in (
        click.option(
            "--json", "as_json", is_flag=True, help="A list of {mode, language, words, lines}; lines are explained."
        ),
        click.option("--explain", "with_explanations", is_flag=True, help="Say of each line what it does, and why."),
        click.option(
            "--service",
            default="",
            metavar="[NAMESPACE/]NAME[:PORT]",
            help="Only what concerns this Service, and what its packets meet; PORT is a name or number.",
        ),
    ):
        function = option(function)
    return function


def show(found: Sequence[Explained], *, explains: bool, as_json: bool) -> None:
    """Print *found*: in colours to a terminal, modes side by side where it is wide; plain to anything else."""
    from userspace_proxy.explain import plain

    if as_json:
        click.echo(plain.as_json(found))
    elif sys.stdout.isatty():
        from userspace_proxy.explain.terminal import print_to

        print_to(found, explains=explains)
    else:
        click.echo(plain.as_text(found, explains=explains), nl=False)
