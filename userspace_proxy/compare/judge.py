"""Summarises figures of several rounds, and decides whether two modes differ.

1. Two modes are compared by their ratio within each round, because a disturbance of a whole round affects both.
2. The noise is the difference between two runs of direct connections. For figures that these do not have (CPU time and
   context switches of a proxy) the noise is unknown, and no difference is decided.
3. A difference is decided if the median ratio is further from 1 than the noise, and the ratios of all rounds are on the
   same side of 1. Otherwise it is undecided.
4. The spread covers all rounds. It shows what to expect from the next round.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, Results

# Three rounds agree by chance in 25 % of all cases, five in 6 %, seven in 2 %.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of the rounds, and their lowest and highest value."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The ratio of two modes: median and spread, the noise (a ratio above 1), and whether the difference is decided.

    ``noise``: None if unknown.
    """

    ratio: Figure
    noise: float | None
    decided: bool


def summed_up(values: Sequence[float]) -> Figure | None:
    """Return the median, the lowest and the highest of *values*, or None if there are none."""
    return Figure(statistics.median(values), min(values), max(values)) if values else None


def figure(results: Results, case: str, mode: str, name: str) -> Figure | None:
    return summed_up(list(results.figures(case, mode, name).values()))


def noise(results: Results, case: str, name: str) -> float | None:
    """Return the noise: the median ratio of two runs of direct connections, in the larger direction (1: no noise).

    None if unknown: there was no second run, or direct connections do not have this figure.
    """
    found = ratios(results, case, DIRECT, DIRECT_AGAIN, name)
    return math.exp(statistics.median(abs(math.log(ratio)) for ratio in found)) if found else None


def compare(results: Results, case: str, mode: str, reference: str, name: str) -> Comparison | None:
    """Compare one figure of two modes; return None if no round has both."""
    found = ratios(results, case, mode, reference, name)
    ratio = summed_up(found)
    if ratio is None:
        return None
    around = noise(results, case, name)
    rounds_agree = len(found) >= _FEWEST_ROUNDS and (min(found) > 1 or max(found) < 1)
    is_beyond = around is not None and abs(math.log(ratio.median)) > math.log(around)
    return Comparison(ratio, around, rounds_agree and is_beyond)


def ratios(results: Results, case: str, mode: str, reference: str, name: str) -> list[float]:
    """Return the figure *name* of *mode* divided by that of *reference*, for each round that has both."""
    figures, others = results.figures(case, mode, name), results.figures(case, reference, name)
    return [value / others[n] for n, value in figures.items() if value > 0 and others.get(n, 0) > 0]


def shares(good: Sequence[int], slow: Sequence[int], failed: Sequence[int]) -> tuple[float, float]:
    """Return the shares (0 to 1) of failed and of slow requests."""
    total = sum(good) + sum(slow) + sum(failed)
    return (sum(failed) / total, sum(slow) / total) if total else (0.0, 0.0)
