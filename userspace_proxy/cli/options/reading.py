"""What options take, how their defaults are shown, and how a mistake in them is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import click

from userspace_proxy.config import values
from userspace_proxy.config.settings import HEALTHZ_PORT, METRICS_PORT, Settings
from userspace_proxy.printable import printable

DEFAULTS = Settings()
_Function = TypeVar("_Function", bound=Callable[..., Any])


def fail(message: object) -> NoReturn:
    click.echo(f"userspace-proxy: {printable(str(message))}", err=True)
    sys.exit(1)


class Value(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.5
    """What *read* makes of a text; what it is already (a default, a configuration file's), it stays."""

    def __init__(self, name: str, read: Callable[[str], object]) -> None:
        self.name = name
        self._read = read

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> object:
        if not isinstance(value, str):
            return value
        try:
            return self._read(value.strip())
        except ValueError as error:
            self.fail(str(error), param, ctx)


CIDRS = Value("CIDR[,CIDR]", values.networks)
PORT_RANGE = Value("A-B", values.port_range)
HEALTHZ_ADDRESS = Value("ADDRESS", lambda text: values.with_port(text, HEALTHZ_PORT))
METRICS_ADDRESS = Value("ADDRESS", lambda text: values.with_port(text, METRICS_PORT))
SECONDS = Value("DURATION", values.seconds)
INTERFACE = Value("NAME", values.interface_name)
NODE_PORT_ADDRESSES = Value("addresses", lambda text: values.node_port_addresses(text.split(",")))


def shown(seconds: float) -> str:
    """Return *seconds* as a person writes them: 24h, 30s, 50ms."""
    if not seconds:
        return "0"
    for unit, size in (("h", 3600), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds * 1000:g}ms"


def together(*options: Callable[[_Function], _Function]) -> Callable[[_Function], _Function]:
    def decorate(function: _Function) -> _Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate
