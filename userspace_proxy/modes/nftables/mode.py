"""Mode nftables: the kernel leads packets on, by look-ups in maps of nftables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from userspace_proxy.modes.kernel_mode import kernel_mode
from userspace_proxy.modes.mode import ModeSettings

if TYPE_CHECKING:
    from userspace_proxy.interfaces import KernelRules, NodeFacts, Translation
    from userspace_proxy.model.names import ServicePortName
    from userspace_proxy.modes.rule_line import Rules


def make_tables(_: ModeSettings) -> KernelRules:
    from userspace_proxy.modes.slots.element_tables import ElementTables
    from userspace_proxy.modes.slots.slot_table import SlotTable

    return ElementTables("nftables", SlotTable())


def _rules(translations: Mapping[ServicePortName, Translation], facts: NodeFacts, _: ModeSettings) -> Rules:
    from userspace_proxy.modes.slots.slot_table import SlotTable

    return SlotTable().rules(facts, translations.values())


MODE = kernel_mode(
    "nftables",
    "the kernel serves, by maps of nftables",
    make_tables,
    _rules,
    language="nftables",
    node_port_addresses=("primary",),  # as kube-proxy does in this mode
    annotations=("balance: random", "weights"),
)
