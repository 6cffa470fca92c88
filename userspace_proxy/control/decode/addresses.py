"""Addresses and port numbers as people write them -> canonical ones, or why they are none. Pure."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Callable, Iterator

from userspace_proxy.errors import ConfigError

_NUMBER = re.compile(r"[0-9]{1,9}")
# Canonical addresses that the API refuses as those of Services and endpoints; a match is ten times cheaper than asking
# `ipaddress`.
_SPECIAL_IP = re.compile(
    r"(?P<unspecified>0\.0\.0\.0\Z|::\Z)|(?P<broadcast>255\.255\.255\.255\Z)|(?P<loopback>127\.|::1\Z)"
    r"|(?P<multicast>22[4-9]\.|23[0-9]\.|ff[0-9a-f]{2}:)|(?P<link_local>169\.254\.|fe[89ab][0-9a-f]:)"
)


def canonical_ip(ip: str, field: str = "") -> str:
    """Return *ip* in canonical form; zeros in front are read as decimal, as older manifests write them.

    An IPv4 address written as IPv6 (``::ffff:10.96.0.10``) is the IPv4 address, as it is for Kubernetes. A zone
    (``fe80::1%eth0``) is refused: it means something on one host only, and no rule could match it.

    Raises:
        ConfigError: it is no IP address.
    """
    try:
        socket.inet_pton(socket.AF_INET, ip)
    except (OSError, ValueError):
        pass
    else:
        return ip  # it takes canonical IPv4 only, and is fifteen times faster than what follows
    text = _without_zeros(ip.strip())
    if "%" in text:
        raise ConfigError(f"{ip!r} has a zone", field=field, mend="write the address alone")
    try:
        address = ipaddress.ip_address(text)
        return str((address.ipv4_mapped if address.version == 6 else None) or address)
    except ValueError:
        mend = f"write one such as {_example(field)}, or leave it out"
        if ip.strip().lower() == "none":
            mend = "a headless Service has 'None', with a capital N"
        raise ConfigError(f"{ip!r} is no IP address", field=field, mend=mend) from None


def _example(field: str) -> str:
    is_from_outside = field.startswith(("spec.externalIPs", "spec.loadBalancerIP", "status.loadBalancer"))
    return "192.0.2.10" if is_from_outside else "10.96.0.10"


def canonical_cidr(cidr: str, field: str = "") -> str:
    """Return *cidr* in canonical form, without the bits of a host; zeros and zones are read as in `canonical_ip`.

    Raises:
        ConfigError: it is no range of addresses.
    """
    text = _without_zeros(cidr.strip())
    if "%" in text:  # what stands behind it may be any text, and rules would have it
        raise ConfigError(f"{cidr!r} has a zone", field=field, mend="write the range alone")
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        mend = "write one such as 192.0.2.0/24"
        raise ConfigError(f"{cidr!r} is no range of addresses", field=field, mend=mend) from None
    if "/" not in text:
        raise ConfigError(f"{cidr!r} is no range of addresses", field=field, mend=f"write {network}")
    return str(network)


def mapped_cidr(cidr: str) -> str | None:
    """Return the IPv4 range that *cidr*, written as IPv6 (``::ffff:10.0.0.0/104``), is; None if it is none."""
    if not cidr.startswith("::ffff:"):
        return None
    network = ipaddress.IPv6Network(cidr)
    if (first := network.network_address.ipv4_mapped) is None or network.prefixlen < 96:
        return None
    return f"{first}/{network.prefixlen - 96}"


def _without_zeros(text: str) -> str:
    """Return *text*, an IPv4 address or CIDR, without zeros in front of numbers; anything else as it is."""
    if "." not in text or ":" in text:
        return text
    ip, slash, length = text.partition("/")
    return ".".join(part.lstrip("0") or part[:1] for part in ip.split(".")) + slash + length


def virtual_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield why *ip* is no address that a Service can have for its own, if it is none."""
    try:
        special = _SPECIAL_IP.match(canonical_ip(ip, field))
    except ConfigError as error:
        yield error
        return
    if special:
        said = f"{ip!r} is {_named(special)}, which no Service can have"
        yield ConfigError(said, field=field, mend=f"choose one such as {_example(field)}")


def backend_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield why *ip* is no address of a backend, if it is none."""
    mend = "write the backend's address, such as 10.244.0.2"
    try:
        special = _no_backend(canonical_ip(ip, field))
    except ConfigError as error:
        is_name = ":" not in ip and any(letter.isalpha() for letter in ip)
        mend = f"{mend}; names are not resolved" if is_name else mend
        yield ConfigError(error.reason, field=field, mend=mend)
        return
    if special:
        yield ConfigError(f"{ip!r} is {_named(special)}, which no backend can have", field=field, mend=mend)


def _no_backend(ip: str) -> re.Match[str] | None:
    """Return why the canonical *ip* is none of a backend.

    The API refuses loopback addresses, too. Here they are allowed: who tries a proxy on one host with manifests of
    his own has his backends there.
    """
    special = _SPECIAL_IP.match(ip)
    return None if special and special.lastgroup == "loopback" else special


def _named(special: re.Match[str]) -> str:
    name = (special.lastgroup or "").replace("_", "-")
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name} address"


def is_ip(text: str) -> bool:
    return _reads(canonical_ip, text)


def is_cidr(text: str) -> bool:
    return _reads(canonical_cidr, text)


def _reads(read: Callable[[str], str], text: str) -> bool:
    try:
        read(text)
    except ConfigError:
        return False
    return True


def backend_ip(ip: str) -> str | None:
    """Return *ip* in canonical form; None where it is none that a backend can have."""
    try:
        canonical = canonical_ip(ip)
    except ConfigError:
        return None
    return None if _no_backend(canonical) else canonical


def as_number(target: int | str | None) -> int | None:
    """Return a targetPort that is a number, in quotes or not; None for a name, and where there is none."""
    if isinstance(target, str):
        return int(target) if _NUMBER.fullmatch(target) else None
    return target


def is_port(port: int | None) -> bool:
    return port is not None and 1 <= port <= 65_535


def number_errors(port: int, field: str) -> Iterator[ConfigError]:
    """Yield why *port* is no port number, if it is none."""
    if not is_port(port):
        yield ConfigError(f"{port} is not a port", field=field, mend="write a number from 1 to 65535")
