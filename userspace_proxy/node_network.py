"""How this node's network is made to bring traffic here: capture, routes to cluster IPs, limits of the kernel.

What is added is taken away by ``leave_network`` without knowing what it was: a crashed process cannot tell. Limits
stay as they are set, as kube-proxy's do: others rely on them by then.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
from collections.abc import Callable, Iterable

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import Capture, StateSink
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.proxiers.userspace import UserspaceProxier
from userspace_proxy.rules import network, sysctls
from userspace_proxy.rules.network import Network
from userspace_proxy.rules.notices import NetworkNotices

_SETTLE_S = 0.2

log = logging.getLogger(__name__)


async def first_capture(asked: str) -> Capture:
    """Return how to capture where *asked* is "auto", "redirect" or "address", after what it needs was put on ``lo``."""
    if await network.lacks_addresses():
        # The kernel has no source for a local client's packets to a cluster IP, unless we give it one.
        await network.add_local_addresses()
    if asked == "redirect":
        return Capture.REDIRECT
    if asked == "auto" and not await _unnumbered():
        return Capture.REDIRECT
    await network.add_local_addresses()
    return Capture.ADDRESS


async def _unnumbered() -> list[str]:
    try:
        found = await network.find_unnumbered_interfaces()
    except SyncError as error:
        log.warning("interfaces cannot be looked at, traffic is captured by REDIRECT: %s", error)
        return []
    if found:
        log.info(
            "%s has no IPv4 address, so REDIRECT cannot work there; capturing with a private address on lo instead",
            ", ".join(found[:3]),
        )
    return found


async def watch_network(asked: str, proxier: UserspaceProxier) -> None:
    """Change to a private address as soon as an interface comes up at which REDIRECT cannot work."""
    if asked != "auto":
        return
    changed = asyncio.Event()
    notices = NetworkNotices(changed.set)
    try:
        while proxier.capture is Capture.REDIRECT:
            await changed.wait()
            await asyncio.sleep(_SETTLE_S)
            changed.clear()
            if await _unnumbered():
                await network.add_local_addresses()
                try:
                    await proxier.set_capture(Capture.ADDRESS)
                except SyncError as error:
                    log.error("capture could not be changed: %s", error)  # noqa: TRY400
                    await asyncio.sleep(_SETTLE_S)
    finally:
        notices.close()


class WithRoutes:
    """A sink before the proxier: sees to it that this node has a route to every cluster IP.

    ``sources``: the addresses of this node's own packets there, for modes in which endpoints see them.
    """

    def __init__(self, sink: StateSink, ranges: Iterable[Network], sources: Iterable[str] = ()) -> None:
        self._sink = sink
        self._sources = tuple(sources)
        self._ranges = list(ranges)
        self._routed: set[Network] = set()
        self._known: dict[ServicePortName, ServicePort] = {}

    async def sync(self, state: ProxyState) -> None:
        wanted = set(self._ranges)
        for name, service_port in state.service_ports.items():
            if self._known.get(name) is not service_port:
                for ip in (*service_port.cluster_ips, *service_port.external_ips, *service_port.load_balancer_ips):
                    address = ipaddress.ip_address(ip)
                    if not any(address in known for known in self._ranges):
                        wanted.add(ipaddress.ip_network(ip))
        self._known = dict(state.service_ports)
        if new := wanted - self._routed:
            self._routed |= new  # one try: what refuses now (a blackhole route of somebody's, say) is no passing fault
            try:
                await network.add_routes(new, self._sources)
            except SyncError as error:
                log.warning("no route to cluster IPs could be added, clients on this node may fail: %s", error)
        await self._sink.sync(state)


def widen_queues(backlog: int) -> None:
    """Have the kernel let a listener's queue be *backlog* long."""
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
    """Take away the routes and addresses that were added here, as far as the kernel lets us."""
    with contextlib.suppress(SyncError):
        await network.remove_routes()
        await network.remove_local_addresses()
