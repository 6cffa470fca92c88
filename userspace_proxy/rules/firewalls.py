"""Firewalls of others in the way of redirected traffic, which arrives at INPUT like any packet for this node."""

from __future__ import annotations

import json
import logging
from typing import Any

from userspace_proxy.errors import SyncError
from userspace_proxy.rules.tool import is_installed, parsed, run_tool

log = logging.getLogger(__name__)

# What iptables on nf_tables makes: only its own tool can read all of its rules, and refuses chains with foreign ones.
_OF_IPTABLES = (("ip", "filter", "INPUT"), ("ip6", "filter", "INPUT"))


def blocking_chains(ruleset: dict[str, Any]) -> list[str]:
    """Return the nftables input chains that drop what no rule accepts, and accept nothing for its NAT status.

    Redirected traffic arrives at INPUT like any packet for this node. *ruleset* is what
    ``nft --json list ruleset`` prints; a chain is returned as ``family table chain``.
    """
    items = ruleset.get("nftables", [])
    chains = [item["chain"] for item in items if "chain" in item]
    inputs = {(c["family"], c["table"], c["name"]): c.get("policy") for c in chains if c.get("hook") == "input"}
    rules: dict[tuple[str, str, str], list[list[dict[str, Any]]]] = {chain: [] for chain in inputs}
    for rule in (item["rule"] for item in items if "rule" in item):
        rules.setdefault((rule["family"], rule["table"], rule["chain"]), []).append(rule.get("expr", []))
    return [
        " ".join(chain)
        for chain, policy in sorted(inputs.items())
        if chain not in _OF_IPTABLES
        and (policy == "drop" or any(map(_drops_everything, rules[chain])))
        and not any(map(_accepts_translated, rules[chain]))
    ]


def _drops_everything(expressions: list[dict[str, Any]]) -> bool:
    kinds = {kind for expression in expressions for kind in expression}
    return bool(kinds & {"drop", "reject"}) and kinds <= {"drop", "reject", "counter", "log"}


def _accepts_translated(expressions: list[dict[str, Any]]) -> bool:
    return any("accept" in e for e in expressions) and "dnat" in json.dumps(expressions).lower()


def blocks_input(rules: str) -> bool:
    """Return whether iptables drops at INPUT what no rule accepts, and accepts nothing for its NAT status.

    *rules* is what ``iptables -S`` prints.
    """
    lines = rules.splitlines()
    drops = any(line.startswith(("-P INPUT DROP", "-A INPUT -j DROP", "-A INPUT -j REJECT")) for line in lines)
    return drops and not any("DNAT" in line and line.endswith("-j ACCEPT") for line in lines)


async def find_blocking_firewall() -> list[str]:
    """Return what on this node would drop redirected traffic, each with the command that mends it."""
    found = []
    if is_installed("nft"):
        listed = parsed(await run_tool("nft", "--json", "--terse", "list", "ruleset")) or {}
        found += [
            f"nftables chain '{chain}' drops what it does not know; `nft insert rule {chain} ct status dnat accept` "
            "lets it pass"
            for chain in blocking_chains(listed)
        ]
    for tool in ("iptables", "ip6tables"):
        try:
            blocked = is_installed(tool) and blocks_input(await run_tool(tool, "-S"))
        except SyncError as error:
            log.debug("the rules of %s cannot be looked at: %s", tool, error)
            continue
        if blocked:
            found.append(
                f"{tool} INPUT drops what it does not know; `{tool} -I INPUT -m conntrack --ctstate DNAT -j ACCEPT` "
                "lets it pass"
            )
    return found
