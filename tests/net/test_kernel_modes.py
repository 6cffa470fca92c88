"""Kernel modes as a whole: the kernel serves on without us, a restart in another mode leaves no trace of the first."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.net.world import (
    POD1,
    POD2,
    Proxy,
    answers,
    ask_udp,
    background_requests,
    documents,
    endpoints,
    is_refused,
    is_refused_udp,
    service,
    traces,
    udp_socket,
    wait_until,
)
from userspace_proxy.lab import NODE_IP, ServiceLab, ask, connect
from userspace_proxy.modes.slots.slot_table import SlotTable

IP = "10.96.7.1"
NODE_PORTS = "[{name: http, port: 80, nodePort: 30780}, {name: dns, port: 53, nodePort: 30753, protocol: UDP}]"
TABLE = SlotTable.name
# From pods of the node, too, answers have to come back by way of it.
FLAGS = ("--proxy-mode", "nftables", "--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.0.0/16")


def a_request(world: ServiceLab) -> str:
    """Send requests slowly: conntrack may still have the entry of a port that its client reuses, and drop its SYN."""
    time.sleep(0.01)
    return ask(world.client, IP, 80, timeout_s=1.0)


@pytest.fixture
def proxy(world: ServiceLab, tmp_path: Path) -> Iterator[Proxy]:
    proxy = Proxy(world, tmp_path)
    proxy.apply("web", documents(service("web", IP), endpoints("web", POD1)))
    yield proxy
    proxy.end()


def test_the_kernel_serves_while_we_run_and_no_worker_does(proxy: Proxy, world: ServiceLab) -> None:
    proxy.start(*FLAGS)

    assert answers(world.client, IP, 80) == answers(world.node, IP, 80) == answers(world.pods[1], IP, 80) == "pod1"
    assert ask_udp(world.client, IP) == "pod1"
    assert proxy.workers() == []
    assert proxy.get("/proxyMode", 10249) == (200, "nftables")
    assert proxy.metric("userspace_proxy_service_ports") == 2

    proxy.apply("web", documents(service("web", IP), endpoints("web", POD2)))
    wait_until(lambda: answers(world.client, IP, 80) == "pod2", "the other endpoint serves")


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_a_pod_reaches_itself_by_its_service(proxy: Proxy, world: ServiceLab, mode: str) -> None:
    proxy.start("--proxy-mode", mode, *FLAGS[2:])

    assert ask(world.pods[0], IP, 80) == "pod1"


def test_a_local_udp_client_of_a_node_port_without_endpoints_is_refused_as_by_a_closed_port(
    proxy: Proxy, world: ServiceLab
) -> None:
    proxy.apply("node-port", service("node-port", "10.96.7.2", NODE_PORTS, extra="  type: NodePort"))
    proxy.start(*FLAGS)

    for host in (world.node, world.client):
        assert is_refused(host, NODE_IP, 30_780)
        assert is_refused_udp(host, NODE_IP, 30_753)


def test_a_forward_policy_that_drops_is_named(proxy: Proxy, world: ServiceLab) -> None:
    world.node.run(
        "nft", "add table inet fw; add chain inet fw c { type filter hook forward priority 0; policy drop; }"
    )
    try:
        proxy.start(*FLAGS)
        wait_until(lambda: "drops forwarded traffic: nftables chain 'inet fw c'" in proxy.log(), "it is named")
        assert not answers(world.client, IP, 80)
        world.node.run(*proxy.log().split("`")[1].split())
        assert answers(world.client, IP, 80) == "pod1"
    finally:
        world.node.run("nft", "delete", "table", "inet", "fw")


def test_a_stop_lets_open_connections_end_and_leaves_nothing(proxy: Proxy, world: ServiceLab) -> None:
    before = traces(world.node)
    proxy.start(*FLAGS)
    with connect(world.client, IP, 80) as sock:
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGINT)
        wait_until(lambda: "stopping" in proxy.log(), "it stops")
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)

    assert proxy.stop() == 0, proxy.log()
    assert traces(world.node) == before
    assert TABLE not in world.node.run("nft", "list", "tables").stdout


@pytest.mark.parametrize("mode", ["nftables", "iptables"])
def test_new_clients_are_refused_while_open_connections_drain(proxy: Proxy, world: ServiceLab, mode: str) -> None:
    proxy.start("--proxy-mode", mode, *FLAGS[2:], "--drain-timeout", "30")
    with connect(world.client, IP, 80) as sock:
        assert proxy.process is not None
        proxy.process.send_signal(signal.SIGINT)
        wait_until(lambda: is_refused(world.client, IP, 80), "nobody new is served")

        assert is_refused(world.node, IP, 80)
        assert is_refused_udp(world.client, IP, 53)
        sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
        assert b"pod1" in sock.recv(1 << 16)
    assert proxy.stop() == 0, proxy.log()


@pytest.mark.parametrize(
    ("first", "signum", "then"),
    [
        ("nftables", signal.SIGTERM, "nftables"),
        ("nftables", signal.SIGKILL, "nftables"),
        ("nftables", signal.SIGTERM, "iptables"),
        ("iptables", signal.SIGTERM, "iptables"),
        ("iptables", signal.SIGTERM, "userspace"),
    ],
)
def test_no_request_fails_between_the_end_of_one_process_and_the_start_of_the_next(
    proxy: Proxy, world: ServiceLab, first: str, signum: signal.Signals, then: str
) -> None:
    proxy.start("--proxy-mode", first, *FLAGS[2:])
    with background_requests(lambda: a_request(world)) as outcomes:
        assert proxy.stop(signum) == (0 if signum is signal.SIGTERM else -signum)
        assert answers(world.client, IP, 80) == answers(world.node, IP, 80) == "pod1"
        proxy.start("--proxy-mode", then, *FLAGS[2:])
        if then != first:
            theirs = ("nft", "list", "tables") if first == "nftables" else ("iptables-save",)
            ours = TABLE if first == "nftables" else "KUBE-SERVICES"
            wait_until(lambda: ours not in world.node.run(*theirs).stdout, "the rules of the first are gone")
        assert answers(world.client, IP, 80) == "pod1"

    assert set(outcomes) == {"pod1"}


@pytest.mark.parametrize("first", ["userspace", "nftables"])
def test_a_restart_in_another_mode_leaves_no_trace_of_the_first(proxy: Proxy, world: ServiceLab, first: str) -> None:
    userspace: tuple[str, ...] = ("--orphan-timeout", "0")
    started, then = (userspace, FLAGS) if first == "userspace" else (FLAGS, userspace)
    proxy.start(*started)
    proxy.stop(signal.SIGKILL)

    def is_switched() -> bool:
        tables = world.node.run("nft", "list", "tables").stdout.split("\n")
        return (f"table {TABLE}" in tables) == (first == "userspace") and (
            ("table inet userspace_proxy" in tables) == (first == "nftables")
        )

    def can_start() -> bool:
        proxy.start(*then, wait=False)
        wait_until(lambda: "ready:" in proxy.log() or proxy.process.poll() is not None, "it starts or not")  # type: ignore[union-attr]
        return "ready:" in proxy.log()

    wait_until(can_start, "workers without their process have ended, and it starts")
    wait_until(is_switched, "only the rules of the second are there")
    assert answers(world.client, IP, 80) == "pod1"


def test_rules_removed_by_another_program_are_restored(proxy: Proxy, world: ServiceLab) -> None:
    proxy.start(*FLAGS)

    world.node.run("nft", "delete", "table", *TABLE.split())

    wait_until(lambda: answers(world.client, IP, 80) == "pod1", "it is served again")
    wait_until(lambda: proxy.metric("userspace_proxy_rule_repairs_total") >= 1, "it is counted")


IPTABLES = (*("--proxy-mode", "iptables"), *FLAGS[2:])


@pytest.mark.parametrize("then", [FLAGS, IPTABLES, ()], ids=["nftables", "iptables", "userspace"])
def test_a_second_run_replaces_the_first_and_no_request_fails(
    proxy: Proxy, world: ServiceLab, then: tuple[str, ...]
) -> None:
    proxy.start(*FLAGS)
    first, log = proxy.process, proxy.log_file
    assert first is not None
    with background_requests(lambda: a_request(world)) as outcomes:
        proxy.log_file = proxy.folder / "second"
        proxy.start(*then)
        assert first.wait(20) == 0
        if then != FLAGS:
            wait_until(
                lambda: TABLE not in world.node.run("nft", "list", "tables").stdout, "the first one's table is gone"
            )
        assert answers(world.client, IP, 80) == "pod1"

    assert set(outcomes) == {"pod1"}
    assert "handed over to process" in log.read_text()
    proxy.apply("web", documents(service("web", IP), endpoints("web", POD2)))
    wait_until(lambda: answers(world.client, IP, 80) == "pod2", "the second one follows changes")


def test_it_starts_anew_in_its_place(proxy: Proxy, world: ServiceLab) -> None:
    proxy.start(*FLAGS)
    assert proxy.process is not None
    with background_requests(lambda: a_request(world)) as outcomes:
        proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: proxy.log().count("ready:") == 2, "it is ready again", 10)
        assert answers(world.client, IP, 80) == "pod1"

    assert set(outcomes) == {"pod1"}
    assert proxy.process.poll() is None


def test_a_kernel_mode_does_not_take_over_from_a_process_with_workers(proxy: Proxy, world: ServiceLab) -> None:
    proxy.start()
    second = world.node.run(*proxy.command(*proxy.run_arguments(), *FLAGS), check=False)

    assert second.returncode == 1
    assert "stop it first" in second.stderr
    assert answers(world.client, IP, 80) == "pod1"


def test_a_node_name_that_no_node_has_is_named(proxy: Proxy) -> None:
    proxy.apply("node", "apiVersion: v1\nkind: Node\nmetadata: {name: node-1}\n")
    proxy.start(*FLAGS, "--hostname-override", "node-7")

    wait_until(lambda: "no Node is called node-7" in proxy.log(), "it is said")


# ---- UDP flows and the last endpoint

EVERY_MODE = {
    "nftables": ("--proxy-mode", "nftables"),
    "iptables": ("--proxy-mode", "iptables"),
    "userspace, nftables": ("--rules", "nftables"),
    "userspace, iptables": ("--rules", "iptables"),
}
DNS_EVERYWHERE = "  type: NodePort\n  externalIPs: [172.30.7.7]"
DNS_PORTS = "[{name: dns, port: 53, protocol: UDP, nodePort: 30053}]"
DNS_IP = "10.96.7.53"


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_a_udp_flow_is_refused_when_its_services_last_endpoint_is_gone(
    proxy: Proxy, world: ServiceLab, mode: str
) -> None:
    """Though its client never stops sending from the same port (kubernetes#139628)."""

    def dns(*pods: str) -> str:
        return documents(service("dns", DNS_IP, DNS_PORTS, DNS_EVERYWHERE), endpoints("dns", *pods))

    proxy.apply("dns", dns(POD1, POD2))
    proxy.start(*EVERY_MODE[mode])
    with contextlib.ExitStack() as stack:
        socks = {
            (host.name, ip): stack.enter_context(udp_socket(host, ip, port))
            for host in (world.client, world.node, world.pods[2])
            for ip, port in ((DNS_IP, 53), (NODE_IP, 30_053), ("172.30.7.7", 53))
        }
        for where, sock in socks.items():
            sock.send(b"who")
            assert sock.recv(100) in (b"pod1", b"pod2"), where
        proxy.apply("dns", dns())
        left = dict(socks)

        def are_refused() -> bool:
            for where, sock in list(left.items()):
                sock.settimeout(0.02)
                try:
                    sock.send(b"who")
                    sock.recv(100)
                except (ConnectionRefusedError, PermissionError):
                    del left[where]
                except TimeoutError:
                    pass
            return not left

        try:
            wait_until(are_refused, "all are refused", 5.0)
        finally:
            print(mode, "not refused:", list(left))  # noqa: T201 - pytest shows it where the test failed
