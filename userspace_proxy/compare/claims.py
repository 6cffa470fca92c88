"""Compares what textbooks claim about the modes with this machine's results. Pure.

`claims.toml` has the claims. Only figures of this run count, by the rule of `judge`. If no kernel mode took part,
direct connections replace the kernel modes as the upper bound, and the text says so.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from userspace_proxy.compare import cases
from userspace_proxy.compare.derived import (
    EVENT_NAMES,
    RATE_POINT,
    best_kernel,
    calls_of,
    kernel_modes,
    lookup_growth,
    outage,
    outages,
    percent,
    points,
    short,
    sizes_of,
    stand_in,
    timelines_of,
    times,
)
from userspace_proxy.compare.judge import compare, figure
from userspace_proxy.compare.modes import HAPROXY, IPTABLES, IPVS, NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import DIRECT, Kind, ModeRun, Results

Ruling = Literal["holds", "partly", "fails", "undecided", "unmeasured"]
RULINGS: dict[Ruling, str] = {
    "holds": "true here",
    "partly": "half of the truth",
    "fails": "not true here",
    "undecided": "undecided",
    "unmeasured": "not measured",
}
_ENOUGH_S = 1.0  # a change that takes effect within a second is fast enough
_VISIBLE = 0.02  # a share of failed requests that users notice
_MATTERS = 1.1  # a smaller ratio is no reason to choose a mode
_HOP_FIGURES = (
    (cases.KEEPALIVE_1, "p50_ms", "the latency of a request"),
    (cases.KEEPALIVE_64, "machine_cpu_s", "the CPU of a request"),
    (cases.NEW_64, "machine_cpu_s", "the CPU of a new connection"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ruling and the figures it is based on, one sentence each."""

    ruling: Ruling
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """A chart below a verdict: one figure of *case* by mode or by number of Services; system calls without figure."""

    title: str
    note: str
    figure: str = ""
    case: str = ""
    factor: float = 1.0
    unit: str = ""
    kinds: tuple[Kind, ...] = ("none", "kernel", "proxy")
    is_log: bool = False

    @property
    def label(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: float) -> str:
        return f"{short(value * self.factor)} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim. ``text``: the textbook's words; ``how``: how the figures were measured."""

    name: str
    title: str
    text: str
    how: str
    bars: tuple[Panel, ...] = ()
    lines: tuple[Panel, ...] = ()

    def judge(self, results: Results) -> Verdict:
        """Return the verdict on this claim by *results*."""
        return _JUDGES[self.name](results)


def _userspace_is_slow(results: Results) -> Verdict:
    found = list(points(results))
    if not found:
        return Verdict("unmeasured", ("Userspace was not measured beside another mode.",))
    slower = [p for p in found if p.comparison.decided and p.comparison.ratio.median > _MATTERS]
    words = [*stand_in(results), *(f"{p.kernel} is better in {p.what}: {times(p.comparison)}." for p in slower)]
    rest = [p for p in found if p not in slower]
    if rest:
        words.append(f"The difference is small or undecided in: {', '.join(p.what for p in rest)}.")
    haproxy = compare(results, cases.KEEPALIVE_64, USERSPACE, HAPROXY, "rate")
    if haproxy is not None:
        words.append(f"HAProxy is a process, too: userspace serves {times(haproxy)} its requests a second.")
    return Verdict(_slow_or_not(len(slower), [p.comparison.decided for p in rest]), tuple(words))


def _slow_or_not(slower: int, others_decided: Sequence[bool]) -> Ruling:
    """Return the ruling: undecided figures support neither side, and most figures must support the claim."""
    if slower:
        return "partly" if any(others_decided) else "holds" if slower > len(others_decided) else "undecided"
    return "fails" if all(others_decided) else "undecided"


def _two_switches(results: Results) -> Verdict:
    alone = figure(results, cases.KEEPALIVE_1, USERSPACE, "switches")
    many = figure(results, cases.KEEPALIVE_64, USERSPACE, "switches")
    if alone is None or many is None:
        return Verdict("unmeasured", ("The loads that count context switches were not run.",))
    words = [
        f"One connection: {short(alone.median)} context switches a request (request and answer each wake the "
        f"process). 64 connections: {short(many.median)}, because one wake-up serves all ready connections.",
    ]
    calls, per_mb = calls_of(results, "calls-request", USERSPACE), calls_of(results, "calls-mb", USERSPACE)
    if calls is not None and per_mb is not None:
        words.append(f"System calls: {short(calls.median)} a request, {short(per_mb.median)} a megabyte of bulk.")
    if (bulk := figure(results, cases.BULK_1, USERSPACE, "switches")) is not None:
        words.append(f"Bulk: {short(bulk.median / 1000)} context switches a megabyte, which is some 700 packets.")
    seen = ((mode.title, figure(results, cases.KEEPALIVE_64, mode.name, "switches")) for mode in _kernel(results))
    if each := [f"{title} {short(found.median)}" for title, found in seen if found]:
        words.append(f"The control process of a kernel mode also wakes during the load: {', '.join(each)} a request.")
    if alone.median < 1.5:
        return Verdict("fails", tuple(words))
    return Verdict("holds" if many.median >= 1.5 else "partly", tuple(words))


