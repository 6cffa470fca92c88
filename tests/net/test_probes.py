"""Active health checks in every mode: endpoints that fail their probes get no traffic, and get it again."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.net.ipvs import fresh_ipvs_proxy
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
from userspace_proxy.lab import Host, ServiceLab, connect

IP = "10.96.12.1"
CHECK_PORT, PRIMARY_PORT = 9_999, 8_008
CHECK = f"tcp port={CHECK_PORT} interval=100ms rise=1 fall=1"
POD_IPS = ("--detect-local-mode", "ClusterCIDR", "--cluster-cidr", "10.244.0.0/16")
MODES = ["userspace", "nftables", "iptables", pytest.param("ipvs", marks=pytest.mark.ipvs)]


class Switch:
    """The target of one pod's probes: a port that listens, or one that refuses."""

    def __init__(self, pod: Host) -> None:
        self._pod = pod
        self._listener: socket.socket | None = None
        self.turn_on()

    def turn_on(self) -> None:
        with self._pod.inside():
            self._listener = socket.create_server(("0.0.0.0", CHECK_PORT))

    def turn_off(self) -> None:
        if self._listener is not None:
            self._listener.close()
        self._listener = None


@pytest.fixture
def switches(world: ServiceLab) -> Iterator[tuple[Switch, Switch]]:
    made = Switch(world.pods[0]), Switch(world.pods[1])
    yield made
    for switch in made:
        switch.turn_off()


def checked(name: str, cluster_ip: str, check: str, slices: str = "") -> str:
    """Return a Service with a health check, and its endpoints: *slices*, or else two pods."""
    plain = service(name, cluster_ip).replace(
        f"name: {name}", f'name: {name}, annotations: {{userspace-proxy/health-check: "{check}"}}', 1
    )
    return documents(plain, slices or endpoints(name, POD1, POD2))


@contextlib.contextmanager
def proxy_in(mode: str, world: ServiceLab, folder: Path) -> Iterator[Proxy]:
    if mode == "ipvs":
        with fresh_ipvs_proxy(world, folder) as in_ipvs_mode:
            yield in_ipvs_mode
        return
    proxy = Proxy(world, folder)
    try:
        yield proxy
    finally:
        proxy.end()


@pytest.mark.parametrize("mode", MODES)
def test_an_endpoint_that_is_unhealthy_gets_no_traffic_in_any_mode(
    mode: str, world: ServiceLab, tmp_path: Path, switches: tuple[Switch, Switch]
) -> None:
    one, two = switches
    with proxy_in(mode, world, tmp_path) as proxy:
        proxy.apply("web", checked("web", IP, CHECK))
        proxy.apply("strict", checked("strict", "10.96.12.2", f"{CHECK} panic=off"))
        proxy.start("--proxy-mode", mode, *POD_IPS)

        def only(*names: str) -> None:
            seen: set[str] = set()

            def is_so() -> bool:
                seen.clear()
                seen.update(answers(world.client, IP, 80) for _ in range(12))
                return seen == set(names)

            wait_until(is_so, f"{names} answer")

        only("pod1", "pod2")
        with udp_socket(world.client, IP, 53, timeout_s=0.2) as flow:

            def flow_finds() -> str:
                with contextlib.suppress(OSError):
                    flow.send(b"who")
                    return flow.recv(100).decode()
                return ""

            wait_until(flow_finds, "the flow has an endpoint")
            loads = proxy.metric("userspace_proxy_rule_loads_total")
            first = flow_finds()
            (one if first == "pod1" else two).turn_off()
            left = "pod2" if first == "pod1" else "pod1"
            only(left)
            wait_until(lambda: flow_finds() == left, "the flow follows")
            assert {ask_udp(world.client, IP) for _ in range(4)} == {left}
            if mode == "userspace":
                assert proxy.metric("userspace_proxy_rule_loads_total") == loads
        unhealthy = ("userspace_proxy_unhealthy_endpoints", {"service": "web", "port": "http"})
        assert proxy.metric(unhealthy[0], **unhealthy[1]) == 1

        for switch in switches:
            switch.turn_off()
        only("pod1", "pod2")
        wait_until(lambda: is_refused(world.client, "10.96.12.2", 80), "panic=off refuses")
        proxy.wait_logged("every IPv4 endpoint of default/strict:http is unhealthy; none is used, by panic=off")
        proxy.wait_logged("every IPv4 endpoint of default/web:http is unhealthy; all are used")

        one.turn_on()
        only("pod1")
        assert answers(world.client, "10.96.12.2", 80) == "pod1"
        proxy.wait_logged(f"endpoint {POD1}:{CHECK_PORT} is healthy: tcp: it answers again")
        two.turn_on()
        only("pod1", "pod2")


class Role(threading.Thread):
    """A server of one pod that answers 200 at /primary while it is the primary, 503 otherwise, and elsewhere its name.

    ``served``: the number of requests of clients.
    """

    def __init__(self, pod: Host) -> None:
        super().__init__(daemon=True)
        role = self
        self.is_primary = False
        self.served = 0

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                is_probe = self.path == "/primary"
                role.served += not is_probe
                self.send_response(200 if role.is_primary or not is_probe else 503)
                self.send_header("Content-Length", str(len(pod.name)))
                self.end_headers()
                self.wfile.write(pod.name.encode())

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Log nothing: connections are reset on purpose."""

        with pod.inside():
            self._server = Server(("0.0.0.0", PRIMARY_PORT), Handler)
        self.start()

    def run(self) -> None:
        self._server.serve_forever(poll_interval=0.05)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.join()


def test_traffic_follows_the_one_server_that_is_the_primary_and_open_connections_to_the_other_are_reset(
    world: ServiceLab, tmp_path: Path
) -> None:
    roles = [Role(pod) for pod in world.pods]
    # The servers run in this process: one late answer, as when it collects garbage, must not count.
    check = "http path=/primary status=200 interval=1s rise=1 fall=3 panic=off"
    with contextlib.ExitStack() as stack:
        for role in roles:
            stack.callback(role.close)
        proxy = stack.enter_context(proxy_in("userspace", world, tmp_path))
        ips = [ServiceLab.pod_ip(index) for index in range(3)]
        manifest = checked("db", "10.96.12.3", check, endpoints("db", *ips, http_port=PRIMARY_PORT))
        proxy.apply(
            "db", manifest.replace("{userspace-proxy/", "{userspace-proxy/on-endpoint-removal: reset, userspace-proxy/")
        )
        proxy.start()

        def unhealthy() -> float:
            return proxy.metric("userspace_proxy_unhealthy_endpoints", service="db", port="http")

        def served_by() -> set[int]:
            """Send a few requests; return the servers that got one."""
            before = [role.served for role in roles]
            for _ in range(6):
                answers(world.client, "10.96.12.3", 80)
            return {at for at, role in enumerate(roles) if role.served != before[at]}

        held: socket.socket | None = None
        for index in (0, 1, 0):
            before = [role for role in roles if role.is_primary]
            roles[index].is_primary = True
            for role in before:
                role.is_primary = False
            wait_until(lambda: unhealthy() == 2 and served_by() == {index}, f"server {index} alone serves")  # noqa: B023
            assert served_by() == {index}, proxy.log_file.read_text()[-5_000:]
            if held is not None:
                with pytest.raises(ConnectionResetError):
                    held.recv(1)
            held = stack.enter_context(connect(world.client, "10.96.12.3", 80))
            held.sendall(b"GET / HTTP/1.1\r\nHost: db\r\n\r\n")
            reply = b""
            while not reply.endswith(world.pods[index].name.encode()):
                reply += held.recv(1_000)
