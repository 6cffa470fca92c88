"""Explained lines: what `render --explain` prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Line(NamedTuple):
    """A line as its tool reads it. ``explanation`` is "" for brackets. ``service``: its owner, "" if all share it."""

    text: str
    explanation: str = ""
    service: str = ""


class Way(NamedTuple):
    """A mode in one rule language."""

    mode: str
    language: str

    def __str__(self) -> str:
        return f"userspace ({self.language})" if self.mode == "userspace" else self.mode


@dataclass(frozen=True, slots=True)
class Explained:
    """All lines of one mode."""

    way: Way
    lines: tuple[Line, ...]
