"""Which endpoints may take traffic: the ready ones, those of this node, those that are meant for its zone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.service import ServicePort


@dataclass(frozen=True, slots=True)
class Node:
    """What decides on endpoints here: this node's name ("": no endpoint is local), its zone, its own addresses.

    ``addresses`` are canonical, the primary one of each family first. ``pod_cidrs``: what its pods have theirs from.
    """

    name: str = ""
    zone: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """The endpoints of one service port that new traffic may go to, by traffic policy (kube-proxy: topology.go).

    ``has_any``: somewhere in the cluster there is one that may take traffic, though perhaps none of this node.
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_any: bool = False


def reach(service_port: ServicePort, endpoints: Iterable[Endpoint], node: Node) -> Reach:
    """Return which of *endpoints*, all of one family, the clients of *service_port* may reach from *node*.

    Cluster: the ready ones that are meant for this node or zone; local: the ready ones on this node, whatever the
    hints say. Where there are none, those that still serve while they terminate (KEP-1669), hinted or not.
    """
    known = tuple(endpoints)
    external_local = service_port.external_local and service_port.is_externally_accessible
    uses_cluster = not service_port.internal_local or service_port.is_externally_accessible
    uses_local = service_port.internal_local or external_local
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    if uses_cluster:
        cluster = meant_for(node, usable_endpoints(known))
    has_any = bool(cluster)
    if uses_local:
        has_any = has_any or bool(usable_endpoints(known))
        if node.name:
            local = usable_endpoints(e for e in known if e.node_name == node.name)
    return Reach(cluster, local, has_any)


def usable_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints that may take new traffic.

    Ready ones; if there are none, those still serving while they terminate (KEP-1669).
    """
    known = tuple(endpoints)
    return tuple(e for e in known if e.ready) or tuple(e for e in known if e.serving and e.terminating)


def meant_for(node: Node, usable: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return those of *usable* that their hints mean for *node*: for it by name, else for its zone, else all.

    A kind of hint counts only where every ready endpoint has it, and one of them names this node or zone (KEP-2433,
    KEP-3015). Endpoints that are not ready are a last resort, and taken whatever their hints say.
    """
    if not all(e.ready for e in usable):
        return usable
    for mine, hints in ((node.name, attrgetter("node_hints")), (node.zone, attrgetter("zone_hints"))):
        if mine and all(map(hints, usable)):
            meant = tuple(e for e in usable if mine in hints(e))
            if meant:
                return meant
    return usable


def serving_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints whose existing UDP flows may stay where they are (behaviours U1)."""
    return tuple(e for e in endpoints if e.serving)
