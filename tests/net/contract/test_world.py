"""The world is as the table assumes: rules written by hand give the results that the table expects of the proxy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.net.contract.cluster import ADDRESSES, CLUSTER_CIDRS, DNS, WEB, Cluster
from tests.net.contract.modes import differences
from tests.net.contract.services import Given

BY_HAND = Given("by-hand", number=254)


def _nat(family: int) -> str:
    """Return kube-proxy's rules for a NodePort Service with a local and a remote endpoint, policy Local."""
    ip, table = ("ip", "ip control") if family == 4 else ("ip6", "ip6 control")
    pods = next(cidr for cidr in CLUSTER_CIDRS.split(",") if (":" in cidr) == (family == 6))
    local, remote = ADDRESSES["local1"][family], ADDRESSES["remote1"][family]
    virtual, node_port = BY_HAND.cluster_ip(family), BY_HAND.node_port
    return f"""
table {table} {{
    chain before {{ type nat hook prerouting priority -100; jump services; }}
    chain output {{ type nat hook output priority -100; jump services; }}
    chain services {{
        {ip} daddr {virtual} {ip} saddr != {pods} meta mark set 0x4000
        fib daddr type local th dport {node_port} fib saddr type local meta mark set 0x4000
        {ip} daddr {virtual} tcp dport 80 dnat to numgen inc mod 2 map {{ 0 : {local} . {WEB}, 1 : {remote} . {WEB} }}
        {ip} daddr {virtual} udp dport 80 dnat to numgen inc mod 2 map {{ 0 : {local} . {DNS}, 1 : {remote} . {DNS} }}
        fib daddr type local tcp dport {node_port} dnat to {local if family == 4 else f"[{local}]"}:{WEB}
        fib daddr type local udp dport {node_port} dnat to {local if family == 4 else f"[{local}]"}:{DNS}
    }}
    chain after {{
        type nat hook postrouting priority 100;
        meta mark & 0x4000 != 0 masquerade
        {ip} saddr {local} {ip} daddr {local} masquerade
    }}
}}
"""


@pytest.fixture
def nat_by_hand(cluster: Cluster) -> Iterator[None]:
    for family in (4, 6):
        cluster.node.run("nft", _nat(family))
    yield
    for family in (4, 6):
        cluster.node.run("nft", f"delete table {'ip' if family == 4 else 'ip6'} control")


@pytest.mark.usefixtures("nat_by_hand")
def test_the_kernels_own_nat_gives_what_the_table_wants(cluster: Cluster) -> None:
    wanted = (
        "caller,local1 clusterIP -> local1 remote1 as own",
        "outside,node-1 clusterIP -> local1 remote1 as node",
        "outside,caller nodePort,nodePort@alternate -> local1 as own",
        "node-1 nodePort -> local1 as node",
        "outside clusterIP:4444 -> timeout",
        "outside nodePort:4444 -> refused",
    )

    assert differences(cluster, BY_HAND.but(families=(4, 6)), *wanted) == []
