"""`--proxy-mode iptables` as a whole process: what tutorials show, other programs' rules, and what it leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.world import (
    POD1,
    POD2,
    Proxy,
    answers,
    ask_udp,
    documents,
    endpoints,
    is_refused,
    service,
    udp_socket,
    wait_until,
)
from userspace_proxy.lab import ServiceLab

FOREIGN = "*nat\n:KUBE-SERVICES - [0:0]\n-A KUBE-SERVICES -d 10.96.0.1/32 -p tcp -j RETURN\nCOMMIT\n"


class KernelProxy(Proxy):
    """The same in iptables mode."""

    def run_arguments(self) -> list[str]:
        return [*super().run_arguments(), "--proxy-mode", "iptables"]

    def saved(self) -> str:
        return self.node.run("iptables-save").stdout + self.node.run("ip6tables-save").stdout

    def give(self, name: str, cluster_ip: str, *pods: str, extra: str = "") -> None:
        self.apply(name, documents(service(name, cluster_ip, extra=extra), endpoints(name, *pods)))


@pytest.fixture
def proxy(world: ServiceLab, tmp_path: Path) -> Iterator[KernelProxy]:
    one = KernelProxy(world, tmp_path)
    yield one
    one.end()
    assert "KUBE-" not in one.saved()


def test_a_grep_for_a_service_shows_kube_proxys_rules(proxy: KernelProxy) -> None:
    proxy.give("my-service", "10.96.9.1", POD1, POD2)
    proxy.start()

    shown = [line for line in proxy.saved().splitlines() if "my-service:http" in line]

    assert sum(" -j KUBE-SVC-" in line and line.startswith("-A KUBE-SERVICES -d 10.96.9.1/32") for line in shown) == 1
    assert sum("--mode random --probability 0.50000000000 -j KUBE-SEP-" in line for line in shown) == 1
    assert sum(f"-j DNAT --to-destination {pod}:8080" in line for line in shown for pod in (POD1, POD2)) == 2


def test_clients_are_served_by_the_kernel_and_changes_are_followed(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.2", POD1)
    proxy.start()
    for client in (world.client, world.node):
        assert answers(client, "10.96.9.2", 80) == "pod1"
        assert ask_udp(client, "10.96.9.2") == "pod1"

    proxy.give("web", "10.96.9.2", POD2)
    wait_until(lambda: answers(world.client, "10.96.9.2", 80) == "pod2", "pod2 answers")

    proxy.give("web", "10.96.9.2")
    wait_until(lambda: is_refused(world.client, "10.96.9.2", 80), "nobody is there")
    proxy.delete("web")
    wait_until(lambda: "10.96.9.2" not in proxy.saved(), "its rules are gone")


def test_clients_on_a_node_without_a_default_route_are_refused_where_no_endpoint_is(
    proxy: KernelProxy, world: ServiceLab
) -> None:
    proxy.give("nobody", "10.96.9.3")
    proxy.start()

    assert "default" not in world.node.ip("-4", "route")
    assert is_refused(world.node, "10.96.9.3", 80)


def test_metrics_tell_of_rules_and_loads_as_kube_proxys_do(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.7", POD1)
    proxy.start()
    of_it = {"ip_family": "IPv4"}
    rules = proxy.metric("kubeproxy_sync_proxy_rules_iptables_total", table="nat", **of_it)
    with udp_socket(world.client, "10.96.9.7", 53) as sock:
        sock.send(b"who")
        assert sock.recv(64) == b"pod1"
        proxy.give("web", "10.96.9.7", POD2)

        forgotten = "kubeproxy_conntrack_reconciler_deleted_entries_total"
        wait_until(lambda: proxy.metric(forgotten, **of_it) == 1, "its flow is forgotten")

    assert proxy.metric("kubeproxy_sync_proxy_rules_iptables_total", table="nat", **of_it) == rules > 10
    assert 0 < proxy.metric("kubeproxy_sync_proxy_rules_iptables_last", table="nat", **of_it) < rules
    assert proxy.metric("kubeproxy_sync_full_proxy_rules_duration_seconds_count", **of_it) == 1
    assert proxy.metric("kubeproxy_sync_partial_proxy_rules_duration_seconds_count", **of_it) == 1
    assert proxy.metric("kubeproxy_sync_proxy_rules_iptables_restore_failures_total") == 0


def test_foreign_flushes_are_repaired(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.3", POD1)
    proxy.start()

    world.node.run("nft", "flush", "ruleset")

    wait_until(lambda: answers(world.client, "10.96.9.3", 80) == "pod1", "they are back")
    wait_until(lambda: "changed by another program" in proxy.log(), "it is said")


def test_ctrl_c_takes_all_away_and_so_does_cleanup_after_another_end(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.4", POD1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        proxy.start()
        assert "KUBE-SVC-" in proxy.saved()

        proxy.stop(signum)
        if signum is not signal.SIGINT:
            assert answers(world.client, "10.96.9.4", 80) == "pod1", "the kernel serves on alone"
            world.node.run(*proxy.command("cleanup"))

        assert "KUBE-" not in proxy.saved()
        assert "USERSPACE-PROXY" not in proxy.saved()


def test_cleanup_names_what_it_cannot_remove_and_removes_the_rest(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.9", POD1)
    proxy.start()
    proxy.stop(signal.SIGKILL)
    chain = next(line.split()[0][1:] for line in proxy.saved().splitlines() if line.startswith(":KUBE-SVC-"))
    foreign = ("OUTPUT", "-t", "nat", "-d", "192.0.2.77", "-j", chain)
    world.node.run("nft", "add", "table", "inet", "userspace_proxy")
    world.node.run("iptables", "-A", *foreign)
    try:
        refused = world.node.run(*proxy.command("cleanup"), check=False)
    finally:
        world.node.run("iptables", "-D", *foreign)

    assert refused.returncode == 1
    assert "iptables-restore" in refused.stderr
    assert "userspace_proxy" not in world.node.run("nft", "list", "tables").stdout
    world.node.run(*proxy.command("cleanup"))
    assert "KUBE-" not in proxy.saved()


def test_a_start_after_a_crash_continues_with_the_state_left(proxy: KernelProxy, world: ServiceLab) -> None:
    proxy.give("web", "10.96.9.5", POD1)
    proxy.give("gone", "10.96.9.6", POD1)
    proxy.start()
    proxy.stop(signal.SIGKILL)
    proxy.delete("gone")

    proxy.start()

    assert answers(world.client, "10.96.9.5", 80) == "pod1"
    assert "10.96.9.6" not in proxy.saved()
    assert "gone" not in proxy.saved()


def test_a_start_in_one_mode_removes_the_rules_of_another_mode(proxy: KernelProxy, world: ServiceLab) -> None:
    other = Proxy(world, proxy.folder)
    proxy.give("web", "10.96.9.7", POD1)
    proxy.start()
    proxy.stop(signal.SIGKILL)

    other.start()
    wait_until(lambda: "KUBE-" not in proxy.saved(), "its chains are gone")
    assert answers(world.client, "10.96.9.7", 80) == "pod1"

    other.stop(signal.SIGKILL)
    proxy.start("--take-over", "never")
    wait_until(lambda: "userspace_proxy" not in world.node.run("nft", "list", "tables").stdout, "its table is gone")
    assert answers(world.client, "10.96.9.7", 80) == "pod1"


def test_beside_another_kube_proxy_it_says_what_to_do_and_touches_nothing(
    proxy: KernelProxy, world: ServiceLab
) -> None:
    world.node.run("iptables-restore", "--noflush", stdin=FOREIGN)
    before = [line for line in proxy.saved().splitlines() if line.startswith("-A")]

    proxy.start(wait=False)

    assert proxy.process is not None
    assert proxy.process.wait(20) == 1
    proxy.wait_logged("stop it and run `kube-proxy --cleanup`, or use --proxy-mode nftables")
    world.node.run(*proxy.command("cleanup"))
    assert [line for line in proxy.saved().splitlines() if line.startswith("-A")] == before
    world.node.run("iptables", "-t", "nat", "-F", "KUBE-SERVICES")
    world.node.run("iptables", "-t", "nat", "-X", "KUBE-SERVICES")
