"""Text shared by the nftables tables of several modes. Pure."""

import hashlib
import ipaddress
from collections.abc import Iterable

from userspace_proxy.model.endpoint import Family, family_of
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import PodDetector

# Reject packets to Service addresses that no rule translates. The route of `network.add_routes` would send them out
# through lo and in again, until their TTL is used up. The client gets the same ICMP error as then. IPv6 packets and
# packets of this node itself do not loop.
FORWARD_HOOK = "type filter hook forward priority 10; policy accept;"  # after filters at priority 0
NO_LOOP = 'oif "lo" reject with icmpx type host-unreachable'

_COMMENT_BYTES_MAX = 127  # followed by a zero byte
_PORT_NAME_SHOWN = 24  # longer than the 15 characters of a container port's name


def comment(name: ServicePortName) -> str:
    """Return ``namespace/name:port``, shortened with a hash if it exceeds the 128 bytes that nft allows.

    The longest legal names need 191 bytes, and one comment that is too long fails the whole transaction. The Service's
    name and a port name of usual length always stay complete: users search for them.
    """
    text = str(name)
    if len(text) <= _COMMENT_BYTES_MAX:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    port = f":{name.port_name[:_PORT_NAME_SHOWN]}" if name.port_name else ""
    ending = f"~{digest}/{name.service.name}{port}"
    return name.service.namespace[: _COMMENT_BYTES_MAX - len(ending)] + ending


def removal(table: str) -> str:
    """Return the script that removes *table* (``family name``). It succeeds if there is none.

    Without the flag, the kernel would call the chains of a dormant table again before it deletes them.
    """
    return f"table {table} {{ flags dormant; }}\ndelete table {table}\n"


def pod_cidrs(pods: PodDetector, family: Family) -> tuple[str, ...]:
    return merged(pods.cidrs, family)


def merged(cidrs: Iterable[str], family: Family) -> tuple[str, ...]:
    """Return the networks of *family* in *cidrs*, merged so that none overlap, as interval sets require."""
    networks = (ipaddress.ip_network(cidr, strict=False) for cidr in cidrs if family_of(cidr) == family)
    return tuple(map(str, ipaddress.collapse_addresses(networks)))  # type: ignore[type-var]


def is_everything(networks: tuple[str, ...]) -> bool:
    return networks in (("0.0.0.0/0",), ("::/0",))
