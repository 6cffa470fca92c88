"""Lines of rules with what is said of them; and how patterns say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Line(NamedTuple):
    """A line as its tool reads it. ``explanation`` is "" for brackets; ``service``: whose it is, "" for everybody's."""

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


Says = str | Callable[[re.Match[str]], str]
Patterns = tuple[tuple[re.Pattern[str], Says], ...]


def patterns(*rows: tuple[str, Says]) -> Patterns:
    return tuple((re.compile(pattern), says) for pattern, says in rows)


def said_of(text: str, known: Iterable[tuple[re.Pattern[str], Says]]) -> str:
    """Return what the first of *known* that matches all of *text* says; "" where none does."""
    for pattern, says in known:
        if (match := pattern.fullmatch(text)) is not None:
            return says if isinstance(says, str) else says(match)
    return ""
