"""``--proxy-mode iptables``: kube-proxy's chains in the kernel, loaded at the cost of what changed."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host import discard_routes, sysctls
from userspace_proxy.host.tool import in_thread, is_installed
from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.routes import Refusal
from userspace_proxy.modes.iptables import tables as kube_tables
from userspace_proxy.modes.iptables.chains import (
    LOCALNET,
    NODE_PORTS,
    SHARED,
    Chain,
    Manner,
    Rules,
    node_lines,
    node_rules,
    own_chains,
    service_lines,
    service_rules,
)
from userspace_proxy.modes.iptables.metrics import iptables_metrics
from userspace_proxy.modes.iptables.tables import Tables
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.xtables_script import TOOLS, XtablesScript, new_chain
from userspace_proxy.netfilter import xtables
from userspace_proxy.netfilter.notices import LaterLook, RuleNotices, call_often, quiet

# Of more endpoints rules do not say which they lead to, as with kube-proxy: it is a third of what is loaded.
_SAID_MAX = 1000
# So many changes at once are loaded as all is.
_CHANGED_MAX = 300
_CHAINS_AT_ONCE = 500
# How often iptables-legacy is looked at, which sends no notices; and how much of the time at most, as a look is long.
_POLL_S, _POLL_SHARE = 0.7, 0.05
_ROUTE_LOCALNET = sysctls.Sysctl(Path("/proc/sys/net/ipv4/conf/all/route_localnet"), 1)
_LOCALNET_NOTE = "route_localnet was off"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Family:
    """What is wanted of one family, and what is loaded: None where that is not known.

    ``counts``: how many ``rules`` there are, by table.
    """

    family: Family
    tool: str
    how: Manner | None = None
    rules: dict[ServicePortName, Rules] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    loaded: Tables | None = None
    loads: Loads = field(default_factory=Loads)


class IptablesTables:
    """kube-proxy's chains, through ``iptables-restore``: a transaction for each table of each family."""

    mode = "iptables"

    def __init__(self, how: Manner | None = None) -> None:
        self._how = how or Manner()
        self._families: list[_Family] = []
        self._is_legacy = False
        self._is_node_set = False
        self._notes: list[str] = []
        self._notices: RuleNotices | None = None
        self._poll: asyncio.Task[None] | None = None
        self._look = LaterLook()
        self._look_s = 0.0
        self._touched = False
        self._rejected: dict[ServicePortName, frozenset[str]] = {}  # addresses of portals that are rejected
        self._are_exceptions_known = False
        self._unheard = False  # something may have happened while our own loads were not listened to

    async def prepare(self) -> None:
        """Find out what there is; nothing is changed.

        Raises:
            SyncError: iptables is not installed; or the chains of these names are somebody else's.
        """
        self._is_legacy = await xtables.is_legacy()
        how = replace(self._how, random_fully=await xtables.knows_random_fully())
        families = []
        for family, tool in xtables.families():
            try:
                saved = kube_tables.read(await xtables.save(tool))
            except SyncError as error:
                if family == 4:
                    raise
                log.warning("IPv6 is not served: %s", error)  # a kernel may be without it
                continue
            if reason := kube_tables.foreign(saved, node_rules(family, how)):
                raise SyncError(reason)
            families.append(_Family(family, tool))
            if family == 4 and kube_tables.is_noted(_LOCALNET_NOTE, saved):
                self._notes = [_LOCALNET_NOTE]  # by the process before; whoever flushes our rules must not lose it
        if how.localhost_node_ports:
            if not sysctls.can_apply(_ROUTE_LOCALNET):
                log.warning("node ports are not served at 127.0.0.1: %s cannot be made 1 here", _ROUTE_LOCALNET)
                how = replace(how, localhost_node_ports=False)
            elif _ROUTE_LOCALNET.path.read_text().strip() == "0":
                self._notes = [_LOCALNET_NOTE]
        self._how, self._families = how, families

    def _set_node(self) -> None:
        """Set the node to what the mode needs: once it is noted how it was, and rules guard what this opens."""
        if self._how.localhost_node_ports and (refused := sysctls.apply([_ROUTE_LOCALNET])):
            log.warning("node ports are not served at 127.0.0.1: %s", refused[0])
        self._is_node_set = True

    async def load(
        self,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        facts: NodeFacts,
    ) -> None:
        if not self._families:
            await self.prepare()
        how = replace(self._how, pods=facts.pods, node_ports_on=facts.node_ports_on)
        done = await asyncio.gather(
            *(self._load_family(each, translations, changed, how) for each in self._families), return_exceptions=True
        )
        for error in filter(None, done):
            raise error
        self._touched = False
        if not self._is_node_set:
            self._set_node()
        await self._except_rejected(translations, changed)
        self._look.after(self._pause_s())

    async def _except_rejected(
        self, translations: Mapping[ServicePortName, Translation], changed: Collection[ServicePortName]
    ) -> None:
        """Let packets to portals that are rejected at FORWARD come so far, instead of being discarded before."""
        before = set().union(*self._rejected.values())
        for name in changed:
            self._rejected.pop(name, None)
            if name in translations and (ips := _rejected_ips(translations[name])):
                self._rejected[name] = ips
        after = set().union(*self._rejected.values())
        if after == before and self._are_exceptions_known:
            return
        try:
            await discard_routes.except_addresses(after)
        except SyncError as error:
            log.warning("clients of Services without endpoints may wait for a time-out: %s", error)
        self._are_exceptions_known = True

    async def _load_family(
        self,
        each: _Family,
        translations: Mapping[ServicePortName, Translation],
        changed: Collection[ServicePortName],
        how: Manner,
    ) -> None:
        how = _said(how, translations, each.family)
        names = changed if each.how == how else {*each.rules, *translations}
        for name in names:
            if before := each.rules.pop(name, None):
                each.counts.subtract(kube_tables.counts(before))
            if (made := translations.get(name)) is not None and (rules := service_rules(made, each.family, how)):
                each.rules[name] = rules
                each.counts.update(kube_tables.counts(rules))
        each.how = how
        wanted = Tables(node_rules(each.family, how), dict(each.rules))
        each.loads.rules = each.counts + kube_tables.counts(wanted.node)
        loaded, each.loaded = each.loaded, None  # unknown until the kernel has said yes
        with quiet(self._notices):
            self._unheard = True
            if loaded is None or self._touched or len(names) > _CHANGED_MAX:
                await self._load_whole(each, wanted)
            else:
                try:
                    with each.loads.of(everything=False):
                        await self._restore(each, kube_tables.change(loaded, wanted, names))
                except SyncError as error:
                    log.warning("the change was refused (%s); loading all that differs", error)
                    await self._load_whole(each, wanted)
        each.loaded = wanted

    async def _load_whole(self, each: _Family, wanted: Tables) -> None:
        saved = kube_tables.read(await xtables.save(each.tool))
        if reason := kube_tables.foreign(saved, wanted.node):
            raise SyncError(reason)
        notes = self._notes if each.family == 4 else []
        with each.loads.of(everything=True):
            await self._restore(each, kube_tables.whole(wanted, saved, self._at_once, notes))

    async def _restore(self, each: _Family, script: str) -> None:
        await xtables.restore(each.tool, script)
        each.loads.written = await in_thread(kube_tables.written, script)  # 20 MB, after a whole load

    @property
    def loads(self) -> Mapping[str, Loads]:
        return {f"IPv{each.family}": each.loads for each in self._families}

    def metrics(self) -> Iterator[Metric]:
        return iptables_metrics(self.loads)

    @property
    def _at_once(self) -> int | None:
        return None if self._is_legacy else _CHAINS_AT_ONCE

    async def reload(self) -> None:
        for each in self._families:
            if each.loaded is not None:
                with quiet(self._notices):
                    self._unheard = True
                    await self._load_whole(each, each.loaded)
        self._touched = False
        self._look.after(self._pause_s())

    async def remove(self) -> None:
        self._families, self._is_node_set = [], False
        self._rejected, self._are_exceptions_known = {}, False
        await discard_routes.except_addresses(())
        self._is_legacy = is_installed("iptables") and await xtables.is_legacy()
        for family, tool in xtables.families():
            if not is_installed(f"{tool}-save"):
                continue
            try:
                saved = kube_tables.read(await xtables.save(tool))
            except SyncError as error:
                if family == 4:
                    raise
                log.debug("no IPv6 rules are here: %s", error)
                continue
            with quiet(self._notices):
                await xtables.restore(tool, kube_tables.removal(saved, self._at_once))
            if kube_tables.is_noted(_LOCALNET_NOTE, saved):
                sysctls.apply([_ROUTE_LOCALNET._replace(value=0)])

    async def is_intact(self) -> bool:
        if not self._touched and not self._unheard and not self._is_legacy:
            return True
        began = time.monotonic()
        self._touched = self._unheard = False
        for each in self._families:
            if each.loaded is not None:
                try:
                    saved = await in_thread(kube_tables.read, await xtables.save(each.tool))
                except SyncError:
                    self._touched = True  # as it is not known
                    raise
                self._touched |= not kube_tables.is_loaded(each.loaded, saved)
        self._look_s = time.monotonic() - began
        return not self._touched

    async def watch(self, on_change: Callable[[], None]) -> None:
        def on_notice() -> None:
            self._touched = True
            on_change()

        if await xtables.is_legacy():
            self._poll = asyncio.create_task(call_often(self._pause_s, on_change), name="rules-poll")
        else:
            self._notices = RuleNotices(kube_tables.TABLES, on_notice)
            self._look.begin(on_change)
            self._look.after(self._pause_s())

    def _pause_s(self) -> float:
        return max(_POLL_S, self._look_s / _POLL_SHARE)

    def unwatch(self) -> None:
        self._look.end()
        if self._notices is not None:
            self._notices.close()
            self._notices = None
        if self._poll is not None:
            self._poll.cancel()
            self._poll = None


