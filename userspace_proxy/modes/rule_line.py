"""Lines of rules, each with its reason, for `render` and `render --explain`. Pure.

A reason may be a callable. It is called only for an explanation, so that loads do not pay for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.lines import Line

Reason = str | Callable[[Known], str]


class RuleLine(NamedTuple):
    """A line as its tool reads it. ``reason`` is "" for brackets. ``service``: its owner, None if all share it."""

    text: str
    reason: Reason = ""
    service: ServicePortName | None = None

    def indented(self, tabs: str, end: str = "") -> RuleLine:
        return RuleLine(f"{tabs}{self.text}{end}", self.reason, self.service)

    def explained(self, known: Known) -> Line:
        """Return the line with its reason in words."""
        reason = self.reason if isinstance(self.reason, str) else self.reason(known)
        return Line(self.text, reason, str(self.service or ""))


class Rules(Protocol):
    """All rules of one mode, in one language."""

    def lines(self) -> Iterator[RuleLine]:
        """Yield every line, in the order in which the tools read them."""
        ...

    def text(self) -> str:
        """Return the same lines as one text."""
        ...

    def without_unused(self) -> Rules:
        """Return the rules without lines that affect no packet to a Service."""
        ...
