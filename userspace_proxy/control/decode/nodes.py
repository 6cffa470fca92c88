"""Node -> what of it decides on traffic here. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import canonical_cidr, canonical_ip
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.topology import Node

_ZONE_LABEL = "topology.kubernetes.io/zone"
_LEAVING_TAINT = "ToBeDeletedByClusterAutoscaler"


def node_of(given: api.Node | None, fallback: Node) -> Node:
    """Return what *given*, the object of this node, says; what it does not say (or where it is None) is *fallback*."""
    if given is None:
        return fallback
    zone = (given.metadata.labels or {}).get(_ZONE_LABEL, "")
    return Node(given.metadata.name, zone, tuple(dict.fromkeys(_addresses(given))) or fallback.addresses)


def _addresses(node: api.Node) -> Iterator[str]:
    """Yield its addresses as kube-proxy goes through them: internal ones before external ones."""
    given = (node.status.addresses if node.status else None) or ()
    for kind in ("InternalIP", "ExternalIP"):
        for item in given:
            if item.type == kind and item.address:
                try:
                    yield canonical_ip(item.address)
                except ConfigError:
                    continue


def pod_cidrs(node: api.Node | None) -> tuple[str, ...]:
    """Return the ranges of the addresses of *node*'s pods; none where it has not been given one (yet)."""
    spec = node.spec if node else None
    if spec is None:
        return ()
    found = []
    for cidr in spec.pod_cidrs or ([spec.pod_cidr] if spec.pod_cidr else []):
        try:
            found.append(canonical_cidr(cidr))
        except ConfigError:
            continue
    return tuple(found)


def is_eligible(node: api.Node | None) -> bool:
    """Return whether load balancers may send traffic to *node*: it is known and not about to go (behaviours Z2)."""
    if node is None:
        return False
    taints = (node.spec.taints if node.spec else None) or ()
    return node.metadata.deletion_timestamp is None and all(taint.key != _LEAVING_TAINT for taint in taints)
