"""Cluster DNS in the lab: asked by the node, by a pod and by a client that is routed through the node."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import dns.message
import dns.rcode
import pytest

from tests.net.world import Proxy, wait_until
from userspace_proxy.lab import Host, ServiceLab, connect

SERVER, SERVER6 = "10.96.0.10", "fd00:10:96::a"
RANGES = "10.96.0.0/16,fd00:10:96::/108"
CLUSTER = ".svc.cluster.local."
WEB = """
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.11, ports: [{name: http, port: 80}]}
"""
ARGUMENTS = ("--service-cluster-ip-range", RANGES, "--dns")


def asked(
    host: Host, name: str, kind: str = "A", server: str = SERVER, *, over_tcp: bool = False
) -> dns.message.Message:
    """Return the answer to a query that *host* sends."""
    query = dns.message.make_query(name, kind)
    wire = query.to_wire()
    with connect(host, server, 53, 5.0, socket.SOCK_STREAM if over_tcp else socket.SOCK_DGRAM) as sock:
        if not over_tcp:
            sock.send(wire)
            received = sock.recv(65_535)
        else:
            sock.sendall(len(wire).to_bytes(2, "big") + wire)
            with sock.makefile("rb") as stream:
                received = stream.read(int.from_bytes(stream.read(2), "big"))
    answer = dns.message.from_wire(received)
    assert query.is_response(answer)
    return answer


def found(answer: dns.message.Message) -> list[str]:
    """Return what the records of the answer section say, sorted."""
    return sorted(str(record) for rrset in answer.answer for record in rrset)


@pytest.fixture(
    scope="module",
    params=[
        ("userspace", "nftables"),
        ("userspace", "iptables"),
        ("nftables", "nftables"),
        ("iptables", "iptables"),
    ],
    ids="-".join,
)
def proxy(
    world: ServiceLab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Proxy]:
    mode, rules = request.param
    running = Proxy(world, tmp_path_factory.mktemp("dns"), rules)
    running.apply("web", WEB)
    try:
        running.start("--proxy-mode", mode, *ARGUMENTS)
        yield running
        assert running.stop() == 0, running.log()
        left = [world.node.ip(f"-{family}", "route", "show", "table", "local", "proto", "107") for family in (4, 6)]
        assert left == ["", ""]
    finally:
        running.end()


@pytest.mark.parametrize("server", [SERVER, SERVER6])
def test_the_node_its_pods_and_clients_behind_it_get_answers_in_every_mode(proxy: Proxy, server: str) -> None:
    for host in (proxy.node, proxy.world.pods[0], proxy.world.client):
        for over_tcp in (False, True):
            assert found(asked(host, f"web.default{CLUSTER}", server=server, over_tcp=over_tcp)) == ["10.96.0.11"]
        assert asked(host, f"missing.default{CLUSTER}", server=server).rcode() == dns.rcode.NXDOMAIN


def test_a_new_service_has_a_name(proxy: Proxy) -> None:
    proxy.apply("more", WEB.replace("web", "more").replace(".11", ".12"))

    wait_until(lambda: found(asked(proxy.node, f"more.default{CLUSTER}")) == ["10.96.0.12"], "the name is known")

    proxy.delete("more")
    wait_until(lambda: asked(proxy.node, f"more.default{CLUSTER}").rcode() == dns.rcode.NXDOMAIN, "it is gone")
