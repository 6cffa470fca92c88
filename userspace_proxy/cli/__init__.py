"""The commands: argv -> Settings, one function each, and the exit codes. Their many options are in `options`.

0 done, 1 the input or the world is wrong (said in one line on stderr), 2 usage.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from userspace_proxy import __version__
from userspace_proxy.cli.options.reading import SECONDS, Value, fail
from userspace_proxy.cli.options.rules import (
    CAPTURE,
    KERNEL_MODES,
    LOCAL_TRAFFIC,
    MODES_OF_KERNEL,
    PROXY_PORTS,
    RULES,
    STATE_DIR,
    proxy_mode,
)
from userspace_proxy.cli.options.run import RUN_OPTIONS, settings_from
from userspace_proxy.cli.options.sources import (
    CLUSTER_IPS,
    HOSTNAME,
    LOAD_BALANCER_POOL,
    PATHS,
    PROXY_NAME,
    SOURCE_IP,
    SOURCES,
)
from userspace_proxy.config.settings import DEFAULT_SERVICE_RANGES, Settings
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.explain.command import EXPLAINING, show
from userspace_proxy.printable import printable

if TYPE_CHECKING:
    from userspace_proxy.config.kubeproxy_config import Configuration
    from userspace_proxy.control.contract import Answer
    from userspace_proxy.control.lint import Finding

log = logging.getLogger(__name__)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, "--version", prog_name="userspace-proxy", message="%(prog)s %(version)s")
def commands() -> None:
    """A userspace-mode Kubernetes service proxy.

    No client sees a dead backend, and the proxy can say why it chose what it chose.
    """


@commands.command()
@SOURCES
@RUN_OPTIONS
def run(configuration: Configuration | None, **options: Any) -> None:
    """Serve Services on this node: those in PATH... (manifest files, folders of them, - for stdin), or a cluster's."""
    from userspace_proxy.logs import configure_logging
    from userspace_proxy.runtime import app

    settings = settings_from(configuration, options)
    configure_logging(settings.log_format, verbose=settings.verbose)
    if configuration is not None and configuration.named:
        log.warning("--config: no meaning here, and nothing done about it: %s", ", ".join(configuration.named))
    try:
        app.run(settings)
    except* (StartError, SyncError) as errors:
        fail(_first(errors))


@commands.command()
@PATHS
@CLUSTER_IPS
@LOAD_BALANCER_POOL
@SOURCE_IP
@PROXY_NAME
@HOSTNAME
@click.option(
    "--proxy-mode",
    type=click.Choice(["userspace", *MODES_OF_KERNEL]),
    default=None,
    help="Say which annotations have no effect in this mode.",
)
@click.option("--strict", is_flag=True, help="Exit 1 for notes, too: what is incomplete here, or has no effect.")
@click.option(
    "--contract",
    "with_contract",
    is_flag=True,
    help="Say first what becomes of each field: honoured, approximated or ignored; how, or why.",
)
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="A list of {file, line, field, problem, mend, object, severity}; with --contract that is {findings}, beside "
    "{fields}.",
)
def check(
    paths: tuple[str, ...], *, proxy_mode: str | None, strict: bool, with_contract: bool, as_json: bool, **options: Any
) -> None:
    """Say what is wrong with the manifests in PATH..., where, and how to mend it; exit 1 if anything is.

    A fault is what the API server refuses, and what leaves clients of a Service without an endpoint. A note is what is
    incomplete here, or has no effect.
    """
    from dataclasses import asdict

    from userspace_proxy.control.contract import answers
    from userspace_proxy.control.lint import LintOptions, lint
    from userspace_proxy.sources.files import nothing_found, read_once

    try:
        manifests, problems = read_once(paths)
    except StartError as error:
        fail(error)
    fields = answers(manifests) if with_contract else []
    told = LintOptions(
        options["service_cluster_ip_ranges"] or DEFAULT_SERVICE_RANGES,
        options["load_balancer_pool"],
        options["service_proxy_name"],
        options["source_ip"],
        proxy_mode or "",
        options["hostname_override"].strip().lower(),
    )
    findings = lint(manifests, problems, told)
    faults = sum(strict or finding.severity == "fault" for finding in findings)
    if as_json:
        found: Any = [asdict(finding) for finding in findings]
        if with_contract:
            found = {"fields": [asdict(answer) for answer in fields], "findings": found}
        click.echo(json.dumps(found, indent=2))
    else:
        shown = findings if len(findings) <= _SHOWN_MAX else sorted(findings, key=_is_note)[:_SHOWN_MAX]
        if sys.stdout.isatty():
            _show_contract(fields)
            _show(shown, faults)
        else:
            for line in (*fields, *shown):
                click.echo(printable(str(line)))
        if (more := len(findings) - len(shown)) > 0:
            click.echo(f"{_count(more, 'more finding')}; --json lists all")
    if faults:
        sys.exit(1)
    if not manifests and not findings:
        fail(nothing_found(paths))
    if not as_json:
        notes = f", {_count(len(findings), 'note')}" if findings else ""
        click.echo(f"{_count(len(manifests), 'object')}, nothing wrong{notes}")


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
        if finding.mend:
            console.print(Text("  ").append(printable(finding.mend), "dim"))
    if faults:
        files = _count(len({finding.file for finding in findings}), "file")
        console.print(Text(f"{_count(faults, 'problem')} in {files}", "bold"))


