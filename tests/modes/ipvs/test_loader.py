"""The kernel of `tools/vm` has real IPVS, which the other tests of this folder need."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from userspace_proxy.lab import HTTP_PORT, Lab, ServiceLab, ask, build_service_lab, start_nginx

pytestmark = pytest.mark.ipvs

SERVICE_IP = "10.96.0.10"
# Debian's kernels lack one of those that Linux has: twos.
SCHEDULERS = ("rr", "wrr", "lc", "wlc", "fo", "ovf", "lblc", "lblcr", "dh", "sh", "mh", "sed", "nq")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[ServiceLab]:
    with Lab() as lab:
        built = build_service_lab(lab, pods=2)
        for pod in built.pods:
            start_nginx(pod, tmp_path)
        yield built


def test_a_virtual_server_on_a_dummy_device_shares_clients_among_pods(world: ServiceLab) -> None:
    world.node.ip("link", "add", "kube-ipvs0", "type", "dummy")
    world.node.ip("address", "add", f"{SERVICE_IP}/32", "dev", "kube-ipvs0")
    world.node.set_knob("ipv4/ip_forward", 1)
    world.node.run("ipvsadm", "-A", "-t", f"{SERVICE_IP}:80", "-s", "rr")
    for index in range(2):
        pod = f"{world.pod_ip(index)}:{HTTP_PORT}"
        world.node.run("ipvsadm", "-a", "-t", f"{SERVICE_IP}:80", "-r", pod, "-m")

    answers = [ask(world.client, SERVICE_IP) for _ in range(4)]

    assert answers[:2] == answers[2:]
    assert sorted(answers[:2]) == ["pod1", "pod2"]


def test_a_pod_reaches_itself_by_the_virtual_server_when_its_connections_are_masqueraded(world: ServiceLab) -> None:
    world.node.ip("link", "add", "kube-ipvs0", "type", "dummy")
    world.node.ip("address", "add", f"{SERVICE_IP}/32", "dev", "kube-ipvs0")
    world.node.set_knob("ipv4/ip_forward", 1)
    world.node.set_knob("ipv4/vs/conntrack", 1)  # else the packets of IPVS pass netfilter's NAT by
    world.node.run("iptables", "-t", "nat", "-A", "POSTROUTING", "-m", "ipvs", "--ipvs", "-j", "MASQUERADE")
    world.node.run("ipvsadm", "-A", "-t", f"{SERVICE_IP}:80", "-s", "rr")
    pod = f"{world.pod_ip(0)}:{HTTP_PORT}"
    world.node.run("ipvsadm", "-a", "-t", f"{SERVICE_IP}:80", "-r", pod, "-m")

    assert ask(world.pods[0], SERVICE_IP) == "pod1"


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_kernel_loads_the_scheduler_that_a_virtual_server_asks_for(scheduler: str) -> None:
    with Lab() as lab:
        node = lab.add("node")
        node.run("ipvsadm", "-A", "-t", f"{SERVICE_IP}:80", "-s", scheduler)

        assert f"TCP  {SERVICE_IP}:80 {scheduler}" in node.run("ipvsadm", "-Ln").stdout


def test_a_scheduler_that_the_kernel_lacks_is_refused() -> None:
    with Lab() as lab, pytest.raises(subprocess.CalledProcessError) as refused:
        lab.add("node").run("ipvsadm", "-A", "-t", f"{SERVICE_IP}:80", "-s", "twos")

    assert "Scheduler or persistence engine not found" in refused.value.stderr
