"""``--proxy-mode iptables``: load kube-proxy's chains into the kernel. The cost follows what changed."""

import itertools
import logging
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from prometheus_client.core import Metric

from userspace_proxy.errors import SyncError
from userspace_proxy.host import discard_routes, sysctls
from userspace_proxy.host.tool import in_thread, is_installed
from userspace_proxy.model.endpoint import FAMILIES, Family
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.routes import Refusal
from userspace_proxy.modes.iptables import chains as kube_chains
from userspace_proxy.modes.iptables import tables as kube_tables
from userspace_proxy.modes.iptables.chains import LOCALNET, NODE_PORTS, SHARED, ChainOptions, ChainRules
from userspace_proxy.modes.iptables.metrics import iptables_metrics
from userspace_proxy.modes.iptables.tables import Tables
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.rule_line import RuleLine, Rules
from userspace_proxy.modes.watched_rules import XtablesRules, all_or_first_error
from userspace_proxy.modes.xtables_script import TOOLS, ChainKey, Saved, XtablesScript, new_chain, read
from userspace_proxy.netfilter import xtables

# With more endpoints, rules have no comment that names their endpoint, as in kube-proxy: a third of the text.
_COMMENTS_MAX = 1000
# With more changes than this, a load compares all rules instead.
_CHANGED_MAX = 300
_CHAINS_AT_ONCE = 500
_ROUTE_LOCALNET = sysctls.Sysctl(Path("/proc/sys/net/ipv4/conf/all/route_localnet"), 1)
_LOCALNET_NOTE = "route_localnet was off"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Family:
    """The desired and the loaded rules of one IP family. ``loaded``: None if unknown.

    ``counts``: the number of ``rules`` in each table.
    """

    family: Family
    tool: str
    options: ChainOptions | None = None
    rules: dict[ServicePortName, ChainRules] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    loaded: Tables | None = None
    loads: Loads = field(default_factory=Loads)

    def update(self, update: RuleUpdate, options: ChainOptions) -> Collection[ServicePortName]:
        """Set the desired rules; return the service ports whose rules may differ from the loaded ones."""
        translations = update.translations
        names = update.changed if self.options == options else {*self.rules, *translations}
        for name in names:
            if before := self.rules.pop(name, None):
                self.counts.subtract(kube_tables.counts(before))
            made = translations.get(name)
            if made is not None and (rules := kube_chains.service_rules(made, self.family, options)):
                self.rules[name] = rules
                self.counts.update(kube_tables.counts(rules))
        self.options = options
        return names