def _said(how: Manner, translations: Mapping[ServicePortName, Translation], family: Family) -> Manner:
    reaches = (made.reaches[family] for made in translations.values() if family in made.reaches)
    endpoints = sum(len(there.cluster) + len(there.local) for there in reaches)
    return replace(how, says_endpoints=endpoints <= _SAID_MAX)


def rules(translations: Mapping[ServicePortName, Translation], facts: NodeFacts, how: Manner) -> XtablesScript:
    """Return what is loaded for *translations* where nothing is yet, for the tools of both families. Pure."""
    made = {chain: new_chain(chain.name, reason) for chain, reason in SHARED.items()}
    made.update(itertools.chain.from_iterable(own_chains(each).items() for each in translations.values()))
    families, has_node_ports = [], False
    for family, tool in zip(FAMILIES, TOOLS, strict=True):
        here = replace(_said(how, translations, family), pods=facts.pods, node_ports_on=facts.node_ports_on)
        lines: dict[Chain, list[RuleLine]] = {chain: [] for chain in SHARED}
        of_services = (service_lines(each, family, here) for each in translations.values())
        for found in (*of_services, node_lines(family, here)):
            for chain, of_chain in found.items():
                lines.setdefault(chain, []).extend(of_chain)
        has_node_ports |= bool(lines[NODE_PORTS])
        families.append((tool, [kube_tables.section(table, lines, made) for table in kube_tables.TABLES]))

    def is_dead(rule: RuleLine) -> bool:
        return not has_node_ports and rule.text.startswith(f"-A {LOCALNET.name} ")

    return XtablesScript(families, is_dead, kube_tables.MARK.__eq__)


def _rejected_ips(made: Translation) -> frozenset[str]:
    return frozenset(r.portal.ip for r in made.routes if r.to is Refusal.REJECT and not r.portal.is_node_port)
