"""The control plane is killed, compacted and cut off: no request fails, and no stale state stays."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.control_plane import API, NODE_NAME, NODES, SERVICES, SLICES, ControlPlane
from tests.cluster.cutter import Cutter
from tests.cluster.node_proxy import NodeProxy, make_service, make_slice
from tests.net.world import POD1, POD2, background_requests, wait_until
from userspace_proxy.lab import ServiceLab, ask

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(140)]

STALE_S = 5.0


@pytest.fixture
def proxy(world: ServiceLab, plane: ControlPlane, tmp_path: Path) -> Iterator[NodeProxy]:
    plane.create(NODES, NODE_NAME)
    one = NodeProxy(world, tmp_path, plane)
    one.verbose = False
    yield one
    assert one.process is not None
    assert one.stop() == 0, one.log()
    world.node.run(*one.command("cleanup"))
    plane.delete_all()
    plane.delete(NODES, NODE_NAME)


def serve(plane: ControlPlane, name: str, cluster_ip: str, pod: str) -> str:
    make_service(plane, name, clusterIP=cluster_ip, clusterIPs=[cluster_ip], type="ClusterIP")
    make_slice(plane, name, name, pod)
    return cluster_ip


def move(plane: ControlPlane, name: str, *pods: str) -> None:
    endpoints = [{"addresses": [pod], "conditions": {"ready": True}} for pod in pods]
    plane.patch(SLICES, name, {"endpoints": endpoints})


def test_an_api_server_that_is_killed_is_not_missed(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = serve(plane, "web", "10.96.1.1", POD1)
    gone = serve(plane, "gone", "10.96.1.2", POD1)
    proxy.start()
    proxy.reaches(ip, "pod1")
    proxy.reaches(gone, "pod1")

    with background_requests(lambda: ask(proxy.world.client, ip)) as outcomes:
        plane.kill("kube-apiserver")
        wait_until(lambda: len(proxy.health()[1].get("problems", [])) == 3, "the outage is a problem", 20.0)
        time.sleep(3.0)
        plane.start_api()
        plane.delete(SERVICES, "gone")
        move(plane, "web", POD2)
        changed_at = time.monotonic()
        wait_until(lambda: set(outcomes[-20:]) == {"pod2"}, "traffic goes to the new pod", 20.0)
        took_s = time.monotonic() - changed_at
        proxy.leaves(gone)
        wait_until(lambda: not proxy.health()[1].get("problems"), "all is well again")

    assert set(outcomes) == {"pod1", "pod2"}
    assert took_s < STALE_S, proxy.log()


def test_what_was_written_while_we_were_away_and_compacted_is_found(proxy: NodeProxy, plane: ControlPlane) -> None:
    cutter = Cutter(plane.node, API)
    ip = serve(plane, "web", "10.96.1.1", POD1)
    gone = serve(plane, "gone", "10.96.1.2", POD1)
    proxy.config = plane.kubeconfig("cut", "proxy-token", cutter.port)
    proxy.start()
    proxy.reaches(ip, "pod1")

    with background_requests(lambda: ask(proxy.world.client, ip)) as outcomes:
        cutter.close()
        wait_until(lambda: len(proxy.health()[1].get("problems", [])) == 3, "the outage is a problem", 20.0)
        plane.delete(SERVICES, "gone")
        move(plane, "web", POD2)
        time.sleep(1.0)
        # A restart takes the watch cache with it, so that only etcd knows of the past, and the past is gone.
        plane.compact()
        plane.kill("kube-apiserver")
        plane.start_api()
        again = Cutter(plane.node, API, cutter.port)
        back_at = time.monotonic()
        wait_until(lambda: set(outcomes[-20:]) == {"pod2"}, "traffic goes to the new pod", 20.0)
        took_s = time.monotonic() - back_at
        proxy.leaves(gone)

    again.close()
    assert set(outcomes) == {"pod1", "pod2"}
    assert took_s < STALE_S, proxy.log()
    assert proxy.metric("userspace_proxy_watch_expired_total", kind="services") >= 1


def test_an_etcd_that_is_restored_from_a_backup_is_believed(proxy: NodeProxy, plane: ControlPlane) -> None:
    ip = serve(plane, "web", "10.96.1.1", POD1)
    plane.back_up()
    for _ in range(100):  # so that the restored history does not catch up soon
        move(plane, "web", POD2)
        move(plane, "web", POD2, POD1)
    gone = serve(plane, "gone", "10.96.1.2", POD1)
    move(plane, "web", POD2)
    proxy.start()
    proxy.reaches(ip, "pod2")

    with background_requests(lambda: ask(proxy.world.client, ip)) as outcomes:
        plane.restore()
        back_at = time.monotonic()
        wait_until(lambda: set(outcomes[-20:]) == {"pod1"}, "what the backup says is served", 20.0)
        took_s = time.monotonic() - back_at
        proxy.leaves(gone)
        move(plane, "web", POD2)
        wait_until(lambda: set(outcomes[-20:]) == {"pod2"}, "changes are followed", 5.0)

    assert set(outcomes) == {"pod1", "pod2"}
    assert took_s < STALE_S, proxy.log()


def test_watches_that_are_cut_every_second_for_a_minute_cost_no_request(proxy: NodeProxy, plane: ControlPlane) -> None:
    cutter = Cutter(plane.node, API)
    ip = serve(plane, "web", "10.96.1.1", POD1)
    move(plane, "web", POD1, POD2)
    proxy.config = plane.kubeconfig("cut", "proxy-token", cutter.port)
    proxy.start()
    proxy.reaches(ip, "pod1", "pod2")

    with background_requests(lambda: ask(proxy.world.client, ip)) as outcomes:
        for second in range(60):
            cutter.cut()
            move(plane, "web", *((POD1, POD2) if second % 2 == 0 else (POD1,)))
            time.sleep(1.0)
        ended_at = time.monotonic()  # without pod2
        wait_until(lambda: set(outcomes[-50:]) == {"pod1"}, "nothing is stale", 20.0)
        took_s = time.monotonic() - ended_at

    assert set(outcomes) == {"pod1", "pod2"}
    assert took_s < STALE_S, proxy.log()
    assert cutter.cuts > 60
    cutter.close()
