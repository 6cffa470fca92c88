"""Renders the rules that `run` would load, with a reason for each line. Nothing is loaded."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import Note, StartError
from userspace_proxy.model.redirects import Capture
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.modes import MODES
from userspace_proxy.modes.kernel_mode import warn_unless_forwarding
from userspace_proxy.modes.mode import Mode, RenderRequest
from userspace_proxy.modes.reasons.known import Known, chosen
from userspace_proxy.modes.reasons.lines import Explained, Way
from userspace_proxy.modes.rule_line import Rules
from userspace_proxy.runtime.desired_state import make_allocations, make_proxy_ports, open_state_dir
from userspace_proxy.runtime.node_setup import node_rules
from userspace_proxy.sources.files import nothing_found, read_once

log = logging.getLogger(__name__)


class _Given(NamedTuple):
    """The state in the manifests; ``is_complete``: all of them were understood."""

    state: ProxyState
    memory: SavedAllocations
    is_complete: bool


def render(settings: Settings) -> tuple[str, bool]:
    """Return the rules that `run` would load for *settings*; load nothing.

    Also returns whether all manifests were understood. Mistakes are logged, as `run` does.

    Raises:
        StartError: a path cannot be read, or there are no manifests.
    """
    mode = MODES[settings.proxy_mode]
    if mode.kernel_serves:
        warn_unless_forwarding()
    given = _read(settings)
    (language,) = mode.languages_for(settings.rules)
    return mode.render(_requested(settings, given, mode, language)).text(), given.is_complete


def explain(settings: Settings, service: str = "") -> tuple[list[Explained], bool]:
    """Return the rules of `render` with a reason for each line; with the mode "all" those of every mode.

    With *service*, only the rules of that Service. Also returns whether all manifests were understood.

    Raises:
        StartError: as `render`; or there is no such Service.
    """
    given = _read(settings)
    service_ports = given.state.service_ports.values()
    try:
        names = chosen(service, service_ports) if service else None
    except ValueError as error:
        raise StartError(f"--service: {error}") from None
    known = Known(service_ports)
    is_all = settings.proxy_mode == "all"
    modes = MODES.values() if is_all else (MODES[settings.proxy_mode],)
    found = []
    for mode, language in _ways(modes, "all" if is_all else settings.rules):
        rules = mode.render(replace(_requested(settings, given, mode, language), names=names))
        found.append(explained(Way(mode.name, language), rules, known, is_short=bool(service)))
    return found, given.is_complete


def _ways(modes: Iterable[Mode], rules: str) -> Iterator[tuple[Mode, str]]:
    """Yield each of *modes* with each of its rule languages that *rules* selects."""
    return ((mode, language) for mode in modes for language in mode.languages_for(rules))


def explained(way: Way, rules: Rules, known: Known, *, is_short: bool) -> Explained:
    """Return the lines of *rules* with their reasons. *is_short*: without lines that affect no packet to a Service."""
    shown = rules.without_unused() if is_short else rules
    return Explained(way, tuple(line.explained(known) for line in shown.lines()))


def _read(settings: Settings) -> _Given:
    state_dir = None
    if settings.state_dir is not None:
        state_dir = open_state_dir(settings.state_dir)
    memory = state_dir.load() if state_dir else SavedAllocations()
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


def _requested(settings: Settings, given: _Given, mode: Mode, language: str) -> RenderRequest:
    capture = Capture.ADDRESS if settings.capture == "address" else Capture.REDIRECT
    ports = make_proxy_ports(settings, given.memory.proxy_ports)
    return RenderRequest(settings, given.state, ports, node_rules(settings, mode, capture), language)