def _is_note(finding: Finding) -> bool:
    return finding.severity == "note"


# Of the findings of `check`, so many are shown; faults first where there are more.
_SHOWN_MAX = 1_000
_COLOURS = {"honoured": "green", "approximated": "yellow", "ignored": "dim", "unknown": "red"}


def _show_contract(fields: Sequence[Answer]) -> None:
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


@commands.command()
@PATHS
@EXPLAINING
@proxy_mode("all")
@KERNEL_MODES
@LOCAL_TRAFFIC
@RULES
@CAPTURE
@CLUSTER_IPS
@LOAD_BALANCER_POOL
@SOURCE_IP
@PROXY_PORTS
@STATE_DIR
def render(paths: tuple[str, ...], *, service: str, with_explanations: bool, as_json: bool, **options: Any) -> None:
    """Print the rules that `run` would load for PATH..., and install nothing; exit 1 if anything is wrong there."""
    from userspace_proxy.explain import rendering
    from userspace_proxy.logs import configure_logging

    configure_logging("text")
    settings = Settings(paths=paths, **options)
    try:
        if service or with_explanations or as_json or settings.proxy_mode == "all":
            found, is_well = rendering.explain(settings, service)
            show(found, explains=with_explanations, as_json=as_json)
        else:
            rules, is_well = rendering.render(settings)
            click.echo(rules, nl=False)
    except StartError as error:
        fail(error)
    if not is_well:
        sys.exit(1)


@commands.command()
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON, nothing else.")
def demo(*, as_json: bool) -> None:
    """Show what the proxy does, in private namespaces: no root, no cluster, nothing left behind."""
    from userspace_proxy import demo as show

    try:
        show.enter(["--json"] if as_json else [])
        show.run(as_json=as_json)
    except StartError as error:
        fail(error)


def _names(known: Callable[[], Sequence[str]]) -> Value:
    """Comma-separated names out of *known*, which is asked only when there is something to read."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known()]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known())}")
        return names

    return Value("NAME,...", read)


def _known_modes() -> Sequence[str]:
    from userspace_proxy.compare.command import MODE_NAMES

    return MODE_NAMES


def _known_cases() -> Sequence[str]:
    from userspace_proxy.compare.command import CASE_NAMES

    return CASE_NAMES


@commands.command()
@click.option("--quick", is_flag=True, help="2 minutes instead of 10, with more noise.")
@click.option("--duration", "duration_s", type=SECONDS, help="How long to measure.  [default: 10m]")
@click.option("--modes", type=_names(_known_modes), default=(), show_default="all", help="Beside the direct way.")
@click.option(
    "--cases",
    type=_names(_known_cases),
    default=(),
    show_default="all",
    help="Of latency, rates, throughput, system-calls, services, failures.",
)
@click.option("--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write every figure there.")
@click.option("--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report there.")
def compare(
    *,
    quick: bool,
    duration_s: float | None,
    modes: tuple[str, ...],
    cases: tuple[str, ...],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure all modes side by side on this machine, and say what that means: no root, nothing left behind."""
    from userspace_proxy.compare import command

    if duration_s is not None and duration_s <= 0:
        raise click.UsageError("--duration must be more than nothing")
    default_s = command.QUICK_S if quick else command.DEFAULT_S
    try:
        command.enter(sys.argv[1:])
        command.run(command.Request(duration_s or default_s, modes, cases), json_file, html_file)
    except StartError as error:
        fail(error)


@commands.command()
@click.argument("portal", metavar="IP:PORT[/udp]")
@click.option("--udp", is_flag=True, help="The same as /udp behind the port.")
@click.option("--wait", is_flag=True, help="Follow the next packet of somebody else, instead of sending one.")
@click.option("--timeout", "timeout_s", type=SECONDS, default="30s", show_default=True, help="Wait so long for it.")
@click.option("--from", "client_ip", metavar="IP", default="", help="Wait for a packet from this address.")
@click.option("--from-pod", metavar="PID|NAME", help="Send it from the network namespace of a process, or a named one.")
@click.option("--svg", type=click.Path(path_type=Path), metavar="FILE", help="Draw the packet's way there, too.")
@click.option("--wide", is_flag=True, help="Draw its packets side by side: for a projector, not for a phone.")
@click.option("--json", "as_json", is_flag=True, help="Print what was seen as JSON.")
def trace(portal: str, *, udp: bool, svg: Path | None, wide: bool, as_json: bool, **whence: Any) -> None:
    """Show which hooks, chains and rules a real packet to a portal meets here, as the kernel tells it."""
    from userspace_proxy.trace import command

    try:
        request = command.request(f"{portal.removesuffix('/udp')}/udp" if udp else portal, **whence)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    try:
        command.run(request, as_json=as_json, svg=svg, wide=wide, say=lambda text: click.echo(text, err=True))
    except StartError as error:
        fail(error)


@commands.command()
def cleanup() -> None:
    """Remove every rule, route and address of ours, whatever crashed. Nothing else is touched."""
    from userspace_proxy.runtime import cleanup as removal

    try:
        asyncio.run(removal.remove_all())
    except (StartError, SyncError) as error:
        fail(error)
    click.echo("nothing of userspace-proxy is left in this network namespace")


def _first(errors: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; never returns where a command fails."""
    commands.main(args=arguments, prog_name="userspace-proxy")
