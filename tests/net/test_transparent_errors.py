"""ICMP errors for packets that carry a client's own address come to this node's sockets, as those for its own do."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
from collections.abc import Iterator

import pytest

from tests.net.world import BACKEND, POD1, POD2, Proxy, ask_udp, documents, service, udp_socket, wait_until
from userspace_proxy.lab import Host, ServiceLab, connect

UDP_PORT, TCP_PORT = 5399, 8099
FAR_IP = "10.250.0.2"
POD3 = ServiceLab.pod_ip(2)
SIZE = 2_000_000
# Says how many bytes it was sent.
COUNTS = f"""
import socket
with socket.create_server(("", {TCP_PORT})) as server:
    while True:
        sock, _ = server.accept()
        with sock:
            count = 0
            while piece := sock.recv(1 << 16):
                count += len(piece)
            sock.sendall(b"%d" % count)
"""


def transparent_service(name: str, cluster_ip: str, *addresses: str) -> str:
    ports = "[{name: tcp, port: 80}, {name: udp, port: 53, protocol: UDP}]"
    told = service(name, cluster_ip, ports).replace("}", ", annotations: {userspace-proxy/source-ip: transparent}}", 1)
    listed = ", ".join(f'{{addresses: ["{a}"]}}' for a in addresses)
    return documents(
        told,
        f"""\
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {{name: {name}, labels: {{kubernetes.io/service-name: {name}}}}}
addressType: IPv{6 if ":" in addresses[0] else 4}
ports: [{{name: tcp, port: {TCP_PORT}}}, {{name: udp, port: {UDP_PORT}, protocol: UDP}}]
endpoints: [{listed}]
""",
    )


@pytest.fixture(scope="module")
def far(world: ServiceLab) -> Iterator[Host]:
    """A host behind the first pod, by a link that takes no packets above 1,280 bytes; the other pods' servers, too."""
    far, router = world.lab.add("far"), world.pods[0]
    try:
        world.lab.link(far, "eth0", router, "far0")
        far.ip("address", "add", f"{FAR_IP}/24", "dev", "eth0")
        far.ip("route", "add", "default", "via", "10.250.0.1")
        router.ip("address", "add", "10.250.0.1/24", "dev", "far0")
        router.ip("link", "set", "far0", "mtu", "1280")
        router.set_knob("ipv4/ip_forward", 1)
        world.node.ip("route", "add", "10.250.0.0/24", "via", POD1)
        started = [far.start(sys.executable, "-c", COUNTS)]
        for host in (far, *world.pods[:2]):
            started.append(host.start(sys.executable, str(BACKEND), host.name, str(UDP_PORT)))
        for host in (far, *world.pods[:2]):
            wait_until(functools.partial(ask_udp, host, "127.0.0.1", UDP_PORT, 0.1), "a server answers")
        yield far
        for process in started:
            process.kill()
            process.wait(20)
        world.node.ip("route", "del", "10.250.0.0/24", "via", POD1)
        router.set_knob("ipv4/ip_forward", 0)
    finally:
        far.stop_all()
        world.node.run("ip", "netns", "del", "far")
        del world.lab.hosts["far"]


@pytest.fixture(params=["nftables", "iptables"])
def proxy(far: Host, fresh_proxy: Proxy, request: pytest.FixtureRequest) -> Proxy:
    fresh_proxy.rules = request.param
    fresh_proxy.apply("dead", transparent_service("dead", "10.96.53.1", POD1, POD2, POD3))
    of_ip6 = (ServiceLab.pod_ip6(index) for index in range(3))
    fresh_proxy.apply("dead6", transparent_service("dead6", "fd00:96::53:1", *of_ip6))
    fresh_proxy.apply("far", transparent_service("far", "10.96.53.2", FAR_IP))
    fresh_proxy.start()
    return fresh_proxy


def test_a_backend_without_a_process_is_ejected(proxy: Proxy, world: ServiceLab) -> None:
    for ip in ("10.96.53.1", "fd00:96::53:1"):
        answered = [ask_udp(world.client, ip, timeout_s=0.3) for _ in range(6)]
        assert answered.count("") <= 1, (ip, answered)
    with udp_socket(world.client, "10.96.53.1", 53, 1.0) as sock:
        sock.send(b"who")
        assert sock.recv(100) in (b"pod1", b"pod2")


def test_the_path_mtu_is_learnt(proxy: Proxy, world: ServiceLab) -> None:
    world.node.ip("route", "flush", "cache")
    with connect(world.client, "10.96.53.2", 80, timeout_s=15.0) as sock:
        sock.sendall(bytes(SIZE))
        sock.shutdown(socket.SHUT_WR)
        assert int(sock.recv(100)) == SIZE
    with udp_socket(world.client, "10.96.53.2", 53, 0.5) as sock:
        answers = []
        for _ in range(3):
            sock.send(bytes(1_400))
            with contextlib.suppress(TimeoutError):
                answers.append(sock.recv(100))
        assert b"far 1400" in answers
