"""Interprets a recording: builds the packets' paths and one sentence about the outcome. Pure."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs import genetlink
from userspace_proxy.trace.elements import Element, Elements, element_of
from userspace_proxy.trace.legs import legs
from userspace_proxy.trace.nftrace import messages
from userspace_proxy.trace.rulebook import Rulebook
from userspace_proxy.trace.values import (
    ConntrackEntry,
    Ends,
    IpvsServer,
    Leg,
    Listener,
    MatchedRule,
    PacketRole,
    PacketTrace,
    Visit,
    at,
)

_STATES = re.compile(r"\b(SYN_SENT|SYN_RECV|ESTABLISHED|FIN_WAIT|CLOSE_WAIT|LAST_ACK|TIME_WAIT|CLOSE)\b")


ANSWERED = "answered"


@dataclass(frozen=True, slots=True)
class Recording:
    """The raw data of one trace, as the kernel and the tools wrote it.

    ``datagrams``: the kernel's messages in hexadecimal. ``saved``: output of iptables-save by family. ``elements``: the
    set and map elements looked up for the packet, by `Element.key`. ``probe``: the result that the sending socket saw.
    """

    ip: str
    port: int
    protocol: str
    datagrams: list[str]
    nft: str
    saved: dict[str, str]
    devices: dict[int, str]
    conntrack: str = ""
    ip_vs: str = ""
    elements: dict[str, str] = field(default_factory=dict)
    listener: Listener | None = None
    probe: str = ""
    notes: list[str] = field(default_factory=list)


def analyse(recording: Recording) -> PacketTrace:
    """Return what happened to the packets of *recording*, in the order in which they were sent."""
    trace_messages = [message for text in recording.datagrams for message in messages(bytes.fromhex(text))]
    rulebook = Rulebook(recording.nft, recording.saved)
    elements = Elements(recording.protocol, recording.elements)
    seen = legs(trace_messages, rulebook, recording.devices, elements)
    trace = PacketTrace(
        portal=at(recording.ip, recording.port),
        protocol=recording.protocol,
        legs=_of_one_connection(seen, at(recording.ip, recording.port)),
        listener=recording.listener,
        ipvs=ipvs_server(recording),
        notes=tuple(recording.notes),
    )
    client = trace.leg(PacketRole.CLIENT)
    if client is not None:
        trace = replace(trace, flow=flow_of(recording.conntrack, client.first))
    return with_outcome(trace, recording.probe)


def _of_one_connection(seen: tuple[Leg, ...], portal: str) -> tuple[Leg, ...]:
    """Return the first client's leg and what belongs to it: the proxy's dials and the answer."""
    client = next((leg for leg in seen if leg.role is PacketRole.CLIENT), None)
    if client is None:
        return ()
    later = seen[seen.index(client) + 1 :]
    back = (portal, client.first.sender)
    answers = [leg for leg in later if leg.role is PacketRole.ANSWER]
    answer = next((leg for leg in answers if (leg.last.sender, leg.last.receiver) == back), None)
    if answer is None:  # an ICMP unreachable comes from another address
        answer = next((leg for leg in answers if leg.last.destination == client.first.source), None)
    dials = _dials(later) if _is_delivered(client) else []
    return (client, *dials, *([answer] if answer is not None else []))


def _dials(later: tuple[Leg, ...]) -> list[Leg]:
    """Return the proxy's dials up to the first successful one; later dials belong to other clients."""
    found: list[Leg] = []
    for leg in later:
        if leg.role is PacketRole.DIAL and not any(before.answered.startswith("SYN") for before in found):
            back = (leg.last.receiver, leg.last.sender)
            replies = (one for one in later if one.role is PacketRole.REPLY)
            reply = next((one for one in replies if (one.first.sender, one.first.receiver) == back), None)
            found.append(replace(leg, answered=reply.what if reply is not None else ""))
    return found


def _is_delivered(leg: Leg) -> bool:
    return leg.hooks[-1].name == "INPUT" and leg.hooks[-1].after is not None


