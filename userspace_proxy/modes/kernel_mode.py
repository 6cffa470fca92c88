"""What the modes share in which the kernel translates packets: one `KernelProxier` over the rules of the mode."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import FORWARDED, ServiceTraffic
from userspace_proxy.modes.mode import CleanUp, Mode, ModeSettings, PreparedMode, ProxierRequest, RenderRequest

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_proxier import KernelProxier, KernelTranslator
    from userspace_proxy.modes.kernel_rules import KernelRules
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.modes.rule_line import Rules

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelMode(Mode):
    """A mode in which the kernel translates packets, by the rules that ``make_rules`` returns."""

    make_rules: Callable[[ModeSettings], KernelRules]
    kernel_serves: bool = True
    firewalled_traffic: tuple[ServiceTraffic, ...] = (FORWARDED,)

    async def prepare(self, settings: ModeSettings) -> PreparedMode:
        from userspace_proxy.modes.kernel_proxier import KernelProxier

        kernel = self.make_rules(settings)
        await kernel.prepare()

        def make_proxier(request: ProxierRequest) -> KernelProxier:
            warn_unless_forwarding()
            return KernelProxier(kernel, _translator(settings, request.rules))

        return PreparedMode(make_proxier)

    def clean_ups(self, settings: ModeSettings) -> Sequence[CleanUp]:
        return (self.make_rules(settings).remove,)

    def render(self, request: RenderRequest) -> Rules:
        translator = _translator(request.settings, request.rules)
        translator.plan(request.state)
        translator.translate()
        return self.make_rules(request.settings).rules(request.chosen(translator.translations), translator.facts())


def warn_unless_forwarding() -> None:
    """Log a warning if this node forwards no packets: then only its own processes are served."""
    from userspace_proxy.host import network

    if not network.forwards():
        log.warning("this node forwards no packets (sysctl net.ipv4.ip_forward): only its own processes are served")


def _translator(settings: ModeSettings, rules: NodeRules) -> KernelTranslator:
    from userspace_proxy.modes.kernel_proxier import KernelTranslator

    cidrs = tuple(map(str, settings.service_ranges))
    return KernelTranslator(rules, masquerade_all=settings.masquerade_all, service_cidrs=cidrs)
