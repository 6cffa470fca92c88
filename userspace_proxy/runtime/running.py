"""The parts of a running proxy, for health, metrics and the control socket, which report on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # commands that use parts of `run` need neither all of them nor a server for HTTP
    from userspace_proxy.admin.health_checks import ServiceHealthChecks
    from userspace_proxy.config.settings import Settings
    from userspace_proxy.control.controller import Controller
    from userspace_proxy.control.journal import Journal
    from userspace_proxy.control.tracker import Tracker
    from userspace_proxy.dataplane.handover import HandoverPlane
    from userspace_proxy.dns.sink import DnsSink
    from userspace_proxy.interfaces import Proxier, Source
    from userspace_proxy.modes.mode import Mode
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.probes.filter import HealthFilter


@dataclass(frozen=True, slots=True)
class RunningProxy:
    """All parts, from desired state to rules.

    ``rules``: the facts about this node that rules need. ``journal``: the latest events of Services.
    """

    settings: Settings
    mode: Mode
    rules: NodeRules
    source: Source
    tracker: Tracker
    controller: Controller
    journal: Journal
    health_filter: HealthFilter
    proxier: Proxier
    plane: HandoverPlane
    health_checks: ServiceHealthChecks
    dns: DnsSink | None
