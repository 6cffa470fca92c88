"""Which rules of other programs are named as what stops a connection, and that the suggested commands work."""

from __future__ import annotations

import pytest

from userspace_proxy.host.foreign_rules import Packet, read_foreign_rules
from userspace_proxy.lab import Host

TO_PORTAL = Packet("traffic to 10.96.0.1:80", "prerouting", "ip", "tcp", "192.0.2.9", "10.96.0.1", 80)
REDIRECTED = Packet("redirected traffic", "input", "ip", "tcp", "192.0.2.9", "", 12_345, True)
TO_ENDPOINT = Packet("traffic to 10.244.1.1:8080", "output", "ip", "tcp", "", "10.244.1.1", 8080)
FORWARDED = TO_ENDPOINT._replace(hook="forward", is_translated=True)
# rules, policy, packet, whether they stop it
NFTABLES = [
    ("tcp dport 10000-29999 drop", "accept", REDIRECTED, True),
    ("tcp dport { 80, 443 } drop", "accept", REDIRECTED, False),
    ("udp dport 12345 drop", "accept", REDIRECTED, False),
    ("tcp dport != 22 drop", "accept", REDIRECTED, True),
    ("ct state new counter log reject", "accept", REDIRECTED, True),
    ("ct state established,related accept; tcp dport 22 accept", "drop", REDIRECTED, True),
    ("ct status dnat accept", "drop", REDIRECTED, False),
    ("ip saddr 192.0.2.0/24 accept", "drop", REDIRECTED, False),
    ("ip saddr 198.51.100.0-198.51.100.9 accept", "drop", REDIRECTED, True),
    ("ip6 saddr ::/0 drop", "accept", REDIRECTED, False),
    ("meta l4proto tcp drop", "accept", REDIRECTED, True),
    ("tcp dport vmap { 12345 : drop }", "accept", REDIRECTED, False),  # not looked at
    ("limit rate 5/second drop", "accept", REDIRECTED, False),  # not certain
    ('iifname "eth0" accept', "drop", REDIRECTED, False),  # not certain
    ("jump other", "accept", REDIRECTED, True),
    ("meta mark 7 jump other", "accept", REDIRECTED, False),
    ("ip daddr 10.244.0.0/16 drop", "accept", TO_ENDPOINT, True),
    ("ip daddr 10.244.0.0/16 drop", "accept", FORWARDED, True),
    ("ip daddr { 10.244.1.1, 10.244.1.2 } tcp dport 8080 reject", "accept", TO_ENDPOINT, True),
    ("ip daddr 10.244.1.2 reject", "accept", TO_ENDPOINT, False),
    ("ip daddr 10.96.0.0/12 drop", "accept", TO_PORTAL, True),
]
IPTABLES = [
    ("-p tcp --dport 10000:29999 -j DROP", REDIRECTED, True),
    ("-p udp --dport 10000:29999 -j DROP", REDIRECTED, False),
    ("-p tcp -m multiport --dports 22,12345 -j REJECT", REDIRECTED, True),
    ("! -s 192.0.2.0/24 -j DROP", REDIRECTED, False),
    ("! -s 198.51.100.0/24 -j DROP", REDIRECTED, True),
    ("-m conntrack --ctstate NEW -m comment --comment no-drop -j DROP", REDIRECTED, True),
    ("-m conntrack --ctstate DNAT -j DROP", REDIRECTED, True),
    ("-m conntrack --ctstate ESTABLISHED -j DROP", REDIRECTED, False),
    ("-i eth0 -j DROP", REDIRECTED, False),
    ("-m mark --mark 7 -j DROP", REDIRECTED, False),
    ("-d 10.244.0.0/16 -j REJECT", TO_ENDPOINT, True),
    ("-d 10.244.1.1 -p tcp --dport 8080 -j DROP", FORWARDED, True),
]


@pytest.mark.parametrize(("rules", "policy", "packet", "stops"), NFTABLES)
async def test_rules_of_nftables_stop_what_they_certainly_match(
    host: Host, rules: str, policy: str, packet: Packet, stops: bool
) -> None:
    priority = -200 if packet.hook == "prerouting" else 0
    chain = f"chain c {{ type filter hook {packet.hook} priority {priority}; policy {policy}; {rules}; }}"
    host.run("nft", "-f", "-", stdin=f"table inet fw {{ chain other {{ tcp dport 12345 drop; }}; {chain}; }}")
    try:
        with host.inside():
            found = (await read_foreign_rules("ip")).against(packet)

            assert bool(found) == stops
            if found:
                reason, fix = found
                assert reason == f"a firewall of this node drops {packet.traffic}: nftables inet fw c"
                host.run(*fix.split("`")[1].split())
                assert (await read_foreign_rules("ip")).against(packet) is None
    finally:
        host.run("nft", "delete", "table", "inet", "fw")


@pytest.mark.parametrize(("rule", "packet", "stops"), IPTABLES)
async def test_rules_of_iptables_stop_what_they_certainly_match(
    host: Host, rule: str, packet: Packet, stops: bool
) -> None:
    chain = packet.hook.upper()
    host.run("iptables", "-A", chain, *rule.split())
    try:
        with host.inside():
            found = (await read_foreign_rules("ip")).against(packet)

            assert bool(found) == stops
            if found:
                host.run(*found[1].split("`")[1].split())
                assert (await read_foreign_rules("ip")).against(packet) is None
    finally:
        host.run("iptables", "-F", chain)


@pytest.mark.parametrize(("priority", "is_named"), [(-110, True), (-100, False)])
async def test_rules_that_translate_before_ours_are_named(host: Host, priority: int, is_named: bool) -> None:
    ours = "chain c { type nat hook prerouting priority -105; }"
    theirs = f"chain c {{ type nat hook prerouting priority {priority}; ip daddr 10.96.0.0/12 dnat to 10.244.1.9; }}"
    host.run("nft", "-f", "-", stdin=f"table ip userspace_proxy_x {{ {ours}; }}; table ip x {{ {theirs}; }}")
    try:
        with host.inside():
            found = (await read_foreign_rules("ip")).against(TO_PORTAL)
    finally:
        host.run("nft", "delete table ip userspace_proxy_x; delete table ip x")

    assert bool(found) == is_named
    assert found is None or found[0].endswith("send traffic to 10.96.0.1:80 elsewhere: nftables ip x c")
