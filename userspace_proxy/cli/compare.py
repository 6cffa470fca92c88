"""`userspace-proxy compare`: measure all modes side by side."""

import sys
from pathlib import Path

import click

from userspace_proxy.cli.options import Value, fails_on, file_option
from userspace_proxy.config.kinds import DURATION, Kind
from userspace_proxy.errors import StartError


def _names(of: str) -> Value:
    """Return the type of comma-separated names, each one of the constant *of*, which is imported when it is needed."""

    def read(text: str) -> tuple[str, ...]:
        from userspace_proxy.compare import command

        known, names = getattr(command, of), tuple(name.strip() for name in text.split(","))
        unknown = [name for name in names if name not in known]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return names

    return Value(Kind("NAME,...", read))


@click.command()
@click.option("--quick", is_flag=True, help="Measure for 2 minutes instead of 10, with more noise")
@click.option("--duration", "duration_s", type=Value(DURATION), help="Time to measure (default 10m)")
@click.option(
    "--modes", type=_names("MODE_NAMES"), default=(), help="Modes to measure beside direct connections (default all)"
)
@click.option(
    "--cases",
    type=_names("CASE_NAMES"),
    default=(),
    help="Some of latency, rates, throughput, system-calls, services, failures, disasters, or the name of a disaster "
    "(default all; with --quick all but disasters)",
)
@file_option("--json", "json_file", help="Write all figures to this file")
@file_option("--html", "html_file", help="Write the report to this file")
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
    with fails_on(StartError):
        command.enter(sys.argv[1:])
        command.run(command.ComparisonRequest(duration_s or default_s, modes, cases), json_file, html_file)
