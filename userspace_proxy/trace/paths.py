"""Prepares a trace for display: a path of stages for each packet, with lines for each stage. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from userspace_proxy.trace.analysis import deciding
from userspace_proxy.trace.values import (
    Ends,
    Hook,
    IpvsServer,
    Leg,
    Listener,
    MatchedRule,
    PacketRole,
    PacketTrace,
    Visit,
)


@dataclass(frozen=True, slots=True)
class StageLine:
    """One line of text at a stage.

    ``kind`` is chain, rule, decides (the rule that decides), element (the looked-up map element), skipped, change or
    note. ``depth`` is 0 for lines about a hook, 1 for rules of its base chain, and more for chains that these jump to.
    """

    kind: str
    text: str
    depth: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """A place on the packet's path: a hook of the kernel, IPVS, a process, or outside (``kind``)."""

    kind: str
    title: str
    aside: str
    lines: tuple[StageLine, ...] = ()


@dataclass(frozen=True, slots=True)
class PacketPath:
    """The path of one packet: the stages in the order in which it passes them."""

    title: str
    aside: str
    stages: tuple[Stage, ...]


_TITLES = {
    PacketRole.CLIENT: "The client's first packet",
    PacketRole.DIAL: "The proxy's own connection to the backend",
    PacketRole.REPLY: "What comes back from the backend",
    PacketRole.ANSWER: "What comes back to the client",
}
_RANDOM = re.compile(r"numgen random mod (\d+) map")
_HOOKS = {
    "PREROUTING": "as it comes in",
    "INPUT": "for this host itself",
    "FORWARD": "to be passed on",
    "OUTPUT": "from this host itself",
    "POSTROUTING": "as it goes out",
}


def packet_paths(trace: PacketTrace, *, folded: bool) -> tuple[PacketPath, ...]:
    """Return the paths of *trace*; *folded* omits the chains that had no effect on the packet."""
    return tuple(_path(leg, trace, folded=folded) for leg in trace.legs)


def _path(leg: Leg, trace: PacketTrace, *, folded: bool) -> PacketPath:
    stages = []
    for hook, later in zip(leg.hooks, (*leg.hooks[1:], None), strict=True):
        stages.append(_hook(hook, leg, trace, folded=folded))
        now = hook.after or (later.before if later is not None else None)
        if trace.ipvs is not None and now is not None and _is_by_ipvs(hook, now, leg):
            stages.append(_ipvs(trace.ipvs, hook.before, now))
    stages.insert(0, _start(leg, trace))
    last = leg.hooks[-1]
    if last.after is not None:
        stages.append(_end(leg, last, trace))
    aside = (
        f"{trace.protocol.upper()} {leg.what}" if trace.protocol == "tcp" else f"a {trace.protocol.upper()} datagram"
    )
    if leg.what.startswith("ICMP"):
        aside = leg.what
    return PacketPath(_TITLES[leg.role], f"{aside}, {leg.first}", tuple(stages))


# ---- hooks


def _hook(hook: Hook, leg: Leg, trace: PacketTrace, *, folded: bool) -> Stage:
    lines = [line for visit in hook.visits for line in _visit(visit, folded=folded)]
    if hook.after is not None:
        lines += _change(hook, leg, trace)
    iif, oif = hook.devices
    devices = " ".join(word for word in (f"in {iif}" if iif else "", f"out {oif}" if oif else "") if word)
    meaning = _HOOKS.get(hook.name, "")
    return Stage("hook", hook.name, f"{meaning} ({devices})" if devices else meaning, tuple(lines))


def _visit(visit: Visit, *, folded: bool) -> Iterator[StageLine]:
    name = f"{visit.family} {visit.table} {visit.chain}"
    is_empty = not (visit.steps or visit.skipped)
    if folded and is_empty:
        return
    if not visit.steps or (folded and _did_nothing(visit)):
        yield StageLine("skipped", f"{name}: {_nothing_done(visit)}")
        return
    yield StageLine("chain", f"{name} ({visit.kind})" if visit.kind else name)
    decides = deciding(visit)
    for step in visit.steps:
        yield from _step(step, decides=step is decides)
    if visit.skipped:
        yield StageLine("skipped", f"{count(visit.skipped, 'rule')} did not match", 1)
    if visit.by_policy:
        yield StageLine("skipped", f"policy {visit.end}", 1)


def _nothing_done(visit: Visit) -> str:
    passed = sum(step.skipped for step in visit.steps) + visit.skipped
    if visit.steps:
        rest = f", {passed} did not match" if passed else ""
        return f"{count(len(visit.steps), 'rule')} had no effect{rest}"
    said = f"{count(passed, 'rule')} did not match" if passed else "no rules"
    return said if visit.end == "accept" else f"{said}, policy {visit.end}"


def _did_nothing(visit: Visit) -> bool:
    """Return whether *visit* only jumped between chains and left the packet unchanged."""
    led = all(step.verdict in ("jump", "goto", "return") for step in visit.steps)
    noted = any(step.element or " set " in step.rule for step in visit.steps)
    return led and not noted and visit.by_policy and visit.end == "accept" and visit.after == visit.before


