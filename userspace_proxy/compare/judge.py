"""How figures of several rounds are summed up, and when a difference between two modes is one.

Two modes are compared by their ratio within each round: what disturbs a whole round disturbs both. The same
mode measured twice gives the noise; what the direct way has none of (CPU and context switches of a proxy) has none that
is known, and is never decided. A difference is decided where the median ratio is further from 1 than
the noise, and the ratios of all rounds agree on which side of 1 they are.
Everything else is undecided, and is called so. The spread is that of all rounds: it says what to expect of the next.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from userspace_proxy.compare.modes import DIRECT, DIRECT_AGAIN
from userspace_proxy.compare.results import Results

# So many agree by chance in 25 % of all cases, five in 6 %, seven in 2 %.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of the rounds, and the spread: their lowest and highest."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One mode by another: the median ratio with its spread, the noise as a ratio above 1, whether it is decided.

    ``noise``: None where it is unknown.
    """

    ratio: Figure
    noise: float | None
    decided: bool


def summed_up(values: Sequence[float]) -> Figure | None:
    """Return the figure of *values*; None if there are none."""
    return Figure(statistics.median(values), min(values), max(values)) if values else None


def figure(results: Results, case: str, mode: str, name: str) -> Figure | None:
    return summed_up(list(results.figures(case, mode, name).values()))


def noise(results: Results, case: str, name: str) -> float | None:
    """Return how far the same mode is from itself: the larger of both directions, as a median ratio (1 is none).

    None where that is unknown: the direct way was not measured twice, or has nothing of the figure.
    """
    ratios = _ratios(results, case, DIRECT, DIRECT_AGAIN, name)
    return math.exp(statistics.median(abs(math.log(ratio)) for ratio in ratios)) if ratios else None


def compare(results: Results, case: str, mode: str, reference: str, name: str) -> Comparison | None:
    """Compare one figure of two modes; None where a round with both is missing."""
    ratios = _ratios(results, case, mode, reference, name)
    ratio = summed_up(ratios)
    if ratio is None:
        return None
    around = noise(results, case, name)
    rounds_agree = len(ratios) >= _FEWEST_ROUNDS and (min(ratios) > 1 or max(ratios) < 1)
    is_beyond = around is not None and abs(math.log(ratio.median)) > math.log(around)
    return Comparison(ratio, around, rounds_agree and is_beyond)


def _ratios(results: Results, case: str, mode: str, reference: str, name: str) -> list[float]:
    figures, others = results.figures(case, mode, name), results.figures(case, reference, name)
    return [value / others[n] for n, value in figures.items() if value > 0 and others.get(n, 0) > 0]


def shares(good: Sequence[int], slow: Sequence[int], failed: Sequence[int]) -> tuple[float, float]:
    """Return which share of requests failed, and which was slow."""
    total = sum(good) + sum(slow) + sum(failed)
    return (sum(failed) / total, sum(slow) / total) if total else (0.0, 0.0)
