"""Mode iptables: the kernel translates packets, by kube-proxy's chains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from userspace_proxy.modes.kernel_mode import kernel_mode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.interfaces import KernelRules, NodeFacts, Translation
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.modes.iptables.chains import ChainOptions
    from userspace_proxy.modes.rule_line import Rules


def make_tables(settings: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.iptables.loader import IptablesTables

    return IptablesTables(_options(settings))


def _options(settings: ModeSettings) -> ChainOptions:
    from userspace_proxy.modes.iptables.chains import ChainOptions

    return ChainOptions(
        masquerade_bit=settings.masquerade_bit,
        localhost_node_ports=settings.localhost_nodeports,
        drops_invalid=not settings.conntrack_tcp_be_liberal,
    )


def _rules(translations: Mapping[ServicePortName, Translation], facts: NodeFacts, settings: ModeSettings) -> Rules:
    from userspace_proxy.modes.iptables import loader

    return loader.rules(translations, facts, _options(settings))


MODE = kernel_mode(
    "iptables",
    "the kernel serves, by kube-proxy's iptables chains",
    make_tables,
    _rules,
    language="iptables",
    annotations=("balance: random",),
)
