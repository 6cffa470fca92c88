"""Judges the claims of textbooks about the modes by this machine's results: pure functions from results to text.

Only figures of this run count, by the rule of `judge`. Kernel modes are the ones that took part. If none did, direct
connections replace them as the upper bound, and the text says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from userspace_proxy.compare import cases
from userspace_proxy.compare.charts import short
from userspace_proxy.compare.derived import (
    EVENT_NAMES,
    best_kernel,
    growth,
    kernel_modes,
    lookup_noise_us,
    outage,
    percent,
    points,
    sizes_of,
    stand_in,
    timelines_of,
    times,
    title_of,
)
from userspace_proxy.compare.judge import compare, figure
from userspace_proxy.compare.modes import DIRECT, HAPROXY, IPTABLES, IPVS, NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import Results

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


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ruling and the figures it is based on, one sentence each."""

    ruling: Ruling
    words: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Claim:
    """One claim. ``text``: the textbook's words; ``how``: how the figures were measured."""

    name: str
    title: str
    text: str
    judge: Callable[[Results], Verdict]
    how: str


def _userspace_is_slow(results: Results) -> Verdict:
    found = list(points(results))
    if not found:
        return Verdict("unmeasured", ("Userspace was not measured beside another mode.",))
    slower = [p for p in found if p.comparison.decided and p.comparison.ratio.median > _MATTERS]
    words = [*stand_in(results)]
    words += [f"{p.kernel} is better in {p.what}: {times(p.comparison)}." for p in slower]
    rest = [p for p in found if p not in slower]
    if rest:
        words.append(f"No difference that counts, or none that is decided: {', '.join(p.what for p in rest)}.")
    haproxy = compare(results, cases.KEEPALIVE_64, USERSPACE, HAPROXY, "rate")
    if haproxy is not None:
        words.append(
            f"Of HAProxy's requests a second, which is a process in the way as well, userspace makes {times(haproxy)}."
        )
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
    calls = sum(results.figures("calls-request", USERSPACE, name)[1] for name in _call_names(results, "calls-request"))
    if calls:
        per_mb = sum(results.figures("calls-mb", USERSPACE, name)[1] for name in _call_names(results, "calls-mb"))
        words.append(f"System calls: {short(calls)} a request, {short(per_mb)} a megabyte of bulk.")
    bulk = figure(results, cases.BULK_1, USERSPACE, "switches")
    if bulk is not None:
        words.append(f"Bulk: {short(bulk.median / 1000)} context switches a megabyte, which is some 700 packets.")
    kernel = [mode for mode in results.ran() if mode.kind == "kernel"]
    seen = [(mode.title, figure(results, cases.KEEPALIVE_64, mode.name, "switches")) for mode in kernel]
    if seen:
        each = ", ".join(f"{title} {short(found.median)}" for title, found in seen if found)
        words.append(f"Kernel modes have a process that writes rules; during the same load it was woken: {each}.")
    ruling: Ruling = "holds" if alone.median >= 1.5 and many.median >= 1.5 else "partly"
    return Verdict(ruling if alone.median >= 1.5 else "fails", tuple(words))


def _call_names(results: Results, case: str, mode: str = USERSPACE) -> list[str]:
    return [name for s in results.samples if s.case == case and s.mode == mode for name in s.figures]


def _copies(results: Results) -> Verdict:
    kernel = best_kernel(results, cases.BULK_1, "machine_cpu_s", more_is_better=False)
    if kernel is None or (cost := compare(results, cases.BULK_1, USERSPACE, kernel.name, "machine_cpu_s")) is None:
        return Verdict("unmeasured", ("Throughput was not measured.",))
    words = [
        *stand_in(results),
        f"A gigabyte costs the whole machine {times(cost)} what it costs over {kernel.title}.",
    ]
    rate = compare(results, cases.BULK_1, kernel.name, USERSPACE, "rate")
    if rate is not None:
        words.append(f"One flow over {kernel.title} has {times(rate)} the throughput of userspace.")
    engines = compare(results, cases.BULK_1, USERSPACE_COPY, USERSPACE, "proxy_cpu_s")
    # Compare the machine's CPU time: direct connections, which give the noise, have no proxy process.
    choice = compare(results, cases.BULK_1, USERSPACE_COPY, USERSPACE, "machine_cpu_s")
    if engines is not None and choice is not None:
        words.append(
            f"Whether the process copies is its own choice: the engine that copies spends {times(engines)} the CPU of "
            f"the one that lets the kernel move pages by splice(2); the whole machine spends {times(choice)}."
        )
    if not cost.decided:
        return Verdict("undecided", tuple(words))
    if cost.ratio.median <= _MATTERS:
        return Verdict("fails", tuple(words))
    is_choice = choice is not None and choice.decided and choice.ratio.median > _MATTERS
    return Verdict("partly" if is_choice else "holds", tuple(words))


