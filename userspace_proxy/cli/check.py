"""`userspace-proxy check`: what is wrong with manifests, where, and how to correct it."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from userspace_proxy.cli.options import PATHS, GroupedCommand, Value, fail, fails_on, setting_options, settings_of
from userspace_proxy.config.settings import SETTINGS
from userspace_proxy.errors import StartError
from userspace_proxy.printable import printable

if TYPE_CHECKING:
    from userspace_proxy.control.contract import FieldTreatment
    from userspace_proxy.control.lint import Finding


@click.command(cls=GroupedCommand, params=setting_options("check"))
@PATHS
@click.option(
    "--proxy-mode",
    type=Value(SETTINGS["proxy_mode"].kind),
    help="Report annotations without effect in this mode",
)
@click.option("--strict", is_flag=True, help="Exit 1 for notes too")
@click.option(
    "--contract",
    "with_contract",
    is_flag=True,
    help="Report first how each field is treated: honoured, approximated or ignored",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON list of findings; with --contract an object {fields, findings}",
)
def check(
    paths: tuple[str, ...], *, proxy_mode: str | None, strict: bool, with_contract: bool, as_json: bool, **options: Any
) -> None:
    """Report what is wrong with the manifests in PATH..., where, and how to correct it.

    A fault is refused by the API server, or leaves clients of a Service without an endpoint; the exit code is then 1.
    A note names what is incomplete here, or has no effect.
    """
    from dataclasses import asdict

    import msgspec

    from userspace_proxy.control.contract import field_treatments
    from userspace_proxy.control.decode import ANNOTATION_PREFIX
    from userspace_proxy.control.lint import LintOptions, lint
    from userspace_proxy.modes import annotation_modes
    from userspace_proxy.sources.files import nothing_found, read_once

    with fails_on(StartError):
        manifests, problems = read_once(paths)
    fields = field_treatments(manifests) if with_contract else []
    settings = settings_of(options)
    told = LintOptions(
        settings.service_ranges,
        settings.load_balancer_pool,
        settings.service_proxy_name,
        settings.source_ip,
        proxy_mode or "",
        settings.hostname_override.strip().lower(),
        annotation_modes=annotation_modes(ANNOTATION_PREFIX),
    )
    findings = lint(manifests, problems, told)
    faults = sum(strict or finding.severity == "fault" for finding in findings)
    if as_json:
        found: Any = msgspec.to_builtins(findings)
        if with_contract:
            found = {"fields": [asdict(answer) for answer in fields], "findings": found}
        click.echo(json.dumps(found, indent=2))
    else:
        _print(fields, findings, faults)
    if faults:
        sys.exit(1)
    if not manifests and not findings:
        fail(nothing_found(paths))
    if not as_json:
        notes = f", {_count(len(findings), 'note')}" if findings else ""
        click.echo(f"{_count(len(manifests), 'object')}, nothing wrong{notes}")


def _print(fields: Sequence[FieldTreatment], findings: Sequence[Finding], faults: int) -> None:
    """Print *fields* and the first *findings*, faults before notes if there are more."""
    shown = findings
    if len(findings) > _SHOWN_MAX:
        shown = sorted(findings, key=lambda finding: finding.severity == "note")[:_SHOWN_MAX]
    if sys.stdout.isatty():
        _show_contract(fields)
        _show(shown, faults)
    else:
        for line in (*fields, *shown):
            click.echo(printable(str(line)))
    if (more := len(findings) - len(shown)) > 0:
        click.echo(f"{_count(more, 'more finding')}; --json lists all")


def _show(findings: Sequence[Finding], faults: int) -> None:
    """Print *findings* in colours, three lines each, for a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for finding in findings:
        is_named = not finding.object or finding.problem.startswith(finding.object)
        said = finding.problem if is_named else f"{finding.object}: {finding.problem}"
        place = Text(printable(finding.where), "bold")
        console.print(place.append(f"  {printable(finding.field)}", "cyan") if finding.field else place)
        console.print(Text("  ").append(printable(said), "red" if finding.severity == "fault" else "yellow"))
        if finding.fix:
            console.print(Text("  ").append(printable(finding.fix), "dim"))
    if faults:
        files = _count(len({finding.file for finding in findings}), "file")
        console.print(Text(f"{_count(faults, 'problem')} in {files}", "bold"))


_SHOWN_MAX = 1_000
_COLOURS = {"honoured": "green", "approximated": "yellow", "ignored": "dim", "unknown": "red"}


def _show_contract(fields: Sequence[FieldTreatment]) -> None:
    """Print what becomes of *fields*, a table for each object, for a terminal."""
    from itertools import groupby

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for (file, thing), group in groupby(fields, lambda answer: (answer.file, answer.object)):
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(overflow="fold")
        for answer in group:
            colour = _COLOURS[answer.treatment]
            table.add_row(
                Text(printable(answer.field), "cyan"), Text(answer.treatment, colour), Text(answer.how, "dim")
            )
        console.print(Text.assemble((printable(thing), "bold"), (f"  {printable(file)}", "dim")), table, "", sep="\n")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
