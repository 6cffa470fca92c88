"""nftables mode: the kernel translates packets, by look-ups in nftables maps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace_proxy.modes.kernel_mode import KernelMode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.modes.kernel_rules import KernelRules


def _make_rules(_: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.element_tables import ElementTables
    from userspace_proxy.modes.slots.slot_table import SlotTable

    return ElementTables("nftables", SlotTable())


MODE = KernelMode(
    name="nftables",
    description="the kernel serves, by maps of nftables",
    make_rules=_make_rules,
    languages=("nftables",),
    node_port_addresses=("primary",),  # as kube-proxy does in this mode
    annotations=("balance: random", "weights"),
    choice="at random, by nftables",
    config_section="nftables",
)