def _no_extra_hop(results: Results) -> Verdict:
    kernel = [mode for mode in results.ran() if mode.kind == "kernel"]
    words, seen = [], []
    for mode in kernel:
        parts = []
        for case, name, what in (
            (cases.KEEPALIVE_1, "p50_ms", "the latency of a request"),
            (cases.KEEPALIVE_64, "machine_cpu_s", "the CPU of a request"),
            (cases.NEW_64, "machine_cpu_s", "the CPU of a new connection"),
        ):
            compared = compare(results, case, mode.name, DIRECT, name)
            if compared is not None:
                parts.append(f"{what} {times(compared)}")
                if mode.name == IPTABLES:  # the claim is about iptables; other modes are context
                    seen.append(compared)
        if parts:
            words.append(f"{mode.title}, beside the direct way: {'; '.join(parts)}.")
    if not any(mode.name == IPTABLES for mode in kernel):
        return Verdict("unmeasured", (*words, *_missing(results, IPTABLES)))
    if not seen:
        return Verdict("unmeasured", (*words, "The loads were not run."))
    if any(each.decided and each.ratio.median > _MATTERS for each in seen):
        return Verdict("partly", (*words, "No hop, but the rules and the rewriting are not free."))
    if any(each.ratio.high > _MATTERS for each in seen):
        words.append(f"Differences below {_MATTERS - 1:.0%} could not be told from noise everywhere.")
        return Verdict("undecided", tuple(words))
    return Verdict("holds", tuple(words))


def _missing(results: Results, name: str) -> tuple[str, ...]:
    """Return the reason why the mode *name* did not take part."""
    reasons = [f"{mode.title}: {mode.reason}." for mode in results.modes if mode.name == name and mode.reason]
    return tuple(reasons) or (f"{name} was not asked for.",)


def _lookup_grows(results: Results) -> Verdict:
    added = {mode.name: sizes_of(results, mode.name, "added_us") for mode in results.ran()}
    added = {name: by_size for name, by_size in added.items() if len(by_size) > 1}
    if not added:
        return Verdict("unmeasured", ("Modes were not measured with more than one number of Services.",))
    grown = {name: (growth(by_size), lookup_noise_us(results, name)) for name, by_size in added.items()}
    words = [
        f"{title_of(results, name)}: from {min(added[name]):,} to {max(added[name]):,} Services a new connection got "
        + (f"{more_us:.0f} µs slower" if more_us > noise_us else f"no slower that could be seen ({more_us:+.0f} µs")
        + (f" (noise: {noise_us:.0f} µs)." if more_us > noise_us else f", noise {noise_us:.0f} µs).")
        for name, (more_us, noise_us) in grown.items()
    ]
    words.append("Only a connection's first packet is looked up; conntrack carries the others in every mode.")
    if IPVS not in grown:
        words.append("Nothing is said of ipvs, which was not measured.")
    slower = [name for name, (more_us, noise_us) in grown.items() if more_us > noise_us]
    if IPTABLES not in grown and any(mode.name == IPTABLES for mode in results.ran()):
        return Verdict("undecided", (*words, "iptables was measured with too few Services to say."))
    if IPTABLES not in grown:
        return Verdict("unmeasured", (*words, *_missing(results, IPTABLES)))
    if IPTABLES not in slower:
        return Verdict("undecided", tuple(words))
    return Verdict("partly" if NFTABLES in slower or IPVS in slower else "holds", tuple(words))


def _orders_of_magnitude(results: Results) -> Verdict:
    modes = [mode for mode in results.ran() if sizes_of(results, mode.name, "change_ms")]
    if not modes:
        return Verdict("unmeasured", ("Modes were not measured with many Services.",))
    words, enough = [], {}
    for mode in modes:
        change, load = sizes_of(results, mode.name, "change_ms"), sizes_of(results, mode.name, "load_s")
        last = max(change)
        enough[mode.name] = max((size for size, ms in change.items() if ms <= _ENOUGH_S * 1000), default=0)
        words.append(
            f"{mode.title}: with {last:,} Services of two Pods, a change reaches traffic after "
            f"{short(change[last])} ms; so many Services at once took {short(load[last])} s."
        )
    words.append(
        "Measured with the rule that a change should reach traffic within a second: "
        + ", ".join(f"{title_of(results, name)} with up to {size:,} Services" for name, size in enough.items())
        + ", of those that were tried."
    )
    if enough.get(USERSPACE, 0) >= 1_000:
        return Verdict("fails", (*words, "The number of Services is no reason against userspace mode on this machine."))
    if USERSPACE not in enough:
        return Verdict("unmeasured", tuple(words))
    if all(ms <= _ENOUGH_S * 1000 for ms in sizes_of(results, USERSPACE, "change_ms").values()):
        return Verdict("undecided", (*words, "userspace was measured with too few Services to say."))
    return Verdict("holds", tuple(words))


def _ipvs_is_best(results: Results) -> Verdict:
    others = [mode for mode in results.ran() if mode.name in (IPTABLES, NFTABLES)]
    if not any(mode.name == IPVS for mode in results.ran()) or not others:
        return Verdict("unmeasured", _missing(results, IPVS))
    words, better, worse = [], 0, 0
    for other in others:
        for case, name, what in ((cases.KEEPALIVE_64, "rate", "requests"), (cases.NEW_64, "rate", "new connections")):
            compared = compare(results, case, IPVS, other.name, name)
            if compared is None:
                continue
            better += compared.decided and compared.ratio.median > 1
            worse += compared.decided and compared.ratio.median < 1
            words.append(f"Of {other.title}'s {what} a second, ipvs makes {times(compared)}.")
    if not words:
        return Verdict("unmeasured", ("The loads were not run.",))
    if better == len(words):
        return Verdict("holds", tuple(words))
    return Verdict("fails" if worse else "undecided", tuple(words))


