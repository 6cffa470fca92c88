"""What `render` prints: the rules that `run` would load, and what each line of them does. Nothing is installed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Set
from dataclasses import replace
from typing import NamedTuple

from userspace_proxy.config.settings import Settings
from userspace_proxy.control.memory import Memory
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import Note, StartError
from userspace_proxy.explain.modes import explained, ways
from userspace_proxy.host import network
from userspace_proxy.interfaces import Capture, EventType, ObjectEvent, Redirects
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.iptables import loader as kube_kernel
from userspace_proxy.modes.ipvs import rules as ipvs
from userspace_proxy.modes.plans import planned_redirects
from userspace_proxy.modes.reasons.known import Known, chosen, only
from userspace_proxy.modes.reasons.lines import Explained
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.modes.userspace import iptables, nft
from userspace_proxy.runtime.parts import (
    KERNEL_MODES,
    make_allocations,
    make_kernel_proxier,
    make_proxy_ports,
    manner_of,
    node_rules_of,
    open_state_dir,
    warn_unless_forwarding,
)
from userspace_proxy.sources.files import nothing_found, read_once

log = logging.getLogger(__name__)


class _Given(NamedTuple):
    """What the paths say once; ``is_well``: all of it was understood."""

    state: ProxyState
    memory: Memory
    is_well: bool


def render(settings: Settings) -> tuple[str, bool]:
    """Return the rules that `run` would load for *settings*, in the language asked for; installs nothing.

    Also returns whether all was well; what was not is logged, as `run` does.

    Raises:
        StartError: a path cannot be read, or nothing is in any.
    """
    if settings.proxy_mode in KERNEL_MODES:
        warn_unless_forwarding()
    given = _read(settings)
    return _rules(settings, given).text(), given.is_well


def explain(settings: Settings, service: str = "") -> tuple[list[Explained], bool]:
    """Return what `render` does with what each line does; with the mode "all" for every mode; or for *service* only.

    Raises:
        StartError: as `render`; or *service* is none.
    """
    given = _read(settings)
    service_ports = given.state.service_ports.values()
    names = None
    if service:
        try:
            names = chosen(service, service_ports)
        except ValueError as error:
            raise StartError(f"--service: {error}") from None
    known = Known(service_ports)
    found = []
    for way in ways(settings.proxy_mode, settings.rules):
        if way.mode == "userspace" or way.mode in KERNEL_MODES:
            rules = _rules(replace(settings, proxy_mode=way.mode, rules=way.language), given, names)
            found.append(explained(way, rules, known, is_short=bool(service)))
    return found, given.is_well


def _read(settings: Settings) -> _Given:
    state_dir = None
    if settings.state_dir is not None:
        state_dir = open_state_dir(settings.state_dir)
    memory = state_dir.load() if state_dir else Memory()
    tracker = Tracker(make_allocations(settings, memory), here=Node(settings.node_name), source_ip=settings.source_ip)
    manifests, problems = read_once(settings.paths, for_check=False)
    if not manifests and not problems:
        raise StartError(nothing_found(settings.paths))
    faults = [problem for problem in problems if not isinstance(problem.error, Note)]
    for problem in faults:
        log.error("%s", problem)
    tracker.apply(
        ObjectEvent(EventType.SET, manifest.kind, manifest.name, manifest.object, manifest.place)
        for manifest in manifests
        if manifest.object is not None
    )
    return _Given(tracker.state(), memory, not faults and not tracker.problems)


def _redirects(settings: Settings, given: _Given) -> Redirects:
    ports = make_proxy_ports(settings, given.memory.proxy_ports)
    return planned_redirects(given.state, ports, node_rules_of(settings, _shown_capture(settings)))


def _shown_capture(settings: Settings) -> Capture:
    return Capture.ADDRESS if settings.capture == "address" else Capture.REDIRECT


def _rules(settings: Settings, given: _Given, names: Set[ServicePortName] | None = None) -> Rules:
    """Return the rules of one mode, of the service ports *names* only where these are given."""
    if settings.proxy_mode in KERNEL_MODES:
        tables = KERNEL_MODES[settings.proxy_mode](settings)
        proxier = make_kernel_proxier(tables, settings, node_rules_of(settings, _shown_capture(settings)))
        translations, facts = proxier.translated(given.state)
        wanted = translations.keys() if names is None else translations.keys() & names
        translations = {name: translations[name] for name in given.state.service_ports if name in wanted}
        if settings.proxy_mode == "ipvs":
            host_ips = facts.node.addresses or asyncio.run(network.host_addresses())
            return ipvs.rules(translations.values(), facts, host_ips, settings.ipvs_scheduler)
        if settings.proxy_mode == "iptables":
            return kube_kernel.rules(translations, facts, manner_of(settings))
        return SlotTable().rules(facts, translations.values())
    redirects = _redirects(settings, given)
    if names is not None:
        redirects = only(redirects, names)
    return iptables.rules(redirects) if settings.rules == "iptables" else nft.rules(redirects)
