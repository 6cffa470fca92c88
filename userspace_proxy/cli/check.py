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

_SHOWN_MAX = 1_000
# The colours of fields and findings in a terminal.
_COLOURS = {"honoured": "green", "approximated": "yellow", "unknown": "red", "fault": "red", "note": "yellow"}


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
        _print(fields, findings)
    if faults:
        sys.exit(1)
    if not manifests and not findings:
        fail(nothing_found(paths))
    if not as_json:
        notes = f", {_count(len(findings), 'note')}" if findings else ""
        click.echo(f"{_count(len(manifests), 'object')}, nothing wrong{notes}")


def _print(fields: Sequence[FieldTreatment], findings: Sequence[Finding]) -> None:
    """Print *fields* and the first *findings*, faults before notes if there are more."""
    shown = findings
    if len(findings) > _SHOWN_MAX:
        shown = sorted(findings, key=lambda finding: finding.severity == "note")[:_SHOWN_MAX]
    for field in fields:
        click.secho(printable(str(field)), fg=_COLOURS.get(field.treatment))
    for finding in shown:
        click.secho(printable(str(finding)), fg=_COLOURS[finding.severity])
    if (more := len(findings) - len(shown)) > 0:
        click.echo(f"{_count(more, 'more finding')}; --json lists all")


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
