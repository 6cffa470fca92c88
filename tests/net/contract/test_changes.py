"""Services and slices that change while they are served."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable

from tests.net.contract.cluster import NODE, OTHER_WEB
from tests.net.contract.conftest import ContractProxy
from tests.net.contract.probes import ask_once
from tests.net.contract.services import PORTS, Given, endpoint_slice, node_object
from tests.net.contract.table import EXTERNAL_LOCAL, LB
from tests.net.world import background_requests, wait_until
from userspace_proxy.lab import Host

MakeGiven = Callable[..., Given]
CLIENTS = "caller,outside"


def test_a_service_that_is_given_to_another_proxy_goes_and_comes_back(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type="NodePort")
    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort -> local1")

    proxy.give(service.but(labels={"service.kubernetes.io/service-proxy-name": "another"}))
    proxy.expect(service, f"{CLIENTS} clusterIP -> timeout", f"{CLIENTS} nodePort -> refused")

    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort -> local1")


def test_a_slice_that_is_marked_headless_goes_and_comes_back(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1")
    labels = {"kubernetes.io/service-name": service.name}
    plain = endpoint_slice(service.name, "more", "local2")
    proxy.give(service.but(more=(plain,)))
    proxy.expect(service, "caller clusterIP -> local1 local2")

    headless = endpoint_slice(service.name, "more", "local2", labels=labels | {"service.kubernetes.io/headless": ""})
    proxy.give(service.but(more=(headless,)))
    proxy.expect(service, "caller clusterIP -> local1")

    proxy.give(service.but(more=(plain,)))
    proxy.expect(service, "caller clusterIP -> local1 local2")


def test_a_type_changes_in_place_and_frees_what_it_had(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1")
    everywhere = "clusterIP,nodePort,vip,externalIP"
    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP -> local1 remote1", f"{CLIENTS} nodePort -> refused")

    proxy.give(service.but(type="NodePort"))
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort -> local1 remote1", f"{CLIENTS} vip -> timeout")

    proxy.give(service.but(type=LB))
    proxy.expect(service, f"{CLIENTS} {everywhere} -> local1 remote1")

    proxy.give(
        service.but(spec={"type": "ExternalName", "externalName": "example.org", "clusterIP": "", "clusterIPs": []})
    )
    proxy.expect(service, f"{CLIENTS} clusterIP,vip,externalIP -> timeout", f"{CLIENTS} nodePort -> refused")

    proxy.give(service.but(type="NodePort"))
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort -> local1 remote1", f"{CLIENTS} vip,externalIP -> timeout")

    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP -> local1 remote1", f"{CLIENTS} nodePort -> refused")


def test_a_freed_node_port_is_the_next_services(proxy: ContractProxy, given: MakeGiven) -> None:
    first, second = given("local1", type="NodePort"), given("local2")
    proxy.give(first, second)
    proxy.expect(first, "outside nodePort -> local1")

    ports = tuple(dict(port, nodePort=first.node_port) for port in PORTS)
    proxy.give(first.but(type="ClusterIP"), second.but(type="NodePort", ports=ports))

    proxy.expect(first, "outside nodePort -> local2", "outside clusterIP -> local1")


def test_a_removed_slice_removes_only_endpoints_that_no_other_slice_has(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 local2", "local2 remote1")
    proxy.give(service)
    proxy.expect(service, "caller clusterIP -> local1 local2 remote1")

    proxy.give(service.but(slices=("local1 local2",)))

    proxy.expect(service, "caller clusterIP -> local1 local2")


def test_a_service_without_endpoints_refuses_and_a_deleted_one_has_no_rules(
    proxy: ContractProxy, given: MakeGiven
) -> None:
    service = given("local1", type=LB)
    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort,vip,externalIP -> local1")

    proxy.give(service.but(slices=("",)))
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort,vip,externalIP -> refused")

    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort,vip,externalIP -> local1")

    proxy.delete(service.name)
    proxy.expect(service, f"{CLIENTS} clusterIP,vip,externalIP -> timeout", f"{CLIENTS} nodePort -> refused")


def test_policies_change_in_place(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1", type=LB)
    proxy.give(service)
    proxy.expect(service, "outside nodePort,vip -> local1 remote1", "caller clusterIP -> local1 remote1")

    proxy.give(service.but(spec=EXTERNAL_LOCAL))
    proxy.expect(service, "outside nodePort,vip -> local1", "caller clusterIP,nodePort -> local1 remote1")

    proxy.give(service.but(spec=EXTERNAL_LOCAL, slices=("remote1",)))
    proxy.expect(service, "outside nodePort,vip -> timeout", "caller clusterIP,nodePort -> remote1")

    proxy.give(service.but(spec={"internalTrafficPolicy": "Local"}))
    proxy.expect(service, "outside nodePort,vip -> local1 remote1", "caller clusterIP -> local1")

    proxy.give(service)
    proxy.expect(service, "outside nodePort,vip,clusterIP -> local1 remote1", "caller clusterIP -> local1 remote1")


def test_a_terminating_endpoint(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1", type=LB, spec=EXTERNAL_LOCAL)
    proxy.give(service)
    proxy.expect(service, "outside vip -> local1", "caller clusterIP -> local1 remote1")

    proxy.give(service.but(slices=("local1:leaving remote1",)))
    proxy.expect(service, "outside vip -> local1", "caller clusterIP,vip -> remote1")

    proxy.give(service.but(slices=("local1:gone remote1",)))
    proxy.expect(service, "outside vip -> timeout", "caller clusterIP,vip -> remote1")

    proxy.give(service.but(slices=("local1:gone remote1:gone",)))
    proxy.expect(service, f"{CLIENTS} vip,clusterIP -> refused")


def test_the_nodes_zone_changes(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1:zone-a local2:zone-b remote1:zone-b")
    proxy.give(service)
    proxy.expect(service, "caller clusterIP -> local1")
    try:
        proxy.apply(NODE, json.dumps(node_object("zone-b")))
        proxy.expect(service, "caller clusterIP -> local2 remote1")
        for unknown in ("", None):
            proxy.apply(NODE, json.dumps(node_object(unknown)))
            proxy.expect(service, "caller clusterIP -> local1 local2 remote1")
    finally:
        proxy.apply(NODE, json.dumps(node_object()))
    proxy.expect(service, "caller clusterIP -> local1")


def test_ports_come_go_and_change_and_the_others_never_miss_a_request(proxy: ContractProxy, given: MakeGiven) -> None:
    stays, goes = {"name": "web", "port": 80}, {"name": "other", "port": 81}
    service = given("local1", ports=(stays,), targets={"web": 8080, "other": OTHER_WEB, "dns": 5353})
    proxy.give(service)
    nobodys = "refused" if proxy.variant.mode == "nftables" else "timeout"  # the other ports of a cluster IP (N3)
    proxy.expect(service, "caller clusterIP/tcp -> local1", f"caller clusterIP:81/tcp -> {nobodys}")
    caller = proxy.cluster.places["caller"].host

    def ask() -> str:
        answer, _ = ask_once(caller, service.cluster_ip(4), 80, timeout_s=1.0)
        time.sleep(0.002)
        return answer

    with background_requests(ask) as outcomes:
        proxy.give(service.but(ports=(stays, goes)))
        proxy.expect(service, "caller clusterIP:81/tcp -> local1-2")

        proxy.give(service.but(ports=(stays, goes | {"port": 82})))
        proxy.expect(service, "caller clusterIP:82/tcp -> local1-2", f"caller clusterIP:81/tcp -> {nobodys}")

        proxy.give(service.but(ports=(stays, {"name": "dns", "port": 82, "protocol": "UDP"})))
        proxy.expect(service, "caller clusterIP:82/udp -> local1", f"caller clusterIP:82/tcp -> {nobodys}")

        proxy.give(service)
        proxy.expect(service, f"caller clusterIP:82 -> {nobodys}")

    assert set(outcomes) == {"local1"}


def test_a_client_that_dialled_before_its_service_was_there_is_served_from_the_same_port(
    proxy: ContractProxy, given: MakeGiven
) -> None:
    """Its first SYN was not translated, and conntrack would treat later ones alike for two minutes."""
    service = given("local1", ports=({"name": "web", "port": 80},))
    caller, address = proxy.cluster.places["caller"].host, (service.cluster_ip(4), 80)

    def answer_to_port(port: int) -> str:
        with socket_at(caller, port) as sock, contextlib.suppress(TimeoutError, ConnectionRefusedError):
            sock.settimeout(0.3)  # less than until a SYN is sent again
            sock.connect(address)
            return sock.recv(100).decode().split()[0]
        return ""

    assert answer_to_port(3_999) == ""

    proxy.give(service)

    wait_until(lambda: answer_to_port(3_999) == "local1", "it is served")


def socket_at(host: Host, port: int) -> socket.socket:
    """Return an unconnected TCP socket of *host* with *port* as its source port."""
    with host.inside():
        sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    return sock


def test_two_ports_swap_their_numbers(proxy: ContractProxy, given: MakeGiven) -> None:
    one, two = {"name": "one", "port": 80}, {"name": "two", "port": 81}
    service = given("local1", ports=(one, two), targets={"one": 8080, "two": OTHER_WEB})
    proxy.give(service)
    proxy.expect(service, "caller clusterIP/tcp -> local1", "caller clusterIP:81/tcp -> local1-2")

    proxy.give(service.but(ports=(one | {"port": 81}, two | {"port": 80})))

    proxy.expect(service, "caller clusterIP/tcp -> local1-2", "caller clusterIP:81/tcp -> local1")


def test_a_service_made_anew_has_another_address(proxy: ContractProxy, given: MakeGiven) -> None:
    service, another = given("local1", type=LB), given("local1", type=LB)
    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} clusterIP,nodePort,vip -> local1")

    proxy.apply(service.name, another.but(name=service.name).manifest())

    proxy.expect(another, f"{CLIENTS} clusterIP,nodePort,vip -> local1")
    proxy.expect(service, f"{CLIENTS} clusterIP,vip -> timeout", f"{CLIENTS} nodePort -> refused")


def test_external_addresses_and_source_ranges_change_in_place(proxy: ContractProxy, given: MakeGiven) -> None:
    service, other = given("local1", type=LB), given("local1")
    proxy.give(service)
    proxy.expect(service, f"{CLIENTS} vip,externalIP -> local1")

    proxy.give(service.but(spec={"loadBalancerSourceRanges": ["192.0.2.0/24"]}))
    proxy.expect(service, "outside vip -> local1", "caller vip -> timeout", f"{CLIENTS} externalIP,nodePort -> local1")

    proxy.give(service.but(spec={"loadBalancerSourceRanges": ["10.244.0.0/16"]}))
    proxy.expect(service, "caller vip -> local1", "outside vip -> timeout")

    moved = {"externalIPs": [other.external_ip(4)], "status": {"loadBalancer": {"ingress": [{"ip": other.vip(4)}]}}}
    proxy.give(service.but(spec=moved))
    proxy.expect(service, f"{CLIENTS} vip,externalIP -> timeout")
    proxy.expect(other, f"{CLIENTS} vip,externalIP -> local1")
