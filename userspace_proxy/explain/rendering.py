"""Renders the rules that `run` would load, with a reason for each line. Nothing is loaded."""

import asyncio
import logging
from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.config.settings import Settings
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.errors import Note, StartError
from userspace_proxy.explain.lines import Explained, Line
from userspace_proxy.host import network
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import Capture
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.modes import MODES
from userspace_proxy.modes.kernel_mode import warn_unless_forwarding
from userspace_proxy.modes.mode import Mode, RenderedMode, RenderRequest
from userspace_proxy.modes.portal_names import PortalNames
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
        names = select_service_ports(service, service_ports) if service else None
    except ValueError as error:
        raise StartError(f"--service: {error}") from None
    portal_names = PortalNames(service_ports)
    is_all = settings.proxy_mode == "all"
    modes = MODES.values() if is_all else (MODES[settings.proxy_mode],)
    found = []
    for mode in modes:
        for language in mode.languages_for("all" if is_all else settings.rules):
            rules = mode.render(replace(_requested(settings, given, mode, language), names=names))
            found.append(explained(RenderedMode(mode, language), rules, portal_names, is_short=bool(service)))
    return found, given.is_complete


def select_service_ports(text: str, service_ports: Collection[ServicePort]) -> set[ServicePortName]:
    """Return the service ports that *text*, ``[namespace/]name[:port]``, means. The port is a name or a number.

    Raises:
        ValueError: there is none, or Services of several namespaces match.
    """
    service, _, port = text.partition(":")
    namespace, _, name = service.rpartition("/")
    found = {
        each.name
        for each in service_ports
        if each.name.service.name == name
        and namespace in ("", each.name.service.namespace)
        and port in ("", each.name.port_name, str(each.port))
    }
    if not found:
        present = ", ".join(dict.fromkeys(str(each.name) for each in service_ports)) or "no Service at all"
        raise ValueError(f"no Service is called {text!r}; there is: {present}")
    services = sorted({str(each.service) for each in found})
    if len(services) > 1:
        raise ValueError(f"{text!r} may be any of {', '.join(services)}")
    return found


def explained(mode: RenderedMode, rules: Rules, names: PortalNames, *, is_short: bool) -> Explained:
    """Return the lines of *rules* with their reasons. *is_short*: without lines that affect no packet to a Service."""
    shown = rules.without_unused() if is_short else rules
    return Explained(mode, tuple(Line.of(rule, names) for rule in shown.lines()))


def _read(settings: Settings) -> _Given:
    state_dir = None
    if settings.state_dir is not None:
        state_dir = open_state_dir(settings.state_dir)
    memory = state_dir.load() if state_dir else SavedAllocations()
    here = Node(settings.node_name, addresses=asyncio.run(network.host_addresses()))
    tracker = Tracker(make_allocations(settings, memory), here=here, source_ip=settings.source_ip)
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
