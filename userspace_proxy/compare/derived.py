"""Values derived from results for claims, tables and charts: userspace against the best kernel mode, sizes, outages."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from userspace_proxy.compare import cases
from userspace_proxy.compare.judge import Comparison, Figure, compare, figure, shares, summed_up
from userspace_proxy.compare.modes import USERSPACE
from userspace_proxy.compare.results import DIRECT, ModeRun, Results, Timeline
from userspace_proxy.compare.scaling import SIZES

EVENT_NAMES = {"dies": "dies", "silent": "falls silent", "leaves": "is deleted"}


def short(value: float) -> str:
    """Return *value* with at most three significant digits: 12,300, 1.25, 0.031."""
    if not value:
        return "0"
    size = abs(value)
    if size >= 100:
        digits = max(0, int(math.log10(size)) - 2)
        return f"{round(value / 10**digits) * 10**digits:,}"
    text = f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{float(f'{value:.2g}'):.5f}"
    return text.rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """Return *share* as a percentage; never 0 % for a value above zero."""
    return f"{share:.0%}" if share in (0, 1) or share >= 0.095 else f"{share:.1%}"


def times(comparison: Comparison) -> str:
    """Return the ratio with its spread, marked as undecided, or as undecidable without a known noise."""
    ratio = comparison.ratio
    undecided = "" if comparison.decided else ", noise unknown" if comparison.noise is None else ", undecided"
    return f"{ratio.median:.2f} times ({ratio.low:.2f} to {ratio.high:.2f}{undecided})"


def noise_text(noise: float | None) -> str:
    """Return the noise as a ratio above 1, or a dash if it is unknown."""
    return "-" if noise is None else f"{noise:.2f}"


def kernel_modes(results: Results) -> list[ModeRun]:
    """Return the kernel modes that took part, or direct connections if there are none."""
    ran = [mode for mode in results.ran() if mode.kind == "kernel"]
    return ran or [mode for mode in results.ran() if mode.name == DIRECT]


def stand_in(results: Results) -> tuple[str, ...]:
    """Return a sentence that states that direct connections replace the kernel modes; nothing if they do not."""
    if any(mode.kind == "kernel" for mode in results.ran()):
        return ()
    return ("No kernel mode took part. Direct connections, without any Service, stand for the best that one could do.",)


def best_kernel(results: Results, case: str, name: str, *, more_is_better: bool) -> ModeRun | None:
    """Return the kernel mode with the best median, or None if none was measured.

    A median of zero is skipped, because it allows no ratio.
    """
    measured = [(figure(results, case, mode.name, name), mode) for mode in kernel_modes(results)]
    known = [(found.median, index, mode) for index, (found, mode) in enumerate(measured) if found and found.median]
    if not known:
        return None
    return (max if more_is_better else min)(known, key=lambda each: each[0])[2]


# ---- userspace against the kernel, figure by figure


@dataclass(frozen=True, slots=True)
class Point:
    """One figure compared between userspace and the best kernel mode; above 1 the kernel mode is better."""

    what: str
    kernel: str
    comparison: Comparison


RATE_POINT, BULK_POINT = "requests a second, 64 connections", "throughput of one flow"
_POINTS = (
    (cases.KEEPALIVE_1, "p50_ms", False, "latency of a request, one connection"),
    (cases.KEEPALIVE_64, "rate", True, RATE_POINT),
    (cases.NEW_1, "p50_ms", False, "latency of a new connection with a request"),
    (cases.NEW_64, "rate", True, "new connections a second"),
    (cases.BULK_1, "rate", True, BULK_POINT),
    (cases.BULK_8, "rate", True, "throughput of 8 flows"),
    (cases.KEEPALIVE_64, "machine_cpu_s", False, "CPU of the whole machine per request"),
    (cases.BULK_1, "machine_cpu_s", False, "CPU of the whole machine per GB"),
)


def points(results: Results) -> Iterator[Point]:
    """Yield the comparisons of userspace with the best kernel mode."""
    for case, name, more_is_better, what in _POINTS:
        kernel = best_kernel(results, case, name, more_is_better=more_is_better)
        if kernel is None:
            continue
        pair = (kernel.name, USERSPACE) if more_is_better else (USERSPACE, kernel.name)
        compared = compare(results, case, *pair, name)
        if compared is not None:
            yield Point(what, kernel.title, compared)


# ---- Services and failing pods


def sizes_of(results: Results, mode: str, name: str) -> dict[int, float]:
    """Return one figure of `scaling` by the number of Services."""
    found = {size: results.figures(f"services-{size}", mode, name) for size in SIZES}
    return {size: rounds[1] for size, rounds in found.items() if rounds}


@dataclass(frozen=True, slots=True)
class LookupGrowth:
    """How much longer a new connection takes with the most Services than with the fewest, in microseconds.

    The noise is the largest interquartile range of the turns at any number of Services. With fifteen turns, that is
    about three times the error of a difference of medians. ``by_size`` is empty if fewer than two sizes were measured.
    """

    title: str
    by_size: dict[int, float]
    noise_us: float

    @property
    def more_us(self) -> float:
        return self.by_size[max(self.by_size)] - self.by_size[min(self.by_size)] if self.by_size else 0.0

    @property
    def is_visible(self) -> bool:
        return self.more_us > self.noise_us


def lookup_growth(results: Results, mode: ModeRun) -> LookupGrowth:
    """Return how *mode*'s time for a new connection grows with the number of Services."""
    added = sizes_of(results, mode.name, "added_us")
    noise_us = max(sizes_of(results, mode.name, "spread_us").values(), default=0.0)
    return LookupGrowth(mode.title, added if len(added) > 1 else {}, noise_us)


def calls_of(results: Results, case: str, mode: str) -> Figure | None:
    """Return the number of system calls of *mode* in *case*, or None if they were not counted."""
    return summed_up([sum(s.figures.values()) for s in results.samples if (s.case, s.mode) == (case, mode)])


def outage(timelines: Sequence[Timeline]) -> tuple[float, float]:
    """Return the shares of failed and slow requests, from the event until a second after all modes were notified."""
    good, slow, failed = [], [], []
    for line in timelines:
        first, last = int(line.event_s / line.bucket_s), int((line.told_s + 1.0) / line.bucket_s)
        good += line.good[first:last]
        slow += line.slow[first:last]
        failed += line.failed[first:last]
    return shares(good, slow, failed)


def timelines_of(results: Results, event: str, mode: str) -> list[Timeline]:
    return [line for line in results.timelines if line.event == event and line.mode == mode]


def outages(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Yield event, best kernel mode, and the shares of failed requests there and in userspace."""
    for event in EVENT_NAMES:
        ours = timelines_of(results, event, USERSPACE)
        seen = [
            (outage(timelines)[0], mode.title)
            for mode in kernel_modes(results)
            if (timelines := timelines_of(results, event, mode.name))
        ]
        if ours and seen:
            lost, title = min(seen)
            yield event, title, lost, outage(ours)[0]
