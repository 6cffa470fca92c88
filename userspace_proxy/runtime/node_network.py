"""This node's network: routes to portals, discard routes, limits of the kernel.

``leave_network`` removes what was added by its marks alone, because a crashed process leaves no list. Discard routes
stay for the next start, and `cleanup` removes them. Limits stay, as kube-proxy's do: other programs may rely on them.
"""

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping

from userspace_proxy.control.pools import address_of
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import SyncError
from userspace_proxy.host import discard_routes, network, sysctls
from userspace_proxy.host.rtnetlink import Network
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.netfilter.notices import NetworkNotices, RoutingRuleNotices

# Each Pod that comes or goes causes notices, and each look takes some tens of milliseconds of CPU.
_ADDRESSES_SETTLE_S = 1.0
# Linux forgets a redirect after this time (RT_GC_TIMEOUT in net/ipv4/route.c).
_REDIRECT_LASTS_S = 300.0

log = logging.getLogger(__name__)


async def follow_addresses(
    tracker: Tracker, sync_again: Callable[[], None], add_routes: Callable[[tuple[str, ...]], Awaitable[None]]
) -> None:
    """Report this host's addresses to *tracker* after changes of them or of the default route, until cancelled.

    *add_routes* gets the addresses, and adds routes that such a change has removed or made necessary.
    """
    changed = asyncio.Event()
    notices = NetworkNotices(changed.set)
    changed.set()  # changes before the first notice are unknown
    try:
        while True:
            await changed.wait()
            await asyncio.sleep(_ADDRESSES_SETTLE_S)
            changed.clear()
            addresses = await network.host_addresses()
            if addresses and tracker.update_addresses(addresses):
                log.info("this host's addresses are %s now", ", ".join(addresses))
                sync_again()
            await add_routes(addresses)
    finally:
        notices.close()


async def follow_routing_rules(discard_again: Callable[[], Awaitable[None]]) -> None:
    """Call *discard_again* after changes of this host's routing rules, until cancelled.

    Another program may have removed those of the discard routes: systemd-networkd does so when it starts.
    """
    changed = asyncio.Event()
    notices = RoutingRuleNotices(changed.set)
    try:
        while True:
            await changed.wait()
            await asyncio.sleep(_ADDRESSES_SETTLE_S)
            changed.clear()
            await discard_again()
    finally:
        notices.close()


