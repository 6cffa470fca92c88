"""Endpoints: where a service port's traffic may go."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

Address = tuple[str, int]
"""An IP address as canonical text, and a port: what a socket connects to."""

Family = Literal[4, 6]
FAMILIES: tuple[Family, ...] = (4, 6)
# Endpoints named in one description; the rest are counted.
_SHOWN_MAX = 5


def family_of(ip: str) -> Family:
    """Return the family of an address or CIDR."""
    return 6 if ":" in ip else 4


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One address behind a service port, with its conditions from the API.

    ``ip`` is canonical text: sockets take text, and it keeps 100,000 endpoints cheap.
    ``ready``: takes new traffic. ``serving``: answers requests, even if not ready. ``terminating``: is shutting down.
    ``zone_hints``, ``node_hints``: the zones and nodes that the slice controller assigns it to; empty without hints.
    Tuples, because every empty set that a worker decodes takes 216 bytes.
    """

    ip: str
    port: int
    ready: bool = True
    serving: bool = True
    terminating: bool = False
    node_name: str | None = None
    zone_hints: tuple[str, ...] = ()
    node_hints: tuple[str, ...] = ()

    @property
    def address(self) -> Address:
        """The address to connect to. Endpoints with equal addresses are the same backend."""
        return self.ip, self.port

    def __str__(self) -> str:
        return join_address(self.ip, self.port)


def join_address(ip: str, port: int) -> str:
    """Return ``ip:port``, with brackets around an IPv6 address."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def without_duplicates(endpoints: list[Endpoint]) -> tuple[Endpoint, ...]:
    """Return *endpoints* with each address once, in the given order.

    Of two with the same address, prefer the one that is not terminating: the pod's IP was reused (behaviours S9).
    """
    by_address: dict[Address, Endpoint] = {}
    for endpoint in endpoints:
        earlier = by_address.get(endpoint.address)
        if earlier is None or (earlier.terminating and not endpoint.terminating):
            by_address[endpoint.address] = endpoint
    return tuple(by_address.values())


def difference(before: Iterable[Endpoint], after: Iterable[Endpoint]) -> str:
    """Describe how endpoints changed: how many there are, and which were added, removed or changed condition."""
    old, new = ({endpoint.address: endpoint for endpoint in endpoints} for endpoints in (before, after))
    both = [(old[address], endpoint) for address, endpoint in new.items() if address in old]
    parts = {
        "added": [endpoint for address, endpoint in new.items() if address not in old],
        "removed": [endpoint for address, endpoint in old.items() if address not in new],
        "ready": [now for was, now in both if now.ready and not was.ready],
        "not ready": [now for was, now in both if was.ready and not now.ready],
        "terminating": [now for was, now in both if now.terminating and not was.terminating],
    }
    ready = sum(endpoint.ready for endpoint in new.values())
    changes = [f"{what} {_listed(endpoints)}" for what, endpoints in parts.items() if endpoints]
    return "; ".join([f"{len(new)} endpoint{'' if len(new) == 1 else 's'}, {ready} ready", *changes])


def _listed(endpoints: Sequence[Endpoint]) -> str:
    more = len(endpoints) - _SHOWN_MAX
    return ", ".join(map(str, endpoints[:_SHOWN_MAX])) + (f" and {more} more" if more > 0 else "")
