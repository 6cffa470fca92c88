"""Write docs/reference/flags.md, and the table of fields in configuration.md, from the code (`make reference`)."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import click

from userspace_proxy.cli import COMMANDS, load
from userspace_proxy.config.settings import SETTINGS

_HEAD = """\
# Command line

`make reference` writes this page from the command line itself. A duration is a number with a unit: `50ms`, `30s`, `5m`,
`24h`. Exit codes: 0 done, 1 the input or the environment is wrong (one line on stderr), 2 wrong usage.
"""


def page() -> str:
    """Return the page: a section for each command, an item for each of its flags."""
    sections = (section for name in sorted(COMMANDS) for section in _section(name, load(name)))
    return "\n".join([_HEAD, *sections])


def _options(command: click.Command) -> list[click.Option]:
    """Return the options of *command*, those of a group behind the others."""
    options = [param for param in command.params if isinstance(param, click.Option)]
    return sorted(options, key=lambda option: hasattr(option, "group"))


def _section(name: str, command: click.Command) -> Iterator[str]:
    context = click.Context(command, info_name=f"userspace-proxy {name}", max_content_width=10_000)
    yield f"## {name}\n"
    yield f"```\n{' '.join([context.info_name or '', *command.collect_usage_pieces(context)])}\n```\n"
    for paragraph in (command.help or "").split("\n\n"):
        yield textwrap.fill(" ".join(paragraph.split()), 118) + "\n"
    for topic, options in groupby(_options(command), key=lambda option: getattr(option, "group", "")):
        records = [record for option in options if (record := option.get_help_record(context)) is not None]
        if topic and records:
            yield f"\n{topic}:\n"
        for flag, help_text in records:
            item = f"- `{flag}`: {help_text}"
            yield textwrap.fill(item, 118, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
    if command.epilog:
        yield f"\nExamples:\n\n```\n{textwrap.dedent(command.epilog)}```"
    yield ""


def with_fields(text: str) -> str:
    """Return the page *text* with its table of a KubeProxyConfiguration's fields as the settings have them."""
    rows = (
        f"| `{path}` | `{setting.flag.split(', ')[-1]}` | {', '.join(modes) or 'all'} |\n"
        for setting in SETTINGS.values()
        for path, modes in setting.fields.items()
    )
    head = "| field | flag | modes |\n|---|---|---|\n"
    return re.sub(r"\| field \| flag .*?\n\n", lambda _: f"{head}{''.join(rows)}\n", text, flags=re.DOTALL)


if __name__ == "__main__":
    reference = Path(sys.argv[1])
    (reference / "flags.md").write_text(page())
    configuration = reference / "configuration.md"
    configuration.write_text(with_fields(configuration.read_text()))
