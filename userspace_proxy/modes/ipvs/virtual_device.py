"""The device that bears portals' addresses in ipvs mode: IPVS sees what is addressed to this node alone."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from pathlib import Path

from userspace_proxy.host.tool import parsed, run_tool
from userspace_proxy.model.endpoint import family_of
from userspace_proxy.modes.ipvs.device import DEVICE, OWN_GROUP, device_lines

_IPV6 = Path("/proc/sys/net/ipv6/conf")


class VirtualDevice:
    """``ips``: the addresses that it has, as far as we know."""

    def __init__(self) -> None:
        self.ips: set[str] = set()

    async def is_foreign(self) -> bool:
        """Return whether there is one that is somebody else's."""
        if not _is_there():
            return False
        links = parsed(await run_tool("ip", "-json", "link", "show", "dev", DEVICE))
        return any(link.get("group") != OWN_GROUP for link in links)

    async def bear(self, wanted: Iterable[str]) -> None:
        """Have just the addresses that are *wanted*, those of IPv6 only where this host uses it.

        Raises:
            SyncError: the kernel has no such devices, or refused.
        """
        wanted = set(wanted) if _uses_ipv6() else {ip for ip in wanted if family_of(ip) == 4}
        if is_new := not _is_there():
            self.ips = set()
        lines = device_lines(self.ips, sorted(wanted), is_new=is_new)
        if lines:
            await run_tool("ip", "-batch", "-", stdin="".join(f"{line.text}\n" for line in lines))
        self.ips = wanted

    async def remove(self) -> None:
        """Take it away, if it is ours."""
        self.ips = set()
        if _is_there() and not await self.is_foreign():
            await run_tool("ip", "link", "del", DEVICE)


def _uses_ipv6() -> bool:
    """Return whether the device can have IPv6 addresses; before there is one, whether new devices can."""
    knobs = (_IPV6 / name / "disable_ipv6" for name in (DEVICE, "default"))
    return next((knob.read_text().strip() == "0" for knob in knobs if knob.exists()), False)


def _is_there() -> bool:
    return DEVICE in {name for _, name in socket.if_nameindex()}