def _dead_backends(results: Results) -> Verdict:
    ours = timelines_of(results, "dies", USERSPACE)
    others = [mode for mode in kernel_modes(results) if timelines_of(results, "dies", mode.name)]
    if not ours or not others:
        return Verdict("unmeasured", ("Failing pods were not tried in both kinds of modes.",))
    words = [*stand_in(results)]
    for event, what in EVENT_NAMES.items():
        each = []
        for mode in (next(m for m in results.ran() if m.name == USERSPACE), *others):
            if seen := timelines_of(results, event, mode.name):
                failed, slow = outage(seen)
                each.append(f"{mode.title} {percent(failed)} failed, {percent(slow)} slow")
        words.append(f"One pod of three {what}: {'; '.join(each)}.")
    words.append(
        "Counted from the event until a second after the endpoint was removed; in a cluster that takes longer."
    )
    spared = outage(ours)[0] < _VISIBLE
    hit = [outage(timelines_of(results, "dies", mode.name))[0] >= _VISIBLE for mode in others]
    return Verdict("holds" if spared and all(hit) else "fails" if not spared else "partly", tuple(words))


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "slow",
        "Userspace is slow",
        "In userspace mode every connection passes through the proxy's process. That is slower than forwarding in "
        "the kernel.",
        _userspace_is_slow,
        "wrk on the client's host, nginx with a 3-byte answer behind. One connection shows latency, 64 show what the "
        "machine can do; connections are kept or made anew for each request.",
    ),
    Claim(
        "switches",
        "Two context switches for each packet",
        "Each packet goes from the kernel to the proxy and back to the kernel: two context switches, every time.",
        _two_switches,
        "Context switches are those of all threads of the mode's processes (/proc/PID/task/*/status) around a load, "
        "by the requests or bytes of that load. System calls are counted by strace -c in a run of their own, because "
        "it slows what it watches. CPU of the proxy is what its processes used; CPU of the machine is all that is "
        "not idle, client and servers included.",
    ),
    Claim(
        "copies",
        "Every byte is copied twice",
        "A proxy reads each byte into its memory and writes it out again, so large transfers suffer most.",
        _copies,
        "iperf3 with one flow and with eight, from the Pod to the client (-R). Its two ends copy each byte, too, as "
        "programs do; where an end is what limits, what stands between shows in the CPU more than in the throughput.",
    ),
    Claim(
        "hop",
        "iptables has no extra hop",
        "Rules in the kernel rewrite addresses on the fly; traffic goes straight to the Pod as if no proxy were there.",
        _no_extra_hop,
        "The same loads over the direct way, where clients dial the Pod through a node that only forwards, with "
        "connection tracking on as in a cluster.",
    ),
    Claim(
        "lookup",
        "iptables is O(n), nftables and ipvs are O(1)",
        "iptables looks through its Services one by one, nftables and ipvs use a hash table: with thousands of "
        "Services iptables gets slow.",
        _lookup_grows,
        "A client dials 20 Services, spread evenly over all, one after another, with one request each; the median, "
        "in turns with the direct way. Python's own time is in all of them alike.",
    ),
    Claim(
        "sizes",
        "100 Pods, 1,000 Pods, 5,000 Pods",
        "Userspace mode is for some 100 Pods, iptables for some 1,000, and beyond 5,000 you need ipvs.",
        _orders_of_magnitude,
        "Services of two Pods each, read from manifest files. Time to load runs from the moment when the manifests of "
        "the next size lie in the folder until a client is answered by the last Service; noticing and reading the file "
        "is in it, which alone takes some 50 ms. Time to change runs from a replaced manifest to the first connection "
        "at the new Pod (median of five).",
    ),
    Claim(
        "ipvs",
        "ipvs is always better",
        "ipvs was made for load balancing, so it beats iptables and nftables in every respect.",
        _ipvs_is_best,
        "The loads of the first claim.",
    ),
    Claim(
        "failures",
        "A dead Pod costs requests, unless a process can try another",
        "If the chosen Pod does not answer, userspace mode tries another one; in the kernel modes the connection "
        "fails, until the cluster has noticed and removed the endpoint.",
        _dead_backends,
        "Clients come at 60 a second and mode, each with a new connection, whether answers come or not, to all modes "
        "in turn, so all modes see the same moment. Slow is more than 0.1 s, failed is an error or no answer within "
        "1 s. Modes are told that the endpoint is gone 2 s after the event (a readiness probe takes 10 to 30 s), at "
        "once where the Pod is deleted. HAProxy asks its servers every half second; nginx has its defaults; the "
        "direct way is told nothing, as a client with an address in its cache.",
    ),
)
