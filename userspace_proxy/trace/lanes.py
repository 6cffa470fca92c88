"""Prepares a trace for display: a lane of stations for each packet, with lines for each station. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from userspace_proxy.trace.analysis import deciding
from userspace_proxy.trace.values import Ends, Hook, Leg, Listener, PacketTrace, Role, Step, VirtualServer, Visit, at


@dataclass(frozen=True, slots=True)
class Line:
    """One line of text at a station.

    ``kind`` is chain, rule, decides (the rule that decides), element (the looked-up map element), skipped, change or
    note. ``depth`` is 0 for lines about a hook, 1 for rules of its base chain, and more for chains that these jump to.
    """

    kind: str
    text: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Station:
    """A place on the packet's path: a hook of the kernel, IPVS, a process, or outside (``kind``)."""

    kind: str
    title: str
    aside: str
    lines: tuple[Line, ...] = ()


@dataclass(frozen=True, slots=True)
class Lane:
    """One packet's path."""

    title: str
    aside: str
    stations: tuple[Station, ...]


_TITLES = {
    Role.CLIENT: "The client's first packet",
    Role.DIAL: "The proxy's own connection to the backend",
    Role.REPLY: "What comes back from the backend",
    Role.ANSWER: "What comes back to the client",
}
_RANDOM = re.compile(r"numgen random mod (\d+) map")
_HOOKS = {
    "PREROUTING": "as it comes in",
    "INPUT": "for this host itself",
    "FORWARD": "to be passed on",
    "OUTPUT": "from this host itself",
    "POSTROUTING": "as it goes out",
}


def lanes(trace: PacketTrace, *, folded: bool) -> tuple[Lane, ...]:
    """Return the lanes of *trace*; *folded* omits the chains that had no effect on the packet."""
    return tuple(_lane(leg, trace, folded=folded) for leg in trace.legs)


def _lane(leg: Leg, trace: PacketTrace, *, folded: bool) -> Lane:
    stations = []
    for hook, later in zip(leg.hooks, (*leg.hooks[1:], None), strict=True):
        stations.append(_hook(hook, leg, trace, folded=folded))
        now = hook.after or (later.before if later is not None else None)
        if trace.ipvs is not None and now is not None and _is_by_ipvs(hook, now, leg):
            stations.append(_ipvs(trace.ipvs, hook.before, now))
    stations.insert(0, _start(leg, trace))
    last = leg.hooks[-1]
    if last.after is not None:
        stations.append(_end(leg, last, trace))
    aside = (
        f"{trace.protocol.upper()} {leg.what}" if trace.protocol == "tcp" else f"a {trace.protocol.upper()} datagram"
    )
    if leg.what.startswith("ICMP"):
        aside = leg.what
    return Lane(_TITLES[leg.role], f"{aside}, {leg.first}", tuple(stations))


# ---- hooks


def _hook(hook: Hook, leg: Leg, trace: PacketTrace, *, folded: bool) -> Station:
    lines = [line for visit in hook.visits for line in _visit(visit, folded=folded)]
    if hook.after is not None:
        lines += _change(hook, leg, trace)
    iif, oif = hook.devices
    devices = " ".join(word for word in (f"in {iif}" if iif else "", f"out {oif}" if oif else "") if word)
    meaning = _HOOKS.get(hook.name, "")
    return Station("hook", hook.name, f"{meaning} ({devices})" if devices else meaning, tuple(lines))


def _visit(visit: Visit, *, folded: bool) -> Iterator[Line]:
    name = f"{visit.family} {visit.table} {visit.chain}"
    if not visit.steps or (folded and _did_nothing(visit)):
        if folded and not (visit.steps or visit.skipped):
            return
        yield Line("skipped", f"{name}: {_nothing_done(visit)}")
        return
    yield Line("chain", f"{name} ({visit.kind})" if visit.kind else name)
    decides = deciding(visit)
    for step in visit.steps:
        yield from _step(step, decides=step is decides)
    if visit.skipped:
        yield Line("skipped", f"{count(visit.skipped, 'rule')} did not match", 1)
    if visit.by_policy:
        yield Line("skipped", f"policy {visit.end}", 1)


def _nothing_done(visit: Visit) -> str:
    passed = sum(step.skipped for step in visit.steps) + visit.skipped
    if visit.steps:
        rest = f", {passed} did not match" if passed else ""
        return f"{count(len(visit.steps), 'rule')} led nowhere{rest}"
    said = f"{count(passed, 'rule')} did not match" if passed else "no rules"
    return said if visit.end == "accept" else f"{said}, policy {visit.end}"


def _did_nothing(visit: Visit) -> bool:
    """Return whether *visit* only jumped between chains and left the packet unchanged."""
    led = all(step.verdict in ("jump", "goto", "return") for step in visit.steps)
    noted = any(step.element or " set " in step.rule for step in visit.steps)
    return led and not noted and visit.by_policy and visit.end == "accept" and visit.after == visit.before


