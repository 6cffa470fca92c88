"""Forgetting UDP flows that conntrack would go on sending to where a portal pointed before.

NAT is decided at a flow's first datagram, and a client that goes on sending keeps that decision alive for
ever. So when a portal appears, goes, or gets another port, its old flows are deleted (behaviours U1).
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import NamedTuple

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Redirects
from userspace_proxy.model.endpoint import Address, Family, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.rules.netlink import delete_udp_flows
from userspace_proxy.rules.tool import run_tool

# From where a portal's answers come; ANY_IP at a port: from this port of whichever address.
Answering = Set[Address]
ANY_IP = ""

log = logging.getLogger(__name__)


def changed_udp_portals(old: Redirects, new: Redirects) -> dict[Portal, Answering]:
    """Return the UDP portals that lead elsewhere in *new*, with the local ports to which they lead now.

    Several, where senders are told from one another.
    """
    before, after = udp_ports(old), udp_ports(new)
    nowhere: Answering = frozenset()
    return {
        portal: after.get(portal, nowhere)
        for portal in {**before, **after}
        if before.get(portal, nowhere) != after.get(portal, nowhere)
    }


def udp_ports(redirects: Redirects) -> dict[Portal, Answering]:
    """Return the local ports to which each UDP portal leads."""
    found: dict[Portal, Answering] = {}
    for ports in (redirects.ports, *redirects.exceptions.values()):
        for portal, port in ports.items():
            if portal.protocol is L4Protocol.UDP:
                found[portal] = found.get(portal, frozenset()) | {(ANY_IP, port)}
    return found


class Flow(NamedTuple):
    """A UDP flow, as its client sees it."""

    client: Address
    asked: Address


def stale_flows(listing: str, changed: Mapping[Portal, Answering]) -> list[Flow]:
    """Return which flows in *listing* to the portals in *changed* do not go where these lead now.

    *listing* is what ``conntrack -L -p udp`` prints: a flow's own addresses, then those of its replies. Answers that
    come from what was asked mean that no rule was there yet when it began.
    """
    by_ip = {(portal.ip, portal.port): wanted for portal, wanted in changed.items() if not portal.is_node_port}
    by_port = {(portal.family, portal.port): wanted for portal, wanted in changed.items() if portal.is_node_port}
    stale = []
    for line in listing.splitlines():
        words = [word.partition("=") for word in line.split()]
        values = [value for key, _, value in words if key in ("src", "dst", "sport", "dport")]
        if len(values) < 8:
            continue
        asked, answering = (values[1], int(values[3])), (values[4], int(values[6]))
        wanted = by_ip.get(asked, by_port.get((family_of(asked[0]), asked[1])))
        if wanted is not None and (answering == asked or not {answering, (ANY_IP, answering[1])} & wanted):
            stale.append(Flow((values[0], int(values[2])), asked))
    return stale


async def forget_udp_flows(changed: Mapping[Portal, Answering]) -> Counter[Family]:
    """Delete the flows to the portals in *changed* that do not go where these lead now; return how many.

    Never raises: it warns.
    """
    forgotten = Counter[Family]()
    try:
        for family in sorted({portal.family for portal in changed}):
            listing = await run_tool("conntrack", "-L", "-p", "udp", "-f", f"ipv{family}")
            if flows := await asyncio.to_thread(stale_flows, listing, changed):
                forgotten[family] = await asyncio.to_thread(delete_udp_flows, flows)
                log.debug("forgot %d UDP flows of %d that went the old way", forgotten[family], len(flows))
    except (SyncError, OSError) as error:
        log.warning("stale UDP flows were not forgotten, their clients wait for conntrack's time-out: %s", error)
    return forgotten


async def open_connections(portals: Iterable[Portal]) -> int:
    """Return how many TCP connections to *portals* the kernel translates; 0 where it cannot be asked."""
    led_anywhere: dict[Portal, Answering] = dict.fromkeys(portals, frozenset())
    found = 0
    try:
        for family in sorted({portal.family for portal in led_anywhere}):
            listing = await run_tool("conntrack", "-L", "-p", "tcp", "--state", "ESTABLISHED", "-f", f"ipv{family}")
            found += len(await asyncio.to_thread(stale_flows, listing, led_anywhere))
    except SyncError as error:
        log.debug("open connections cannot be counted: %s", error)
    return found
