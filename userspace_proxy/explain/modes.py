"""The modes in the order in which `render` shows them, and their rules with their reasons. Pure."""

from __future__ import annotations

from userspace_proxy.modes import MODES
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import Explained, Way
from userspace_proxy.modes.rule_line import Rules

WAYS = tuple(Way(mode.name, language) for mode in MODES.values() for language in mode.languages)


def explained(way: Way, rules: Rules, known: Known, *, is_short: bool) -> Explained:
    """Return the lines of *rules* with their reasons. *is_short*: without lines that affect no packet to a Service."""
    shown = rules.without_unused() if is_short else rules
    return Explained(way, tuple(line.explained(known) for line in shown.lines()))