def _copies(results: Results) -> Verdict:
    kernel = best_kernel(results, cases.BULK_1, "machine_cpu_s", more_is_better=False)
    if kernel is None or (cost := compare(results, cases.BULK_1, USERSPACE, kernel.name, "machine_cpu_s")) is None:
        return Verdict("unmeasured", ("Throughput was not measured.",))
    words = [*stand_in(results), f"For a gigabyte, the machine needs {times(cost)} the CPU that {kernel.title} needs."]
    rate = compare(results, cases.BULK_1, kernel.name, USERSPACE, "rate")
    if rate is not None:
        words.append(f"One flow over {kernel.title} has {times(rate)} the throughput of userspace.")
    engines = compare(results, cases.BULK_1, USERSPACE_COPY, USERSPACE, "proxy_cpu_s")
    # Compare the machine's CPU time: direct connections, which give the noise, have no proxy process.
    choice = compare(results, cases.BULK_1, USERSPACE_COPY, USERSPACE, "machine_cpu_s")
    if engines is not None and choice is not None:
        words.append(
            f"A proxy need not copy: splice(2) lets the kernel move pages. With the copying engine, the whole machine "
            f"needs {times(choice)} the CPU of splice(2), and the process {times(engines)} the CPU of the same."
        )
    if not cost.decided:
        return Verdict("undecided", tuple(words))
    if cost.ratio.median <= _MATTERS:
        return Verdict("fails", tuple(words))
    is_choice = choice is not None and choice.decided and choice.ratio.median > _MATTERS
    return Verdict("partly" if is_choice else "holds", tuple(words))


def _no_extra_hop(results: Results) -> Verdict:
    words, of_iptables = [], []
    for mode in _kernel(results):
        compared = {what: compare(results, case, mode.name, DIRECT, name) for case, name, what in _HOP_FIGURES}
        found = {what: each for what, each in compared.items() if each is not None}
        if found:
            ratios = "; ".join(f"{what} {times(each)}" for what, each in found.items())
            words.append(f"{mode.title}, compared with direct connections: {ratios}.")
        if mode.name == IPTABLES:  # the claim is about iptables; other modes are context
            of_iptables = list(found.values())
    if not of_iptables:
        return Verdict("unmeasured", (*words, *_missing(results, IPTABLES)))
    if any(each.decided and each.ratio.median > _MATTERS for each in of_iptables):
        return Verdict("partly", (*words, "There is no hop, but rules and rewriting have a cost."))
    if any(each.ratio.high > _MATTERS for each in of_iptables):
        words.append(f"Some differences below {_MATTERS - 1:.0%} could not be told from noise.")
        return Verdict("undecided", tuple(words))
    return Verdict("holds", tuple(words))


def _kernel(results: Results) -> list[ModeRun]:
    return [mode for mode in results.ran() if mode.kind == "kernel"]


def _missing(results: Results, name: str) -> tuple[str, ...]:
    """Return why there are no figures of the mode *name*."""
    for mode in results.modes:
        if mode.name == name:
            return (f"{mode.title}: {mode.reason}." if mode.reason else f"{mode.title} was not measured in this way.",)
    return (f"{name} was not selected.",)


def _lookup_grows(results: Results) -> Verdict:
    growths = {mode.name: lookup_growth(results, mode) for mode in results.ran()}
    grown = {name: each for name, each in growths.items() if each.by_size}
    if not grown:
        return Verdict("unmeasured", ("Modes were not measured with more than one number of Services.",))
    words = [
        f"{each.title}: with {max(each.by_size):,} Services, a new connection took {each.more_us:+.0f} µs compared "
        f"with {min(each.by_size):,} (noise {each.noise_us:.0f} µs{'' if each.is_visible else ', undecided'})."
        for each in grown.values()
    ]
    words.append("The lookup is for the first packet of a connection only; conntrack handles the others in all modes.")
    if IPVS not in grown:
        words.append("ipvs was not measured, so nothing is known about it.")
    if IPTABLES not in grown:
        return Verdict(*_without_iptables(results, words))
    if not grown[IPTABLES].is_visible:
        return Verdict("undecided", tuple(words))
    others = any(grown[name].is_visible for name in (NFTABLES, IPVS) if name in grown)
    return Verdict("partly" if others else "holds", tuple(words))


def _without_iptables(results: Results, words: Sequence[str]) -> tuple[Ruling, tuple[str, ...]]:
    if any(mode.name == IPTABLES for mode in results.ran()):
        return "undecided", (*words, "iptables was measured with too few Services.")
    return "unmeasured", (*words, *_missing(results, IPTABLES))


