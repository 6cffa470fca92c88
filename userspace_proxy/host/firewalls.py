"""Finds firewalls of other programs that block Services' traffic.

Redirected traffic passes INPUT like any packet for this node. Traffic that NAT rules translate passes FORWARD. Of
traffic that IPVS translates, requests pass INPUT with the address that the client dialled, and replies pass FORWARD.
"""

import json
import logging
import re
from typing import Any, Literal, NamedTuple

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, parsed, run_tool

log = logging.getLogger(__name__)

Hook = Literal["input", "forward"]


class ServiceTraffic(NamedTuple):
    """Traffic of Services that passes the firewall of a node at ``hook``.

    ``nft`` and ``iptables``: the match of a rule that accepts this traffic. ``sign``: a word in every such rule.
    """

    name: str
    hook: Hook
    nft: str
    iptables: str
    sign: str


REDIRECTED = ServiceTraffic("redirected traffic", "input", "ct status dnat", "-m conntrack --ctstate DNAT", "dnat")
FORWARDED = ServiceTraffic("forwarded traffic", "forward", "ct status dnat", "-m conntrack --ctstate DNAT", "dnat")
# Before IPVS translates a request, only its address tells that it is for a Service.
DIALLED = ServiceTraffic("requests to Services", "input", "{family} daddr {range}", "-d {range}", "")
REPLIES = ServiceTraffic(
    "replies of endpoints", "forward", "ct state established", "-m conntrack --ctstate ESTABLISHED", "established"
)

# The chains of iptables on nf_tables. Only iptables can read all rules in them; it rejects chains with foreign rules.
_OF_IPTABLES = [(family, "filter", chain) for family in ("ip", "ip6") for chain in ("INPUT", "FORWARD")]
# Docker's bridges: a rule that accepts traffic there concerns containers, not pods.
_CONTAINER_BRIDGE = re.compile(r"(docker\d+|br-)")
# A rule that accepts by address or interface may be meant for Services; one that accepts by port alone is not.
_ADDRESS = re.compile(r'addr"|"iif(name)?"(?!.*"lo")| -[sd] | -i (?!lo )|^-A \w+ -j ACCEPT')


def blocking_chains(ruleset: dict[str, Any], traffic: ServiceTraffic = REDIRECTED) -> list[str]:
    """Return the nftables chains at the hook of *traffic* that drop by default and do not accept it.

    A forward chain that accepts new connections of any kind may accept those to endpoints too, so it is not returned.
    *ruleset* is the output of ``nft --json list ruleset``. Chains are returned as ``family table chain``.
    """
    items = ruleset.get("nftables", [])
    chains = [item["chain"] for item in items if "chain" in item]
    hooked = {(c["family"], c["table"], c["name"]): c.get("policy") for c in chains if c.get("hook") == traffic.hook}
    rules: dict[tuple[str, str, str], list[list[dict[str, Any]]]] = {chain: [] for chain in hooked}
    for rule in (item["rule"] for item in items if "rule" in item):
        rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule.get("expr", []))
    return [
        " ".join(chain)
        for chain, policy in sorted(hooked.items())
        if chain not in _OF_IPTABLES
        and (policy == "drop" or any(map(_drops_everything, rules[chain])))
        and not any(_accepts(rule, traffic) for rule in rules[chain])
        and not (
            traffic.hook == "forward"
            and any(_may_accept_new(rule) for at in rules if at[:2] == chain[:2] for rule in rules[at])
        )
    ]


def _drops_everything(expressions: list[dict[str, Any]]) -> bool:
    kinds = {kind for expression in expressions for kind in expression}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _accepts(expressions: list[dict[str, Any]], traffic: ServiceTraffic) -> bool:
    text = json.dumps(expressions).lower()
    is_meant = traffic.sign in text if traffic.sign else _may_accept_new(expressions) and _ADDRESS.search(text)
    return any("accept" in e for e in expressions) and bool(is_meant)


def _may_accept_new(expressions: list[dict[str, Any]]) -> bool:
    text = json.dumps(expressions)
    is_of_states = '"dnat"' in text or ('"state"' in text and '"new"' not in text)
    return any("accept" in e for e in expressions) and not is_of_states and not _CONTAINER_BRIDGE.search(text)


def blocks(rules: str, traffic: ServiceTraffic = REDIRECTED) -> bool:
    """Return whether iptables drops by default at the hook of *traffic* and does not accept it.

    As in `blocking_chains`, a rule that accepts new connections may accept those to endpoints at FORWARD. *rules* is
    the output of ``iptables -S``.
    """
    lines, chain = rules.splitlines(), traffic.hook.upper()
    ends = (f"-P {chain} DROP", f"-A {chain} -j DROP", f"-A {chain} -j REJECT")
    accepts = [line for line in lines if line.endswith("-j ACCEPT") and not _CONTAINER_BRIDGE.search(line)]
    sign = re.compile(traffic.sign.upper()) if traffic.sign else _ADDRESS
    return (
        any(line.startswith(ends) for line in lines)
        and not any(sign.search(line) for line in accepts)
        and not (traffic.hook == "forward" and any(map(_may_accept_new_by_iptables, accepts)))
    )


def _may_accept_new_by_iptables(rule: str) -> bool:
    chain = rule.split()[1]
    is_of_states = "state " in rule and "NEW" not in rule
    # KUBE-FORWARD accepts masqueraded traffic only, and not all Service traffic is masqueraded.
    return not (is_of_states or chain in ("INPUT", "OUTPUT", "KUBE-FORWARD"))


async def find_blocking_firewall(traffic: ServiceTraffic = REDIRECTED, service_range: str = "") -> list[str]:
    """Return the firewalls that drop *traffic*, each with a command that lets it pass."""
    found = []
    family = "ip6" if ":" in service_range else "ip"
    nft, iptables = (text.format(family=family, range=service_range) for text in (traffic.nft, traffic.iptables))
    if is_installed("nft"):
        listed = parsed(await run_tool("nft", "--json", "--terse", "list", "ruleset")) or {}
        found += [
            f"nftables chain '{chain}' drops what no rule accepts; `nft insert rule {chain} {nft} accept` lets it pass"
            for chain in blocking_chains(listed, traffic)
        ]
    for tool in ("iptables", "ip6tables"):
        try:
            blocked = is_installed(tool) and blocks(await run_tool(tool, "-S"), traffic)
        except SyncError as error:
            log.debug("the rules of %s cannot be looked at: %s", tool, error)
            continue
        if blocked:
            chain = traffic.hook.upper()
            fix = f"{tool} -I {chain} {iptables} -j ACCEPT"
            found.append(f"{tool} {chain} drops what no rule accepts; `{fix}` lets it pass")
    return found
