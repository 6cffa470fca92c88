"""The iptables rules of userspace mode, line by line. Pure."""

from __future__ import annotations

from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.reasons.phrases import PACKETS_OF, answer, owner, packets
from userspace_proxy.modes.reasons.xtables_frame import LOOPS_SAID, NO_LOOP_SAID, explain_frame
from userspace_proxy.modes.reasons.xtables_text import Explainer, Family, Rule, Section, parse_rule
from userspace_proxy.modes.userspace.iptables import CHAIN, DROP, GUARD, LOOPS, NODE_PORTS, RANGES

_CHAINS = {
    ("mangle", CHAIN): "What comes in by the network.",
    ("mangle", RANGES): "Portals that not everybody may dial (loadBalancerSourceRanges).",
    ("mangle", DROP): "New connections that are to be dropped.",
    ("mangle", NODE_PORTS): "Node ports: which of them are dropped, and for whom.",
    ("nat", CHAIN): "Packets to Services. Asked rule by rule, so a connection costs more the more Services there are.",
    ("nat", NODE_PORTS): "Packets to an address of this node: is it a node port?",
    ("filter", GUARD): "Guards our proxy ports: they are reached by their portals only.",
    ("filter", LOOPS): LOOPS_SAID,
}


def explainer(known: Known) -> Explainer:
    """Return what explains lines that `iptables.restore` has rendered."""

    def explain(_: Family, section: Section | None, line: str) -> tuple[str, str]:
        if section is None or not line.startswith("-"):
            return explain_frame(section, line, lambda table, chain: _CHAINS.get((table, chain), "")), ""
        rule = parse_rule(section.name, line)
        if rule is None:
            return "", ""
        return _rule(rule, known), owner(rule, known) or _named(rule)

    return explain


def _named(rule: Rule) -> str:
    return rule.get("comment")


def _rule(rule: Rule, known: Known) -> str:
    if rule.chain in PACKETS_OF:
        return _jump(rule)
    match rule.target:
        case "REDIRECT":
            return _led(f"{packets(rule, known)} are led to", rule.get("to"), known)
        case "DNAT":
            address, _, port = rule.get("to").rpartition(":")
            return _led(f"{packets(rule, known)} are led to {address}, an address of ours on lo, at", port, known)
        case "DROP":
            why = "" if rule.chain != RANGES else " All who may dial it have left this chain by the rules above."
            return f"{packets(rule, known)} are dropped, without an answer.{why}"
        case "REJECT" if rule.chain == LOOPS and answer(rule):
            return NO_LOOP_SAID.format(answer(rule))
        case "REJECT" if answer(rule):
            return f"{packets(rule, known)}, which nobody dials by a portal, are refused with {answer(rule)}."
        case "RETURN":
            return _return(rule, known)
        case "MARK" if "--transparent" in rule.flags:
            return (
                "An answer to a client whose address a socket of ours speaks with: marked, by which "
                "routing brings it to "
                "this node instead of to the client."
            )
        case _ if rule.target in (CHAIN, DROP, RANGES, NODE_PORTS):
            return _call(rule, known)
    return ""


def _led(start: str, port: str, known: Known) -> str:
    if port == known.refuse_port:
        return f"{start} port {port}, at which nobody listens: no endpoint is there, and the kernel refuses at once."
    return f"{start} our proxy port {port}."


def _return(rule: Rule, known: Known) -> str:
    if rule.chain == GUARD:
        return f"{packets(rule, known)} may pass: they did not dial a proxy port directly."
    return f"{packets(rule, known)} are not dropped: back to where this chain was called."


def _call(rule: Rule, known: Known) -> str:
    if rule.target == NODE_PORTS:
        return f"{packets(rule, known)}: see whether it is a node port. Behind the Services' own addresses."
    if rule.target == RANGES:
        return "First: may the sender dial this portal at all?"
    return f"{packets(rule, known)}: see whether they are to be dropped." if rule.target == DROP else ""


def _jump(rule: Rule) -> str:
    first = f"{PACKETS_OF[rule.chain]}: first of all (-I ... 1) on to {rule.target}"
    if "mark" in rule.negated:
        first += (
            ", but not for what our proxy itself sends: its sockets mark their packets, so a dial to an endpoint never "
            "comes back to us"
        )
    if rule.get("out interface"):
        return f"{first}, where they are to leave by {rule.get('out interface')}."
    return f"{first}; new connections only." if rule.get("state") == "NEW" else f"{first}."
