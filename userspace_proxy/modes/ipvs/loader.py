"""``--proxy-mode ipvs``: loads virtual servers, their addresses on a device of this proxy, and nftables rules."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from errno import EINVAL, ENOENT, ESRCH
from pathlib import Path
from typing import TypeVar

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host import network, sysctls
from userspace_proxy.host.tool import in_thread, is_installed, run_tool
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.element_tables import ElementTables
from userspace_proxy.modes.ipvs import genetlink
from userspace_proxy.modes.ipvs.changes import ServerChange, Verb, record, removals_when_idle, server_changes
from userspace_proxy.modes.ipvs.desired import DesiredServers
from userspace_proxy.modes.ipvs.device import DEVICE, VirtualDevice
from userspace_proxy.modes.ipvs.genetlink import Listing
from userspace_proxy.modes.ipvs.rules import rules
from userspace_proxy.modes.ipvs.table import (
    DEFAULT_SCHEDULER,
    IpvsTable,
    VirtualServers,
    VirtualServerSpec,
    at_host,
    node_port_ips,
)
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.netfilter.notices import NetworkNotices, RuleWatch

# IPVS sends no notices, so it is polled. A check takes at most this share of the time.
_POLL_S, _POLL_SHARE = 1.0, 0.02
_VS = Path("/proc/sys/net/ipv4/vs")
_IPV4 = Path("/proc/sys/net/ipv4/conf/all")
# Without it, IPVS's packets cannot be masqueraded.
_NEEDED = sysctls.Sysctl(_VS / "conntrack", 1)
# They end connections and pins to deleted endpoints.
_USEFUL = (sysctls.Sysctl(_VS / "expire_nodest_conn", 1), sysctls.Sysctl(_VS / "expire_quiescent_template", 1))
_STRICT_ARP = (sysctls.Sysctl(_IPV4 / "arp_ignore", 1), sysctls.Sysctl(_IPV4 / "arp_announce", 2))

_Answer = TypeVar("_Answer")

log = logging.getLogger(__name__)


class _MissingSchedulersError(SyncError):
    """This kernel lacks schedulers that virtual servers ask for."""

    def __init__(self, schedulers: set[str]) -> None:
        super().__init__(", ".join(sorted(schedulers)))
        self.schedulers = schedulers


@dataclass(slots=True)
class _Present:
    """The virtual servers in the kernel.

    ``servers``: ours, as far as known; None if they must be read. ``foreign``: portals of other programs' servers.
    ``was_refused``: a change of the last load was refused. ``text``: the listing without counts at a time when
    everything was as loaded and nothing was left to remove; None if there was no such time since the last load.
    """

    servers: VirtualServers | None = None
    foreign: frozenset[Portal] = frozenset()
    was_refused: bool = False
    text: str | None = None


class IpvsTables:
    """The virtual servers of this mode, with nftables rules that refuse and masquerade (`IpvsTable`).

    A load is not atomic, as IPVS has no transactions. The changes before a refused one are recorded as made, and the
    next load compares everything.
    """

    def __init__(self, scheduler: str = DEFAULT_SCHEDULER, *, strict_arp: bool = False) -> None:
        """*strict_arp*: each interface answers ARP requests only for its own addresses."""
        self.loads: Mapping[str, Loads] = {}  # kube-proxy counts no loads in this mode either
        self._scheduler = scheduler
        self._strict_arp = strict_arp
        self._rules = ElementTables("ipvs", IpvsTable())
        self._node_ips: tuple[str, ...] = ()
        self._desired = DesiredServers()
        self._present = _Present()
        self._last_error = ""  # of `load`; its caller retries
        self._missing: frozenset[str] = frozenset()  # schedulers that this kernel lacks
        self._device = VirtualDevice()
        self._facts: NodeFacts | None = None
        self._host_ips: tuple[str, ...] = ()
        self._are_addresses_old = True  # those of this host or of our device may have changed
        self._notices: NetworkNotices | None = None
        self._watch = RuleWatch()
        self._is_due = False
        self._check_s = 0.0

    def rules(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> Rules:
        return rules(translations.values(), facts, facts.node.addresses, self._scheduler)

    def metrics(self) -> Iterator[Metric]:
        return iter(())

    async def prepare(self) -> None:
        await self._rules.prepare()
        if await self._device.is_foreign():
            raise SyncError(
                f"{DEVICE} belongs to another program (kube-proxy in ipvs mode?): "
                "stop it and run `kube-proxy --cleanup`, or use --proxy-mode nftables"
            )
        await _require_ipvs()

    def _set_node(self) -> None:
        """Set the sysctls that this mode needs. Call it at the first load, when no other instance serves this node."""
        if refused := sysctls.apply([_NEEDED]):
            raise SyncError(f"ipvs mode needs conntrack: {refused[0]}")
        for reason in sysctls.apply(_USEFUL):
            log.warning("connections to deleted endpoints may last longer: %s", reason)
        for reason in sysctls.apply(_STRICT_ARP) if self._strict_arp else ():
            log.warning("this node answers ARP requests for Services' addresses: %s", reason)

    async def load(self, update: RuleUpdate) -> None:
        self._last_error = ""
        try:
            await self._load(update)
        except SyncError as error:
            self._last_error = str(error)
            raise

    async def _load(self, update: RuleUpdate) -> None:
        if self._facts is None:
            self._set_node()
        host_ips = await self._addresses()
        await self._rules.load(update._replace(facts=at_host(update.facts, host_ips)))
        self._facts = update.facts
        try:
            await self._load_servers(update, host_ips)
        except _MissingSchedulersError as error:
            self._missing |= error.schedulers
            instead = DEFAULT_SCHEDULER if self._scheduler in self._missing else self._scheduler
            log.warning("this kernel has no scheduler %s; using %s instead", error, instead)
            everything = {*self._desired.translations, *update.translations}
            await self._load_servers(update._replace(changed=everything), host_ips)

    async def _load_servers(self, update: RuleUpdate, host_ips: tuple[str, ...]) -> None:
        self._present.text = None
        node_ips = node_port_ips(update.facts, host_ips)
        names = set(update.changed)
        present = None if self._present.was_refused else self._present.servers
        if present is None or node_ips != self._node_ips:
            names |= {*self._desired.translations, *update.translations}
        self._node_ips = node_ips
        portals = self._desired.change(names, update.translations, node_ips, self._scheduler, self._missing)
        if present is None:
            present = await self._read_servers()
            portals |= present.keys()
        servers, foreign = self._desired.servers, self._present.foreign
        for portal in portals & foreign & servers.keys():
            log.warning("%s is not served: another program has a virtual server there", portal)
        there = {portal: present[portal] for portal in portals if portal in present}
        desired = {p: servers[p] for p in portals if p in servers and p not in foreign}
        try:
            await self._apply(present, list(server_changes(there, desired)))
        finally:
            await self._set_addresses(present, host_ips)  # for the Services that were not refused, too

    async def _addresses(self) -> tuple[str, ...]:
        """Return this host's addresses. If they may have changed, read them and those of our device again."""
        if self._are_addresses_old or self._notices is None:
            self._are_addresses_old = False  # a notice during the read counts
            try:
                self._host_ips, device_ips = await network.look_at_addresses()
            except SyncError:
                self._are_addresses_old = True
                raise
            self._device.ips = set(device_ips)
        return self._host_ips

    async def _read_servers(self) -> VirtualServers:
        """Read our virtual servers from the kernel, and note the portals of others."""
        listing = await _call(genetlink.listing)
        ours = await _call(genetlink.own_portals) if listing.servers else set()
        self._present.foreign = frozenset(listing.servers.keys() - ours)
        return {portal: server for portal, server in listing.servers.items() if portal in ours}

    async def _apply(self, present: VirtualServers, changes: list[ServerChange]) -> None:
        """Apply *changes* to IPVS, which has *present*. Endpoints that IPVS does not support are left out."""
        self._present.servers = None
        done, refused = await _call(genetlink.apply, changes) if changes else ([], [])
        record(present, done)
        refusals = [f"{change}: {why.strerror}" for change, why in refused if not _is_unsupported(change, why)]
        self._present.servers, self._present.was_refused = present, bool(refusals)
        schedulers = {c.server.scheduler for c, why in refused if c.endpoint is None and why.errno == ENOENT}
        if missing := schedulers - {DEFAULT_SCHEDULER}:
            raise _MissingSchedulersError(missing)
        if refusals:
            raise SyncError(f"IPVS refused: {min(refusals)}")
        for change, why in refused:
            log.warning("%s: left out, IPVS does not support such endpoints (%s)", change, why.strerror)

    async def _set_addresses(self, present: VirtualServers, host_ips: Iterable[str]) -> None:
        """Give our device the desired addresses, and those of removed servers that still have connections."""
        left = {portal.ip for portal in present.keys() - self._desired.servers.keys()} & self._device.ips
        await self._device.set_addresses((left | self._desired.ips.keys()) - set(host_ips))

    # ---- checks and repairs

    async def is_intact(self) -> bool:
        if self._facts is None or self._present.servers is None or not await self._rules.is_intact():
            return False
        if self._watch.is_polling and not self._is_due:
            return True  # the caller asks after each load, and a full check is slow
        self._is_due = False
        began = time.monotonic()
        is_intact = await self._check_servers()
        self._check_s = time.monotonic() - began
        return is_intact

    async def _check_servers(self) -> bool:
        """Follow address changes and remove idle servers; return whether the servers are as they were loaded."""
        sysctls.apply([_NEEDED])
        if self._are_addresses_old or self._notices is None:
            await self._load_again()
        printed = await _call(genetlink.printed)
        text = await _call(genetlink.without_counts, printed)
        if text == self._present.text:
            return True
        listing = await _call(genetlink.read, printed)
        if not self._is_as_loaded(listing):
            return False
        self._present.text = None if await self._remove_idle(listing) else text
        return True

    def _is_as_loaded(self, listing: Listing) -> bool:
        servers = self._present.servers
        assert servers is not None
        # A foreign server that is gone makes room for ours.
        return self._present.foreign & self._desired.servers.keys() <= listing.servers.keys() and all(
            listing.servers.get(portal) == server for portal, server in servers.items()
        )

    async def _remove_idle(self, listing: Listing) -> bool:
        """Remove undesired servers and endpoints without connections; return whether there were any to remove."""
        present, desired = self._present.servers, self._desired.servers
        assert present is not None
        if not any(removals_when_idle(present, desired, {})):
            return False
        if idle := list(removals_when_idle(present, desired, listing.connections)):
            await self._apply(present, idle)
            await self._set_addresses(present, self._host_ips)
        return True

    async def reload(self) -> None:
        """Load the rules and virtual servers again that another program has changed."""
        if self._facts is None:
            return
        if not await self._rules.is_intact():
            await self._rules.reload()
        self._present.servers = None
        await self._load_again()

    async def _load_again(self) -> None:
        """Load everything held. After a failure nothing counts as intact, so that the next check retries.

        An error that `load` raised, too, is left to its caller, who retries; everything else is loaded.
        """
        assert self._facts is not None
        try:
            await self._load(RuleUpdate(self._desired.translations.copy(), (), self._facts))
        except SyncError as error:
            if str(error) != self._last_error or self._present.servers is None:
                self._present.servers = None
                raise

    async def remove(self) -> None:
        self._present.servers, self._facts = None, None
        await self._rules.remove()
        if genetlink.is_loaded() and _NEEDED.path.exists():  # in a user namespace IPVS has nothing, and does not answer
            ours = await _call(genetlink.own_portals)
            deletions = [ServerChange(Verb.DELETE, portal, VirtualServerSpec()) for portal in ours]
            for change, why in (await _call(genetlink.apply, deletions)).refused:
                if why.errno != ESRCH:  # another program has deleted it
                    raise SyncError(f"IPVS refused: {change}: {why.strerror}")
        await self._device.remove()

    async def watch(self, on_change: Callable[[], None]) -> None:
        def on_notice() -> None:
            self._are_addresses_old = True

        def on_due() -> None:
            self._is_due = True
            on_change()

        await self._rules.watch(on_change)
        self._notices = NetworkNotices(on_notice)
        self._are_addresses_old = True  # changes before the first notice are unknown
        self._watch.poll(lambda: max(_POLL_S, self._check_s / _POLL_SHARE), on_due)

    def unwatch(self) -> None:
        self._rules.unwatch()
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        self._watch.stop()