def _orders_of_magnitude(results: Results) -> Verdict:
    words, enough = [], {}
    for mode in results.ran():
        change, load = sizes_of(results, mode.name, "change_ms"), sizes_of(results, mode.name, "load_s")
        if not change:
            continue
        last = max(change)
        enough[mode.name] = max((size for size, ms in change.items() if ms <= _ENOUGH_S * 1000), default=0)
        words.append(
            f"{mode.title}: with {last:,} Services of two Pods, a change reaches traffic after {short(change[last])} "
            f"ms; to load all of them took {short(load[last])} s. A change takes less than a second with up to "
            f"{enough[mode.name]:,} Services, of the numbers that were tried."
        )
    if USERSPACE not in enough:
        return Verdict("unmeasured", (*words, "userspace was not measured with many Services."))
    if enough[USERSPACE] >= 1_000:
        return Verdict("fails", (*words, "The number of Services is no reason against userspace mode on this machine."))
    if enough[USERSPACE] == max(sizes_of(results, USERSPACE, "change_ms")):
        return Verdict("undecided", (*words, "userspace was measured with too few Services."))
    return Verdict("holds", tuple(words))


def _ipvs_is_best(results: Results) -> Verdict:
    compared = [
        (f"ipvs serves {times(found)} {other}'s {what} a second.", found)
        for other in (IPTABLES, NFTABLES)
        for case, what in ((cases.KEEPALIVE_64, "requests"), (cases.NEW_64, "new connections"))
        if (found := compare(results, case, IPVS, other, "rate")) is not None
    ]
    if not compared:
        return Verdict("unmeasured", _missing(results, IPVS))
    words = tuple(sentence for sentence, _ in compared)
    decided = [found.ratio.median for _, found in compared if found.decided]
    if any(ratio < 1 for ratio in decided):
        return Verdict("fails", words)
    return Verdict("holds" if len(decided) == len(compared) else "undecided", words)


def _dead_backends(results: Results) -> Verdict:
    others = [mode for mode in kernel_modes(results) if timelines_of(results, "dies", mode.name)]
    ours = [mode for mode in results.ran() if mode.name == USERSPACE and timelines_of(results, "dies", USERSPACE)]
    if not ours or not others:
        return Verdict("unmeasured", ("Failing pods were not tried in both kinds of modes.",))
    words = [*stand_in(results)]
    for event, what in EVENT_NAMES.items():
        seen = {mode.title: timelines_of(results, event, mode.name) for mode in (*ours, *others)}
        shares = {title: outage(timelines) for title, timelines in seen.items() if timelines}
        each = (f"{title} {percent(failed)} failed, {percent(slow)} slow" for title, (failed, slow) in shares.items())
        words.append(f"One pod of three {what}: {'; '.join(each)}.")
    words.append(
        "Counted from the event until a second after the endpoint was removed; in a cluster that takes longer."
    )
    if outage(timelines_of(results, "dies", USERSPACE))[0] >= _VISIBLE:
        return Verdict("fails", tuple(words))
    all_lose = all(outage(timelines_of(results, "dies", mode.name))[0] >= _VISIBLE for mode in others)
    return Verdict("holds" if all_lose else "partly", tuple(words))


# ---- advice


def choices(results: Results) -> tuple[str, ...]:
    """Return which mode to choose for what, one sentence each, from the figures of this run."""
    said = (*_choose_by_failures(results), *_choose_by_rate(results), *_choose_by_size(results))
    return said or ("Nothing was measured that helps to choose: run it with userspace and a kernel mode.",)


def _choose_by_failures(results: Results) -> Iterator[str]:
    for event, title, lost, kept in outages(results):
        if event == "dies" and kept < lost:
            yield (
                f"userspace, where a failed request costs more than microseconds: when a Pod died, {percent(kept)} of "
                f"the requests failed, and {percent(lost)} in {title}."
            )


def _choose_by_rate(results: Results) -> Iterator[str]:
    for point in points(results):
        if point.what == RATE_POINT and point.comparison.decided:
            ratio = point.comparison.ratio.median
            if ratio > _MATTERS:
                yield f"{point.kernel}, where processor time counts most: it serves {ratio:.1f} times the requests."
            else:
                yield f"userspace as well for many requests: {point.kernel} serves {ratio:.1f} times as many."


def _choose_by_size(results: Results) -> Iterator[str]:
    for mode in _kernel(results):
        grown = lookup_growth(results, mode)
        if grown.is_visible:
            yield (
                f"{mode.title} only for few Services: with {max(grown.by_size):,} of them, a new connection takes "
                f"{grown.more_us:.0f} µs longer than with {min(grown.by_size):,}."
            )


_JUDGES: dict[str, Callable[[Results], Verdict]] = {
    "slow": _userspace_is_slow,
    "switches": _two_switches,
    "copies": _copies,
    "hop": _no_extra_hop,
    "lookup": _lookup_grows,
    "sizes": _orders_of_magnitude,
    "ipvs": _ipvs_is_best,
    "failures": _dead_backends,
}
_FILE = Path(__file__).with_suffix(".toml")
CLAIMS = msgspec.toml.decode(_FILE.read_bytes(), type=dict[str, tuple[Claim, ...]])["claims"]
