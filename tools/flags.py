"""Write docs/reference/flags.md, the flags of every command, from the command line itself (`make reference`)."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click

from userspace_proxy.cli import commands

_HEAD = """\
# Command line

`make reference` writes this page from the command line itself. A duration is a number with a unit: `50ms`, `30s`, `5m`,
`24h`. Exit codes: 0 done, 1 the input or the environment is wrong (one line on stderr), 2 wrong usage.
"""


def page() -> str:
    """Return the page: a section for each command, an item for each of its flags."""
    sections = (section for name in sorted(commands.commands) for section in _section(name, commands.commands[name]))
    return "\n".join([_HEAD, *sections])


def _section(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"userspace-proxy {name}", max_content_width=10_000)
    yield f"## {name}\n"
    yield f"```\n{' '.join([context.info_name or '', *command.collect_usage_pieces(context)])}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield textwrap.fill(" ".join(paragraph.split()), 118) + "\n"
    for option in command.params:
        record = option.get_help_record(context) if isinstance(option, click.Option) else None
        if record is not None:
            flag, said = record
            said = said.replace("  [default:", " [default:")
            yield textwrap.fill(
                f"- `{flag}`: {said}", 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
            )
    yield ""


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())
