"""The results as written to JSON and read again: raw figures of each round, nothing derived."""

from dataclasses import dataclass, field
from typing import Literal

import msgspec

SCHEMA = 1
DIRECT, DIRECT_AGAIN = "direct", "direct again"  # clients dial the Pods themselves: the reference, taken twice
Kind = Literal["none", "kernel", "proxy"]


@dataclass(frozen=True, slots=True)
class ModeRun:
    """A mode, and the reason if it did not take part. ``kind``: what carries the bytes."""

    name: str
    title: str
    kind: Kind
    ours: bool
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One load over one mode in one round. Names of figures end in their units, e.g. ``p99_ms``."""

    case: str
    mode: str
    round: int
    figures: dict[str, float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What clients saw while one pod of three failed: counts of requests, one for each bucket.

    A request belongs to the bucket in which it began. ``event_s``: when the pod failed. ``told_s``: when the mode was
    notified that the endpoint is gone.
    """

    event: str
    mode: str
    round: int
    bucket_s: float
    event_s: float
    told_s: float
    good: list[int]
    slow: list[int]
    failed: list[int]


@dataclass
class Results:
    """The results of one comparison. ``notes``: what could not be measured, and why."""

    version: str
    taken_at: str
    machine: dict[str, str]
    duration_s: float
    rounds: int
    load_s: float
    modes: list[ModeRun]
    samples: list[Sample] = field(default_factory=list)
    timelines: list[Timeline] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def ran(self) -> list[ModeRun]:
        """Return the modes that took part."""
        return [mode for mode in self.modes if mode.reason is None]

    def shown(self) -> list[ModeRun]:
        """Return the modes without the second run of direct connections, which only gives the noise."""
        return [mode for mode in self.ran() if mode.name != DIRECT_AGAIN]

    def figures(self, case: str, mode: str, figure: str) -> dict[int, float]:
        """Return *figure* by round, for the rounds that have it."""
        return {
            sample.round: sample.figures[figure]
            for sample in self.samples
            if sample.case == case and sample.mode == mode and figure in sample.figures
        }


def to_json(results: Results) -> bytes:
    return msgspec.json.format(msgspec.json.encode(results), indent=1) + b"\n"


def from_json(data: bytes) -> Results:
    """Parse the output of `to_json`. Raises msgspec.ValidationError for any other data."""
    results = msgspec.json.decode(data, type=Results)
    if results.schema != SCHEMA:
        raise msgspec.ValidationError(f"schema is {results.schema}; this version reads {SCHEMA}")
    return results
