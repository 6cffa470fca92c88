"""Endpoints: where a service port's traffic may go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Address = tuple[str, int]
"""An IP address as canonical text, and a port: what a socket connects to."""

Family = Literal[4, 6]
FAMILIES: tuple[Family, ...] = (4, 6)
# Of a list of endpoints, so many are named.
_SHOWN_MAX = 5


def family_of(ip: str) -> Family:
    """Return the family of an address or CIDR."""
    return 6 if ":" in ip else 4


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address behind a service port, with what the API says of it.

    ``ip`` is canonical text (sockets take text, and 100,000 endpoints are cheap that way).
    ``ready``: takes new traffic. ``serving``: answers, whatever ``ready`` says. ``terminating``: on its way out.
    ``zone_hints``, ``node_hints``: for whom the slice controller meant it; empty where it said nothing.
    """

    ip: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node_name: str | None = None
    zone_hints: frozenset[str] = frozenset()
    node_hints: frozenset[str] = frozenset()

    @property
    def address(self) -> Address:
        """Where to connect; two endpoints with one address are one backend."""
        return self.ip, self.port

    def __str__(self) -> str:
        return join_address(self.ip, self.port)


def join_address(ip: str, port: int) -> str:
    """Return ``ip:port``, with brackets around an IPv6 address."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def without_duplicates(endpoints: list[Endpoint]) -> tuple[Endpoint, ...]:
    """Return *endpoints* with each address once, in the order given.

    Of two with one address the one that is not terminating wins: a pod's IP was used again (behaviours S9).
    """
    by_address: dict[Address, Endpoint] = {}
    for endpoint in endpoints:
        known = by_address.get(endpoint.address)
        if known is None or (known.terminating and not endpoint.terminating):
            by_address[endpoint.address] = endpoint
    return tuple(by_address.values())


def difference(before: Iterable[Endpoint], after: Iterable[Endpoint]) -> str:
    """Return in words how the endpoints of a service port have changed: how many there are, and which came and left."""
    old, new = ({endpoint.address: endpoint for endpoint in known} for known in (before, after))
    both = [(old[address], endpoint) for address, endpoint in new.items() if address in old]
    parts = {
        "added": [endpoint for address, endpoint in new.items() if address not in old],
        "removed": [endpoint for address, endpoint in old.items() if address not in new],
        "ready": [now for was, now in both if now.ready and not was.ready],
        "not ready": [now for was, now in both if was.ready and not now.ready],
        "terminating": [now for was, now in both if now.terminating and not was.terminating],
    }
    ready = sum(endpoint.ready for endpoint in new.values())
    said = [f"{what} {_listed(endpoints)}" for what, endpoints in parts.items() if endpoints]
    return "; ".join([f"{len(new)} endpoint{'' if len(new) == 1 else 's'}, {ready} ready", *said])


def _listed(endpoints: Sequence[Endpoint]) -> str:
    more = len(endpoints) - _SHOWN_MAX
    return ", ".join(map(str, endpoints[:_SHOWN_MAX])) + (f" and {more} more" if more > 0 else "")
