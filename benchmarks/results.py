"""What was measured, and the two ways to sum it up: the median of a figure, and of its paired ratios."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.cases import Run

Figure = Callable[[Run], float]


@dataclass
class Results:
    """``runs``: case -> plane -> round -> Run. ``system_calls``: request or connection -> plane -> call -> how many."""

    machine: dict[str, str]
    rounds: int
    seconds: float
    runs: dict[str, dict[str, dict[int, Run]]] = field(default_factory=dict)
    idle_kib: dict[str, float] = field(default_factory=dict)
    system_calls: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    disturbed: dict[str, list[dict[str, float]]] = field(default_factory=dict)

    def add(self, case: str, plane: str, number: int, run: Run) -> None:
        self.runs.setdefault(case, {}).setdefault(plane, {})[number] = run

    def median(self, case: str, plane: str, figure: Figure) -> float | None:
        """Return the median of *figure* over the rounds; None where this plane did not run this case."""
        rounds = self.runs.get(case, {}).get(plane)
        return statistics.median(figure(run) for run in rounds.values()) if rounds else None

    def ratios(self, case: str, plane: str, reference: str, figure: Figure) -> list[float]:
        """Return *figure* of *plane* by that of *reference* in the same round, for each round that has both."""
        rounds, others = self.runs.get(case, {}).get(plane, {}), self.runs.get(case, {}).get(reference, {})
        return [figure(run) / figure(others[n]) for n, run in rounds.items() if n in others and figure(others[n])]

    def ratio(self, case: str, plane: str, reference: str, figure: Figure) -> float | None:
        """Return the median of `ratios`; None if there are none."""
        ratios = self.ratios(case, plane, reference, figure)
        return statistics.median(ratios) if ratios else None

    def disturbed_median(self, plane: str, figure: str) -> float | None:
        """Return the median of one figure of `disturbed.disturbed`."""
        rounds = self.disturbed.get(plane)
        return statistics.median(each[figure] for each in rounds) if rounds else None
