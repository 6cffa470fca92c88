"""The device kube-ipvs0 and its addresses, as ``ip`` is told of them. Pure.

One message to the kernel makes it, says that it is ours and brings it up: a kill leaves none that is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from userspace_proxy.host.network import SERVICES_DEVICE
from userspace_proxy.model.endpoint import family_of

# What tutorials look at. kube-proxy makes one, too; the group says whose it is: `ip link show group 10777` has ours.
DEVICE = SERVICES_DEVICE
OWN_GROUP = "10777"


def device_lines(held: Set[str], wanted: Iterable[str], *, is_new: bool) -> list[str]:
    """Return, as ``ip -batch`` reads it, what leads from the addresses *held* to those *wanted*; first what goes."""
    ips = list(wanted)
    return [
        *((f"link add {DEVICE} up group {OWN_GROUP} type dummy",) if is_new else ()),
        *(f"address del {_prefix(ip)} dev {DEVICE}" for ip in sorted(held - set(ips))),
        *(f"address replace {_prefix(ip)} dev {DEVICE}" for ip in ips if ip not in held),
    ]


def _prefix(ip: str) -> str:
    return f"{ip}/128 nodad" if family_of(ip) == 6 else f"{ip}/32"