class NodeRoutes:
    """A state sink that gives this node a route to each portal, and discards packets that no Service serves.

    Sync it before the proxier: a local client needs a route before its packets are translated.

    *ranges*: the ranges of cluster IPs, if known. *discarded*: ranges to which no packet is forwarded. Without
    *ranges*, those of the state are discarded, too. *discards_portals*: also discard portals outside of these ranges.
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
        self._lock = asyncio.Lock()
        self._refusal = ""
        self._routed: set[Network] = set()  # the routes that were added
        self._ranges = list(ranges)
        self._given_discarded = list(discarded)
        self._discarded = self._given_discarded
        self._discards_portals = discards_portals
        self._now = now
        self._is_first = True
        # The addresses of each service port that are outside of the ranges, and all of them.
        self._outside: dict[ServicePortName, tuple[ServicePort, tuple[Network, ...]]] = {}
        self._used: set[Network] = set()
        self._last_ports: Mapping[ServicePortName, ServicePort] = {}
        self._left_at: dict[Network, float] = {}  # the time since which a portal that is still discarded has no user

    async def sync(self, state: ProxyState) -> None:
        async with self._lock:
            await self._sync(state)

    async def add_missing(self, addresses: tuple[str, ...]) -> None:
        """Add the routes that are missing since the default route or this host's *addresses* have changed.

        The kernel removes a route with the address that is its source. Routes to addresses outside of the ranges are
        not made where there were none: when the default route comes back, it leads to other ports of these.
        """
        async with self._lock:
            self._sources = self._sources and (addresses or self._sources)
            if not self._is_first:
                await self._add({*self._ranges, *self._routed})

    async def discard_again(self) -> None:
        """Restore discard routes that another program has removed."""
        async with self._lock:
            if not self._is_first:
                await self._discard(set(), set())

    async def _add(self, networks: Iterable[Network]) -> None:
        # One attempt: a refusal, such as by a blackhole route of another program, does not pass by itself.
        refusal, self._refusal = self._refusal, ""
        try:
            self._routed.update(await network.add_routes(networks, self._sources))
        except SyncError as error:
            self._refusal = str(error)
            if self._refusal != refusal:
                log.warning("no route to cluster IPs could be added, clients on this node may fail: %s", error)

    async def _sync(self, state: ProxyState) -> None:
        came, gone = self._note(state)
        discarded = self._given_discarded + ([] if self._ranges else _networks(state.service_cidrs))
        is_another = discarded != self._discarded
        self._discarded = discarded
        if self._is_first or is_another or came or gone:
            await self._discard(came, gone)
        if routed := {*came, *(self._ranges if self._is_first else ())}:
            await self._add(routed)
        if gone:
            self._routed -= gone
            await network.remove_routes_to(gone)
        self._is_first = False

    def _note(self, state: ProxyState) -> tuple[set[Network], set[Network]]:
        """Return the addresses outside of the ranges that service ports have since this state, and unused ones."""
        if state.service_ports is self._last_ports:
            return set(), set()
        self._last_ports = state.service_ports
        last = self._outside
        self._outside = {
            name: last[name] if name in last and last[name][0] is service_port else self._look_at(service_port)
            for name, service_port in state.service_ports.items()
        }
        before, self._used = self._used, {host for _, hosts in self._outside.values() for host in hosts}
        return self._used - before, before - self._used

    def _look_at(self, service_port: ServicePort) -> tuple[ServicePort, tuple[Network, ...]]:
        ips = (*service_port.cluster_ips, *service_port.external_ips, *service_port.load_balancer_ips)
        outside = [ip for ip in ips if not any(address_of(ip) in each for each in self._ranges)]
        return service_port, tuple(map(ipaddress.ip_network, outside))

    async def _discard(self, came: set[Network], gone: set[Network]) -> None:
        now = self._now()
        self._left_at |= dict.fromkeys(gone, now)
        kept = {n: at for n, at in self._left_at.items() if n not in came and now - at < _REDIRECT_LASTS_S}
        self._left_at = kept
        addresses = {*self._used, *kept} if self._discards_portals else set()
        others = {h for h in addresses if not any(h.network_address in each for each in self._discarded)}
        try:
            await discard_routes.discard(self._discarded, others)
        except SyncError as error:
            log.warning("packets that no Service serves may be forwarded, and clients redirected: %s", error)


def _networks(cidrs: Iterable[str]) -> list[Network]:
    return [ipaddress.ip_network(cidr, strict=False) for cidr in cidrs]


def widen_queues(backlog: int) -> None:
    """Allow accept queues of *backlog* connections."""
    for refused in sysctls.apply([sysctls.queue_sysctl(backlog)]):
        log.warning("clients that come all at once may wait for a second or more: %s", refused)


def tune_conntrack(limits: sysctls.ConntrackLimits, warn: Callable[[str], None]) -> bool:
    """Set conntrack's *limits*, and *warn* of those that are refused; return False if conntrack is not loaded yet."""
    wanted = sysctls.conntrack_sysctls(limits, os.cpu_count() or 1)
    if wanted and not sysctls.knows_conntrack():
        return False
    if refused := sysctls.apply(wanted):
        warn(f"{'; '.join(refused)}; set it on the node itself, or leave it alone with --conntrack-...=0")
    return True


async def leave_network() -> None:
    """Remove the routes and addresses that were added here, as far as the kernel allows it.

    Discard routes stay: until the next start no packet to a Service may leave by the default route.
    """
    with contextlib.suppress(SyncError):
        await network.remove_routes()
        await network.remove_local_addresses()
