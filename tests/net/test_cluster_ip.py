"""Traffic to a cluster IP, with real packets, in both rule languages and on both event loops."""

from __future__ import annotations

import time
from collections import Counter

import pytest

from tests.net.world import (
    Proxy,
    answers,
    ask_udp,
    documents,
    endpoints,
    is_refused,
    is_refused_udp,
    service,
    udp_socket,
    wait_until,
)
from userspace_proxy.lab import NODE_IP, NODE_IP6, ServiceLab, ask

POD1, POD2, POD3 = (ServiceLab.pod_ip(index) for index in range(3))


def test_thirty_requests_over_three_backends_are_ten_each(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("web", "10.96.1.1", POD1, POD2, POD3)

    seen = [ask(world.client, "10.96.1.1") for _ in range(30)]

    assert Counter(seen) == {"pod1": 10, "pod2": 10, "pod3": 10}
    assert seen[:3] == seen[3:6] == seen[27:]


def test_the_node_itself_is_served(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("for-node", "10.96.1.2", POD1, POD2)

    assert {ask(world.node, "10.96.1.2") for _ in range(2)} == {"pod1", "pod2"}
    assert {ask_udp(world.node, "10.96.1.2") for _ in range(2)} == {"pod1", "pod2"}


def test_a_pod_is_served_even_by_itself(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("hairpin", "10.96.1.3", POD1)

    assert ask(world.pods[0], "10.96.1.3") == "pod1"
    assert ask_udp(world.pods[0], "10.96.1.3") == "pod1"


def test_ipv6_is_served_from_outside_and_from_the_node(proxy: Proxy, world: ServiceLab) -> None:
    pods = [ServiceLab.pod_ip6(0), ServiceLab.pod_ip6(1)]
    proxy.serve("six", "fd00:96::1", *pods)

    for host in (world.client, world.node):
        assert {ask(host, "fd00:96::1") for _ in range(2)} == {"pod1", "pod2"}
        assert {ask_udp(host, "fd00:96::1") for _ in range(2)} == {"pod1", "pod2"}


def test_udp_replies_come_from_the_address_that_was_asked(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("resolver", "10.96.1.4", POD1, POD2, POD3)

    # Each socket is connected, so that the kernel drops a reply from any other address.
    assert Counter(ask_udp(world.client, "10.96.1.4") for _ in range(9)) == {"pod1": 3, "pod2": 3, "pod3": 3}


def test_the_datagrams_of_one_flow_stay_with_one_backend(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("flow", "10.96.1.5", POD1, POD2, POD3)

    with udp_socket(world.client, "10.96.1.5", 53) as sock:
        seen = set()
        for _ in range(5):
            sock.send(b"who")
            seen.add(sock.recv(100))

    assert len(seen) == 1


def test_the_largest_datagram_goes_through(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("large", "10.96.1.6", POD1)

    with udp_socket(world.client, "10.96.1.6", 53) as sock:
        sock.send(bytes(65_507))
        assert sock.recv(100) == b"pod1 65507"


def test_two_services_interleaved_keep_exact_rotations_while_an_endpoint_joins(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("left", "10.96.1.7", POD1, POD2)
    proxy.serve("right", "10.96.1.8", POD2, POD3)
    seen: dict[str, list[str]] = {"tcp left": [], "udp left": [], "tcp right": [], "udp right": []}

    def ask_all(rounds: int) -> None:
        for _ in range(rounds):
            for side, address in (("left", "10.96.1.7"), ("right", "10.96.1.8")):
                seen[f"tcp {side}"].append(ask(world.client, address))
                seen[f"udp {side}"].append(ask_udp(world.client, address))

    ask_all(2)
    loads = proxy.metric("userspace_proxy_rule_loads_total")
    proxy.apply("left", documents(service("left", "10.96.1.7"), endpoints("left", POD1, POD2, POD3)))
    wait_until(lambda: proxy.metric("userspace_proxy_endpoints", service="left") == 6, "the endpoint has joined")
    ask_all(6)

    assert seen["tcp left"] == seen["udp left"] == ["pod1", "pod2", *["pod1", "pod2", "pod3"] * 2]
    assert seen["tcp right"] == seen["udp right"] == ["pod2", "pod3"] * 4
    assert proxy.metric("userspace_proxy_rule_loads_total") == loads, "an endpoint change loads no rule"


def test_a_service_without_endpoints_is_refused_at_once(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("nobody", "10.96.1.9")

    for host in (world.client, world.node):
        started_at = time.monotonic()
        assert is_refused(host, "10.96.1.9", 80)
        assert is_refused_udp(host, "10.96.1.9", 53)
        assert time.monotonic() - started_at < 1.0, "refused, not timed out"


def test_the_first_endpoint_opens_and_the_last_one_closes(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("scaled", "10.96.1.10")
    assert is_refused(world.client, "10.96.1.10", 80)

    proxy.serve("scaled", "10.96.1.10", POD2)
    wait_until(lambda: answers(world.client, "10.96.1.10", 80) == "pod2", "the first endpoint is served")

    proxy.serve("scaled", "10.96.1.10")
    wait_until(lambda: is_refused(world.client, "10.96.1.10", 80), "it is refused again")


def test_a_udp_client_that_keeps_sending_is_served_while_endpoints_change(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("restless", "10.96.1.11", POD1)

    with udp_socket(world.client, "10.96.1.11", 53, timeout_s=0.05) as sock:

        def answer() -> str:
            try:
                sock.send(b"who")
                return sock.recv(100).decode()
            except TimeoutError:
                return ""
            except ConnectionRefusedError:
                return "refused"

        wait_until(lambda: answer() == "pod1", "pod1 answers")
        proxy.serve("restless", "10.96.1.11")
        wait_until(lambda: answer() == "refused", "the same socket is refused")
        proxy.serve("restless", "10.96.1.11", POD3)
        wait_until(lambda: answer() == "pod3", "the same socket reaches the new endpoint")


def test_a_deleted_service_is_gone_and_its_rules_too(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("doomed", "10.96.1.12", POD1)
    port = proxy.proxy_port("default/doomed:http")

    proxy.delete("doomed")

    wait_until(lambda: "doomed" not in proxy.rules_text(), "its rules are gone")
    wait_until(lambda: is_refused(world.node, "127.0.0.1", port), "its listener is gone")


def test_a_directly_dialled_proxy_port_refuses(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("guarded", "10.96.1.13", POD1)
    tcp, udp = proxy.proxy_port("default/guarded:http"), proxy.proxy_port("default/guarded:dns")

    assert is_refused(world.client, NODE_IP, tcp)
    assert is_refused(world.client, NODE_IP6, tcp)
    assert is_refused(world.node, "127.0.0.1", tcp)
    assert is_refused_udp(world.client, NODE_IP, udp)
    assert answers(world.client, "10.96.1.13", 80) == "pod1"


def test_rules_name_the_service_port_they_are_for(proxy: Proxy) -> None:
    name = "a-service-with-the-longest-name-that-kubernetes-allows-there-be"
    assert len(name) == 63
    proxy.serve(name, "10.96.1.14", POD1)

    assert proxy.proxy_port(f"default/{name}:http") >= 10_000


def test_rules_removed_by_another_program_are_loaded_again(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("flushed", "10.96.1.15", POD1)
    repairs = proxy.metric("userspace_proxy_rule_repairs_total")

    if proxy.rules == "nftables":
        world.node.run("nft", "delete", "table", "inet", "userspace_proxy")
    else:
        world.node.run("iptables", "-t", "nat", "-F")

    wait_until(lambda: answers(world.client, "10.96.1.15", 80) == "pod1", "traffic is captured again")
    wait_until(lambda: proxy.metric("userspace_proxy_rule_repairs_total") > repairs, "the repair is counted")


def test_an_element_removed_by_another_program_is_restored(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("picked-out", "10.96.1.16", POD1)

    if proxy.rules == "nftables":
        element = "{ 10.96.1.16 . tcp . 80 }"
        world.node.run("nft", "delete", "element", "inet", "userspace_proxy", "service_ips4", element)
    else:
        world.node.run("iptables", "-t", "nat", "-D", "PREROUTING", "-j", "USERSPACE-PROXY")

    wait_until(lambda: answers(world.client, "10.96.1.16", 80) == "pod1", "traffic is captured again")


def test_node_ports_and_external_ips_are_captured_where_a_manifest_states_them(proxy: Proxy, world: ServiceLab) -> None:
    ports = "[{name: http, port: 80, nodePort: 30080}, {name: dns, port: 53, protocol: UDP, nodePort: 30053}]"
    manifest = service("outside", "10.96.1.17", ports, extra="  type: NodePort\n  externalIPs: [203.0.113.7]")
    proxy.apply("outside", documents(manifest, endpoints("outside", POD1)))
    wait_until(lambda: "outside" in proxy.rules_text(), "it has rules")

    assert ask(world.client, NODE_IP, 30080) == "pod1"
    assert ask(world.node, "127.0.0.1", 30080) == "pod1"
    assert ask(world.client, "203.0.113.7", 80) == "pod1"
    assert ask_udp(world.client, NODE_IP, 30053) == "pod1"


@pytest.mark.parametrize("timeout_s", [10_800, 2])
def test_client_ip_affinity_keeps_a_client_at_one_backend(proxy: Proxy, world: ServiceLab, timeout_s: int) -> None:
    name, address = f"sticky-{timeout_s}", f"10.96.2.{timeout_s % 200}"
    config = f"  sessionAffinity: ClientIP\n  sessionAffinityConfig: {{clientIP: {{timeoutSeconds: {timeout_s}}}}}"
    proxy.serve(name, address, POD1, POD2, POD3, extra=config)

    client = {ask(world.client, address) for _ in range(6)}
    pod = {ask(world.pods[0], address) for _ in range(6)}

    assert len(client) == len(pod) == 1
    assert client != pod, "another client has its own turn"


def test_a_broken_manifest_is_named_and_everything_goes_on(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("steady", "10.96.1.18", POD1)
    good = documents(service("frail", "10.96.1.19"), endpoints("frail", POD2))
    proxy.apply("frail", good)
    wait_until(lambda: answers(world.client, "10.96.1.19", 80) == "pod2", "frail is served")

    proxy.apply("frail", good.replace("ports: [{name: http", "ports: [{{name: http", 1))

    wait_until(lambda: "frail.yaml:6" in proxy.log(), "the line is named")
    assert ask(world.client, "10.96.1.18") == "pod1"
    assert ask(world.client, "10.96.1.19") == "pod2", "the last good version goes on serving"
    assert proxy.get("/healthz", 10256)[0] == 200

    proxy.apply("frail", good.replace(POD2, POD3))
    wait_until(lambda: answers(world.client, "10.96.1.19", 80) == "pod3", "the mended version is served")


def test_a_configmap_that_is_swapped_by_its_symlink_is_seen(proxy: Proxy, world: ServiceLab) -> None:
    versions = proxy.folder / "configmap"
    for version, pod in (("v1", POD1), ("v2", POD2)):
        (versions / version).mkdir(parents=True)
        (versions / version / "svc.yaml").write_text(
            documents(service("swapped", "10.96.1.20"), endpoints("swapped", pod))
        )
    data = proxy.manifests / "..data"
    data.symlink_to(versions / "v1")
    (proxy.manifests / "swapped.yaml").symlink_to("..data/svc.yaml")
    wait_until(lambda: answers(world.client, "10.96.1.20", 80) == "pod1", "the first version is served")

    (proxy.manifests / "..data_tmp").symlink_to(versions / "v2")
    (proxy.manifests / "..data_tmp").replace(data)

    wait_until(lambda: answers(world.client, "10.96.1.20", 80) == "pod2", "the second version is served")


def test_the_access_log_names_client_endpoint_and_reason(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("logged", "10.96.1.21", POD1)

    ask(world.client, "10.96.1.21")

    wait_until(lambda: any("default/logged:http" in line for line in proxy.access_lines()), "the line is written")
    (line,) = [line for line in proxy.access_lines() if "default/logged:http" in line]
    assert "192.168.50.2:" in line
    assert f"-> 10.96.1.21:80 -> {POD1}:8080 (round robin)" in line
    assert "up=18 " in line
    assert line.endswith("closed")
