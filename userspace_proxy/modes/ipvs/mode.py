"""Mode ipvs: the kernel leads packets on, by virtual servers of IPVS."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import DIALLED, REPLIES
from userspace_proxy.modes.kernel_mode import kernel_mode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.interfaces import KernelRules, NodeFacts, Translation
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.modes.rule_line import Rules


def make_tables(settings: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.ipvs.loader import IpvsTables

    return IpvsTables(settings.ipvs_scheduler, strict_arp=settings.ipvs_strict_arp)


def _rules(translations: Mapping[ServicePortName, Translation], facts: NodeFacts, settings: ModeSettings) -> Rules:
    from userspace_proxy.host import network
    from userspace_proxy.modes.ipvs import rules

    host_ips = facts.node.addresses or asyncio.run(network.host_addresses())
    return rules.rules(translations.values(), facts, host_ips, settings.ipvs_scheduler)


MODE = kernel_mode(
    "ipvs",
    "the kernel serves, by IPVS",
    make_tables,
    _rules,
    language="ipvsadm",
    firewall_passages=(DIALLED, REPLIES),
    annotations=("balance", "ipvs-scheduler", "weights"),
)