def _step(step: MatchedRule, *, decides: bool) -> Iterator[StageLine]:
    depth = step.depth + 1
    if step.skipped:
        yield StageLine("skipped", f"{count(step.skipped, 'rule')} did not match", depth)
    yield StageLine("decides" if decides else "rule", step.rule, depth)
    if step.element:
        yield StageLine("element", step.element, depth + 1)
    if slots := _RANDOM.search(step.rule):
        yield StageLine("note", f"a random one of {slots[1]} slots", depth + 1)


def _change(hook: Hook, leg: Leg, trace: PacketTrace) -> Iterator[StageLine]:
    was, now = hook.before, hook.after
    assert now is not None
    if trace.ipvs is not None and _is_by_ipvs(hook, now, leg):
        return  # IPVS has its own stage
    by = "" if _is_by_rule(hook) else f"{_unseen_hand(hook, leg, trace)}: "
    if was.receiver != now.receiver:
        yield StageLine("change", f"{by}{was.receiver} became {now.receiver}")
    if was.sender != now.sender:
        yield StageLine("change", f"{by}sender {was.sender} became {now.sender}")


def _is_by_rule(hook: Hook) -> bool:
    return any(visit.after not in (None, visit.before) for visit in hook.visits if visit.kind == "nat")


def _is_by_ipvs(hook: Hook, now: Ends, leg: Leg) -> bool:
    """Return whether IPVS changed a client packet's destination: at INPUT, or at OUTPUT for this host's own packets."""
    is_there = hook.name in ("INPUT", "OUTPUT") and leg.role is PacketRole.CLIENT
    return is_there and hook.before.receiver != now.receiver and not _is_by_rule(hook)


def _unseen_hand(hook: Hook, leg: Leg, trace: PacketTrace) -> str:
    """Return what changes addresses although no traced rule does."""
    if leg.role is not PacketRole.ANSWER:
        return "rules that cannot be traced"
    return "IPVS" if trace.ipvs is not None and hook.name in ("FORWARD", "OUTPUT") else "conntrack"


# ---- other stages


def _ipvs(server: IpvsServer, was: Ends, now: Ends) -> Stage:
    lines = [StageLine("note", f"{real}, weight {weight}") for real, weight in server.weights.items()]
    change = StageLine("change", f"{was.receiver} became {now.receiver}")
    return Stage("ipvs", "IPVS", f"{server.portal}, scheduler {server.scheduler}", (*lines, change))


def _start(leg: Leg, trace: PacketTrace) -> Stage:
    is_local = leg.hooks[0].name == "OUTPUT"
    if leg.role is PacketRole.CLIENT:
        where = "a process on this host" if is_local else f"by {leg.hooks[0].devices[0]}"
        return Stage("outside", "the client", f"{leg.first.sender}, {where}")
    if is_local and trace.listener is not None:
        return Stage("process", trace.listener.name, leg.first.sender)
    return Stage("outside", "this host" if is_local else "the backend", leg.first.sender)


def _end(leg: Leg, last: Hook, trace: PacketTrace) -> Stage:
    assert last.after is not None
    if last.name == "INPUT":
        if leg.role is PacketRole.CLIENT:
            return _process(trace.listener, last.after, trace)
        end = "the backend" if leg.role is PacketRole.DIAL else "the client"
        return Stage("outside", end, f"{last.after.receiver}, a process on this host", _answered(leg))
    if last.name == "PREROUTING":
        return Stage("stop", "no route", "this host does not know where to send it")
    place = {PacketRole.ANSWER: "the client", PacketRole.DIAL: "the backend"}.get(leg.role)
    if place is None:
        place = "the backend" if leg.first.receiver != leg.last.receiver else "the destination"
    return Stage("outside", place, f"{last.after.receiver}, by {last.devices[1] or 'no device'}", _answered(leg))


def _answered(leg: Leg) -> tuple[StageLine, ...]:
    if leg.role is not PacketRole.DIAL:
        return ()
    said = leg.answered or "nothing in time"
    is_served = said.startswith(("SYN", "datagram"))
    return (StageLine("note", f"answers {said}" if is_served else f"answers {said}: skipped"),)


def _process(listener: Listener | None, ends: Ends, trace: PacketTrace) -> Stage:
    if listener is None:
        return Stage("stop", "no process", f"nothing listens at port {ends.destination_port}")
    name = f"{listener.name} (process {listener.pid})" if listener.pid else listener.name
    if not listener.is_ours:
        return Stage("process", name, f"port {listener.port}")
    does = "accept, pick, dial, splice" if trace.protocol == "tcp" else "receive, pick, send on"
    lines = [StageLine("note", f"second connection: {trace.dial.first}")] if trace.dial is not None else []
    return Stage("process", name, f"port {listener.port}: {does}", tuple(lines))


def count(number: int, thing: str) -> str:
    """Return *number* and *thing*, with a plural s."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
