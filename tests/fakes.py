"""Hand-written fakes of things that a test must control."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class FakeClock:
    """A clock that the test advances."""

    now_s: float = 1_000.0

    def __call__(self) -> float:
        return self.now_s
