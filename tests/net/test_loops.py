"""What nobody serves does not go round and round: out by lo, where our routes lead it, and in again."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.net.world import POD1, Proxy, answers, documents, endpoints, service
from userspace_proxy.lab import Host, ServiceLab, connect

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
    """Return how many rounds there were since the last call."""
    said = json.loads(node.run("nft", "--json", "reset", "counter", "inet", "rounds", "taken").stdout)
    return int(next(item["counter"]["packets"] for item in said["nftables"] if "counter" in item))


def dial(host: Host, ip: str, kind: socket.SocketKind, timeout_s: float = 0.5) -> str:
    """Say something to a port that nobody has; return what became of it."""
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
        if proxy.process is not None and proxy.process.poll() is None:
            proxy.process.kill()
            proxy.process.wait(20)
        world.node.run("nft", "delete", "table", "inet", "rounds")
        world.node.run(*proxy.command("cleanup"))


def test_a_packet_that_nobody_serves_does_not_come_in_again(node: Host, world: ServiceLab) -> None:
    assert answers(world.client, "10.96.8.1", 80) == "pod1"
    taken(node)

    hosts, kinds = (world.client, world.pods[1], node), (socket.SOCK_STREAM, socket.SOCK_DGRAM)
    asked = [(host, ip, kind) for host in hosts for ip in (*UNSERVED[4], *UNSERVED[6]) for kind in kinds]
    with ThreadPoolExecutor(len(asked)) as pool:  # most of them wait for an answer that does not come
        outcomes = list(pool.map(lambda each: dial(*each), asked))

    assert taken(node) == 0, list(zip(asked, outcomes, strict=True))


def test_who_dials_it_from_outside_is_told_at_once(
    node: Host, world: ServiceLab, request: pytest.FixtureRequest
) -> None:
    of_live_service, external = (dial(world.client, ip, socket.SOCK_STREAM, 5.0) for ip in UNSERVED[4][1:])

    assert external == "No route to host"
    is_refused = "[nftables]" in request.node.name  # as kube-proxy refuses other ports in that mode
    assert of_live_service == ("Connection refused" if is_refused else "No route to host")