def _is_unsupported(change: ServerChange, why: OSError) -> bool:
    """Return whether IPVS refused an endpoint's address as such, e.g. a broadcast address."""
    return change.verb is Verb.ADD and change.endpoint is not None and why.errno == EINVAL


async def _call(function: Callable[..., _Answer], *arguments: object) -> _Answer:
    """Call *function* in a thread. Raises SyncError in place of OSError."""
    try:
        return await in_thread(function, *arguments)
    except OSError as error:
        raise SyncError(f"IPVS does not answer: {error.strerror or error}") from error


async def _require_ipvs() -> None:
    """Raise SyncError, with what to do, unless this kernel has IPVS and it may be used here."""
    why = "modprobe is not installed"
    if not genetlink.is_loaded() and is_installed("modprobe"):
        try:
            await run_tool("modprobe", "ip_vs")
        except SyncError as error:
            why = str(error)
    if not genetlink.is_loaded():
        raise SyncError(f"this kernel has no IPVS ({why}); use --proxy-mode nftables, or a kernel with ip_vs")
    if not _NEEDED.path.exists():  # hidden from user namespaces, which may change nothing in IPVS either
        raise SyncError(
            "IPVS can be used by real root only, not in a user namespace: use sudo, or --proxy-mode nftables"
        )
    if not sysctls.can_apply(_NEEDED):
        raise SyncError(f"ipvs mode needs conntrack, and {_NEEDED} cannot be set to {_NEEDED.value} here")
