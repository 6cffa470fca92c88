"""Forgetting UDP flows that conntrack would go on sending to where a portal pointed before.

NAT is decided at a flow's first datagram, and a client that goes on sending keeps that decision alive for
ever. So when a portal appears, goes, or gets another port, its old flows are deleted (behaviours U1).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Set

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Redirects
from userspace_proxy.model.endpoint import family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.rules.netlink import UdpFlow, delete_udp_flows
from userspace_proxy.rules.tool import run_tool

log = logging.getLogger(__name__)


def changed_udp_portals(old: Redirects, new: Redirects) -> dict[Portal, frozenset[int]]:
    """Return the UDP portals that lead elsewhere in *new*, with the ports to which they lead; none where they are gone.

    Several, where senders are told from one another.
    """
    before, after = _udp_ports(old), _udp_ports(new)
    nowhere: frozenset[int] = frozenset()
    return {
        portal: after.get(portal, nowhere)
        for portal in {**before, **after}
        if before.get(portal, nowhere) != after.get(portal, nowhere)
    }


def _udp_ports(redirects: Redirects) -> dict[Portal, frozenset[int]]:
    ports = {p: frozenset((port,)) for p, port in redirects.ports.items() if p.protocol is L4Protocol.UDP}
    for exceptions in redirects.exceptions.values():
        for portal, port in exceptions.items():
            if portal.protocol is L4Protocol.UDP:
                ports[portal] = ports.get(portal, frozenset()) | {port}
    return ports


def stale_flows(listing: str, changed: Mapping[Portal, Set[int]]) -> list[UdpFlow]:
    """Return the flows in *listing* to the portals in *changed* that still go the old way.

    Their replies come from none of the ports to which the portal leads now; or from the portal itself, as no
    rule was there yet when they began. *listing* is what ``conntrack -L -p udp`` prints: a flow's own addresses,
    then those of its replies.
    """
    by_ip = {(portal.ip, portal.port): ports for portal, ports in changed.items() if not portal.is_node_port}
    by_port = {(portal.family, portal.port): ports for portal, ports in changed.items() if portal.is_node_port}
    stale = []
    for line in listing.splitlines():
        words = [word.partition("=") for word in line.split()]
        values = [value for key, _, value in words if key in ("src", "dst", "sport", "dport")]
        if len(values) < 8:
            continue
        asked, answering = (values[1], int(values[3])), (values[4], int(values[6]))
        wanted = by_ip.get(asked, by_port.get((family_of(asked[0]), asked[1])))
        if wanted is not None and (answering == asked or answering[1] not in wanted):
            zone = next((int(value) for key, _, value in words if key == "zone"), 0)
            stale.append(UdpFlow((values[0], int(values[2])), asked, zone))
    return stale


async def forget_udp_flows(changed: Mapping[Portal, Set[int]]) -> None:
    """Delete the flows that still go where the portals in *changed* pointed before. Never raises: it warns."""
    try:
        for family in sorted({portal.family for portal in changed}):
            listing = await run_tool("conntrack", "-L", "-p", "udp", "-f", f"ipv{family}")
            if stale := stale_flows(listing, changed):
                await asyncio.to_thread(delete_udp_flows, stale)
                log.debug("forgot %d UDP flows of IPv%d", len(stale), family)
    except (SyncError, OSError) as error:
        log.warning("stale UDP flows were not forgotten, their clients wait for conntrack's time-out: %s", error)
