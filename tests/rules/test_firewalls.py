"""Firewalls in the way: which are found, and that what is said mends them."""

from __future__ import annotations

import json

import pytest

from userspace_proxy.lab import Host
from userspace_proxy.rules.firewalls import blocking_chains, blocks_input, find_blocking_firewall


def blocking(host: Host, script: str) -> list[str]:
    """Load *script*, as a firewall would, and return the chains that block."""
    host.run("nft", "-f", "-", stdin=script)
    try:
        return blocking_chains(json.loads(host.run("nft", "--json", "--terse", "list", "ruleset").stdout))
    finally:
        host.run("nft", "delete", "table", "inet", "fw")


def firewall(rules: str, policy: str = "drop", hook: str = "input") -> str:
    return f"table inet fw {{ chain c {{ type filter hook {hook} priority 0; policy {policy}; {rules} }}; }}"


@pytest.mark.parametrize(
    "script",
    [
        firewall(""),
        firewall("iif lo accept; ct state established accept; tcp dport 22 accept;"),
        firewall("tcp dport 22 accept; drop;", policy="accept"),
        firewall("tcp dport 22 accept; counter reject with icmpx admin-prohibited;", policy="accept"),
        firewall("ct status dnat counter;"),
    ],
)
def test_a_chain_that_drops_what_it_does_not_know_blocks(host: Host, script: str) -> None:
    assert blocking(host, script) == ["inet fw c"]


@pytest.mark.parametrize(
    "script",
    [
        firewall("", policy="accept"),
        firewall("", hook="forward"),
        firewall("ct status dnat accept;"),
        firewall("iif lo accept; ct status dnat counter accept; tcp dport 22 accept;"),
        firewall("ct state { established, related } accept; ct status dnat accept; reject;", policy="accept"),
        firewall("tcp dport 23 drop; ip saddr 192.0.2.0/24 reject;", policy="accept"),
    ],
)
def test_a_chain_that_accepts_by_default_or_for_its_nat_status_does_not(host: Host, script: str) -> None:
    assert blocking(host, script) == []


def test_a_host_without_rules_blocks_nothing() -> None:
    assert blocking_chains({}) == []
    assert blocking_chains({"nftables": [{"metainfo": {}}]}) == []


@pytest.mark.parametrize(
    ("rules", "blocks"),
    [
        ("-P INPUT ACCEPT\n-P FORWARD DROP\n", False),
        ("-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n", True),
        ("-P INPUT DROP\n-A INPUT -m conntrack --ctstate DNAT -j ACCEPT\n", False),
        (
            "-P INPUT DROP\n-A INPUT -j theirs\n-A theirs -m conntrack --ctstate RELATED,ESTABLISHED,DNAT -j ACCEPT\n",
            False,
        ),
        ("-P INPUT DROP\n-A USERSPACE-PROXY-GUARD -m conntrack --ctstate DNAT -j RETURN\n", True),
        ("-P INPUT ACCEPT\n-A INPUT -j REJECT --reject-with icmp-host-prohibited\n", True),
        ("-P INPUT ACCEPT\n-A INPUT -p tcp -m tcp --dport 23 -j DROP\n", False),
        ("", False),
    ],
)
def test_an_iptables_firewall_is_read_in_its_own_words(rules: str, blocks: bool) -> None:
    assert blocks_input(rules) is blocks


@pytest.mark.parametrize("tool", ["iptables", "ip6tables"])
async def test_an_iptables_firewall_is_named_with_a_mend_that_leaves_it_usable(host: Host, tool: str) -> None:
    """iptables refuses a chain of its own that holds rules written by nft; so the mend must be its own."""
    with host.inside():
        host.run(tool, "-P", "INPUT", "DROP")
        (found,) = await find_blocking_firewall()
        mend = found.split("`")[1]
        assert mend.startswith(f"{tool} -I INPUT")
        host.run(*mend.split())

        assert await find_blocking_firewall() == []
        assert "--ctstate DNAT" in host.run(tool, "-S", "INPUT").stdout
        host.run(tool, "-F", "INPUT")
        host.run(tool, "-P", "INPUT", "ACCEPT")


async def test_an_nftables_firewall_is_named_with_a_mend_that_works(host: Host) -> None:
    with host.inside():
        host.run("nft", "-f", "-", stdin=firewall("iif lo accept;"))
        (found,) = await find_blocking_firewall()
        host.run(*found.split("`")[1].split())

        assert await find_blocking_firewall() == []
        host.run("nft", "delete", "table", "inet", "fw")
