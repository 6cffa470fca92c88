"""ipvs mode: the kernel translates packets, by virtual servers of IPVS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import DIALLED, REPLIES
from userspace_proxy.modes.kernel_mode import kernel_mode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_rules import KernelRules


def make_rules(settings: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.ipvs.loader import IpvsTables

    return IpvsTables(settings.ipvs_scheduler, strict_arp=settings.ipvs_strict_arp)


MODE = kernel_mode(
    "ipvs",
    "the kernel serves, by IPVS",
    make_rules,
    language="ipvsadm",
    firewall_passages=(DIALLED, REPLIES),
    annotations=("balance", "ipvs-scheduler", "weights"),
    choice="by the scheduler of IPVS",
)
