"""Replacing kube-proxy under traffic and going back fail no request: the order of docs/how-to/run-in-a-cluster.md."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import NODE_NAME, NODES, SLICES, ControlPlane
from tests.cluster.node_proxy import NodeProxy, make_service, make_slice
from tests.net.world import POD1, POD2, answers, background_requests, wait_until
from userspace_proxy.lab import ServiceLab, ask

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(100)]


@pytest.fixture
def proxy(world: ServiceLab, plane: ControlPlane, tmp_path: Path) -> Iterator[NodeProxy]:
    plane.create(NODES, NODE_NAME)
    one = NodeProxy(world, tmp_path, plane)
    yield one
    world.node.run(*one.command("cleanup"))
    plane.delete_all()
    plane.delete(NODES, NODE_NAME)


def kube_proxy() -> str:
    found = Path(os.environ["KUBE_BIN"]) / "kube-proxy"
    if not found.exists():
        pytest.skip("KUBE_BIN has no kube-proxy")
    return str(found)


def test_kube_proxy_makes_way_and_comes_back_without_a_failed_request(proxy: NodeProxy, plane: ControlPlane) -> None:
    node, client = proxy.world.node, proxy.world.client
    command = [
        *(kube_proxy(), "--kubeconfig", str(plane.proxy_config), "--hostname-override", NODE_NAME),
        *("--proxy-mode", "iptables", "--cluster-cidr", "10.244.0.0/16", "--conntrack-max-per-core", "0"),
        *("--conntrack-tcp-timeout-established", "0", "--conntrack-tcp-timeout-close-wait", "0"),
    ]
    ip = make_service(plane, "web")
    make_slice(plane, "web", "web", POD1)
    theirs = node.start(*command, log=proxy.folder / "kube-proxy.log")
    wait_until(lambda: answers(client, ip, 80) == "pod1", "kube-proxy serves", 20.0)

    with background_requests(lambda: ask(client, ip)) as outcomes:
        theirs.terminate()
        theirs.wait(10)
        seen = len(outcomes)
        wait_until(lambda: len(outcomes) > seen + 20, "its rules stay")
        proxy.start()
        endpoints = [{"addresses": [POD2], "conditions": {"ready": True}}]
        plane.patch(SLICES, "web", {"endpoints": endpoints})
        wait_until(lambda: set(outcomes[-5:]) == {"pod2"}, "we serve")
        cleanup = node.run(kube_proxy(), "--cleanup", check=False)
        time.sleep(0.5)
        assert "KUBE-SVC" not in node.run("iptables-save").stdout, cleanup.stderr

        theirs = node.start(*command, log=proxy.folder / "kube-proxy.log")
        wait_until(lambda: f"{POD2}:8080" in node.run("iptables-save").stdout, "kube-proxy is back", 20.0)
        assert proxy.stop() == 0
        seen = len(outcomes)
        wait_until(lambda: len(outcomes) > seen + 20, "it serves")
        endpoints = [{"addresses": [POD1], "conditions": {"ready": True}}]
        plane.patch(SLICES, "web", {"endpoints": endpoints})
        wait_until(lambda: set(outcomes[-5:]) == {"pod1"}, "it follows")

    theirs.terminate()
    theirs.wait(10)
    node.run(kube_proxy(), "--cleanup", check=False)
    assert set(outcomes) == {"pod1", "pod2"}
