"""The device kube-ipvs0 and its addresses: IPVS handles only packets to addresses of this node.

One request to the kernel creates the device, marks it as ours and brings it up: a crash cannot leave an unmarked one.
"""

import socket
from collections.abc import Iterable, Set
from pathlib import Path

from userspace_proxy.host import rtnetlink
from userspace_proxy.host.network import SERVICES_DEVICE
from userspace_proxy.host.tool import run_tool
from userspace_proxy.model.endpoint import family_of
from userspace_proxy.modes.rule_line import RuleLine

DEVICE = SERVICES_DEVICE
# kube-proxy's device has the same name. The group marks ours: `ip link show group 10777` lists it.
OWN_GROUP = 10777
_IPV6 = Path("/proc/sys/net/ipv6/conf")


def device_lines(held: Set[str], desired: Iterable[str], *, is_new: bool) -> list[RuleLine]:
    """Return the input of ``ip -batch`` that turns the addresses *held* into *desired*; deletions come first."""
    ips = list(desired)
    created = RuleLine(
        f"link add {DEVICE} up group {OWN_GROUP} type dummy",
        f"A dummy device, {DEVICE}, which only holds the addresses of Services. kube-proxy has one of the same name; "
        "the group marks this one as ours.",
    )
    return [
        *((created,) if is_new else ()),
        *(RuleLine(f"address del {_prefix(ip)} dev {DEVICE}") for ip in sorted(held - set(ips))),
        *(RuleLine(f"address replace {_prefix(ip)} dev {DEVICE}", _reason(ip)) for ip in ips if ip not in held),
    ]


def _reason(ip: str) -> str:
    nodad = " nodad: do not ask other hosts whether they have it." if family_of(ip) == 6 else ""
    return f"Make {ip} an address of this node, so that packets to it reach INPUT, where IPVS handles them.{nodad}"


def _prefix(ip: str) -> str:
    return f"{ip}/128 nodad" if family_of(ip) == 6 else f"{ip}/32"


class VirtualDevice:
    """The device in the kernel. ``ips``: its addresses, as far as known."""

    def __init__(self) -> None:
        self.ips: set[str] = set()

    async def is_foreign(self) -> bool:
        """Return whether another program created the device."""
        if not _is_there():
            return False
        links = await rtnetlink.read(rtnetlink.interfaces)
        return any(link.name == DEVICE and link.group != OWN_GROUP for link in links)

    async def set_addresses(self, desired: Iterable[str]) -> None:
        """Give the device the *desired* addresses and no others. IPv6 addresses only if this host uses IPv6.

        Raises:
            SyncError: the kernel has no dummy devices, or refused a change.
        """
        desired = set(desired) if _uses_ipv6() else {ip for ip in desired if family_of(ip) == 4}
        if is_new := not _is_there():
            self.ips = set()
        lines = device_lines(self.ips, sorted(desired), is_new=is_new)
        if lines:
            await run_tool("ip", "-batch", "-", stdin="".join(f"{line.text}\n" for line in lines))
        self.ips = desired

    async def remove(self) -> None:
        """Delete the device if this proxy created it."""
        self.ips = set()
        if _is_there() and not await self.is_foreign():
            await run_tool("ip", "link", "del", DEVICE)


def _uses_ipv6() -> bool:
    """Return whether the device, or a new device as long as there is none, can have IPv6 addresses."""
    knobs = (_IPV6 / name / "disable_ipv6" for name in (DEVICE, "default"))
    return next((knob.read_text().strip() == "0" for knob in knobs if knob.exists()), False)


def _is_there() -> bool:
    return DEVICE in {name for _, name in socket.if_nameindex()}
