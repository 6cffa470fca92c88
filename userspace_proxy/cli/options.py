"""Flags from the table of settings, help grouped by topic, and how a command fails."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import click
from click.shell_completion import CompletionItem

from userspace_proxy.cli import HELP_WIDTH
from userspace_proxy.config.kinds import Kind
from userspace_proxy.config.settings import SETTINGS, Setting, Settings
from userspace_proxy.printable import printable

_NARROW_COLUMN, _WIDE_COLUMN = 30, 48  # where texts begin in help


_BARE = {setting.flag: setting.kind for setting in SETTINGS.values() if setting.kind.bare}


def fail(message: object) -> NoReturn:
    click.echo(f"userspace-proxy: {printable(str(message))}", err=True)
    sys.exit(1)


@contextlib.contextmanager
def fails_on(*kinds: type[Exception]) -> Iterator[None]:
    """End this process with one line if the block raises one of *kinds*, alone or in a group."""
    error: BaseException | None = None
    try:
        yield
    except* kinds as errors:
        error = errors
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if error is not None:  # not above: SystemExit would become a group with a traceback
        fail(error)


class Value(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """The type of a flag. A value that is no text, such as a configuration file's, is left as it is."""

    def __init__(self, kind: Kind) -> None:
        self.name = kind.metavar
        self._kind = kind

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._kind.read(value.strip())
        except ValueError as error:
            self.fail(str(error), param, ctx)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(word) for word in self._kind.known if word.startswith(incomplete)]


class SettingOption(click.Option):
    """The flag of a setting. It is None if it is not given, because Settings has the default."""

    def __init__(self, name: str, setting: Setting) -> None:
        self.group = setting.group
        flag, is_switch = setting.flag, not setting.kind.metavar
        if setting.shown == "on":
            flag += f"/--no-{flag.removeprefix('--')}"
        super().__init__(
            [*flag.split(", "), name],
            type=None if is_switch else Value(setting.kind),
            metavar=setting.kind.metavar or None,
            is_flag=is_switch,
            default=None,
            help=setting.help + (f" (default {setting.shown})" if setting.shown else ""),
        )

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record and self.secondary_opts:
            return f"--[no-]{self.opts[0].removeprefix('--')}", record[1]
        return record


class GroupedCommand(click.Command):
    """A command whose help shows flags by topic, and examples at the end, as they are written."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse *args*. A flag that needs no value takes the next argument only if that can be its value."""
        for flag, kind in _BARE.items():
            if flag in args:
                at = args.index(flag)
                try:
                    kind.read("".join(args[at + 1 : at + 2]))
                except ValueError:
                    args = [*args[:at], f"{flag}={kind.bare}", *args[at + 1 :]]
        return super().parse_args(ctx, args)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        topics: dict[str, list[tuple[str, str]]] = {"Options": []}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                topics.setdefault(getattr(param, "group", "Options"), []).append(record)
        column = _NARROW_COLUMN if formatter.width < HELP_WIDTH else _WIDE_COLUMN
        for topic, records in topics.items():
            with formatter.section(topic):
                formatter.write_dl(records, col_max=column)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.epilog:
            formatter.write(f"\nExamples:\n{self.epilog}")


def setting_options(command: str) -> list[click.Parameter]:
    """Return the flags of the settings that *command* has."""
    return [SettingOption(name, setting) for name, setting in SETTINGS.items() if command in setting.commands]


def settings_of(options: Mapping[str, Any]) -> Settings:
    """Return the default settings, overridden by *options*."""
    return Settings(**{name: value for name, value in options.items() if value is not None})


def file_option(*names: str, **options: Any) -> Callable[..., Any]:  # a decorator, as click's
    """Return an option whose value is the path of a file."""
    return click.option(*names, type=click.Path(path_type=Path), **{"metavar": "FILE", **options})


PATHS: Callable[..., Any] = click.argument("paths", nargs=-1, metavar="PATH...", required=True)
