"""Base of the proxiers of all modes: loads of changed rules, the conntrack entries that follow them, and repairs."""

import asyncio
import contextlib
import itertools
import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping

from userspace_proxy.errors import SyncError
from userspace_proxy.model.histogram import SYNC_BOUNDS_S, Histogram
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.kernel_rules import LoadableRules, NodeFacts, RuleUpdate, Translation, portals_of
from userspace_proxy.modes.repairs import REPAIR_PAUSE_S, RuleRepairer
from userspace_proxy.modes.translator import Translator
from userspace_proxy.netfilter.conntrack import Answering, forget_early_connections, forget_udp_flows

# New service ports that are logged one by one.
_LOGGED_MAX = 20

log = logging.getLogger(__name__)


class BaseProxier(ABC):
    """What all proxiers share. ``unopened``, ``loads``, ``repairs`` and ``repairer``: as in the protocol `Proxier`."""

    def __init__(self, kernel: LoadableRules, translator: Translator) -> None:
        self._kernel = kernel
        self._translator = translator
        self._plans = translator.plans
        self._lock = asyncio.Lock()
        self._loaded: NodeFacts | None = None  # None: no rules have been loaded
        self._conntrack = Histogram(SYNC_BOUNDS_S)  # searches for stale UDP flows
        self._forgotten = Counter[str]()  # deleted UDP flows, by IP family
        self.unopened: dict[ListenerName, str] = {}
        self.loads = 0
        self.repairs = 0
        self.repairer = RuleRepairer(kernel)

    @property
    def service_ports(self) -> int:
        return len(self._plans.held)

    def proxy_port(self, listener: ListenerName) -> int:
        return 0

    async def is_intact(self) -> bool:
        return await self._kernel.is_intact()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Neither load nor repair rules within the block."""
        async with self._lock:
            yield

    # ---- loads

    async def _load(self) -> None:
        """Load what differs from the loaded rules, and delete the conntrack entries that do not follow it."""
        facts, changed = self._translator.facts(), self._translator.unloaded
        if changed or facts != self._loaded:
            await self._kernel.load(RuleUpdate(self._translator.translations, changed, facts))
            self.loads += 1
            self.repairer.check_now()
        self._loaded, self._translator.unloaded = facts, {}
        self._log_new(name for name, before in changed.items() if not portals_of(before))
        await self._forget(self._changed_flows(changed))
        await forget_early_connections(self._new_tcp_portals(changed))

    async def _forget(self, flows: Mapping[Portal, Answering]) -> None:
        if flows:
            with self._conntrack.timed():
                for family, count in (await forget_udp_flows(flows)).items():
                    self._forgotten[f"IPv{family}"] += count

    async def _forget_all_flows(self) -> None:
        """Delete conntrack entries of all portals that do not follow the rules: they began while rules were missing."""
        await self._forget(self._udp_portals())
        await forget_early_connections(self._new_tcp_portals(dict.fromkeys(self._translator.translations)))

    def _udp_portals(self) -> dict[Portal, Answering]:
        """Return all UDP portals, each with the addresses that its replies come from."""
        made = (made for name, made in self._translator.translations.items() if name.protocol is L4Protocol.UDP)
        return {portal: answering for each in made for portal, answering in self._answers(each).items()}

    def _changed_flows(self, changed: Mapping[ServicePortName, Translation | None]) -> dict[Portal, Answering]:
        """Return the UDP portals of *changed* that differ, each with the addresses whose flows may continue.

        Without any such address all flows are stale: they would keep a deleted endpoint (kubernetes#139628).
        *changed* as in `Translator.unloaded`.
        """
        stale: dict[Portal, Answering] = {}
        for name, loaded in changed.items():
            if name.protocol is L4Protocol.UDP:
                made = self._translator.translations.get(name)
                before, after = ({} if each is None else self._answers(each) for each in (loaded, made))
                stale |= {portal: answering for portal, answering in after.items() if before.get(portal) != answering}
                gone = before.keys() - after.keys()
                stale |= {portal: frozenset() for portal in gone if self._translator.owners.owner(portal) is None}
        return stale

    @abstractmethod
    def _answers(self, made: Translation) -> Mapping[Portal, Answering]:
        """Return the addresses that replies of each portal of *made* come from."""

    def _new_tcp_portals(self, changed: Mapping[ServicePortName, Translation | None]) -> set[Portal]:
        """Return the TCP portals of *changed* that were not served before."""
        new: set[Portal] = set()
        for name, loaded in changed.items():
            if name.protocol is L4Protocol.TCP:
                new |= portals_of(self._translator.translations.get(name)) - portals_of(loaded)
        return new

    def _log_new(self, names: Iterable[ServicePortName]) -> None:
        """Log where the service ports *names* are served: users do not know allocated addresses."""
        found = (self._translator.translations.get(name) for name in sorted(names))
        new = [made for made in found if made is not None and made.routes]
        lines = (line for made in new for line in self._served_by(made))
        for line in itertools.islice(lines, _LOGGED_MAX):
            log.info("%s", line)
        if len(new) > _LOGGED_MAX:
            log.info("... and %d more service ports", len(new) - _LOGGED_MAX)

    @abstractmethod
    def _served_by(self, made: Translation) -> Iterable[str]:
        """Return lines of the log that say where packets to *made* go."""

    # ---- repairs, end

    async def run(self) -> None:
        """Load our rules again whenever another program changed them. Runs until cancelled."""
        await self.repairer.run(self._repair)

    async def _repair(self) -> None:
        async with self._lock:
            if is_repaired := self._loaded is not None and await self.repairer.repair():
                self.repairs += 1
                await self._forget_all_flows()
        if is_repaired:
            await asyncio.sleep(REPAIR_PAUSE_S)

    async def _remove_rules(self) -> None:
        try:
            await self._kernel.remove()
        except SyncError as error:
            log.error("rules were left behind (`userspace-proxy cleanup` removes them): %s", error)  # noqa: TRY400
