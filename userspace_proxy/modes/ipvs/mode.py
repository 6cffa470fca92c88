"""ipvs mode: the kernel translates packets, by virtual servers of IPVS."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace_proxy.host.firewalls import DIALLED, REPLIES
from userspace_proxy.modes.kernel_mode import KernelMode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_rules import KernelRules


def _make_rules(settings: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.ipvs.loader import IpvsTables

    return IpvsTables(settings.ipvs_scheduler, strict_arp=settings.ipvs_strict_arp)


MODE = KernelMode(
    name="ipvs",
    description="the kernel serves, by IPVS",
    make_rules=_make_rules,
    languages=("ipvsadm",),
    firewalled_traffic=(DIALLED, REPLIES),
    annotations=("balance", "ipvs-scheduler", "weights"),
    choice="by the scheduler of IPVS",
    config_section="ipvs",
)
