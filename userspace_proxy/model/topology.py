"""Which endpoints may take traffic."""

from __future__ import annotations

from collections.abc import Iterable

from userspace_proxy.model.endpoint import Endpoint


def usable_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints that may take new traffic.

    Ready ones; if there are none, those still serving while they terminate (KEP-1669).
    """
    known = tuple(endpoints)
    return tuple(e for e in known if e.ready) or tuple(e for e in known if e.serving and e.terminating)


def serving_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints whose existing UDP flows may stay where they are (behaviours U1)."""
    return tuple(e for e in endpoints if e.serving)
