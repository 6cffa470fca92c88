"""What a rule of iptables matches, in words. Pure."""

from __future__ import annotations

from userspace_proxy.modes.reasons.known import Known, host
from userspace_proxy.modes.reasons.xtables_text import Rule

_STATES = {
    "NEW": "of a new connection",
    "INVALID": "that conntrack cannot place",
    "RELATED,ESTABLISHED": "of a connection that conntrack knows already",
    "DNAT": "whose destination was translated",
}
_ANSWERS = {
    "tcp-reset": "a TCP reset: `connection refused`",
    "icmp-port-unreachable": "ICMP port unreachable: `connection refused`",
    "icmp-host-unreachable": "ICMP host unreachable: `no route to host`",
    "icmp6-port-unreachable": "ICMPv6 port unreachable",
}
PACKETS_OF = {
    "PREROUTING": "PREROUTING (what comes in by the network, before routing)",
    "INPUT": "INPUT (what is for this node itself)",
    "FORWARD": "FORWARD (what passes through this node)",
    "OUTPUT": "OUTPUT (what processes of this node send)",
    "POSTROUTING": "POSTROUTING (what is about to leave, after routing)",
}


def packets(rule: Rule, known: Known) -> str:
    """Return which packets *rule* matches: `Packets to ... from ...`."""
    parts = ["Packets"]
    if state := rule.get("state"):
        parts.append(_STATES.get(state, f"in the state {state}"))
    if where := _where(rule, known):
        parts.append(where)
    if sender := _sender(rule):
        parts.append(sender)
    if mark := rule.words.get("mark"):
        parts.append(f"without the mark {_bit(mark)}" if "mark" in rule.negated else f"with the mark {_bit(mark)}")
    if "state" in rule.negated:
        parts.append(f"in none of the states {rule.words['state']}")
    return " ".join(parts)


def _where(rule: Rule, known: Known) -> str:
    """Return what they are addressed to."""
    port, protocol, at = rule.get("port"), rule.get("protocol"), host(rule.get("destination"))
    if port and protocol:
        return f"to {known.portal(at, port, protocol)}"
    if ports := rule.get("ports"):
        return f"to the {protocol.upper()} port{'s' if ',' in ports else ''} {ports.replace(',', ', ')}"
    here = rule.get("destination type") == "LOCAL"
    if at and here:
        return f"to an address of this node in {at}"
    if "destination" in rule.negated:
        at = f"any address but {host(rule.words['destination'])}"
        return f"to an address of this node, but none of {host(rule.words['destination'])}" if here else f"to {at}"
    return f"to {at}" if at else "to an address of this node" if here else ""


def _sender(rule: Rule) -> str:
    said = []
    if source := rule.words.get("source"):
        said.append(f"{'not ' if 'source' in rule.negated else ''}from {host(source)}")
    if interface := rule.words.get("interface"):
        said.append(f"that {'do not ' if 'interface' in rule.negated else ''}come in by {interface}")
    if rule.get("source type") == "LOCAL":
        said.append("from this node itself")
    return " ".join(said)


def _bit(mark: str) -> str:
    return mark.partition("/")[0]


def answer(rule: Rule) -> str:
    """Return how the sender is told; "" where in a way that is not known here."""
    return _ANSWERS.get(rule.get("answer"), "")


def owner(rule: Rule, known: Known) -> str:
    """Return whose portal *rule* is about, "" where nobody's."""
    port, protocol = rule.get("port"), rule.get("protocol")
    return known.owner(host(rule.get("destination")), port, protocol) if port and protocol else ""
