"""Explained lines: what `render --explain` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from userspace_proxy.modes.mode import RenderedMode
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import RuleLine


class Line(NamedTuple):
    """A line as its tool reads it. ``explanation`` is "" for brackets. ``service``: its owner, "" if all share it."""

    text: str
    explanation: str = ""
    service: str = ""

    @classmethod
    def of(cls, rule: RuleLine, names: PortalNames) -> Line:
        """Return *rule* with its reason in words."""
        reason = rule.reason if isinstance(rule.reason, str) else rule.reason(names)
        return cls(rule.text, reason, str(rule.service or ""))


@dataclass(frozen=True, slots=True)
class Explained:
    """All lines of one mode in one rule language."""

    rendered: RenderedMode
    lines: tuple[Line, ...]