def elements_in(trace: PacketTrace) -> Iterator[Element]:
    """Yield the elements that matching rules look up by the packet's own fields."""
    visits = [visit for leg in trace.legs for hook in leg.hooks for visit in hook.visits]
    for visit in visits:
        found = (element_of(step.rule, visit.family, visit.table, visit.before, trace.protocol) for step in visit.steps)
        yield from (element for element in found if element is not None)


# ---- IPVS and conntrack


def ipvs_server(recording: Recording) -> IpvsServer | None:
    """Return the virtual server of the portal, or None if IPVS has none."""
    portal = Portal(recording.ip, recording.port, L4Protocol(recording.protocol.upper()))
    server = genetlink.read(recording.ip_vs).servers.get(portal)
    if server is None:
        return None
    weights = {at(*address): weight for address, weight in server.weights.items()}
    return IpvsServer(f"{portal.protocol} {at(portal.ip, portal.port)}", server.scheduler, weights)


def flow_of(listing: str, original: Ends) -> ConntrackEntry | None:
    """Return the flow in *listing* (``conntrack -L``) whose original direction is *original*."""
    for line in listing.splitlines():
        words = [word.partition("=") for word in line.split()]
        values = [value for key, _, value in words if key in ("src", "dst", "sport", "dport")]
        if len(values) < 8:
            continue
        there, reply = (Ends(s, int(p), d, int(q)) for s, d, p, q in (values[:4], values[4:8]))
        if there == original:
            state = _STATES.search(line)
            return ConntrackEntry(state[1] if state else "", original, reply)
    return None


# ---- outcome


def deciding(visit: Visit) -> MatchedRule | None:
    """Return the rule that decided in *visit*, or None if the policy did."""
    return visit.steps[-1] if visit.steps and not visit.by_policy else None


def with_outcome(trace: PacketTrace, probe: str = "") -> PacketTrace:
    """Return *trace* with its outcome as one sentence."""
    return replace(trace, outcome=_outcome(trace, probe))


def _outcome(trace: PacketTrace, probe: str) -> str:
    client, answer = trace.leg(PacketRole.CLIENT), trace.leg(PacketRole.ANSWER)
    if client is None:
        return probe or "no packet came"
    return _stopped(client) or _went_on(client, answer, trace, probe)


def _stopped(client: Leg) -> str:
    """Return what stopped the packet, or "" if nothing did."""
    last = client.hooks[-1]
    if last.after is None:
        dropped = next((visit for visit in last.visits if visit.end == "drop"), None)
        return _dropped(last.name, dropped) if dropped else f"it was not seen again after {last.name}"
    if last.name == "PREROUTING":
        return "no route: after PREROUTING this host found no route (net.ipv4.ip_forward? rp_filter?)"
    return ""


def _dropped(hook: str, visit: Visit) -> str:
    step = deciding(visit)
    if step is None:
        return f"dropped at {hook} by the policy of {visit.chain}"
    verb = "refused" if "reject" in step.rule.lower() else "dropped"
    return f"{verb} at {hook} by the rule {step.rule!r} in {step.chain}"


def _went_on(client: Leg, answer: Leg | None, trace: PacketTrace, probe: str) -> str:
    was, became = client.first, client.last
    if was.receiver == became.receiver:
        changed = f"no rule translated {was.receiver}: the packet went on as it was"
    else:
        changed = f"{was.receiver} became {became.receiver}"
    if trace.dial is not None:
        dials = [leg.last.receiver for leg in trace.legs if leg.role is PacketRole.DIAL]
        changed += f", the proxy, which dialled {' and then '.join(dials)}"
    if answer is None and probe == ANSWERED:
        return f"{changed}; it was answered by packets that were not seen here"
    if answer is None:
        return f"{changed}; nothing came back in time"
    if answer.what.startswith(("RST", "ICMP")):
        unserved = f"; no process listens at port {became.destination_port}" if _is_delivered(client) else ""
        return f"{changed}; the answer was {answer.what}, refused{unserved}"
    return f"{changed}; the answer was {'a datagram' if answer.what == 'datagram' else answer.what}"
