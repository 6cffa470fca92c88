"""Names outside of the cluster domain, by a server in a pod."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import dns.rcode
import pytest

from tests.net.test_dns import ARGUMENTS, CLUSTER, SERVER, SERVER6, WEB, asked, found
from tests.net.world import POD1, Proxy, wait_until
from userspace_proxy.lab import ServiceLab

RELAY = Path(__file__).with_name("dns_relay.py")
EXTERNAL = """
apiVersion: v1
kind: Service
metadata: {name: outside}
spec: {type: ExternalName, externalName: www.example.com}
"""


@pytest.fixture
def relaying(world: ServiceLab, request: pytest.FixtureRequest) -> Iterator[None]:
    """A server in the first pod; its parameter is the server that it asks."""
    process = world.pods[0].start(sys.executable, str(RELAY), *request.param)
    yield
    process.kill()
    process.wait(20)


BY_CIDR = ("--cluster-cidr", "10.244.0.0/16")


def start(proxy: Proxy, pods: tuple[str, ...] = BY_CIDR) -> None:
    proxy.apply("web", WEB)
    proxy.apply("outside", EXTERNAL)
    proxy.start(*ARGUMENTS, "--dns-upstream", POD1, *pods)


@pytest.mark.parametrize(
    "pods",
    [
        BY_CIDR,
        ("--detect-local-mode", "BridgeInterface", "--pod-bridge-interface", "cni0"),
        ("--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "cni"),
    ],
    ids=["by-address", "by-bridge", "by-prefix"],
)
@pytest.mark.parametrize("relaying", [()], indirect=True)
def test_other_names_are_for_the_node_and_its_pods_only(
    relaying: None, fresh_proxy: Proxy, pods: tuple[str, ...]
) -> None:
    proxy, world = fresh_proxy, fresh_proxy.world
    start(proxy, pods)
    wait_until(lambda: found(asked(proxy.node, "www.example.com.")) == ["192.0.2.53"], "the node has an answer")

    for over_tcp in (False, True):
        assert found(asked(world.pods[1], "www.example.com.", over_tcp=over_tcp)) == ["192.0.2.53"]
        assert asked(world.client, "www.example.com.", over_tcp=over_tcp).rcode() == dns.rcode.REFUSED
        with_target = asked(world.pods[1], f"outside.default{CLUSTER}", over_tcp=over_tcp)
        assert found(with_target) == ["192.0.2.53", "www.example.com."]
        assert found(asked(world.client, f"outside.default{CLUSTER}", over_tcp=over_tcp)) == ["www.example.com."]
    metrics = proxy.get("/metrics", 10249)[1]
    assert 'coredns_dns_requests_total{family="1",proto="tcp",type="A"} 4.0' in metrics
    assert 'coredns_dns_responses_total{rcode="REFUSED"} 2.0' in metrics
    for over_tcp in (False, True):
        with_interface = asked(world.pods[1], "www.example.com.", server=SERVER6, over_tcp=over_tcp)
        assert found(with_interface) == ([] if pods == BY_CIDR else ["192.0.2.53"])
        assert asked(world.client, "www.example.com.", server=SERVER6, over_tcp=over_tcp).rcode() == dns.rcode.REFUSED


@pytest.mark.parametrize("relaying", [(SERVER,)], indirect=True)
def test_a_server_that_asks_this_one_is_found_out(relaying: None, fresh_proxy: Proxy) -> None:
    proxy = fresh_proxy
    start(proxy)

    proxy.wait_logged(f"other names are not asked for: the servers {POD1} ask this one")
    assert asked(proxy.node, "www.example.com.").rcode() == dns.rcode.SERVFAIL
    assert found(asked(proxy.node, f"web.default{CLUSTER}")) == ["10.96.0.11"]
