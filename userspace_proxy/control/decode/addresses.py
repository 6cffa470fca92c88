"""Parses addresses and port numbers into canonical form, or reports why they are invalid. Pure."""

import ipaddress
import re
import socket
from collections.abc import Callable, Iterator

from userspace_proxy.errors import ConfigError

_NUMBER = re.compile(r"[0-9]{1,9}")
# Canonical addresses that the API rejects for Services and endpoints. A regular expression is ten times faster than
# `ipaddress`.
_SPECIAL_IP = re.compile(
    r"(?P<unspecified>0\.0\.0\.0\Z|::\Z)|(?P<broadcast>255\.255\.255\.255\Z)|(?P<loopback>127\.|::1\Z)"
    r"|(?P<multicast>22[4-9]\.|23[0-9]\.|ff[0-9a-f]{2}:)|(?P<link_local>169\.254\.|fe[89ab][0-9a-f]:)"
)


def canonical_ip(ip: str, field: str = "") -> str:
    """Return *ip* in canonical form; leading zeros are read as decimal, as in older manifests.

    An IPv4 address written as IPv6 (``::ffff:10.96.0.10``) becomes the IPv4 address, as in Kubernetes. A zone
    (``fe80::1%eth0``) is rejected: it has a meaning on one host only, and no rule could match it.

    Raises:
        ConfigError: *ip* is not an IP address.
    """
    try:
        socket.inet_pton(socket.AF_INET, ip)
    except (OSError, ValueError):
        pass
    else:
        return ip  # inet_pton accepts canonical IPv4 only, and is fifteen times faster than `ipaddress`
    text = _without_zeros(ip.strip())
    if "%" in text:
        raise ConfigError(f"{ip!r} has a zone", field=field, fix="write the address alone")
    try:
        address = ipaddress.ip_address(text)
        return str((address.ipv4_mapped if address.version == 6 else None) or address)
    except ValueError:
        fix = f"write one such as {_example(field)}, or leave it out"
        if ip.strip().lower() == "none":
            fix = "a headless Service has 'None', with a capital N"
        raise ConfigError(f"{ip!r} is no IP address", field=field, fix=fix) from None


def _example(field: str) -> str:
    is_from_outside = field.startswith(("spec.externalIPs", "spec.loadBalancerIP", "status.loadBalancer"))
    return "192.0.2.10" if is_from_outside else "10.96.0.10"


def canonical_cidr(cidr: str, field: str = "") -> str:
    """Return *cidr* in canonical form, with host bits cleared; zeros and zones are treated as in `canonical_ip`.

    Raises:
        ConfigError: *cidr* is not an address range.
    """
    text = _without_zeros(cidr.strip())
    if "%" in text:  # any text may follow the %, and it would end up in the rules
        raise ConfigError(f"{cidr!r} has a zone", field=field, fix="write the range alone")
    try:
        network = ipaddress.ip_network(text, strict=False)
    except ValueError:
        fix = "write one such as 192.0.2.0/24"
        raise ConfigError(f"{cidr!r} is no range of addresses", field=field, fix=fix) from None
    if "/" not in text:
        raise ConfigError(f"{cidr!r} is no range of addresses", field=field, fix=f"write {network}")
    return str(network)


def mapped_cidr(cidr: str) -> str | None:
    """Return the IPv4 range that the IPv4-mapped *cidr* (``::ffff:10.0.0.0/104``) stands for, else None."""
    if not cidr.startswith("::ffff:"):
        return None
    network = ipaddress.IPv6Network(cidr)
    if (first := network.network_address.ipv4_mapped) is None or network.prefixlen < 96:
        return None
    return f"{first}/{network.prefixlen - 96}"


def _without_zeros(text: str) -> str:
    """Return *text* without leading zeros in its numbers if it is an IPv4 address or CIDR, else unchanged."""
    if "." not in text or ":" in text:
        return text
    ip, slash, length = text.partition("/")
    return ".".join(part.lstrip("0") or part[:1] for part in ip.split(".")) + slash + length


def virtual_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield an error if *ip* is not a valid address for a Service."""
    try:
        special = _SPECIAL_IP.match(canonical_ip(ip, field))
    except ConfigError as error:
        yield error
        return
    if special:
        reason = f"{ip!r} is {_named(special)}, which no Service can have"
        yield ConfigError(reason, field=field, fix=f"choose one such as {_example(field)}")


def backend_ip_errors(ip: str, field: str) -> Iterator[ConfigError]:
    """Yield an error if *ip* is not a valid address for a backend."""
    fix = "write the backend's address, such as 10.244.0.2"
    try:
        special = _no_backend(canonical_ip(ip, field))
    except ConfigError as error:
        is_name = ":" not in ip and any(letter.isalpha() for letter in ip)
        fix = f"{fix}; names are not resolved" if is_name else fix
        yield ConfigError(error.reason, field=field, fix=fix)
        return
    if special:
        yield ConfigError(f"{ip!r} is {_named(special)}, which no backend can have", field=field, fix=fix)


def _no_backend(ip: str) -> re.Match[str] | None:
    """Return the match that makes *ip* (canonical) invalid for a backend, or None if it is valid.

    Loopback addresses are valid here, though the API rejects them: on a single test host, backends listen there.
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
    """Return *ip* in canonical form, or None if it is not a valid address for a backend."""
    try:
        canonical = canonical_ip(ip)
    except ConfigError:
        return None
    return None if _no_backend(canonical) else canonical


def as_number(target: int | str | None) -> int | None:
    """Return a numeric targetPort, quoted or not, or None if it is a name or missing."""
    if isinstance(target, str):
        return int(target) if _NUMBER.fullmatch(target) else None
    return target


def is_port(port: int | None) -> bool:
    return port is not None and 1 <= port <= 65_535


def number_errors(port: int, field: str) -> Iterator[ConfigError]:
    """Yield an error if *port* is not a port number."""
    if not is_port(port):
        yield ConfigError(f"{port} is not a port", field=field, fix="write a number from 1 to 65535")