def _step(step: Step, *, decides: bool) -> Iterator[Line]:
    depth = step.depth + 1
    if step.skipped:
        yield Line("skipped", f"{count(step.skipped, 'rule')} did not match", depth)
    yield Line("decides" if decides else "rule", step.rule, depth)
    if step.element:
        yield Line("element", step.element, depth + 1)
    if slots := _RANDOM.search(step.rule):
        yield Line("note", f"a random one of {slots[1]} slots", depth + 1)


def _change(hook: Hook, leg: Leg, trace: PacketTrace) -> Iterator[Line]:
    was, now = hook.before, hook.after
    assert now is not None
    if trace.ipvs is not None and _is_by_ipvs(hook, now, leg):
        return  # IPVS has its own station
    by = "" if _is_by_rule(hook) else f"{_unseen_hand(hook, leg, trace)}: "
    if was.receiver != now.receiver:
        yield Line("change", f"{by}{was.receiver} became {now.receiver}")
    if was.sender != now.sender:
        yield Line("change", f"{by}sender {was.sender} became {now.sender}")


def _is_by_rule(hook: Hook) -> bool:
    return any(visit.after not in (None, visit.before) for visit in hook.visits if visit.kind == "nat")


def _is_by_ipvs(hook: Hook, now: Ends, leg: Leg) -> bool:
    """Return whether IPVS changed a client packet's destination: at INPUT, or at OUTPUT for this host's own packets."""
    is_there = hook.name in ("INPUT", "OUTPUT") and leg.role is Role.CLIENT
    return is_there and hook.before.receiver != now.receiver and not _is_by_rule(hook)


def _unseen_hand(hook: Hook, leg: Leg, trace: PacketTrace) -> str:
    """Return what changes addresses although no traced rule does."""
    if leg.role is not Role.ANSWER:
        return "rules that cannot be traced"
    return "IPVS" if trace.ipvs is not None and hook.name in ("FORWARD", "OUTPUT") else "conntrack"


# ---- other stations


def _ipvs(server: VirtualServer, was: Ends, now: Ends) -> Station:
    asked = f"{server.protocol.upper()} {at(server.ip, server.port)}, scheduler {server.scheduler}"
    lines = [
        Line("note", f"{at(real.ip, real.port)}, {real.forwarding}, weight {real.weight}")
        for real in server.real_servers
    ]
    return Station("ipvs", "IPVS", asked, (*lines, Line("change", f"{was.receiver} became {now.receiver}")))


def _start(leg: Leg, trace: PacketTrace) -> Station:
    is_local = leg.hooks[0].name == "OUTPUT"
    if leg.role is Role.CLIENT:
        where = "a process on this host" if is_local else f"by {leg.hooks[0].devices[0]}"
        return Station("outside", "the client", f"{leg.first.sender}, {where}")
    if is_local and trace.listener is not None:
        return Station("process", trace.listener.name, leg.first.sender)
    return Station("outside", "this host" if is_local else "the backend", leg.first.sender)


def _end(leg: Leg, last: Hook, trace: PacketTrace) -> Station:
    assert last.after is not None
    if last.name == "INPUT":
        if leg.role is Role.CLIENT:
            return _process(trace.listener, last.after, trace)
        end = "the backend" if leg.role is Role.DIAL else "the client"
        return Station("outside", end, f"{last.after.receiver}, a process on this host", _answered(leg))
    if last.name == "PREROUTING":
        return Station("stop", "nowhere", "no route from here")
    place = {Role.ANSWER: "the client", Role.DIAL: "the backend"}.get(leg.role)
    if place is None:
        place = "the backend" if leg.first.receiver != leg.last.receiver else "as it was"
    return Station("outside", place, f"{last.after.receiver}, by {last.devices[1] or 'no device'}", _answered(leg))


def _answered(leg: Leg) -> tuple[Line, ...]:
    if leg.role is not Role.DIAL:
        return ()
    said = leg.answered or "nothing in time"
    return (Line("note", f"answers {said}" if said.startswith(("SYN", "datagram")) else f"answers {said}: skipped"),)


def _process(listener: Listener | None, ends: Ends, trace: PacketTrace) -> Station:
    if listener is None:
        return Station("stop", "nobody", f"no process listens at port {ends.destination_port}")
    name = f"{listener.name} (process {listener.pid})" if listener.pid else listener.name
    if not listener.is_ours:
        return Station("process", name, f"port {listener.port}")
    does = "accept, pick, dial, splice" if trace.protocol == "tcp" else "receive, pick, send on"
    lines = [Line("note", f"second connection: {trace.dial.first}")] if trace.dial is not None else []
    return Station("process", name, f"port {listener.port}: {does}", tuple(lines))


def count(number: int, thing: str) -> str:
    """Return *number* and *thing*, with a plural s."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
