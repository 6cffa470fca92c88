"""Forgetting UDP flows that conntrack would go on sending to where a portal pointed before.

NAT is decided at a flow's first datagram, and a client that goes on sending keeps that decision alive for
ever. So when a portal appears, goes, or gets another port, its old flows are deleted (behaviours U1).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Set
from typing import NamedTuple

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Redirects
from userspace_proxy.model.endpoint import Address, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.rules.tool import run_tool

# From where a portal's answers come; ANY_IP at a port: from this port of whichever address.
Answering = Set[Address]
ANY_IP = ""

log = logging.getLogger(__name__)


def changed_udp_portals(old: Redirects, new: Redirects) -> dict[Portal, Answering]:
    """Return the UDP portals that lead elsewhere in *new*, with the local ports that they lead to, none if they went.

    Several, where senders are told from one another.
    """
    before, after = _udp_ports(old), _udp_ports(new)
    nowhere: Answering = frozenset()
    return {
        portal: after.get(portal, nowhere)
        for portal in {**before, **after}
        if before.get(portal, nowhere) != after.get(portal, nowhere)
    }


def _udp_ports(redirects: Redirects) -> dict[Portal, Answering]:
    found: dict[Portal, Answering] = {}
    for ports in (redirects.ports, *redirects.exceptions.values()):
        for portal, port in ports.items():
            if portal.protocol is L4Protocol.UDP:
                found[portal] = found.get(portal, frozenset()) | {(ANY_IP, port)}
    return found


class StaleFlows(NamedTuple):
    """Flows to one address, answered from one other (or from the same: no rule was there yet when they began)."""

    asked: Address
    answering: Address


def stale_flows(listing: str, changed: Mapping[Portal, Answering]) -> set[StaleFlows]:
    """Return which flows in *listing* to the portals in *changed* do not go where these lead now.

    *listing* is what ``conntrack -L -p udp`` prints: a flow's own addresses, then those of its replies.
    """
    by_ip = {(portal.ip, portal.port): wanted for portal, wanted in changed.items() if not portal.is_node_port}
    by_port = {(portal.family, portal.port): wanted for portal, wanted in changed.items() if portal.is_node_port}
    stale = set()
    for line in listing.splitlines():
        words = [word.partition("=") for word in line.split()]
        values = [value for key, _, value in words if key in ("src", "dst", "sport", "dport")]
        if len(values) < 8:
            continue
        asked, answering = (values[1], int(values[3])), (values[4], int(values[6]))
        wanted = by_ip.get(asked, by_port.get((family_of(asked[0]), asked[1])))
        if wanted is not None and (answering == asked or not {answering, (ANY_IP, answering[1])} & wanted):
            stale.add(StaleFlows(asked, answering))
    return stale


async def forget_udp_flows(changed: Mapping[Portal, Answering]) -> None:
    """Delete the flows to the portals in *changed* that do not go where these lead now. Never raises: it warns."""
    try:
        for family in sorted({portal.family for portal in changed}):
            listing = await run_tool("conntrack", "-L", "-p", "udp", "-f", f"ipv{family}")
            for (ip, port), (answering_ip, answering_port) in stale_flows(listing, changed):
                there = ("-d", ip, "--dport", str(port))
                back = ("--reply-src", answering_ip, "--reply-port-src", str(answering_port))
                try:
                    await run_tool("conntrack", "-D", "-p", "udp", "-f", f"ipv{family}", *there, *back)
                    log.debug("forgot the UDP flows to %s port %d by way of %s", ip, port, answering_ip)
                except SyncError as error:  # it also fails where the flows have just ended by themselves
                    log.debug("no UDP flow to %s port %d was forgotten: %s", ip, port, error)
    except SyncError as error:
        log.warning("stale UDP flows were not forgotten, their clients wait for conntrack's time-out: %s", error)
