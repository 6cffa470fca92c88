"""iptables mode: the kernel translates packets, by kube-proxy's chains."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace_proxy.modes.kernel_mode import KernelMode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_rules import KernelRules


def _make_rules(settings: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.iptables.chains import ChainOptions
    from userspace_proxy.modes.iptables.loader import IptablesTables

    options = ChainOptions(
        masquerade_bit=settings.masquerade_bit,
        localhost_node_ports=settings.localhost_nodeports,
        drops_invalid=not settings.conntrack_tcp_be_liberal,
    )
    return IptablesTables(options)


MODE = KernelMode(
    name="iptables",
    description="the kernel serves, by kube-proxy's iptables chains",
    make_rules=_make_rules,
    languages=("iptables",),
    annotations=("balance: random",),
    choice="at random, by iptables",
    shares_kube_proxys_chains=True,
)
