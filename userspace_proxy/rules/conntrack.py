"""Forgetting UDP flows that conntrack would go on sending to where a portal pointed before.

NAT is decided at a flow's first datagram, and a client that goes on sending keeps that decision alive for
ever. So when a portal appears, goes, or gets another port, its old flows are deleted (behaviours U1).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from userspace_proxy.errors import SyncError
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.rules.tool import run_tool

log = logging.getLogger(__name__)


def changed_udp_portals(old: Mapping[Portal, int], new: Mapping[Portal, int]) -> dict[Portal, int]:
    """Return the UDP portals whose port differs between *old* and *new*, with the new one (0: gone)."""
    both = {**old, **new}
    return {
        portal: new.get(portal, 0)
        for portal in both
        if portal.protocol is L4Protocol.UDP and old.get(portal) != new.get(portal)
    }


def stale_portals(listing: str, changed: Mapping[Portal, int]) -> set[tuple[str, int]]:
    """Return (address, port) of the portals in *changed* that flows in *listing* still use the old way.

    *listing* is what ``conntrack -L -p udp`` prints: a flow's own addresses, then those of its replies.
    """
    by_ip = {(p.ip, p.port): port for p, port in changed.items() if p.ip}
    by_port = {p.port: port for p, port in changed.items() if p.ip is None}
    stale = set()
    for line in listing.splitlines():
        words = [word.partition("=") for word in line.split()]
        values = [value for key, _, value in words if key in ("dst", "sport", "dport")]
        if len(values) < 6:
            continue
        asked, port, reply_port = values[0], int(values[2]), int(values[4])
        wanted = by_ip.get((asked, port), by_port.get(port))
        if wanted is not None and reply_port != wanted:
            stale.add((asked, port))
    return stale


async def forget_udp_flows(changed: Mapping[Portal, int]) -> None:
    """Delete the flows that still go where the portals in *changed* pointed before. Never raises: it warns."""
    try:
        for family in _families(changed):
            listing = await run_tool("conntrack", "-L", "-p", "udp", "-f", family)
            for ip, port in stale_portals(listing, changed):
                try:
                    await run_tool("conntrack", "-D", "-p", "udp", "-f", family, "-d", ip, "--dport", str(port))
                    log.debug("forgot the UDP flows to %s port %d", ip, port)
                except SyncError as error:  # it also fails where the flows have just ended by themselves
                    log.debug("no UDP flow to %s port %d was forgotten: %s", ip, port, error)
    except SyncError as error:
        log.warning("stale UDP flows were not forgotten, their clients wait for conntrack's time-out: %s", error)


def _families(portals: Iterable[Portal]) -> list[str]:
    ips = {p.ip for p in portals}
    wanted = []
    if any(ip is None or ":" not in ip for ip in ips):
        wanted.append("ipv4")
    if any(ip is None or ":" in ip for ip in ips):
        wanted.append("ipv6")
    return wanted
