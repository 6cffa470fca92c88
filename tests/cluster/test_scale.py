"""How soon traffic follows a write, and what thousands of Services cost. The figures are shown by `pytest -s`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cluster.control_plane import NODE_NAME, NODES, SERVICES, SLICES, ControlPlane
from tests.cluster.node_proxy import HTTP, NodeProxy
from tests.net.world import POD1, POD2, answers, wait_until
from userspace_proxy.lab import HTTP_PORT, ServiceLab

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(140)]

_PORTS = [{"name": "http", "port": HTTP_PORT, "protocol": "TCP"}]
_WRITERS = 8
_MOVES = 40


@pytest.fixture
def proxy(world: ServiceLab, plane: ControlPlane, tmp_path: Path) -> Iterator[NodeProxy]:
    plane.create(NODES, NODE_NAME)
    one = NodeProxy(world, tmp_path, plane)
    yield one
    assert one.process is not None
    assert one.stop() == 0, one.log()[-2000:]
    world.node.run(*one.command("cleanup"))
    plane.delete(NODES, NODE_NAME)


def in_parallel(plane: ControlPlane, work: Callable[[int], None], count: int) -> None:
    def some(writer: int) -> None:
        try:
            for index in range(writer, count, _WRITERS):
                work(index)
        finally:
            plane.end_thread()

    with ThreadPoolExecutor(_WRITERS) as pool:
        list(pool.map(some, range(_WRITERS)))


def cluster_ip(index: int) -> str:
    return f"10.96.{100 + index // 250}.{1 + index % 250}"


def fill(plane: ControlPlane, services: int, endpoints: int) -> None:
    """Write Services and their slices; only the endpoints of the first one exist."""

    def write(index: int) -> None:
        name, ip = f"s{index}", cluster_ip(index)
        spec = {"ports": list(HTTP), "clusterIP": ip, "clusterIPs": [ip], "type": "ClusterIP", "selector": None}
        plane.create(SERVICES, name, spec=spec)
        addresses = (
            [POD1] if not index else [f"10.{200 + index // 250}.{index % 250}.{n + 1}" for n in range(endpoints)]
        )
        plane.create(
            SLICES,
            name,
            labels={"kubernetes.io/service-name": name},
            addressType="IPv4",
            endpoints=[{"addresses": [address], "conditions": {"ready": True}} for address in addresses],
            ports=_PORTS,
        )

    in_parallel(plane, write, services)


def empty(plane: ControlPlane, services: int) -> None:
    def delete(index: int) -> None:
        plane.delete(SERVICES, f"s{index}")
        plane.delete(SLICES, f"s{index}")

    in_parallel(plane, delete, services)


@pytest.mark.parametrize("services", [10, 1_000])
def test_traffic_follows_a_write_within_milliseconds(proxy: NodeProxy, plane: ControlPlane, services: int) -> None:
    fill(plane, services, 2)
    proxy.verbose = False
    proxy.start()
    client, ip = proxy.world.client, cluster_ip(0)
    wait_until(lambda: answers(client, ip, 80) == "pod1", "the first one is served")
    from_sent, from_answered = [], []
    for move in range(_MOVES):
        address, pod = ((POD2, "pod2"), (POD1, "pod1"))[move % 2]
        sent_at = time.perf_counter()
        plane.patch(SLICES, "s0", {"endpoints": [{"addresses": [address], "conditions": {"ready": True}}]})
        answered_at = time.perf_counter()
        while answers(client, ip, 80) != pod:
            assert time.perf_counter() - answered_at < 5.0
        there_at = time.perf_counter()
        from_sent.append(1000 * (there_at - sent_at))
        from_answered.append(1000 * (there_at - answered_at))
        time.sleep(0.1)
    for what, figures in (("sent", from_sent), ("answered", from_answered)):
        median, worst = statistics.median(figures), max(figures)
        print(f"{services} Services: {median:.1f} ms after the write was {what}, at most {worst:.1f}")  # noqa: T201
    empty(plane, services)

    assert statistics.median(from_sent) < 20


def test_thousands_of_services_are_taken_in_quickly(proxy: NodeProxy, plane: ControlPlane) -> None:
    services = 5_000
    fill(plane, services, 10)
    proxy.start("--sync-period", "30s")
    client = proxy.world.client
    wait_until(lambda: answers(client, cluster_ip(0), 80) == "pod1", "the first one is served", 30.0)
    assert proxy.process is not None
    resident = {pid: _resident_bytes(pid) / 1e6 for pid in (proxy.process.pid, *proxy.workers())}
    seconds = proxy.metric("kubeproxy_sync_proxy_rules_duration_seconds_sum")
    syncs = proxy.metric("kubeproxy_sync_proxy_rules_duration_seconds_count")
    print(f"{services} Services: {syncs:.0f} syncs of {seconds:.2f} s in all, resident MB {resident}")  # noqa: T201
    print("\n".join(line for line in proxy.log().splitlines() if "default/" not in line))  # noqa: T201

    assert seconds < 3
    assert sum(resident.values()) < 300


def _resident_bytes(pid: int) -> float:
    [line] = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")]
    return float(line.split()[1]) * 1024
