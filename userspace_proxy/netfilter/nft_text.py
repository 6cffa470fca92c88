"""Parts of nftables text that the tables of several modes have in common. Pure."""

from __future__ import annotations

import hashlib
import ipaddress
from collections.abc import Iterable

from userspace_proxy.interfaces import PodDetector
from userspace_proxy.model.endpoint import Family, family_of
from userspace_proxy.model.names import ServicePortName

# What nobody serves goes where `network.add_routes` leads it: out by lo, in again, and so on until its TTL is used up.
# Who sent it is told what he would be told then. IPv6 makes no such loops, nor do packets of this node's own.
FORWARD_HOOK = "type filter hook forward priority 10; policy accept;"  # others may have refused it before, at 0
NO_LOOP = 'oif "lo" reject with icmpx type host-unreachable'

_COMMENT_BYTES_MAX = 127  # and a zero behind it
_PORT_NAME_SHOWN = 24  # more than the 15 that a container's port name may have


def comment(name: ServicePortName) -> str:
    """Return ``namespace/name:port`` in the 128 bytes that nft allows; what is too long gives way to a hash.

    The longest legal names need 191 bytes, and one comment too long fails the whole transaction. The Service's
    own name is always there, whole, and so is a port name of the usual length: people search for them.
    """
    text = str(name)
    if len(text) <= _COMMENT_BYTES_MAX:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    port = f":{name.port_name[:_PORT_NAME_SHOWN]}" if name.port_name else ""
    ending = f"~{digest}/{name.service.name}{port}"
    return name.service.namespace[: _COMMENT_BYTES_MAX - len(ending)] + ending


def pod_cidrs(pods: PodDetector, family: Family) -> tuple[str, ...]:
    return merged(pods.cidrs, family)


def merged(cidrs: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return the networks of *family* in *cidrs* without overlap, which a set of intervals refuses."""
    networks = (ipaddress.ip_network(cidr, strict=False) for cidr in cidrs if family_of(cidr) == family)
    return tuple(map(str, ipaddress.collapse_addresses(networks)))  # type: ignore[type-var]


def is_everything(networks: tuple[str, ...]) -> bool:
    return networks in (("0.0.0.0/0",), ("::/0",))
