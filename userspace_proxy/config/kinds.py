"""Kinds of settings: how a value is written as a flag, in help, and in a KubeProxyConfiguration."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from userspace_proxy.config import values


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of value: how it is read and written.

    ``metavar`` is "" for a switch. ``read`` turns a flag's text into the value or raises ValueError; ``show`` writes
    the value as help does. ``from_field`` and ``to_field`` do the same for the field of a KubeProxyConfiguration,
    which holds numbers, lists and durations in seconds; without them it is written as the flag is. ``bare``: the text
    that a flag without a value stands for, "" if it needs one.
    """

    metavar: str
    read: Callable[[str], object]
    show: Callable[[Any], str] = str
    from_field: Callable[[Any], object] | None = None
    to_field: Callable[[Any], object] | None = None
    known: tuple[str, ...] = ()
    bare: str = ""

    def decode(self, value: object) -> object:
        """Return the value that a field holds. Raises ValueError."""
        return (self.from_field or self.read)(value)  # type: ignore[arg-type]  # text where there is no from_field

    def encode(self, value: object) -> object:
        """Return *value* as a field holds it."""
        return (self.to_field or self.show)(value)


def number(least: int, most: int | None = None) -> Kind:
    """Return the kind of whole numbers from *least* to *most*."""

    def check(value: int) -> int:
        if value < least or (most is not None and value > most):
            limits = f"{least} or more" if most is None else f"{least} to {most}"
            raise ValueError(f"{value} is not in the range; write {limits}")
        return value

    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            raise ValueError(f"{text!r} is no whole number; write it in digits")
        return check(int(text))

    return Kind("NUMBER", read, from_field=check, to_field=int)


def one_of(*known: str, metavar: str = "", read: Callable[[str], object] = str) -> Kind:
    """Return the kind of a setting whose value is one of the words *known*."""

    def choose(text: str) -> object:
        if text not in known:
            raise ValueError(f"{text!r} is not known; write one of {', '.join(known)}")
        return read(text)

    return Kind(metavar or f"[{'|'.join(known)}]", choose, known=known)


def address(port: int) -> Kind:
    """Return the kind of addresses to listen at, at *port* if none is given."""
    return Kind("ADDRESS", lambda text: values.with_port(text, port))


def _show_networks(networks: tuple[object, ...]) -> str:
    return ",".join(map(str, networks))


_DEBUG = 4  # klog's level
SWITCH = Kind("", bool, from_field=bool, to_field=bool)
VERBOSITY = Kind("", bool, from_field=lambda level: level >= _DEBUG, to_field=lambda verbose: _DEBUG if verbose else 0)
NAME = Kind("NAME", str)
FILE = Kind("FILE", Path)
FOLDER = Kind("FOLDER", Path)
OUTPUT = Kind("FILE", str)
DURATION = Kind("DURATION", values.seconds, values.short_duration, float, values.go_duration)
ADDRESSES = Kind("ADDRESS,...", values.addresses, ",".join)
DOMAIN = Kind("DOMAIN", values.domain)
AUTO = ("auto",)
DNS_ADDRESSES = Kind(
    "[ADDRESS]", lambda text: AUTO if text == AUTO[0] else values.addresses(text), ",".join, bare=AUTO[0]
)
NETWORKS = Kind("CIDR[,CIDR]", values.networks, _show_networks)
PORT_RANGE = Kind("A-B", values.port_range, lambda ports: "-".join(map(str, ports)))
INTERFACE = Kind("NAME", values.interface_name)
NODE_PORT_ADDRESSES = Kind(
    "CIDR,...",
    lambda text: values.node_port_addresses(text.split(",")),
    _show_networks,
    values.node_port_addresses,
    lambda addresses: list(map(str, addresses)),
)
