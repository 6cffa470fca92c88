"""`userspace-proxy compare`: measure all modes side by side."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import click

from userspace_proxy.cli.options import Value, fail
from userspace_proxy.config.kinds import DURATION, Kind
from userspace_proxy.errors import StartError


def _names(known: Callable[[], Sequence[str]]) -> Value:
    """Comma-separated names, each of *known*, which is called only if the option is given."""

    def read(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known()]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known())}")
        return names

    return Value(Kind("NAME,...", read))


def _known_modes() -> Sequence[str]:
    from userspace_proxy.compare.command import MODE_NAMES

    return MODE_NAMES


def _known_cases() -> Sequence[str]:
    from userspace_proxy.compare.command import CASE_NAMES

    return CASE_NAMES


@click.command()
@click.option("--quick", is_flag=True, help="Measure for 2 minutes instead of 10, with more noise")
@click.option("--duration", "duration_s", type=Value(DURATION), help="Time to measure (default 10m)")
@click.option(
    "--modes", type=_names(_known_modes), default=(), help="Modes to measure beside direct connections (default all)"
)
@click.option(
    "--cases",
    type=_names(_known_cases),
    default=(),
    help="Some of latency, rates, throughput, system-calls, services, failures, disasters, or the name of a disaster "
    "(default all; with --quick all but disasters)",
)
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), metavar="FILE", help="Write all figures to this file"
)
@click.option(
    "--html", "html_file", type=click.Path(path_type=Path), metavar="FILE", help="Write the report to this file"
)
def compare(
    *,
    quick: bool,
    duration_s: float | None,
    modes: tuple[str, ...],
    cases: tuple[str, ...],
    json_file: Path | None,
    html_file: Path | None,
) -> None:
    """Measure all modes side by side on this machine, and explain the result. Needs no root."""
    from userspace_proxy.compare import command

    if duration_s is not None and duration_s <= 0:
        raise click.UsageError("--duration must be more than nothing")
    default_s = command.QUICK_S if quick else command.DEFAULT_S
    try:
        command.enter(sys.argv[1:])
        command.run(command.ComparisonRequest(duration_s or default_s, modes, cases), json_file, html_file)
    except StartError as error:
        fail(error)
