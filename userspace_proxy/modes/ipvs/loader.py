"""``--proxy-mode ipvs``: virtual servers in the kernel, addresses on a device of our own, and rules beside them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from errno import EINVAL, ENOENT, ESRCH
from pathlib import Path
from typing import TypeVar

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host import network, sysctls
from userspace_proxy.host.tool import in_thread, is_installed, run_tool
from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs import genetlink as ipvs_netlink
from userspace_proxy.modes.ipvs.desired import Wanted
from userspace_proxy.modes.ipvs.device import DEVICE
from userspace_proxy.modes.ipvs.genetlink import Listing
from userspace_proxy.modes.ipvs.table import (
    DEFAULT_SCHEDULER,
    IpvsTable,
    Step,
    Verb,
    VirtualServer,
    VirtualServers,
    after,
    at_host,
    endings,
    node_port_ips,
    steps,
)
from userspace_proxy.modes.ipvs.virtual_device import VirtualDevice
from userspace_proxy.modes.slots.element_tables import ElementTables
from userspace_proxy.netfilter.notices import NetworkNotices, call_often

# IPVS tells nobody of changes, so it is looked at: how often, and how much of the time at most, as a look is long.
_POLL_S, _POLL_SHARE = 1.0, 0.02
_VS = Path("/proc/sys/net/ipv4/vs")
# Without the first nothing can be masqueraded; the others end what leads to endpoints that are gone.
_NEEDED = sysctls.Sysctl(_VS / "conntrack", 1)
_IPV4 = Path("/proc/sys/net/ipv4/conf/all")
_STRICT_ARP = (sysctls.Sysctl(_IPV4 / "arp_ignore", 1), sysctls.Sysctl(_IPV4 / "arp_announce", 2))
_WISHED = (sysctls.Sysctl(_VS / "expire_nodest_conn", 1), sysctls.Sysctl(_VS / "expire_quiescent_template", 1))

_Answer = TypeVar("_Answer")

log = logging.getLogger(__name__)


class _MissingSchedulersError(SyncError):
    """Virtual servers ask for schedulers that this kernel has not."""

    def __init__(self, schedulers: set[str]) -> None:
        super().__init__(", ".join(sorted(schedulers)))
        self.schedulers = schedulers


class IpvsTables:
    """Holds virtual servers, and brings them to what is wanted; rules refuse and masquerade (`IpvsTable`).

    Loads are not all or nothing, as IPVS knows no transactions: what was done before a step that the kernel refused is
    known, and the next load looks at all again.
    """

    mode = "ipvs"

    def __init__(self, scheduler: str = DEFAULT_SCHEDULER, *, strict_arp: bool = False) -> None:
        """*strict_arp*: this node answers ARP for addresses of the interface that is asked alone."""
        self.loads: Mapping[str, Loads] = {}  # as kube-proxy, which counts none in this mode
        self._scheduler = scheduler
        self._strict_arp = strict_arp
        self._rules = ElementTables(self.mode, IpvsTable())
        self._node_ips: tuple[str, ...] = ()
        self._wanted = Wanted()
        # What the kernel has of ours, as far as we know; None where that is to be found out.
        self._present: VirtualServers | None = None
        self._was_refused = False  # a step of the last load
        self._refusal = ""  # what whoever loads was told; he tries again
        # What the kernel printed when all was as it should be and nobody was to leave, without counts.
        self._seen: str | None = None
        self._missing: frozenset[str] = frozenset()  # schedulers that this kernel has not
        self._device = VirtualDevice()
        self._foreign: frozenset[Portal] = frozenset()
        self._facts: NodeFacts | None = None
        self._host_ips: tuple[str, ...] = ()
        self._has_moved = True  # addresses, of this host or of our device, may have changed
        self._notices: NetworkNotices | None = None
        self._poll: asyncio.Task[None] | None = None
        self._is_due = False
        self._look_s = 0.0

    def metrics(self) -> Iterator[Metric]:
        return iter(())

    async def prepare(self) -> None:
        await self._rules.prepare()
        if await self._device.is_foreign():
            raise SyncError(
                f"{DEVICE} is somebody else's (kube-proxy in ipvs mode?): "
                "stop it and run `kube-proxy --cleanup`, or use --proxy-mode nftables"
            )
        await _require_ipvs()

    def _set_node(self) -> None:
        """Set the node to what the mode needs: not before the first load, when this node is ours to serve."""
        if refused := sysctls.apply([_NEEDED]):
            raise SyncError(f"ipvs mode needs conntrack: {refused[0]}")
        for said in sysctls.apply(_WISHED):
            log.warning("connections may last on to endpoints that are gone: %s", said)
        for said in sysctls.apply(_STRICT_ARP) if self._strict_arp else ():
            log.warning("this node answers ARP for Services' addresses: %s", said)

    async def load(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        self._refusal = ""
        try:
            await self._load(translations, changed, facts)
        except SyncError as error:
            self._refusal = str(error)
            raise

    async def _load(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        if self._facts is None:
            self._set_node()
        host_ips = await self._look_at_host()
        await self._rules.load(translations, changed, at_host(facts, host_ips))
        self._facts = facts
        try:
            await self._load_servers(translations, changed, facts, host_ips)
        except _MissingSchedulersError as error:
            self._missing |= error.schedulers
            instead = DEFAULT_SCHEDULER if self._scheduler in self._missing else self._scheduler
            log.warning("this kernel has no scheduler %s; %s chooses in its place", error, instead)
            await self._load_servers(translations, {*self._wanted.translations, *translations}, facts, host_ips)

    async def _load_servers(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
        host_ips: tuple[str, ...],
    ) -> None:
        self._seen = None
        node_ips = node_port_ips(facts, host_ips)
        names = set(changed)
        present = None if self._was_refused else self._present
        if present is None or node_ips != self._node_ips:
            names |= {*self._wanted.translations, *translations}
        self._node_ips = node_ips
        portals = self._wanted.change(names, translations, node_ips, self._scheduler, self._missing)
        if present is None:
            present = await self._look()
            portals |= present.keys()
        for portal in portals & self._foreign & self._wanted.servers.keys():
            log.warning("%s is not served: there is a virtual server of somebody else's", portal)
        there = {portal: present[portal] for portal in portals if portal in present}
        servers = self._wanted.servers
        wanted = {p: servers[p] for p in portals if p in servers and p not in self._foreign}
        try:
            await self._take(present, list(steps(there, wanted)))
        except SyncError:
            await self._bear(present, host_ips)  # nobody else waits for what was refused
            raise
        await self._bear(present, host_ips)

    async def _look_at_host(self) -> tuple[str, ...]:
        """Return this host's own addresses; where they may have changed they are looked at, and so is our device."""
        if self._has_moved or self._notices is None:
            self._has_moved = False  # a notice that comes while we look counts
            try:
                self._host_ips, device_ips = await network.look_at_addresses()
            except SyncError:
                self._has_moved = True
                raise
            self._device.ips = set(device_ips)
        return self._host_ips

    async def _look(self) -> VirtualServers:
        """Return which virtual servers of ours the kernel has, and note those of others."""
        listing = await _ask(ipvs_netlink.listing)
        ours = await _ask(ipvs_netlink.own_portals) if listing.servers else set()
        self._foreign = frozenset(listing.servers.keys() - ours)
        return {portal: server for portal, server in listing.servers.items() if portal in ours}

    async def _take(self, present: VirtualServers, todo: list[Step]) -> None:
        """Take the steps *todo*, which lead on from *present*. An endpoint that IPVS cannot have is left out."""
        self._present = None
        done, refused = await _ask(ipvs_netlink.take, todo) if todo else ([], [])
        after(present, done)
        refusals = [f"{step}: {why.strerror}" for step, why in refused if not _is_unfit(step, why)]
        self._present, self._was_refused = present, bool(refusals)
        schedulers = {step.server.scheduler for step, why in refused if step.endpoint is None and why.errno == ENOENT}
        if missing := schedulers - {DEFAULT_SCHEDULER}:
            raise _MissingSchedulersError(missing)
        if refusals:
            raise SyncError(f"IPVS refused: {min(refusals)}")
        for step, why in refused:
            log.warning("%s: IPVS has no such endpoints (%s); it is left out", step, why.strerror)

    async def _bear(self, present: VirtualServers, host_ips: Iterable[str]) -> None:
        """Make what is wanted addresses of this node; those of servers that are left with connections are kept."""
        left = {portal.ip for portal in present.keys() - self._wanted.servers.keys()} & self._device.ips
        await self._device.bear((left | self._wanted.ips.keys()) - set(host_ips))

    # ---- looking after it

    async def is_intact(self) -> bool:
        if self._facts is None or self._present is None or not await self._rules.is_intact():
            return False
        if self._poll is not None and not self._is_due:
            return True  # somebody asks after each load, and all of it is a long look
        self._is_due = False
        return await self._look_after_servers()

    async def _look_after_servers(self) -> bool:
        """Follow this node's addresses and take away what has ended; return whether servers are as they were loaded."""
        began = time.monotonic()
        sysctls.apply([_NEEDED])
        if self._has_moved or self._notices is None:
            await self._load_again()
        text = await _ask(ipvs_netlink.printed)
        seen = await _ask(ipvs_netlink.without_counts, text)
        if not (intact := seen == self._seen):
            listing = await _ask(ipvs_netlink.read, text)
            if intact := self._is_as_loaded(listing):
                self._seen = None if await self._end(listing) else seen
        self._look_s = time.monotonic() - began
        return intact

    def _is_as_loaded(self, listing: Listing) -> bool:
        assert self._present is not None
        # Who was in the way and is gone leaves room for ours.
        return self._foreign & self._wanted.servers.keys() <= listing.servers.keys() and all(
            listing.servers.get(portal) == server for portal, server in self._present.items()
        )

    async def _end(self, listing: Listing) -> bool:
        """Take away what is wanted no more and has no connections left; return whether anybody was to leave."""
        present, wanted = self._present, self._wanted.servers
        assert present is not None
        if not any(endings(present, wanted, {})):
            return False
        if ended := list(endings(present, wanted, listing.connections)):
            await self._take(present, ended)
            await self._bear(present, self._host_ips)
        return True

    async def reload(self) -> None:
        """Load again what is not as it was, of the rules and of the virtual servers."""
        if self._facts is None:
            return
        if not await self._rules.is_intact():
            await self._rules.reload()
        self._present = None
        await self._load_again()

    async def _load_again(self) -> None:
        """Load what is held. After a failure nothing is intact: nobody else would try it once more.

        Except for what whoever loads was refused: the rest is there, and that is his to try and to tell.
        """
        assert self._facts is not None
        try:
            await self._load(self._wanted.translations.copy(), (), self._facts)
        except SyncError as error:
            if str(error) != self._refusal or self._present is None:
                self._present = None
                raise

    async def remove(self) -> None:
        self._present, self._facts = None, None
        await self._rules.remove()
        if ipvs_netlink.is_loaded():
            ours = await _ask(ipvs_netlink.own_portals)
            taken = await _ask(ipvs_netlink.take, [Step(Verb.DELETE, p, VirtualServer()) for p in ours])
            for step, why in taken.refused:
                if why.errno != ESRCH:  # somebody else was faster
                    raise SyncError(f"IPVS refused: {step}: {why.strerror}")
        await self._device.remove()

    async def watch(self, on_change: Callable[[], None]) -> None:
        def on_notice() -> None:
            self._has_moved = True

        def on_due() -> None:
            self._is_due = True
            on_change()

        await self._rules.watch(on_change)
        self._notices = NetworkNotices(on_notice)
        self._has_moved = True  # for all that is known of the time since the first look
        self._poll = asyncio.create_task(call_often(self._pause_s, on_due), name="ipvs-poll")

    def _pause_s(self) -> float:
        return max(_POLL_S, self._look_s / _POLL_SHARE)

    def unwatch(self) -> None:
        self._rules.unwatch()
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None


