"""The device kube-ipvs0 and its addresses, as ``ip`` is told of them. Pure.

One message to the kernel makes it, says that it is ours and brings it up: a kill leaves none that is nobody's.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from userspace_proxy.host.network import SERVICES_DEVICE
from userspace_proxy.model.endpoint import family_of
from userspace_proxy.modes.rule_line import RuleLine

# What tutorials look at. kube-proxy makes one, too; the group says whose it is: `ip link show group 10777` has ours.
DEVICE = SERVICES_DEVICE
OWN_GROUP = "10777"


def device_lines(held: Set[str], wanted: Iterable[str], *, is_new: bool) -> list[RuleLine]:
    """Return, as ``ip -batch`` reads it, what leads from the addresses *held* to those *wanted*; first what goes."""
    ips = list(wanted)
    made = RuleLine(
        f"link add {DEVICE} up group {OWN_GROUP} type dummy",
        f"A device that leads nowhere: {DEVICE} only holds addresses of Services. kube-proxy makes one of this name, "
        "too; the group says that it is ours.",
    )
    return [
        *((made,) if is_new else ()),
        *(RuleLine(f"address del {_prefix(ip)} dev {DEVICE}") for ip in sorted(held - set(ips))),
        *(RuleLine(f"address replace {_prefix(ip)} dev {DEVICE}", _reason(ip)) for ip in ips if ip not in held),
    ]


def _reason(ip: str) -> str:
    quiet = " Nobody else is asked for it (nodad)." if family_of(ip) == 6 else ""
    return (
        f"{ip} becomes an address of this node, at the device {DEVICE}, so that packets to it come to INPUT, where "
        f"ipvs looks at them.{quiet}"
    )


def _prefix(ip: str) -> str:
    return f"{ip}/128 nodad" if family_of(ip) == 6 else f"{ip}/32"
