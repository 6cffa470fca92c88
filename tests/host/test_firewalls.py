"""Firewalls that block traffic: which are found, and that the suggested commands work."""

from __future__ import annotations

import json

import pytest

from userspace_proxy.host.firewalls import (
    DIALLED,
    FORWARDED,
    REDIRECTED,
    REPLIES,
    ServiceTraffic,
    blocking_chains,
    blocks,
    find_blocking_firewall,
)
from userspace_proxy.lab import Host


def blocking(host: Host, script: str, traffic: ServiceTraffic = REDIRECTED) -> list[str]:
    """Load *script*, as a firewall would, and return the chains that block."""
    host.run("nft", "-f", "-", stdin=script)
    try:
        return blocking_chains(json.loads(host.run("nft", "--json", "--terse", "list", "ruleset").stdout), traffic)
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
    ("rules", "blocked"),
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
def test_an_iptables_firewall_blocks_unless_its_rules_accept(rules: str, blocked: bool) -> None:
    assert blocks(rules) is blocked


@pytest.mark.parametrize(
    ("rules", "blocked"),
    [
        ("", True),
        ("ct state established,related accept;", True),
        ('iifname "docker0" accept;', True),
        ("ct status dnat accept;", False),
        ('iifname "cni0" accept;', False),
        ("ip daddr 10.244.0.0/16 accept;", False),
        ("ct state { new, established } accept;", False),
    ],
)
def test_a_forward_chain_blocks_unless_it_may_accept_connections_to_endpoints(
    host: Host, rules: str, blocked: bool
) -> None:
    assert blocking(host, firewall(rules, hook="forward"), FORWARDED) == ["inet fw c"] * blocked


_DOCKER = "-P FORWARD DROP\n-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n"


@pytest.mark.parametrize(
    ("rules", "blocked"),
    [
        ("-P INPUT DROP\n-P FORWARD ACCEPT\n", False),
        ("-P FORWARD DROP\n", True),
        (f"{_DOCKER}-A FORWARD -i docker0 ! -o docker0 -j ACCEPT\n-A FORWARD -i br-1234 -o br-1234 -j ACCEPT\n", True),
        (f"{_DOCKER}-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT\n-A INPUT -i lo -j ACCEPT\n", True),
        (f"{_DOCKER}-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\n", False),
        (f"{_DOCKER}-A FLANNEL-FWD -s 10.244.0.0/16 -j ACCEPT\n", False),
        ("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n", True),
    ],
)
def test_so_does_forward_of_iptables(rules: str, blocked: bool) -> None:
    assert blocks(rules, FORWARDED) is blocked


@pytest.mark.parametrize(
    ("traffic", "rules", "blocked"),
    [
        (DIALLED, "", True),
        (DIALLED, "iif lo accept; ct state established accept; tcp dport 22 accept;", True),
        (DIALLED, "ct status dnat accept;", True),
        (DIALLED, "ip daddr 10.96.0.0/16 accept;", False),
        (DIALLED, 'iifname "cni0" accept;', False),
        (REPLIES, "", True),
        (REPLIES, "ct status dnat accept;", True),
        (REPLIES, "ct state established,related accept;", False),
        (REPLIES, "ip saddr 10.244.0.0/16 accept;", False),
    ],
)
def test_a_chain_blocks_what_ipvs_translates_unless_it_accepts_the_untranslated_packets(
    host: Host, traffic: ServiceTraffic, rules: str, blocked: bool
) -> None:
    assert blocking(host, firewall(rules, hook=traffic.hook), traffic) == ["inet fw c"] * blocked


@pytest.mark.parametrize(
    ("traffic", "rules", "blocked"),
    [
        (DIALLED, "-P INPUT DROP\n-A INPUT -i lo -j ACCEPT\n-A INPUT -p tcp -m tcp --dport 22 -j ACCEPT\n", True),
        (DIALLED, "-P INPUT DROP\n-A INPUT -d 10.96.0.0/16 -j ACCEPT\n", False),
        (REPLIES, _DOCKER, True),
        (REPLIES, f"{_DOCKER}-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT\n", False),
    ],
)
def test_so_do_input_and_forward_of_iptables(traffic: ServiceTraffic, rules: str, blocked: bool) -> None:
    assert blocks(rules, traffic) is blocked


@pytest.mark.parametrize("tool", ["iptables", "ip6tables"])
@pytest.mark.parametrize("traffic", [REDIRECTED, FORWARDED, DIALLED, REPLIES], ids=lambda traffic: traffic.name)
async def test_an_iptables_firewall_is_named_with_a_fix_that_leaves_it_usable(
    host: Host, tool: str, traffic: ServiceTraffic
) -> None:
    """iptables refuses chains of its own that hold rules of nft, so the fix must be an iptables command."""
    chain = traffic.hook.upper()
    service_range = "10.96.0.0/16" if tool == "iptables" else "fd00:10:96::/108"
    with host.inside():
        host.run(tool, "-P", chain, "DROP")
        (found,) = await find_blocking_firewall(traffic, service_range)
        fix = found.split("`")[1]
        assert fix.startswith(f"{tool} -I {chain}")
        host.run(*fix.split())

        assert await find_blocking_firewall(traffic, service_range) == []
        assert traffic.iptables.format(range=service_range) in host.run(tool, "-S", chain).stdout
        host.run(tool, "-F", chain)
        host.run(tool, "-P", chain, "ACCEPT")


async def test_an_nftables_firewall_is_named_with_a_fix_that_works(host: Host) -> None:
    with host.inside():
        host.run("nft", "-f", "-", stdin=firewall("iif lo accept;"))
        (found,) = await find_blocking_firewall()
        host.run(*found.split("`")[1].split())

        assert await find_blocking_firewall() == []
        host.run("nft", "delete", "table", "inet", "fw")
