"""Parse texts of flags and configuration files: durations, ranges of addresses and of ports.

Each function raises ValueError for a wrong text, and says what to write instead.
"""

import ipaddress
import re
from typing import Literal

from userspace_proxy.model.duration import duration

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
# "primary" is known only when the Node is.
NodePortAddress = Network | Literal["primary"]

_INTERFACE_NAME_SIZE = 16  # IFNAMSIZ, with the byte that ends it
_INTERFACE_NAME = re.compile(r"[^\s/\"'\\;{}#]+")  # the kernel would take more; rules are text
_DOMAIN = re.compile(r"(?=.{1,190}$)[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?(\.[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?)*")
_KEYWORDS = {"localhost": ("127.0.0.0/8", "::1/128"), "all": ("0.0.0.0/0", "::/0")}


def seconds(text: str) -> float:
    """Return the seconds of a duration, or of a plain number: 5, 0.25."""
    try:
        number = float(text)
    except ValueError:
        return duration(text)
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text!r} is no duration; write seconds, or such as 250ms, 30s, 1m30s")
    return number


def go_duration(seconds: float) -> str:
    """Return *seconds* as Go writes a duration: ``24h0m0s``, ``1m30s``, ``50ms``, ``0s``."""
    if 0 < seconds < 1:
        return f"{seconds * 1000:g}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    text = f"{rest:g}s"
    if hours or minutes:
        text = f"{minutes}m{text}"
    return f"{hours}h{text}" if hours else text


def short_duration(seconds: float) -> str:
    """Return *seconds* as a person writes them: 24h, 30s, 50ms."""
    if not seconds:
        return "0"
    for unit, size in (("h", 3600), ("s", 1)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:g}{unit}"
    return f"{seconds * 1000:g}ms"


def networks(text: str) -> tuple[Network, ...]:
    """Return the ranges of *text* (10.96.0.0/16,fd00::/108): one for each IP family at most."""
    found = tuple(_network(part.strip()) for part in text.split(","))
    if len({network.version for network in found}) != len(found):
        raise ValueError("one range for each IP family at most")
    return found


def addresses(text: str) -> tuple[str, ...]:
    """Return the IP addresses of *text*, canonical: 10.96.0.10,fd00::a."""
    try:
        return tuple(str(ipaddress.ip_address(part.strip())) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no IP address; write such as 10.96.0.10, or two with a comma") from None


def domain(text: str) -> str:
    """Return *text*, the name of a domain, in lower case and without its final dot."""
    name = text.lower().rstrip(".")
    if not _DOMAIN.fullmatch(name):
        raise ValueError(f"{text!r} is no domain; write such as cluster.local")
    return name


def node_port_addresses(texts: list[str]) -> tuple[NodePortAddress, ...]:
    """Parse *texts*: each is an address range, or one of the words primary, localhost and all."""
    found: list[NodePortAddress] = []
    for text in texts:
        if text == "primary":
            found.append("primary")
        elif text in _KEYWORDS:
            found += map(ipaddress.ip_network, _KEYWORDS[text])
        else:
            found.append(_network(text))
    return tuple(found)


def port_range(text: str) -> tuple[int, int]:
    """Return both ends of *text*: 10000-29999, or, as kube-proxy reads it too, 10000+19999."""
    first, plus, more = text.partition("+")
    if plus and first.isdigit() and more.isdigit():
        last = str(int(first) + int(more))
    else:
        first, _, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 1 <= int(first) < int(last) <= 65_535):
        raise ValueError(f"{text!r} is no port range; write one such as 10000-29999")
    return int(first), int(last)


def with_port(address: str, port: int) -> str:
    """Return *address* with *port* if it is an IP address without a port."""
    try:
        ip = ipaddress.ip_address(address.removeprefix("[").removesuffix("]"))
    except ValueError:
        return address
    return f"[{ip}]:{port}" if ip.version == 6 else f"{ip}:{port}"


def interface_name(text: str) -> str:
    """Return *text* if it can be the name of a network interface, or the beginning of one."""
    if len(text) >= _INTERFACE_NAME_SIZE or not _INTERFACE_NAME.fullmatch(text):
        raise ValueError(f"{text!r} is no interface; write a name of up to {_INTERFACE_NAME_SIZE - 1} characters")
    return text


def _network(text: str) -> Network:
    if "%" in text:  # what stands behind it may be any text
        raise ValueError(f"{text!r} has a zone; write a range such as 10.96.0.0/16")
    try:
        return ipaddress.ip_network(text)
    except ValueError as error:
        raise ValueError(f"{error}; write a range such as 10.96.0.0/16") from None
