"""A node that starts while its API server is gone: it serves the last known state."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.apiserver import SERVICES, SLICES
from tests.net.test_kubernetes import IP, Cluster
from tests.net.world import POD1, POD2, answers, background_requests, wait_until
from userspace_proxy.lab import ServiceLab

OLD_IP = "10.96.9.2"
# No host has this address.
UNREACHABLE = "10.244.0.99"


@pytest.fixture
def cluster(world: ServiceLab, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(world, tmp_path)
    yield made
    made.proxy.end()
    made.api.close()


def keep(cluster: Cluster) -> None:
    """Let a proxy keep the state, and end it as a power failure does; the API server goes, too."""
    cluster.proxy.start("--cache-state")
    file = cluster.proxy.folder / "state" / "cluster-state"
    wait_until(lambda: file.exists() and b"web" in file.read_bytes(), "the state is kept")
    cluster.api.do(cluster.api.server.stop())
    process = cluster.proxy.process
    assert process is not None
    for pid in (process.pid, *cluster.proxy.workers()):
        os.kill(pid, signal.SIGKILL)
    process.wait(20)
    cluster.proxy.node.run(*cluster.proxy.command("cleanup"))


def test_a_restart_without_the_api_server_serves_the_last_state_until_it_answers(
    cluster: Cluster, world: ServiceLab
) -> None:
    cluster.serve("web", IP, POD1, UNREACHABLE)
    cluster.serve("old", OLD_IP, POD2)
    keep(cluster)

    cluster.proxy.start("--cache-state")
    assert [answers(world.client, IP, 80) for _ in range(6)] == ["pod1"] * 6  # nobody is ejected
    assert answers(world.client, OLD_IP, 80) == "pod2"
    status, health = cluster.proxy.health()
    assert status == 200
    assert "the API server has not answered since the start; the state of" in health["degraded"][0]

    port = cluster.proxy.proxy_port("default/web")
    with background_requests(lambda: answers(world.client, IP, 80)) as seen:
        cluster.api.do(cluster.api.server.delete(SERVICES, "old"))
        cluster.api.do(cluster.api.server.delete(SLICES, "old"))
        cluster.restart_api()
        wait_until(lambda: "default/old" not in cluster.proxy.rules_text(), "what is gone is not served", 30)
        wait_until(lambda: "degraded" not in cluster.proxy.health()[1], "the state is the API server's")
        cluster.serve("web", IP, POD1)
    assert set(map(str, seen)) == {"pod1"}
    assert cluster.proxy.proxy_port("default/web") == port
