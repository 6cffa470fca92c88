"""Decodes a Node: the parts that affect traffic on this node. Pure."""

import contextlib
from collections.abc import Iterator

from userspace_proxy import api
from userspace_proxy.control.decode.addresses import canonical_cidr, canonical_ip
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.topology import Node

_ZONE_LABEL = "topology.kubernetes.io/zone"
_LEAVING_TAINT = "ToBeDeletedByClusterAutoscaler"


def node_of(given: api.Node | None, fallback: Node) -> Node:
    """Return this node as *given* describes it; *fallback* fills what is missing, or everything if *given* is None."""
    if given is None:
        return fallback
    return Node(
        name=given.metadata.name,
        zone=(given.metadata.labels or {}).get(_ZONE_LABEL, ""),
        addresses=tuple(dict.fromkeys(_addresses(given))) or fallback.addresses,
        pod_cidrs=tuple(dict.fromkeys(_pod_cidrs(given))) or fallback.pod_cidrs,
    )


def _addresses(node: api.Node) -> Iterator[str]:
    """Yield the addresses of *node* in kube-proxy's order: internal before external."""
    given = (node.status.addresses if node.status else None) or ()
    for address in (item.address for kind in ("InternalIP", "ExternalIP") for item in given if item.type == kind):
        with contextlib.suppress(ConfigError):
            yield canonical_ip(address or "")


def _pod_cidrs(node: api.Node) -> Iterator[str]:
    """Yield the pod CIDRs of *node*; none if it has not been assigned any yet."""
    spec = node.spec
    for cidr in (spec.pod_cidrs or [spec.pod_cidr or ""]) if spec else ():
        with contextlib.suppress(ConfigError):
            yield canonical_cidr(cidr)


def is_eligible(node: api.Node | None) -> bool:
    """Return whether load balancers may use *node*: it is known and not being removed (behaviours Z2)."""
    if node is None:
        return False
    taints = (node.spec.taints if node.spec else None) or ()
    return node.metadata.deletion_timestamp is None and all(taint.key != _LEAVING_TAINT for taint in taints)
