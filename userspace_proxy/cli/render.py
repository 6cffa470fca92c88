"""`userspace-proxy render`: print the rules of manifests, with their reasons, and install nothing."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from userspace_proxy.cli.options import PATHS, GroupedCommand, SettingOption, fails_on, setting_options, settings_of
from userspace_proxy.config.kinds import one_of
from userspace_proxy.config.settings import MODE_NAMES, SETTINGS
from userspace_proxy.errors import StartError

if TYPE_CHECKING:
    from userspace_proxy.explain.lines import Explained

_MODE = SETTINGS["proxy_mode"]
_MODE_OR_ALL = replace(_MODE, kind=one_of(*MODE_NAMES, "all", metavar="MODE"), help=f"{_MODE.help}, or all")


@click.command(cls=GroupedCommand, params=[SettingOption("proxy_mode", _MODE_OR_ALL), *setting_options("render")])
@PATHS
@click.option(
    "--service",
    default="",
    metavar="[NAMESPACE/]NAME[:PORT]",
    help="Print only the rules of this Service; PORT is a name or a number",
)
@click.option("--explain", "with_explanations", is_flag=True, help="Print what each line does, and why")
@click.option("--json", "as_json", is_flag=True, help="Print a list of {mode, language, words, lines}, explained")
def render(paths: tuple[str, ...], *, service: str, with_explanations: bool, as_json: bool, **options: Any) -> None:
    """Print the rules that `run` would load for PATH..., and load nothing. Exit 1 if a manifest is wrong."""
    from userspace_proxy.explain import rendering
    from userspace_proxy.logs import configure_logging

    configure_logging("text")
    settings = settings_of({"paths": paths, **options})
    is_well = True
    with fails_on(StartError):
        if service or with_explanations or as_json or settings.proxy_mode == "all":
            found, is_well = rendering.explain(settings, service)
            _show(found, explains=with_explanations, as_json=as_json)
        else:
            rules, is_well = rendering.render(settings)
            click.echo(rules, nl=False)
    if not is_well:
        sys.exit(1)


def _show(found: Sequence[Explained], *, explains: bool, as_json: bool) -> None:
    """Print *found*: in colours to a terminal, modes side by side where it is wide; plain to anything else."""
    from userspace_proxy.explain import plain

    if as_json:
        click.echo(plain.as_json(found))
    elif sys.stdout.isatty():
        from userspace_proxy.explain.terminal import print_to

        print_to(found, explains=explains)
    else:
        click.echo(plain.as_text(found, explains=explains), nl=False)
