"""The lab, built once, with real servers in its pods; a proxy in two variants that share no code path twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.world import Proxy, start_udp_server
from userspace_proxy.lab import Lab, ServiceLab, build_service_lab, start_nginx

# Both rule languages and both event loops, each once.
VARIANTS = [("nftables", "uvloop"), ("iptables", "asyncio")]


@pytest.fixture(scope="package")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceLab]:
    """A client, a node and three pods that answer HTTP at 8080 and UDP at 5353 with their name."""
    with Lab() as lab:
        built = build_service_lab(lab, pods=3)
        folder = tmp_path_factory.mktemp("servers")
        for pod in built.pods:
            start_nginx(pod, folder)
            start_udp_server(pod)
        yield built


@pytest.fixture(scope="module", params=VARIANTS, ids="-".join)
def proxy(
    world: ServiceLab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Proxy]:
    """A proxy that runs for all tests of a module; each brings its own Services."""
    rules, loop = request.param
    running = Proxy(world, tmp_path_factory.mktemp("proxy"), rules, loop)
    try:
        running.start()
        yield running
        assert running.stop() == 0, running.log()
    finally:
        running.end()


@pytest.fixture
def fresh_proxy(world: ServiceLab, tmp_path: Path) -> Iterator[Proxy]:
    """A proxy that its test starts, kills and starts again."""
    one = Proxy(world, tmp_path)
    yield one
    one.end()
