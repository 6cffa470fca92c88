"""The report: one self-contained HTML file, made from results alone."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from userspace_proxy.compare import cases
from userspace_proxy.compare.charts import Bar, FailureLane, SizeLine, bars, lane_is_half, lanes, lines, short
from userspace_proxy.compare.claims import CLAIMS, RULINGS, Claim
from userspace_proxy.compare.derived import (
    EVENT_NAMES,
    Point,
    growth,
    kernel_modes,
    lookup_noise_us,
    noise_text,
    outage,
    percent,
    points,
    sizes_of,
    timelines_of,
)
from userspace_proxy.compare.failures import EVENTS
from userspace_proxy.compare.judge import Figure, figure
from userspace_proxy.compare.modes import DIRECT_AGAIN, USERSPACE
from userspace_proxy.compare.results import ModeRun, Results, Timeline
from userspace_proxy.compare.scaling import SIZES
from userspace_proxy.compare.tables import Sheet, sheets

_FOLDER = Path(__file__).parent
_KINDS = {"none": "nothing: clients dial the Pod", "kernel": "the kernel, by rules", "proxy": "a process"}


def page(results: Results) -> bytes:
    """Return the report of *results* as one HTML document."""
    machine = results.machine
    lead = (
        f"What stands between a client and its Pods, measured within {results.duration_s:.0f} seconds on "
        f"{machine.get('processors', 'unknown processors')}, Linux {machine.get('kernel', 'unknown')}: "
        f"every mode under the same load, in turns, {results.rounds} times over."
    )
    report = string.Template((_FOLDER / "report.html").read_text()).substitute(
        style=(_FOLDER / "report.css").read_text(),
        host=escape(machine.get("processors", "")),
        lead=escape(lead),
        legend="".join(f'<li class="m-{mode.name}">{escape(mode.title)}</li>' for mode in _shown(results)),
        tiles="".join(_tiles(results)),
        scores="".join(_scores(results)),
        claims="".join(_claim(results, claim) for claim in CLAIMS),
        modes=_modes(results),
        figures="".join(f"<h3>{escape(sheet.title)}</h3>{_table(sheet)}" for sheet in sheets(results)),
        many="Everything above was derived from the figures of each round; <code>--json</code> writes those.",
        about=escape("; ".join(f"{name} {value}" for name, value in machine.items())),
        rounds=results.rounds,
        load_s=f"{results.load_s:g}",
        sizes=", ".join(f"{size:,}" for size in SIZES),
        version=escape(results.version),
        taken_at=escape(results.taken_at),
    )
    return report.encode()


def _shown(results: Results) -> list[ModeRun]:
    """Return the modes for charts, without the second run of direct connections, which only gives the noise."""
    return [mode for mode in results.ran() if mode.name != DIRECT_AGAIN]


# ---- summary


def _tiles(results: Results) -> Iterator[str]:
    def tile(value: str, words: str) -> str:
        return f'<div class="tile"><b>{escape(value)}</b><span>{escape(words)}</span></div>'

    by_what = {point.what: point for point in points(results)}
    for what, words in (
        ("requests a second, 64 connections", "as many requests a second over kept connections"),
        ("throughput of one flow", "the throughput of one large transfer"),
    ):
        if what in by_what:
            point = by_what[what]
            undecided = "" if point.comparison.decided else "; undecided"
            said = f"{words}: {point.kernel} beside userspace{undecided}"
            yield tile(f"{point.comparison.ratio.median:.1f} times", said)
    grown = [(mode, sizes_of(results, mode.name, "added_us")) for mode in _shown(results)]
    grown = sorted(((m, by) for m, by in grown if len(by) > 1), key=lambda each: -growth(each[1]))
    if grown:
        (mode, by_size), *others = grown
        beside = "".join(f"; {m.title} {growth(by):+.0f} µs" for m, by in others)
        words = (
            f"a new connection in {mode.title} with {max(by_size):,} Services, by that with {min(by_size):,}{beside}"
        )
        if growth(by_size) <= lookup_noise_us(results, mode.name):
            words += "; undecided"
        yield tile(f"{growth(by_size):+.0f} µs", words)
    outages = {event: (title, lost, kept) for event, title, lost, kept in _outages(results)}
    if "dies" in outages:
        title, lost, kept = outages["dies"]
        yield tile(
            f"{percent(lost)} or {percent(kept)}",
            f"of requests failed when one Pod of three died: {title} or userspace",
        )


def _scores(results: Results) -> Iterator[str]:
    """Yield three lists: kernel modes better, userspace better, and undecided."""
    found = list(points(results))
    kernel = [p for p in found if p.comparison.decided and p.comparison.ratio.median > 1]
    ours = [p for p in found if p.comparison.decided and p.comparison.ratio.median < 1]
    open_ = [p for p in found if not p.comparison.decided]
    named = "The kernel" if any(mode.kind == "kernel" for mode in results.ran()) else "The direct way"
    yield _score(f"{named} wins", [_point(p, p.comparison.ratio.median) for p in kernel])
    failures = [
        f"<li><b>{percent(lost)} / {percent(kept)}</b>Failed requests when a Pod {EVENT_NAMES[event]}<br>"
        f"<small>{escape(title)} / userspace</small></li>"
        for event, title, lost, kept in _outages(results)
        if lost > kept + 0.01
    ]
    yield _score("Userspace wins", [*failures, *(_point(p, 1 / p.comparison.ratio.median) for p in ours)])
    if open_:
        yield _score("Undecided here", [_point(p, p.comparison.ratio.median) for p in open_])


def _score(title: str, rows: Sequence[str]) -> str:
    return f'<div class="score"><h3>{title}</h3><ul>{"".join(rows) or "<li>Nothing that was measured.</li>"}</ul></div>'


def _point(point: Point, ratio: float) -> str:
    spread, noise = point.comparison.ratio, point.comparison.noise
    said = f"{point.kernel}; rounds {spread.low:.2f} to {spread.high:.2f}; the same mode twice: {noise_text(noise)}"
    what = point.what[0].upper() + point.what[1:]
    return f"<li><b>{ratio:.2f} times</b>{escape(what)}<br><small>{escape(said)}</small></li>"


def _outages(results: Results) -> Iterator[tuple[str, str, float, float]]:
    """Yield event, kernel mode, and the shares of failed requests there and in userspace."""
    others = kernel_modes(results)
    for event in EVENT_NAMES:
        ours = timelines_of(results, event, USERSPACE)
        seen = [(outage(lines)[0], mode.title) for mode in others if (lines := timelines_of(results, event, mode.name))]
        if ours and seen:
            lost, title = min(seen)
            yield event, title, lost, outage(ours)[0]


# ---- claims


def _claim(results: Results, claim: Claim) -> str:
    verdict = claim.judge(results)
    words = "".join(f"<li>{escape(sentence)}</li>" for sentence in verdict.words)
    is_shown = claim.name in _PANELS and verdict.ruling != "unmeasured"
    panels = "".join(_PANELS[claim.name](results)) if is_shown else ""
    return (
        f'<section class="claim" id="{claim.name}"><h2>{escape(claim.title)}</h2>'
        f"<blockquote>“{escape(claim.text)}”</blockquote>"
        f'<div class="verdict"><span class="chip {verdict.ruling}">{RULINGS[verdict.ruling]}</span>'
        f"<ul>{words}</ul></div>"
        f'<div class="panels">{panels}</div><p class="how">{escape(claim.how)}</p></section>'
    )


def _panel(title: str, small: str, svg: str) -> str:
    if not svg:
        return ""
    return f'<figure class="panel"><figcaption>{escape(title)}<small>{escape(small)}</small></figcaption>{svg}</figure>'


def _bar_panel(
    results: Results,
    case: str,
    name: str,
    title: str,
    small: str,
    text: Callable[[float], str] = short,
    kinds: Sequence[str] = tuple(_KINDS),
) -> str:
    found = [(mode, figure(results, case, mode.name, name)) for mode in _shown(results) if mode.kind in kinds]
    rows = [Bar(mode.name, mode.title, each) for mode, each in found if each is not None]
    return _panel(title, small, bars(rows, text, title)) if rows else ""


def _scaled(factor: float, unit: str) -> Callable[[float], str]:
    return lambda value: f"{short(value * factor)} {unit}"


_MS, _US, _GB, _S = _scaled(1, "ms"), _scaled(1e6, "µs"), _scaled(1, "GB/s"), _scaled(1, "s")
_MORE, _LESS = "more is better", "less is better"


def _slow_panels(results: Results) -> Iterator[str]:
    yield _bar_panel(results, cases.KEEPALIVE_64, "rate", "Requests a second", f"64 connections, {_MORE}")
    yield _bar_panel(results, cases.NEW_64, "rate", "New connections a second", f"64 clients, {_MORE}")
    for case, what in ((cases.KEEPALIVE_1, "Request"), (cases.NEW_1, "New connection and request")):
        for name, percentile in (("p50_ms", "p50"), ("p99_ms", "p99"), ("p999_ms", "p99.9")):
            yield _bar_panel(results, case, name, f"{what}: {percentile}", f"one client, {_LESS}", _MS)


def _switch_panels(results: Results) -> Iterator[str]:
    yield _bar_panel(results, cases.KEEPALIVE_1, "switches", "Context switches a request", "one connection")
    yield _bar_panel(results, cases.KEEPALIVE_64, "switches", "Context switches a request", "64 connections")
    for case, title in (("request", "a request"), ("connection", "a new connection"), ("mb", "a megabyte")):
        rows = []
        for mode in _shown(results):
            calls = [s for s in results.samples if s.case == f"calls-{case}" and s.mode == mode.name]
            if calls:
                total = sum(calls[0].figures.values())
                rows.append(Bar(mode.name, mode.title, Figure(total, total, total)))
        if rows:
            yield _panel(f"System calls {title}", _LESS, bars(rows, short, title))
    yield _bar_panel(results, cases.KEEPALIVE_64, "proxy_cpu_s", "CPU of the proxy a request", _LESS, _US)
    yield _bar_panel(results, cases.KEEPALIVE_64, "machine_cpu_s", "CPU of the machine a request", _LESS, _US)
    yield _bar_panel(results, cases.NEW_64, "machine_cpu_s", "CPU of the machine a connection", _LESS, _US)


def _copy_panels(results: Results) -> Iterator[str]:
    yield _bar_panel(results, cases.BULK_1, "rate", "Throughput, 1 flow", _MORE, _GB)
    yield _bar_panel(results, cases.BULK_8, "rate", "Throughput, 8 flows", _MORE, _GB)
    yield _bar_panel(results, cases.BULK_1, "machine_cpu_s", "CPU of the machine a gigabyte", _LESS, _S)
    yield _bar_panel(results, cases.BULK_1, "proxy_cpu_s", "CPU of the proxy a gigabyte", _LESS, _S)


def _hop_panels(results: Results) -> Iterator[str]:
    kinds = ("none", "kernel")
    yield _bar_panel(results, cases.KEEPALIVE_1, "p50_ms", "Request: p50", f"one client, {_LESS}", _MS, kinds)
    yield _bar_panel(results, cases.KEEPALIVE_64, "machine_cpu_s", "CPU of the machine a request", _LESS, _US, kinds)
    yield _bar_panel(results, cases.NEW_64, "machine_cpu_s", "CPU of the machine a connection", _LESS, _US, kinds)


def _line_panel(
    results: Results, name: str, title: str, small: str, text: Callable[[float], str], *, is_log: bool
) -> str:
    rows = [SizeLine(m.name, m.title, found) for m in _shown(results) if (found := sizes_of(results, m.name, name))]
    return _panel(title, small, lines(rows, text, title, is_log=is_log))


def _lookup_panels(results: Results) -> Iterator[str]:
    yield _line_panel(results, "new_connection_ms", "A new connection with a request", _LESS, _MS, is_log=False)
    yield _line_panel(results, "added_us", "The same, beyond the direct way", _LESS, _scaled(1, "µs"), is_log=False)
    yield _line_panel(results, "rules", "Rules in the kernel", "sets and maps count as none", short, is_log=True)


def _size_panels(results: Results) -> Iterator[str]:
    yield _line_panel(results, "load_s", "Time to load", f"from manifests to traffic, {_LESS}", _S, is_log=True)
    yield _line_panel(results, "change_ms", "Time to change one Service", f"to traffic, {_LESS}", _MS, is_log=True)
    yield _line_panel(results, "load_cpu_s", "CPU of the mode to load", _LESS, _S, is_log=True)


def _failure_panels(results: Results) -> Iterator[str]:
    for event in EVENTS:
        rows, first = [], None
        for mode in _shown(results):
            if seen := timelines_of(results, event.name, mode.name):
                first = seen[0]
                rows.append(FailureLane(mode.name, mode.title, *_shares_over_time(seen)))
        if first is not None:
            title, _, small = event.title.partition(": ")
            svg = lanes(rows, first.bucket_s, first.event_s, first.told_s, title)
            high = "half of" if lane_is_half(rows) else "all"
            said = f"{small}. Red failed, yellow slow; a lane is {high} the requests high"
            yield _panel(title[0].upper() + title[1:], said, svg)


def _shares_over_time(seen: Sequence[Timeline]) -> tuple[list[float], list[float]]:
    """Return, for each bucket, the shares of slow and of failed requests over all rounds."""
    slow, failed = [], []
    for bucket in range(min(len(timeline.good) for timeline in seen)):
        counts = [sum(getattr(timeline, kind)[bucket] for timeline in seen) for kind in ("good", "slow", "failed")]
        total = sum(counts) or 1
        slow.append(counts[1] / total)
        failed.append(counts[2] / total)
    return slow, failed


_PANELS: dict[str, Callable[[Results], Iterator[str]]] = {
    "slow": _slow_panels,
    "switches": _switch_panels,
    "copies": _copy_panels,
    "hop": _hop_panels,
    "lookup": _lookup_panels,
    "sizes": _size_panels,
    "failures": _failure_panels,
}


# ---- the rest


def _modes(results: Results) -> str:
    rows = [
        (mode.title, _KINDS[mode.kind], "took part" if mode.reason is None else f"not measured: {mode.reason}")
        for mode in results.modes
    ]
    sheet = Sheet("", ("mode", "bytes carried by", "here"), rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in results.notes)
    return _table(sheet, "words") + (f"<h3>What else was not measured</h3><ul>{notes}</ul>" if notes else "")


def _table(sheet: Sheet, kind: str = "") -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in sheet.head)
    body = "".join(
        f"<tr><th>{escape(row[0])}</th>{''.join(f'<td>{_cell(cell)}</td>' for cell in row[1:])}</tr>"
        for row in sheet.rows
    )
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    value, bracket, spread = text.partition(" (")
    if bracket and spread.endswith(")") and spread[0].isdigit():
        return f"{escape(value)}<small>{escape(spread[:-1])}</small>"
    return escape(text)
