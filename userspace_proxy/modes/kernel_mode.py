"""What modes share in which the kernel serves: each is tables in the kernel, held by one `KernelProxier`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import FORWARDED, Passage
from userspace_proxy.modes.mode import Mode, ModeSettings, PreparedMode, ProxierRequest, Removal, RenderRequest

if TYPE_CHECKING:
    from userspace_proxy.interfaces import KernelRules, NodeFacts, Translation
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.modes.kernel_proxier import KernelProxier
    from userspace_proxy.modes.plans import NodeRules
    from userspace_proxy.modes.rule_line import Rules

# From translations by service port, and facts of the node, to rules.
MakeRules = Callable[["Mapping[ServicePortName, Translation]", "NodeFacts", ModeSettings], "Rules"]

log = logging.getLogger(__name__)


def kernel_mode(
    name: str,
    description: str,
    make_tables: Callable[[ModeSettings], KernelRules],
    rules: MakeRules,
    *,
    language: str,
    firewall_passages: tuple[Passage, ...] = (FORWARDED,),
    annotations: tuple[str, ...] = (),
    node_port_addresses: tuple[str, ...] = (),
) -> Mode:
    """Return a mode whose tables in the kernel are what *make_tables* makes."""

    async def prepare(settings: ModeSettings) -> PreparedMode:
        tables = make_tables(settings)
        await tables.prepare()

        def make_proxier(request: ProxierRequest) -> KernelProxier:
            warn_unless_forwarding()
            return _make_proxier(tables, settings, request.rules)

        return PreparedMode(make_proxier)

    def removals(settings: ModeSettings) -> Sequence[Removal]:
        return (make_tables(settings).remove,)

    def render(request: RenderRequest) -> Rules:
        proxier = _make_proxier(make_tables(request.settings), request.settings, request.rules)
        translations, facts = proxier.translated(request.state)
        wanted = translations.keys() if request.names is None else translations.keys() & request.names
        chosen = {name: translations[name] for name in request.state.service_ports if name in wanted}
        return rules(chosen, facts, request.settings)

    return Mode(
        name=name,
        description=description,
        kernel_serves=True,
        prepare=prepare,
        removals=removals,
        languages=(language,),
        render=render,
        firewall_passages=firewall_passages,
        annotations=annotations,
        node_port_addresses=node_port_addresses,
    )


def warn_unless_forwarding() -> None:
    """Log a warning if this node forwards no packets: then only its own processes are served."""
    from userspace_proxy.host import network

    if not network.forwards():
        log.warning("this node forwards no packets (sysctl net.ipv4.ip_forward): only its own processes are served")


def _make_proxier(tables: KernelRules, settings: ModeSettings, rules: NodeRules) -> KernelProxier:
    from userspace_proxy.modes.kernel_proxier import KernelProxier

    cidrs = tuple(map(str, settings.service_ranges))
    return KernelProxier(tables, rules, masquerade_all=settings.masquerade_all, service_cidrs=cidrs)
