"""Lines of rules, each with its reason, for `render` and `render --explain`. Pure.

A reason may be a callable. It is called only for an explanation, so that loads do not pay for it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from userspace_proxy.model.names import ServicePortName
from userspace_proxy.modes.portal_names import PortalNames

Reason = str | Callable[[PortalNames], str]


class RuleLine(NamedTuple):
    """A line as its tool reads it. ``reason`` is "" for brackets. ``service``: its owner, None if all share it."""

    text: str
    reason: Reason = ""
    service: ServicePortName | None = None

    def indented(self, tabs: str, end: str = "") -> RuleLine:
        return RuleLine(f"{tabs}{self.text}{end}", self.reason, self.service)


class Rules(ABC):
    """All rules of one mode, in one language."""

    @abstractmethod
    def lines(self) -> Iterator[RuleLine]:
        """Yield every line, in the order in which the tools read them."""

    @abstractmethod
    def without_unused(self) -> Rules:
        """Return the rules without lines that affect no packet to a Service."""

    def text(self) -> str:
        """Return the lines of `lines`, joined to one text."""
        return text_of(self.lines())


def text_of(lines: Iterable[RuleLine]) -> str:
    return "".join(f"{line.text}\n" for line in lines)
