"""Finds firewalls of other programs that block Services' traffic.

Redirected traffic passes INPUT like any packet for this node. Traffic that the kernel translates by itself passes
FORWARD.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any, Literal

from userspace_proxy.errors import SyncError
from userspace_proxy.host.tool import is_installed, parsed, run_tool

log = logging.getLogger(__name__)

Hook = Literal["input", "forward"]

# The chains of iptables on nf_tables. Only iptables can read all rules in them; it rejects chains with foreign rules.
_OF_IPTABLES = [(family, "filter", chain) for family in ("ip", "ip6") for chain in ("INPUT", "FORWARD")]
# Docker's bridges: a rule that accepts traffic there concerns containers, not pods.
_CONTAINER_BRIDGE = re.compile(r"(docker\d+|br-)")


def blocking_chains(ruleset: dict[str, Any], hook: Hook = "input") -> list[str]:
    """Return the nftables chains at *hook* that drop by default and accept no translated traffic.

    A forward chain that accepts new connections of any kind may accept those to endpoints too, so it is not returned.
    *ruleset* is the output of ``nft --json list ruleset``. Chains are returned as ``family table chain``.
    """
    items = ruleset.get("nftables", [])
    chains = [item["chain"] for item in items if "chain" in item]
    hooked = {(c["family"], c["table"], c["name"]): c.get("policy") for c in chains if c.get("hook") == hook}
    rules: dict[tuple[str, str, str], list[list[dict[str, Any]]]] = {chain: [] for chain in hooked}
    for rule in (item["rule"] for item in items if "rule" in item):
        rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule.get("expr", []))
    return [
        " ".join(chain)
        for chain, policy in sorted(hooked.items())
        if chain not in _OF_IPTABLES
        and (policy == "drop" or any(map(_drops_everything, rules[chain])))
        and not any(map(_accepts_translated, rules[chain]))
        and not (hook == "forward" and any(_may_accept_new(r) for c in rules if c[:2] == chain[:2] for r in rules[c]))
    ]


def _drops_everything(expressions: list[dict[str, Any]]) -> bool:
    kinds = {kind for expression in expressions for kind in expression}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _accepts_translated(expressions: list[dict[str, Any]]) -> bool:
    return any("accept" in e for e in expressions) and "dnat" in json.dumps(expressions).lower()


def _may_accept_new(expressions: list[dict[str, Any]]) -> bool:
    said = json.dumps(expressions)
    is_of_states = '"state"' in said and '"new"' not in said
    return any("accept" in e for e in expressions) and not is_of_states and not _CONTAINER_BRIDGE.search(said)


def blocks(rules: str, hook: Hook = "input") -> bool:
    """Return whether iptables drops by default at *hook* and accepts no translated traffic.

    As in `blocking_chains`, a rule that accepts new connections may accept those to endpoints at FORWARD. *rules* is
    the output of ``iptables -S``.
    """
    lines, chain = rules.splitlines(), hook.upper()
    ends = (f"-P {chain} DROP", f"-A {chain} -j DROP", f"-A {chain} -j REJECT")
    accepts = [line for line in lines if line.endswith("-j ACCEPT")]
    return (
        any(line.startswith(ends) for line in lines)
        and not any("DNAT" in line for line in accepts)
        and not (hook == "forward" and any(map(_may_accept_new_by_iptables, accepts)))
    )


def _may_accept_new_by_iptables(rule: str) -> bool:
    chain = rule.split()[1]
    is_of_states = "state " in rule and "NEW" not in rule
    # KUBE-FORWARD accepts masqueraded traffic only, and not all Service traffic is masqueraded.
    return not (is_of_states or chain in ("INPUT", "OUTPUT", "KUBE-FORWARD") or _CONTAINER_BRIDGE.search(rule))


async def find_blocking_firewall(hook: Hook = "input") -> list[str]:
    """Return the firewalls that drop Services' traffic at *hook*, each with a command that lets it pass."""
    found = []
    if is_installed("nft"):
        listed = parsed(await run_tool("nft", "--json", "--terse", "list", "ruleset")) or {}
        found += [
            f"nftables chain '{chain}' drops what no rule accepts; `nft insert rule {chain} ct status dnat accept` "
            "lets it pass"
            for chain in blocking_chains(listed, hook)
        ]
    for tool in ("iptables", "ip6tables"):
        try:
            blocked = is_installed(tool) and blocks(await run_tool(tool, "-S"), hook)
        except SyncError as error:
            log.debug("the rules of %s cannot be looked at: %s", tool, error)
            continue
        if blocked:
            chain = hook.upper()
            found.append(
                f"{tool} {chain} drops what no rule accepts; `{tool} -I {chain} -m conntrack --ctstate DNAT -j ACCEPT` "
                "lets it pass"
            )
    return found
