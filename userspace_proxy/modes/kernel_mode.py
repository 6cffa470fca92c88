"""What the modes share in which the kernel translates packets: one `KernelProxier` over the rules of the mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import FORWARDED, Passage
from userspace_proxy.modes.mode import Mode, ModeSettings, PreparedMode, ProxierRequest, Removal, RenderRequest

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_proxier import KernelProxier
    from userspace_proxy.modes.kernel_rules import KernelRules
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.modes.rule_line import Rules

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMode(Mode):
    """A mode in which the kernel translates packets, by the rules that ``make_rules`` returns."""

    make_rules: Callable[[ModeSettings], KernelRules]
    kernel_serves: bool = True
    firewall_passages: tuple[Passage, ...] = (FORWARDED,)

    async def prepare(self, settings: ModeSettings) -> PreparedMode:
        kernel = self.make_rules(settings)
        await kernel.prepare()

        def make_proxier(request: ProxierRequest) -> KernelProxier:
            warn_unless_forwarding()
            return _make_proxier(kernel, settings, request.rules)

        return PreparedMode(make_proxier)

    def removals(self, settings: ModeSettings) -> Sequence[Removal]:
        return (self.make_rules(settings).remove,)

    def render(self, request: RenderRequest) -> Rules:
        kernel = self.make_rules(request.settings)
        translations, facts = _make_proxier(kernel, request.settings, request.rules).translated(request.state)
        names = translations.keys() if request.names is None else translations.keys() & request.names
        return kernel.rules({name: translations[name] for name in request.state.service_ports if name in names}, facts)


def warn_unless_forwarding() -> None:
    """Log a warning if this node forwards no packets: then only its own processes are served."""
    from userspace_proxy.host import network

    if not network.forwards():
        log.warning("this node forwards no packets (sysctl net.ipv4.ip_forward): only its own processes are served")


def _make_proxier(kernel: KernelRules, settings: ModeSettings, rules: NodeRules) -> KernelProxier:
    from userspace_proxy.modes.kernel_proxier import KernelProxier

    cidrs = tuple(map(str, settings.service_ranges))
    return KernelProxier(kernel, rules, masquerade_all=settings.masquerade_all, service_cidrs=cidrs)
