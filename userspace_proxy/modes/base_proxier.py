"""Base of the proxiers of all modes: plans for the desired state, one lock, and repairs of changed rules."""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Iterable

from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import LoadedRules
from userspace_proxy.model.names import ListenerName
from userspace_proxy.model.service import SourceIP
from userspace_proxy.modes.plans import NodeRules, Plans
from userspace_proxy.modes.repairs import REPAIR_PAUSE_S, RuleRepairer

# New service ports that are logged one by one.
_LOGGED_MAX = 20

log = logging.getLogger(__name__)


class BaseProxier:
    """What all proxiers share. ``unopened``, ``loads``, ``repairs`` and ``repairer``: as in the protocol `Proxier`."""

    def __init__(self, loaded: LoadedRules, rules: NodeRules, source_ip: SourceIP | None = None) -> None:
        """*source_ip*: as in `Plans`."""
        self._loaded_rules = loaded
        self._rules = rules
        self._lock = asyncio.Lock()
        self._plans = Plans(source_ip)
        self.unopened: dict[ListenerName, str] = {}
        self.loads = 0
        self.repairs = 0
        self.repairer = RuleRepairer(loaded)

    @property
    def service_ports(self) -> int:
        return len(self._plans.held)

    def proxy_port(self, listener: ListenerName) -> int:
        return 0

    async def is_intact(self) -> bool:
        return await self._loaded_rules.is_intact()

    @contextlib.asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Neither load nor repair rules within the block."""
        async with self._lock:
            yield

    async def run(self) -> None:
        """Load our rules again whenever another program changed them. Runs until cancelled."""
        await self.repairer.run(self._repair)

    async def _repair(self) -> None:
        async with self._lock:
            if is_repaired := self._is_loaded() and await self.repairer.repair():
                self.repairs += 1
                await self._forget_all_flows()
        if is_repaired:
            await asyncio.sleep(REPAIR_PAUSE_S)

    def _is_loaded(self) -> bool:
        """Return whether rules have been loaded."""
        raise NotImplementedError

    async def _forget_all_flows(self) -> None:
        """Delete conntrack entries of all portals that do not follow the rules: they began while rules were missing."""
        raise NotImplementedError

    async def _remove_rules(self) -> None:
        try:
            await self._loaded_rules.remove()
        except SyncError as error:
            log.error("rules were left behind (`userspace-proxy cleanup` removes them): %s", error)  # noqa: TRY400


def log_served(lines: Iterable[str], service_ports: int) -> None:
    """Log what is served from now on, for users who do not know the allocated addresses.

    *lines* describe the new *service_ports*. Only the first ones are read.
    """
    for line in itertools.islice(lines, _LOGGED_MAX):
        log.info("%s", line)
    if service_ports > _LOGGED_MAX:
        log.info("... and %d more service ports", service_ports - _LOGGED_MAX)
