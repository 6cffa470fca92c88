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
    return Node(
        name=given.metadata.name,
        zone=(given.metadata.labels or {}).get(_ZONE_LABEL, ""),
        addresses=tuple(dict.fromkeys(_addresses(given))) or fallback.addresses,
        pod_cidrs=tuple(dict.fromkeys(_pod_cidrs(given))) or fallback.pod_cidrs,
    )


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


def _pod_cidrs(node: api.Node) -> Iterator[str]:
    """Yield the ranges that the addresses of *node*'s pods are from; none where it has not been given one (yet)."""
    spec = node.spec
    for cidr in (spec.pod_cidrs or [spec.pod_cidr or ""]) if spec else ():
        try:
            yield canonical_cidr(cidr)
        except ConfigError:
            continue


def is_eligible(node: api.Node | None) -> bool:
    """Return whether load balancers may send traffic to *node*: it is known and not about to go (behaviours Z2)."""
    if node is None:
        return False
    taints = (node.spec.taints if node.spec else None) or ()
    return node.metadata.deletion_timestamp is None and all(taint.key != _LEAVING_TAINT for taint in taints)
