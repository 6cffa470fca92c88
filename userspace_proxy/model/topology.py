"""Choose the endpoints that may take traffic, by readiness, node and topology hints."""

from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.service import ServicePort


@dataclass(frozen=True, slots=True)
class Node:
    """The facts about this node that endpoint selection needs.

    ``name``: if "", no endpoint is local. ``addresses``: canonical, the primary one of each family first.
    ``pod_cidrs``: the ranges of its pods' addresses.
    """

    name: str = ""
    zone: str = ""
    addresses: tuple[str, ...] = ()
    pod_cidrs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reach:
    """The endpoints of one service port that new traffic may use, by traffic policy (kube-proxy: topology.go).

    ``has_any``: some endpoint in the cluster may take traffic, perhaps on another node.
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    has_any: bool = False


def reach(service_port: ServicePort, endpoints: Iterable[Endpoint], node: Node) -> Reach:
    """Return which of *endpoints*, all of one family, clients of *service_port* may reach from *node*.

    Cluster: ready endpoints that hints assign to this node or zone. Local: ready endpoints on this node; hints do not
    apply. If there are none, endpoints that still serve while terminating (KEP-1669); hints do not apply to these.
    """
    candidates = tuple(endpoints)
    external_local = service_port.external_local and service_port.is_externally_accessible
    uses_cluster = not service_port.internal_local or service_port.is_externally_accessible
    uses_local = service_port.internal_local or external_local
    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    if uses_cluster:
        cluster = apply_hints(node, usable_endpoints(candidates))
    has_any = bool(cluster)
    if uses_local:
        has_any = has_any or bool(usable_endpoints(candidates))
        if node.name:
            local = usable_endpoints(e for e in candidates if e.node_name == node.name)
    return Reach(cluster, local, has_any)


def usable_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints that may take new traffic.

    Ready endpoints; if there are none, endpoints that still serve while terminating (KEP-1669).
    """
    candidates = tuple(endpoints)
    ready = tuple(e for e in candidates if e.ready)
    return held_once(ready or tuple(e for e in candidates if e.serving and e.terminating), candidates)


def apply_hints(node: Node, usable: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return those of *usable* that hints assign to *node*: by node name, else by zone, else all.

    A kind of hint applies only if every endpoint has it and at least one names this node or zone (KEP-2433, KEP-3015).
    Hints do not apply to endpoints that are not ready.
    """
    if not all(e.ready for e in usable):
        return usable
    for mine, hints in ((node.name, attrgetter("node_hints")), (node.zone, attrgetter("zone_hints"))):
        if mine and all(map(hints, usable)):
            near = tuple(e for e in usable if mine in hints(e))
            if near:
                return near
    return usable


def serving_endpoints(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """Return the endpoints whose existing UDP flows may stay (behaviours U1)."""
    candidates = tuple(endpoints)
    return held_once(tuple(e for e in candidates if e.serving), candidates)


def held_once(found: tuple[Endpoint, ...], candidates: tuple[Endpoint, ...]) -> tuple[Endpoint, ...]:
    """Return *found*, which is a part of *candidates*, or *candidates* if it is all of them: one tuple less in memory.

    In most Services every endpoint is ready.
    """
    return candidates if len(found) == len(candidates) else found
