"""This node's network: routes to portals, discard routes, limits of the kernel.

``leave_network`` removes what was added without knowing what it was: a crashed process cannot tell. Discard routes stay
for the next start, and `cleanup` removes them. Limits stay as they are set, as kube-proxy's do: other programs rely on
them by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable

from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import SyncError
from userspace_proxy.host import discard_routes, network, sysctls
from userspace_proxy.host.network import Network
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.netfilter.notices import NetworkNotices

# Pods come and go, and each brings notices: to look takes some tens of milliseconds of CPU.
_ADDRESSES_SETTLE_S = 1.0
# Linux forgets a redirect after so long (RT_GC_TIMEOUT in net/ipv4/route.c).
_REDIRECT_LASTS_S = 300.0

log = logging.getLogger(__name__)


async def follow_addresses(tracker: Tracker, sync_again: Callable[[], None]) -> None:
    """Tell *tracker* this host's addresses whenever they or the default route have changed. Runs until cancelled."""
    changed = asyncio.Event()
    notices = NetworkNotices(changed.set)
    try:
        while True:
            await changed.wait()
            await asyncio.sleep(_ADDRESSES_SETTLE_S)
            changed.clear()
            addresses = await network.host_addresses()
            if addresses and tracker.update_addresses(addresses):
                log.info("this host's addresses are %s now", ", ".join(addresses))
                sync_again()
    finally:
        notices.close()


class NodeRoutes:
    """A state sink: this node has a route to each portal, and forwards nothing that no Service serves.

    Sync it before the proxier: a local client needs a route before its packets are translated.

    *ranges*: where cluster IPs are from, as far as that is known. *discarded*: ranges to which no packet is forwarded;
    with *discards_portals* the same goes for portals outside of these, without *ranges* for those that the state has.
    *sources*: the addresses of this node's own packets to portals, for modes in which endpoints see them.
    """

    def __init__(
        self,
        ranges: Iterable[Network],
        sources: Iterable[str] = (),
        *,
        discarded: Iterable[Network] = (),
        discards_portals: bool = False,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sources = tuple(sources)
        self._ranges = list(ranges)
        self._given_discarded = list(discarded)
        self._discarded = self._given_discarded
        self._discards_portals = discards_portals
        self._now = now
        self._is_first = True
        self._known: dict[ServicePortName, ServicePort] = {}
        self._users: Counter[Network] = Counter()  # how many service ports have an address outside of the ranges
        self._left_at: dict[Network, float] = {}  # since when a portal that is still discarded has no user

    async def sync(self, state: ProxyState) -> None:
        came, gone = self._note(state)
        discarded = self._given_discarded + ([] if self._ranges else _networks(state.service_cidrs))
        is_another = discarded != self._discarded
        self._discarded = discarded
        if self._is_first or is_another or came or gone:
            await self._discard(came, gone)
        if routed := {*came, *(self._ranges if self._is_first else ())}:
            # One try: what refuses now (a blackhole route of somebody's, say) is no passing fault.
            try:
                await network.add_routes(routed, self._sources)
            except SyncError as error:
                log.warning("no route to cluster IPs could be added, clients on this node may fail: %s", error)
        if gone:
            await network.remove_routes_to(gone)
        self._is_first = False

    def _note(self, state: ProxyState) -> tuple[set[Network], set[Network]]:
        """Count who uses which address outside of the ranges; return those with a first user, and those without any."""
        had: dict[Network, bool] = {}
        for name, service_port in state.service_ports.items():
            before = self._known.get(name)
            if before is not service_port:
                self._count(service_port, 1, had)
                self._count(before, -1, had)
        for name, before in self._known.items():
            if name not in state.service_ports:
                self._count(before, -1, had)
        self._known = dict(state.service_ports)
        came = {network for network, was_used in had.items() if not was_used and self._users[network]}
        gone = {network for network, was_used in had.items() if was_used and not self._users[network]}
        for address in had:
            if not self._users[address]:
                self._users.pop(address, None)
        return came, gone

    def _count(self, service_port: ServicePort | None, step: int, had: dict[Network, bool]) -> None:
        if service_port is None:
            return
        for ip in (*service_port.cluster_ips, *service_port.external_ips, *service_port.load_balancer_ips):
            address = ipaddress.ip_address(ip)
            if not any(address in known for known in self._ranges):
                used = ipaddress.ip_network(ip)
                had.setdefault(used, bool(self._users[used]))
                self._users[used] += step

    async def _discard(self, came: set[Network], gone: set[Network]) -> None:
        now = self._now()
        self._left_at |= dict.fromkeys(gone, now)
        kept = {n: at for n, at in self._left_at.items() if n not in came and now - at < _REDIRECT_LASTS_S}
        self._left_at = kept
        addresses = {*self._users, *kept} if self._discards_portals else set()
        try:
            await discard_routes.discard(self._discarded, {n for n in addresses if not self._is_discarded(n)})
        except SyncError as error:
            log.warning("packets that no Service serves may be forwarded, and clients redirected: %s", error)

    def _is_discarded(self, host: Network) -> bool:
        return any(host.network_address in known for known in self._discarded)


def _networks(cidrs: Iterable[str]) -> list[Network]:
    return [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]


def widen_queues(backlog: int) -> None:
    """Let a listener's accept queue be *backlog* long."""
    for refused in sysctls.apply([sysctls.queue_sysctl(backlog)]):
        log.warning("clients that come all at once may wait for a second or more: %s", refused)


def tune_conntrack(limits: sysctls.ConntrackLimits, warn: Callable[[str], None]) -> bool:
    """Set conntrack to *limits*, and *warn* of what is refused; return False where conntrack is not loaded yet."""
    wanted = sysctls.conntrack_sysctls(limits, os.cpu_count() or 1)
    if wanted and not sysctls.knows_conntrack():
        return False
    if refused := sysctls.apply(wanted):
        warn(f"{'; '.join(refused)}; set it on the node itself, or leave it alone with --conntrack-...=0")
    return True


async def leave_network() -> None:
    """Remove the routes and addresses that were added here, as far as the kernel allows it.

    Discard routes stay: until the next start no packet for a Service is to be sent on by the default route.
    """
    with contextlib.suppress(SyncError):
        await network.remove_routes()
        await network.remove_local_addresses()
