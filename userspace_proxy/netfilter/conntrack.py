"""Delete conntrack entries that would still lead packets to a portal's previous destination.

The kernel decides about NAT once, at the first packet of a flow:

1. UDP: a client that continues to send keeps that decision alive for ever. So when a portal appears, goes, or gets
   another port, its old flows are deleted (kubernetes/pkg/proxy/conntrack does the same).
2. TCP: a SYN that came before its portal was served is not translated, and nothing answers it. Each retransmission,
   and each later connection from the same source port, follows that entry, for 120 s by default.
   So when a portal appears, the unanswered and untranslated connections to it are deleted.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import NamedTuple

from userspace_proxy.host.tool import in_thread
from userspace_proxy.model.endpoint import Address, Family, family_of
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.netfilter.nfnetlink import Entry, TcpState, delete_flows, read_entries
from userspace_proxy.netlink import ip_text

# The addresses that replies of a portal come from; (ANY_IP, port) matches that port of any address.
Answering = Set[Address]
ANY_IP = ""

log = logging.getLogger(__name__)


class Flow(NamedTuple):
    """A UDP flow or TCP connection: the client's address and the address it dialled."""

    client: Address
    asked: Address


def stale_flows(entries: Iterable[Entry], changed: Mapping[Portal, Answering]) -> list[Flow]:
    """Return the flows in *entries* to portals in *changed* whose replies do not come from an address given there.

    Replies from the dialled address itself mean that the flow began before a rule existed.
    """
    by_ip = {(portal.ip, portal.port): wanted for portal, wanted in changed.items() if not portal.is_node_port}
    by_port = {(portal.family, portal.port): wanted for portal, wanted in changed.items() if portal.is_node_port}
    stale = []
    for flow, answering in _flows(entries, changed):
        wanted = by_ip.get(flow.asked, by_port.get((family_of(flow.asked[0]), flow.asked[1])))
        if wanted is not None and (answering == flow.asked or not {answering, (ANY_IP, answering[1])} & wanted):
            stale.append(flow)
    return stale


def untranslated(entries: Iterable[Entry], portals: Collection[Portal]) -> list[Flow]:
    """Return the connections in *entries* to *portals* that were not translated."""
    by_ip = {(portal.ip, portal.port) for portal in portals if not portal.is_node_port}
    by_port = {(portal.family, portal.port) for portal in portals if portal.is_node_port}
    return [
        flow
        for flow, answering in _flows(entries, portals)
        if answering == flow.asked
        and (flow.asked in by_ip or (by_port and (family_of(flow.asked[0]), flow.asked[1]) in by_port))
    ]


def _flows(entries: Iterable[Entry], portals: Iterable[Portal]) -> Iterator[tuple[Flow, Address]]:
    """Yield each flow in *entries* to a port of *portals*, with the address that its replies come from."""
    ports = {portal.port for portal in portals}
    for entry in entries:
        if entry.asked_port in ports:
            flow = Flow((ip_text(entry.source), entry.source_port), (ip_text(entry.asked), entry.asked_port))
            yield flow, (ip_text(entry.answering), entry.answering_port)


async def forget_udp_flows(changed: Mapping[Portal, Answering]) -> Counter[Family]:
    """Delete the `stale_flows` of the portals in *changed*; return how many were deleted, by family.

    Never raises: failures are logged.
    """
    forgotten = Counter[Family]()
    try:
        for family in sorted({portal.family for portal in changed}):
            listed = read_entries(L4Protocol.UDP, family)  # a generator: the thread reads it
            if flows := await in_thread(stale_flows, listed, changed):
                forgotten[family] = await in_thread(delete_flows, L4Protocol.UDP, flows)
                log.debug("forgot %d UDP flows of %d that went the old way", forgotten[family], len(flows))
    except OSError as error:
        log.warning("stale UDP flows were not forgotten, their clients wait for conntrack's time-out: %s", error)
    return forgotten


async def forget_early_connections(portals: Collection[Portal]) -> None:
    """Delete unanswered connections that began before *portals* (TCP) were served.

    Never raises: failures are logged.
    """
    try:
        for family in sorted({portal.family for portal in portals}):
            listed = read_entries(L4Protocol.TCP, family, TcpState.SYN_SENT)
            if flows := await in_thread(untranslated, listed, portals):
                deleted = await in_thread(delete_flows, L4Protocol.TCP, flows)
                log.debug("forgot %d connections that began before their portal was served", deleted)
    except OSError as error:
        log.warning("clients that dialled before a portal was served may wait two minutes: %s", error)


async def open_connections(portals: Iterable[Portal]) -> int:
    """Return the number of established TCP connections to *portals* that the kernel translates; 0 if unknown."""
    led_anywhere: dict[Portal, Answering] = dict.fromkeys(portals, frozenset())
    found = 0
    try:
        for family in sorted({portal.family for portal in led_anywhere}):
            listed = read_entries(L4Protocol.TCP, family, TcpState.ESTABLISHED)
            found += len(await in_thread(stale_flows, listed, led_anywhere))
    except OSError as error:
        log.debug("open connections cannot be counted: %s", error)
    return found
