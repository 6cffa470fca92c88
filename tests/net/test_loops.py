"""Packets that no Service serves do not loop: out by ``lo``, where our routes lead them, and in again."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.net.world import POD1, Proxy, answers, ask_udp, documents, endpoints, service
from userspace_proxy.lab import NODE_IP, Host, ServiceLab, connect

# Ahead of all rules that are not raw: what is forwarded out by where it came in, which is a round.
ROUNDS = """
table inet rounds {
    counter taken { }
    chain c {
        type filter hook forward priority -300
        iif "lo" oif "lo" counter name taken
    }
}
"""
WAYS = {
    "userspace-nftables": ("--rules", "nftables"),
    "userspace-iptables": ("--rules", "iptables"),
    "nftables": ("--proxy-mode", "nftables"),
    "iptables": ("--proxy-mode", "iptables"),
}
# A cluster IP that no Service has, another port of one that a Service has, and of an external IP; out of the range.
UNSERVED = {4: ["10.96.77.7", "10.96.8.1", "172.30.8.1"], 6: ["fd00:96::77", "fd00:96::8:1", "fd00:30::8:1"]}


def taken(node: Host) -> int:
    """Return how many rounds there were. Not reset: that fails if the proxy changes rules meanwhile."""
    said = json.loads(node.run("nft", "--json", "list", "counter", "inet", "rounds", "taken").stdout)
    return int(next(item["counter"]["packets"] for item in said["nftables"] if "counter" in item))


def dial(host: Host, ip: str, kind: socket.SocketKind, timeout_s: float = 0.5) -> str:
    """Send to a port without a listener; return the result."""
    try:
        with connect(host, ip, 99, timeout_s, kind) as sock:
            sock.send(b"who")
            sock.recv(1)
    except OSError as error:
        return error.strerror or "silence"
    return "answered"


@pytest.fixture(params=WAYS)
def node(request: pytest.FixtureRequest, world: ServiceLab, tmp_path: Path) -> Iterator[Host]:
    """A node without a default route, with a proxy in each mode."""
    proxy = Proxy(world, tmp_path)
    for version, ip, pod in ((4, "10.96.8.1", POD1), (6, "fd00:96::8:1", ServiceLab.pod_ip6(0))):
        extra = f'  externalIPs: ["{UNSERVED[version][2]}"]'
        proxy.apply(
            f"web{version}", documents(service(f"web{version}", ip, extra=extra), endpoints(f"web{version}", pod))
        )
    world.node.run("nft", "-f", "-", stdin=ROUNDS)
    try:
        proxy.start("--service-cluster-ip-range", "10.96.0.0/16,fd00:96::/64", *WAYS[request.param])
        yield world.node
        assert proxy.stop() == 0, proxy.log()
    finally:
        proxy.end()
        world.node.run("nft", "delete", "table", "inet", "rounds")


def test_an_unserved_packet_does_not_loop_through_lo(node: Host, world: ServiceLab) -> None:
    assert answers(world.client, "10.96.8.1", 80) == "pod1"
    before = taken(node)

    hosts, kinds = (world.client, world.pods[1], node), (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    asked = [(host, ip, kind) for host in hosts for ip in (*UNSERVED[4], *UNSERVED[6]) for kind in kinds]
    with ThreadPoolExecutor(len(asked)) as pool:  # most of them wait for an answer that does not come
        outcomes = list(pool.map(lambda each: dial(*each), asked))

    assert taken(node) == before, list(zip(asked, outcomes, strict=True))


def test_a_client_outside_gets_the_refusal_at_once(
    node: Host, world: ServiceLab, request: pytest.FixtureRequest
) -> None:
    of_live_service, external = (dial(world.client, ip, socket.SOCK_STREAM, 5.0) for ip in UNSERVED[4][1:])

    assert external == "No route to host"
    is_refused = "[nftables]" in request.node.name  # as kube-proxy refuses other ports in that mode
    assert of_live_service == ("Connection refused" if is_refused else "No route to host")


# ---- endpoints that lead back here

# What a Service says, and the endpoint that it leads to.
_LEADING_BACK = {
    "itself": ("10.96.9.1", "", ("10.96.9.1", 5353)),
    "itself-6": ("fd00:96::9:1", "", ("fd00:96::9:1", 5353)),
    "another": ("10.96.9.2", "", ("10.96.9.3", 5353)),
    "other": ("10.96.9.3", "", ("10.96.9.2", 5353)),
    "node-port": ("10.96.9.4", "  type: NodePort", (NODE_IP, 30_535)),
    "external": ("10.96.9.5", '  externalIPs: ["172.30.9.1"]', ("172.30.9.1", 5353)),
}


def leading_back(name: str, transparent: bool) -> str:
    cluster_ip, extra, (ip, port) = _LEADING_BACK[name]
    node_port = ", nodePort: 30535" if "NodePort" in extra else ""
    told = service(name, cluster_ip, f"[{{port: 5353, protocol: UDP{node_port}}}]", extra)
    if transparent:
        told = told.replace("}", ", annotations: {userspace-proxy/source-ip: transparent}}", 1)
    return documents(
        told,
        f"""\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv{6 if ":" in ip else 4}
ports: [{{port: {port}, protocol: UDP}}]
endpoints: [{{addresses: ["{ip}"]}}]
""",
    )


@pytest.mark.parametrize("transparent", [False, True])
@pytest.mark.parametrize("rules", ["nftables", "iptables"])
def test_a_udp_endpoint_that_is_a_portal_begins_no_more_flows_than_datagrams(
    fresh_proxy: Proxy, world: ServiceLab, rules: str, transparent: bool
) -> None:
    fresh_proxy.rules = rules
    fresh_proxy.apply("loops", documents(*(leading_back(name, transparent) for name in _LEADING_BACK)))
    fresh_proxy.start()
    for host in (world.client, world.node):
        for cluster_ip, _, _ in _LEADING_BACK.values():
            ask_udp(host, cluster_ip, 5353, timeout_s=0.1)

    assert 1 <= fresh_proxy.metric("userspace_proxy_udp_flows_total") <= 2 * len(_LEADING_BACK)