def _is_unfit(step: Step, why: OSError) -> bool:
    """Return whether *step* is about an endpoint with an address that IPVS leads nobody to, such as a broadcast's."""
    return step.verb is Verb.ADD and step.endpoint is not None and why.errno == EINVAL


async def _ask(ask: Callable[..., _Answer], *arguments: object) -> _Answer:
    """Ask IPVS in a thread. Raises SyncError where it does not answer."""
    try:
        return await in_thread(ask, *arguments)
    except OSError as error:
        raise SyncError(f"IPVS does not answer: {error.strerror or error}") from error


async def _require_ipvs() -> None:
    """Raise SyncError, a line that says what to do, where this kernel has no IPVS."""
    why = "modprobe is not installed"
    if not ipvs_netlink.is_loaded() and is_installed("modprobe"):
        try:
            await run_tool("modprobe", "ip_vs")
        except SyncError as error:
            why = str(error)
    if not ipvs_netlink.is_loaded():
        raise SyncError(f"this kernel has no IPVS ({why}); use --proxy-mode nftables, or a kernel with ip_vs")
    if not _NEEDED.path.exists():  # hidden from user namespaces, from which changes are refused, too
        raise SyncError("IPVS obeys real root alone, no user namespace's: use sudo, or --proxy-mode nftables")
    if not sysctls.can_apply(_NEEDED):
        raise SyncError(f"ipvs mode needs conntrack, and {_NEEDED} cannot be made {_NEEDED.value} here")