class IptablesTables(XtablesRules):
    """kube-proxy's chains, loaded by ``iptables-restore`` in one transaction for each table and IP family."""

    def __init__(self, options: ChainOptions | None = None) -> None:
        super().__init__(kube_tables.TABLES)
        self._options = options or ChainOptions()
        self._families: list[_Family] = []
        self._is_legacy = False
        self._is_node_set = False
        self._notes: list[str] = []
        self._rejected: dict[ServicePortName, frozenset[str]] = {}  # addresses of portals that are rejected
        self._are_exceptions_known = False
        self._is_unheard = False  # notices during loads of our own were ignored

    def rules(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> Rules:
        return rules(translations, facts, self._options)

    async def prepare(self) -> None:
        """Read this host's rules and settings. Changes nothing.

        Raises:
            SyncError: iptables is not installed, or another program owns chains of these names.
        """
        self._is_legacy = await xtables.is_legacy()
        options = replace(self._options, random_fully=await xtables.knows_random_fully())
        families = []
        for family, tool in xtables.families():
            saved = await _saved(family, tool)
            if saved is None:
                log.warning("IPv6 is not served")
                continue
            if reason := kube_tables.foreign(saved, kube_chains.node_rules(family, options)):
                raise SyncError(reason)
            families.append(_Family(family, tool))
            if family == 4 and kube_tables.is_noted(_LOCALNET_NOTE, saved):
                self._notes = [_LOCALNET_NOTE]  # by the previous process; must survive a flush of our rules
        self._families = families
        self._options = self._with_localnet(options) if options.localhost_node_ports else options

    def _with_localnet(self, options: ChainOptions) -> ChainOptions:
        """Return *options*, without node ports at 127.0.0.1 if route_localnet cannot be set. Note its present value."""
        if not sysctls.can_apply(_ROUTE_LOCALNET):
            log.warning("node ports are not served at 127.0.0.1: %s cannot be set to 1 here", _ROUTE_LOCALNET)
            return replace(options, localhost_node_ports=False)
        if _ROUTE_LOCALNET.path.read_text().strip() == "0":
            self._notes = [_LOCALNET_NOTE]
        return options

    def _set_node(self) -> None:
        """Set route_localnet. Call it after a load: the rules note its value and guard 127.0.0.0/8."""
        if self._options.localhost_node_ports and (refused := sysctls.apply([_ROUTE_LOCALNET])):
            log.warning("node ports are not served at 127.0.0.1: %s", refused[0])
        self._is_node_set = True

    async def load(self, update: RuleUpdate) -> None:
        if not self._families:
            await self.prepare()
        await all_or_first_error(self._load_family(each, update) for each in self._families)
        self._watch.is_touched = False
        if not self._is_node_set:
            self._set_node()
        await self._except_rejected(update)
        self._check_later()

    async def _except_rejected(self, update: RuleUpdate) -> None:
        """Exempt rejected portals from the discard routes: their packets must reach the REJECT rules at FORWARD."""
        before = set().union(*self._rejected.values())
        for name in update.changed:
            self._rejected.pop(name, None)
            made = update.translations.get(name)
            if made is not None and (ips := _rejected_ips(made)):
                self._rejected[name] = ips
        after = set().union(*self._rejected.values())
        if after == before and self._are_exceptions_known:
            return
        try:
            await discard_routes.except_addresses(after)
        except SyncError as error:
            log.warning("clients of Services without endpoints may wait for a time-out: %s", error)
        self._are_exceptions_known = True

    async def _load_family(self, each: _Family, update: RuleUpdate) -> None:
        options = _options_for(self._options, update.translations, update.facts, each.family)
        names = each.update(update, options)
        desired = Tables(kube_chains.node_rules(each.family, options), dict(each.rules))
        each.loads.rules = each.counts + kube_tables.counts(desired.node)
        loaded, each.loaded = each.loaded, None  # unknown until the kernel has accepted the load
        with self._watch.quiet():
            self._is_unheard = True
            if loaded is None or self._watch.is_touched or len(names) > _CHANGED_MAX:
                await self._load_all(each, desired)
            else:
                try:
                    with each.loads.of(everything=False):
                        await _restore(each, kube_tables.change(loaded, desired, names))
                except SyncError as error:
                    log.warning("the change was refused (%s); loading everything that differs", error)
                    await self._load_all(each, desired)
        each.loaded = desired

    async def _load_all(self, each: _Family, desired: Tables) -> None:
        """Compare all rules with those in the kernel, and load the difference."""
        saved = read(await xtables.save(each.tool))
        if reason := kube_tables.foreign(saved, desired.node):
            raise SyncError(reason)
        notes = self._notes if each.family == 4 else []
        with each.loads.of(everything=True):
            await _restore(each, kube_tables.whole(desired, saved, self._at_once, notes))

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
                with self._watch.quiet():
                    self._is_unheard = True
                    await self._load_all(each, each.loaded)
        self._watch.is_touched = False
        self._check_later()

    async def remove(self) -> None:
        self._families, self._is_node_set = [], False
        self._rejected, self._are_exceptions_known = {}, False
        await discard_routes.except_addresses(())
        for family, tool in xtables.families_in_use():
            if not (saved := await _saved(family, tool)):
                continue
            self._is_legacy = is_installed("iptables") and await xtables.is_legacy()
            with self._watch.quiet():
                await xtables.restore(tool, kube_tables.removal(saved, self._at_once))
            if kube_tables.is_noted(_LOCALNET_NOTE, saved):
                sysctls.apply([_ROUTE_LOCALNET._replace(value=0)])

    async def is_intact(self) -> bool:
        if not self._watch.is_touched and not self._is_unheard and not self._is_legacy:
            return True
        return await super().is_intact()

    async def _are_loaded(self) -> bool:
        is_touched = self._watch.is_touched = self._is_unheard = False
        for each in self._families:
            if each.loaded is not None:
                try:
                    saved = await in_thread(read, await xtables.save(each.tool))
                except SyncError:
                    self._watch.is_touched = True  # unknown
                    raise
                is_touched |= not kube_tables.is_loaded(each.loaded, saved)
        self._watch.is_touched |= is_touched
        return not self._watch.is_touched


async def _saved(family: Family, tool: str) -> Saved | None:
    """Return the rules in the kernel, or None if it has no IPv6."""
    try:
        return read(await xtables.save(tool))
    except SyncError as error:
        if family == 4:
            raise
        log.debug("%s cannot be used: %s", tool, error)
        return None


async def _restore(each: _Family, script: str) -> None:
    await xtables.restore(each.tool, script)
    each.loads.written = await in_thread(kube_tables.written, script)  # up to 20 MB


def _options_for(
    options: ChainOptions, translations: Mapping[ServicePortName, Translation], facts: NodeFacts, family: Family
) -> ChainOptions:
    """Return *options* completed for the node and for the number of endpoints of *family*."""
    reaches = (made.reaches[family] for made in translations.values() if family in made.reaches)
    endpoints = sum(len(there.cluster) + len(there.local) for there in reaches)
    names_endpoints = endpoints <= _COMMENTS_MAX
    return replace(options, pods=facts.pods, node_ports_on=facts.node_ports_on, names_endpoints=names_endpoints)


def rules(
    translations: Mapping[ServicePortName, Translation], facts: NodeFacts, options: ChainOptions
) -> XtablesScript:
    """Return what a first load writes for *translations*, for the tools of both families. Pure."""
    made = {chain: new_chain(chain.name, reason) for chain, reason in SHARED.items()}
    made.update(itertools.chain.from_iterable(kube_chains.own_chains(each).items() for each in translations.values()))
    families, has_node_ports = [], False
    for family, tool in zip(FAMILIES, TOOLS, strict=True):
        lines = _lines(translations, family, _options_for(options, translations, facts, family))
        has_node_ports |= bool(lines[NODE_PORTS])
        families.append((tool, [kube_tables.section(table, lines, made) for table in kube_tables.TABLES]))

    def is_dead(rule: RuleLine) -> bool:
        return not has_node_ports and rule.text.startswith(f"-A {LOCALNET.name} ")

    return XtablesScript(families, is_dead, kube_tables.MARK.__eq__)


def _lines(
    translations: Mapping[ServicePortName, Translation], family: Family, options: ChainOptions
) -> dict[ChainKey, list[RuleLine]]:
    lines: dict[ChainKey, list[RuleLine]] = {chain: [] for chain in SHARED}
    of_services = (kube_chains.service_lines(each, family, options) for each in translations.values())
    for found in (*of_services, kube_chains.node_lines(family, options)):
        for chain, of_chain in found.items():
            lines.setdefault(chain, []).extend(of_chain)
    return lines


def _rejected_ips(made: Translation) -> frozenset[str]:
    return frozenset(r.portal.ip for r in made.routes if r.to is Refusal.REJECT and not r.portal.is_node_port)
