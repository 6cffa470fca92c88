"""The changes that turn the virtual servers in the kernel into the desired ones. Pure."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import StrEnum
from typing import NamedTuple

from userspace_proxy.model.endpoint import Address, join_address
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.table import VirtualServers, VirtualServerSpec

_Servers = Mapping[Portal, VirtualServerSpec]


class Verb(StrEnum):
    ADD = "add"
    SET = "set"
    DELETE = "del"


class ServerChange(NamedTuple):
    """One change in IPVS: of *server* at *portal*, or of *endpoint* behind it."""

    verb: Verb
    portal: Portal
    server: VirtualServerSpec
    endpoint: Address | None = None
    weight: int = 0

    @property
    def comes_first(self) -> bool:
        """Whether changes of endpoints behind the same portal need this one."""
        return self.endpoint is None and self.verb is not Verb.DELETE

    def __str__(self) -> str:
        what = f"server ({self.server.scheduler})" if self.endpoint is None else join_address(*self.endpoint)
        return f"{self.verb} {what} at {self.portal.protocol} {self.portal}"


def server_changes(present: _Servers, desired: _Servers) -> Iterator[ServerChange]:
    """Yield the changes that turn *present* into *desired*, for the portals in either. No connection is cut.

    Removed TCP endpoints stay with the weight 0, and so does a virtual server that has any, until
    `removals_when_idle` yields them. UDP endpoints are deleted at once, so that their flows move to another one.
    """
    for portal, server in desired.items():
        yield from _server_change(portal, present.get(portal), server)
    for portal, server in present.items():
        if portal not in desired:
            yield from _drain(portal, server, server, ())
            if portal.protocol is L4Protocol.UDP or not server.weights:
                yield ServerChange(Verb.DELETE, portal, server)


def _server_change(
    portal: Portal, there: VirtualServerSpec | None, server: VirtualServerSpec
) -> Iterator[ServerChange]:
    if there is None:
        yield ServerChange(Verb.ADD, portal, server)
        there = VirtualServerSpec(server.scheduler, server.affinity_timeout_s)
    elif (there.scheduler, there.affinity_timeout_s) != (server.scheduler, server.affinity_timeout_s):
        yield ServerChange(Verb.SET, portal, server)
    # Add endpoints before others are removed: at no moment is there none.
    for endpoint, weight in server.weights.items():
        if (held := there.weights.get(endpoint)) is None:
            yield ServerChange(Verb.ADD, portal, server, endpoint, weight)
        elif held != weight:
            yield ServerChange(Verb.SET, portal, server, endpoint, weight)
    yield from _drain(portal, server, there, server.weights)


def _drain(
    portal: Portal, server: VirtualServerSpec, there: VirtualServerSpec, kept: Collection[Address]
) -> Iterator[ServerChange]:
    """Yield the changes after which the endpoints of *there* that are not *kept* get no new connections."""
    for endpoint, weight in there.weights.items():
        if endpoint in kept:
            continue
        if portal.protocol is L4Protocol.UDP:
            yield ServerChange(Verb.DELETE, portal, server, endpoint)
        elif weight:
            yield ServerChange(Verb.SET, portal, server, endpoint, 0)


class ConnectionCounts(NamedTuple):
    """The connections of an endpoint: ``active`` are established, ``inactive`` begin or end (IPVS's own words)."""

    active: int
    inactive: int


def removals_when_idle(
    present: _Servers, desired: _Servers, connections: Mapping[tuple[Portal, Address], ConnectionCounts]
) -> Iterator[ServerChange]:
    """Yield the deletions of virtual servers and endpoints that are not *desired* and have no *connections* left.

    A virtual server that goes as a whole waits for established connections only, so that its address is free soon.
    """
    for portal, server in present.items():
        counts = {endpoint: connections.get((portal, endpoint), ConnectionCounts(0, 0)) for endpoint in server.weights}
        if portal in desired:
            idle = (e for e, count in counts.items() if not any(count) and e not in desired[portal].weights)
            yield from (ServerChange(Verb.DELETE, portal, server, endpoint) for endpoint in idle)
        elif not any(count.active for count in counts.values()):
            yield ServerChange(Verb.DELETE, portal, server)


def record(present: VirtualServers, done: Iterable[ServerChange]) -> None:
    """Update *present*, what IPVS has, by the changes that were *done*."""
    weights_of: dict[Portal, dict[Address, int]] = {}  # copies, which no other virtual server shares
    for verb, portal, server, endpoint, weight in done:
        if endpoint is None and verb is Verb.DELETE:
            present.pop(portal, None)
            weights_of.pop(portal, None)
            continue
        before = present.get(portal, VirtualServerSpec())
        if portal not in weights_of:
            weights_of[portal] = dict(before.weights)
        weights, after = weights_of[portal], server if endpoint is None else before
        present[portal] = VirtualServerSpec(after.scheduler, after.affinity_timeout_s, weights)
        if endpoint is not None:
            _record_endpoint(weights, verb, endpoint, weight)


def _record_endpoint(weights: dict[Address, int], verb: Verb, endpoint: Address, weight: int) -> None:
    if verb is Verb.DELETE:
        weights.pop(endpoint, None)
    else:
        weights[endpoint] = weight
