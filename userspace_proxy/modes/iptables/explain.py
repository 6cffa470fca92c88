"""kube-proxy's chains, line by line. Pure.

A chain of an endpoint has a hash for a name: which endpoint it is, is read off the rule in it that leads there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from userspace_proxy.modes.iptables.chains import LOCALNET, LOOPS, OWN_PREFIXES, chain_hash
from userspace_proxy.modes.iptables.tables import MARK
from userspace_proxy.modes.reasons.known import Known, host
from userspace_proxy.modes.reasons.phrases import PACKETS_OF, answer, owner, packets
from userspace_proxy.modes.reasons.xtables_frame import LOOPS_SAID, NO_LOOP_SAID, explain_frame
from userspace_proxy.modes.reasons.xtables_text import (
    Explainer,
    Family,
    Rule,
    Section,
    parse_rule,
    target,
    without_the_useless,
)

_CHAINS = {
    (
        "nat",
        "KUBE-SERVICES",
    ): "Which Service? Asked rule by rule, so a connection costs more the more Services there are.",
    ("nat", "KUBE-NODEPORTS"): "Packets to an address of this node: is it a node port?",
    ("nat", "KUBE-POSTROUTING"): "Replaces the sender's address of packets with the mark (masquerade, SNAT).",
    ("nat", "KUBE-MARK-MASQ"): "Puts the mark on packets whose sender's address is to be replaced when they leave.",
    ("filter", "KUBE-SERVICES"): "Cluster IPs that nobody can serve.",
    ("filter", "KUBE-EXTERNAL-SERVICES"): "External IPs, load balancer IPs and node ports that nobody can serve.",
    (
        "filter",
        "KUBE-FORWARD",
    ): "Lets pass through this node what was led to an endpoint, whatever the rules behind it say.",
    ("filter", "KUBE-NODEPORTS"): "Health check node ports, which load balancers ask.",
    ("filter", "KUBE-PROXY-FIREWALL"): "Load balancer IPs that not everybody may dial (loadBalancerSourceRanges).",
    ("filter", "USERSPACE-PROXY-LOCALNET"): "Guards 127.0.0.0/8, since route_localnet opens it for node ports.",
    ("filter", LOOPS.name): LOOPS_SAID,
}
_OWN = dict(
    zip(
        OWN_PREFIXES,
        (
            "{}: all its endpoints that traffic from the cluster may meet.",
            "{}: its endpoints on this node (traffic policy Local).",
            "{}: who dialled it at another address than the cluster IP.",
            "{}: who may dial its load balancer IP (loadBalancerSourceRanges).",
            "{}",
        ),
        strict=True,
    )
)
_JUMPS = {
    ("filter", "KUBE-EXTERNAL-SERVICES"): "is it an external portal that nobody can serve?",
    ("filter", "KUBE-SERVICES"): "is it a cluster IP that nobody can serve?",
    ("filter", "KUBE-NODEPORTS"): "is it a health check node port?",
    ("filter", "KUBE-FORWARD"): "was it led to an endpoint, so that it may pass?",
    ("filter", "KUBE-PROXY-FIREWALL"): "is it a load balancer IP that this sender may not dial?",
    ("filter", "USERSPACE-PROXY-LOCALNET"): "does somebody reach for 127.0.0.0/8 from outside?",
    ("filter", LOOPS.name): "is it to leave by lo, where it would come in again?",
    ("nat", "KUBE-SERVICES"): "is it for a Service?",
    ("nat", "KUBE-POSTROUTING"): "is the sender's address to be replaced?",
}


@dataclass(slots=True)
class _Scanned:
    """What the rules of one family say elsewhere: whose chains are, which endpoint, and who chooses by chance."""

    owners: dict[str, str] = field(default_factory=dict)
    endpoints: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)  # chain -> the rules in it that choose by chance


def _scan(rules: Iterable[str], known: Known) -> _Scanned:
    found = _Scanned()
    by_hash = {chain_hash(name): str(name) for name in known.names}
    for line in rules:
        chain, to = line.split()[1], target(line)
        if match := re.search(r" --to-destination (\S+)", line):
            found.endpoints[chain] = match[1]
        if to.startswith("KUBE-SEP-"):
            if (name := by_hash.get(chain[9:])) is not None:
                found.owners[to] = name
            if "--rcheck" not in line:
                found.choices.setdefault(chain, []).append(line)
        for each in (chain, to):
            if each.startswith(OWN_PREFIXES) and (name := by_hash.get(each.split("-", 2)[2])) is not None:
                found.owners[each] = name
    return found


def what_is_met(families: Iterable[Family]) -> list[Family]:
    """Return *families* without what no packet is changed by; the guard of node ports is of no use without these."""
    left = without_the_useless(families, MARK.__eq__)
    for family in left:
        nat, guarded = family.section("nat").rules, family.section("filter")
        if not any(rule.startswith("-A KUBE-NODEPORTS ") for rule in nat):
            guarded.rules = [rule for rule in guarded.rules if not rule.startswith(f"-A {LOCALNET.name} ")]
    return without_the_useless(left, MARK.__eq__)


def explainer(families: Iterable[Family], known: Known) -> Explainer:
    """Return what explains lines of *families*, which `kube_kernel.text` has rendered."""
    # Each family by itself, as chains of both have the same names.
    by_tool = {f.tool: _scan((rule for section in f.sections for rule in section.rules), known) for f in families}

    def explain(family: Family, section: Section | None, line: str) -> tuple[str, str]:
        scanned = by_tool[family.tool]
        if section is None or not line.startswith("-"):
            whose = scanned.owners.get(line[1:].split()[0], "") if line.startswith(":") else ""
            return explain_frame(section, line, lambda table, name: _chain(table, name, scanned)), whose
        rule = parse_rule(section.name, line)
        if rule is None:
            return "", ""
        whose = owner(rule, known) or scanned.owners.get(rule.chain, "") or scanned.owners.get(rule.target, "")
        return _rule(rule, line, known, scanned), whose

    return explain


def _chain(table: str, name: str, scanned: _Scanned) -> str:
    if name == MARK:
        return "Says by being there that the chains named KUBE-... in this table are ours, and no kube-proxy's."
    for prefix, says in _OWN.items():
        if name.startswith(prefix):
            whose = scanned.owners.get(name, "a Service")
            if prefix == "KUBE-SEP-":
                return f"The endpoint {scanned.endpoints[name]} of {whose}." if name in scanned.endpoints else ""
            return says.format(whose)
    return _CHAINS.get((table, name), "")


def _rule(rule: Rule, line: str, known: Known, scanned: _Scanned) -> str:
    if rule.chain in PACKETS_OF:
        asked = _JUMPS.get((rule.table, rule.target), "")
        new = "; new connections only" if rule.get("state") == "NEW" else ""
        what = ", UDP that leaves this node" if "destination type" in rule.negated else ""
        return f"{PACKETS_OF[rule.chain]}{what}{new}: {asked}" if asked else ""
    if rule.chain.startswith("KUBE-SEP-"):
        return _endpoint(rule, scanned)
    if rule.target.startswith("KUBE-SEP-"):
        return _choice(rule, line, scanned)
    shared = _shared(rule, known)
    return shared or (_own(rule, known, scanned) if rule.chain.startswith(OWN_PREFIXES) else _led(rule, known, scanned))


def _shared(rule: Rule, known: Known) -> str:
    """Return what is said of the rules that do not depend on Services."""
    whom = packets(rule, known)
    match rule.chain, rule.target:
        case "KUBE-SERVICES", "KUBE-NODEPORTS":
            return f"{whom}: see whether it is a node port. The last rule, as it is the most general."
        case "KUBE-POSTROUTING", "RETURN":
            return f"{whom} leave as they are."
        case "KUBE-POSTROUTING", "MARK" if rule.get("set mark").endswith("/0x0"):
            return (
                "Take the mark away (xmark flips it), lest the packet be masqueraded again on its way through a tunnel."
            )
        case "KUBE-POSTROUTING", "MASQUERADE":
            drawn = ", at a port drawn by chance" if "--random-fully" in rule.flags else ""
            return f"Replace the sender's address by that of this node (masquerade{drawn}): answers come back here."
        case "KUBE-MARK-MASQ", "MARK":
            return f"Put the mark {rule.get('set mark').partition('/')[0]} on the packet; POSTROUTING looks for it."
        case "KUBE-FORWARD", "DROP":
            return f"{whom} are dropped: nothing would translate them, and who gets one would reset its connection."
        case "KUBE-FORWARD", "ACCEPT":
            return f"{whom} may pass through this node."
        case "USERSPACE-PROXY-LOCALNET", "DROP":
            return f"{whom} are dropped: only this node itself may dial 127.0.0.1 (CVE-2020-8558)."
        case LOOPS.name, "REJECT" if answer(rule):
            return NO_LOOP_SAID.format(answer(rule))
        case chain, _ if chain == MARK:
            return "What was here before us, to be left as it was." if rule.get("comment") else ""
    return ""


def _led(rule: Rule, known: Known, scanned: _Scanned) -> str:
    """Return what is said of the rules by which the shared chains know a Service."""
    whom = packets(rule, known)
    if (whose := scanned.owners.get(rule.target)) and rule.target.startswith(OWN_PREFIXES):
        return f"{whom} are for {whose}: on to its chain {rule.target[:8].rstrip('-')}-..."
    if "has no" in (reason := rule.get("comment")):
        why = "no endpoint is there" if reason.endswith("has no endpoints") else "none of its endpoints is on this node"
        if rule.target == "REJECT" and answer(rule):
            return f"{whom} are refused with {answer(rule)}: {why}."
        return f"{whom} are dropped, without an answer: {why} (traffic policy Local)." if rule.target == "DROP" else ""
    if rule.chain == "KUBE-PROXY-FIREWALL" and rule.target == "DROP":
        return (
            f"{whom} are dropped: who may dial it was led to an endpoint by now, and is not addressed to it any more."
        )
    if rule.target == "ACCEPT" and rule.chain == "KUBE-NODEPORTS":
        return f"{whom.replace('the node port', 'the health check node port')} may pass."
    return ""


def _own(rule: Rule, known: Known, scanned: _Scanned) -> str:
    """Return what is said of a rule in a Service's own chains but those of endpoints."""
    whom = packets(rule, known)
    kind, to = rule.chain[:8], rule.target
    if to == "KUBE-MARK-MASQ":
        why = "their sender's address will be replaced, so that the endpoint's answers come back to this node"
        if "source" in rule.negated or "interface" in rule.negated:
            return f"{whom} (so from no pod) get the mark: {why}."
        return f"{whom} get the mark: {why}."
    if to == "MARK" and rule.get("set mark").startswith("0x0/"):
        return f"{whom} lose the mark again: a pod, and the endpoint may see its own address."
    if kind == "KUBE-FW-":
        if not to:
            return (
                "A note only: who comes to this line is none of the senders above, and is dropped in the table filter."
            )
        return f"{whom} may dial the load balancer IP: on to {to[:8]}-..."
    if kind == "KUBE-EXT" and to.startswith(OWN_PREFIXES):
        where = "all endpoints" if to.startswith("KUBE-SVC-") else "the endpoints on this node (traffic policy Local)"
        who = "Pods" if rule.get("source") or rule.get("interface") else ""
        if rule.asks:
            again = ", as if they had gone out to a load balancer and come back"
            return f"{whom}{f' ({who.lower()})' if who else ''} may meet {where}{again}."
        return f"{'All others' if to.startswith('KUBE-SVL-') else 'Then'}: on to {where}."
    return ""


def _choice(rule: Rule, line: str, scanned: _Scanned) -> str:
    """Return what is said of a rule that leads to one endpoint out of several."""
    endpoint = scanned.endpoints.get(rule.target)
    if endpoint is None:
        return ""
    if "--rcheck" in rule.flags:
        return (
            f"Affinity: who was led to {endpoint} within the last {rule.get('seconds')} s is led there again "
            "(-m recent keeps a list of clients' addresses for each endpoint)."
        )
    rules = scanned.choices[rule.chain]
    of, at = len(rules), rules.index(line)
    if of == 1:
        return f"Always {endpoint}: there is one endpoint only."
    if at == of - 1:
        return (
            f"One of {of} endpoints by chance, the last: who was not led elsewhere by now goes to "
            f"{endpoint}, 1 in {of}."
        )
    left = round(1 / float(rule.get("probability")))
    if at == 0:
        return f"One of {of} endpoints by chance, the first: {endpoint} with probability 1/{left}."
    return f"The next: {endpoint} with probability 1/{left} of those who came here, which is 1 in {of} of all."


def _endpoint(rule: Rule, scanned: _Scanned) -> str:
    if rule.target == "KUBE-MARK-MASQ":
        return (
            f"The endpoint itself ({host(rule.get('source'))}) dialled its Service and was chosen: it "
            f"gets the mark, for "
            "with its own address as sender it would answer itself, past this node."
        )
    if rule.target == "DNAT":
        seen = " Before, the client's address is noted in the list of this endpoint (affinity)." * (
            "--set" in rule.flags
        )
        return (
            f"DNAT: the packet's destination becomes the endpoint {rule.get('to')} "
            f"({rule.get('protocol').upper()}).{seen}"
        )
    return ""
