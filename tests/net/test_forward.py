"""`forward`: a Service at local ports, without a capability; from files and from an API server, through a rollout."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from tests.net.test_kubernetes import Cluster
from tests.net.world import (
    POD1,
    POD2,
    ask_udp,
    background_requests,
    documents,
    endpoints,
    service,
    wait_until,
)
from userspace_proxy.lab import Host, ServiceLab, ask, connect

PORTS = "[{name: http, port: 80, targetPort: 8080}, {name: dns, port: 53, protocol: UDP, targetPort: 5353}]"
WITHOUT_PRIVILEGES = ("setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs")
POD3 = ServiceLab.pod_ip(2)
# An address that no host has.
UNREACHABLE = "10.244.0.99"

Start = Callable[..., "Forward"]


class Forward:
    """A running `userspace-proxy forward`."""

    def __init__(self, node: Host, log: Path, *arguments: str) -> None:
        self.node = node
        self._log = log
        command = (*WITHOUT_PRIVILEGES, sys.executable, "-m", "userspace_proxy", "forward", *arguments)
        self.process = node.start(*command, log=log)

    def text(self) -> str:
        return self._log.read_text() if self._log.exists() else ""

    def port(self, to: str) -> int:
        """Return the local port at 127.0.0.1 that leads to *to*, once it listens."""
        pattern = re.compile(rf"^Forwarding from 127\.0\.0\.1:(\d+) -> {to}$", re.MULTILINE)

        def found() -> re.Match[str] | None:
            assert self.process.poll() is None, self.text()
            return pattern.search(self.text())

        wait_until(found, f"there is a forward to {to}")
        match = found()
        assert match is not None
        return int(match[1])

    def wait_said(self, text: str) -> None:
        wait_until(lambda: text in self.text(), f"it says {text!r}")

    def ask(self, port: int, ip: str = "127.0.0.1") -> str:
        return ask(self.node, ip, port)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(20)


@pytest.fixture
def start(world: ServiceLab, tmp_path: Path) -> Iterator[Start]:
    started: list[Forward] = []

    def make(*arguments: str) -> Forward:
        started.append(Forward(world.node, tmp_path / f"log{len(started)}", *arguments))
        return started[-1]

    yield make
    for one in started:
        if one.process.poll() is None:
            assert one.stop() == 0, one.text()


def write(folder: Path, *pods: str, cluster_ip: str = "10.96.3.9", extra: str = "") -> Path:
    file = folder / "web.yaml"
    temporary = folder / ".new"
    temporary.write_text(documents(service("web", cluster_ip, PORTS, extra), endpoints("web", *pods)))
    temporary.replace(file)
    return file


def told(world: ServiceLab, *arguments: str) -> str:
    """Return the one line of a `forward` that cannot begin."""
    done = world.node.run(sys.executable, "-m", "userspace_proxy", "forward", *arguments, check=False)
    assert done.returncode == 1, done
    (line,) = done.stderr.splitlines()
    return line


def test_tcp_and_udp_ports_of_a_service_are_balanced_and_reported_as_by_kubectl(start: Start, tmp_path: Path) -> None:
    forward = start("-f", str(write(tmp_path, POD1, POD2, POD3)), "svc/web", ":80", ":http", ":53")
    port = forward.port("8080")

    assert Counter(forward.ask(port) for _ in range(9)) == {"pod1": 3, "pod2": 3, "pod3": 3}
    assert ask_udp(forward.node, "127.0.0.1", forward.port("5353/udp")) in {"pod1", "pod2", "pod3"}
    forward.wait_said(f"Handling connection for {port}\n")
    forward.wait_said(f"Handling connection for {forward.port('5353/udp')}\n")
    assert f"Forwarding from [::1]:{port} -> 8080\n" in forward.text()
    assert forward.ask(port, "::1") in {"pod1", "pod2", "pod3"}
    assert forward.stop() == 0


def test_no_request_fails_while_every_endpoint_is_replaced(start: Start, world: ServiceLab, tmp_path: Path) -> None:
    forward = start("-f", str(write(tmp_path, POD1, UNREACHABLE)), "svc/web", ":80")
    port = forward.port("8080")

    with background_requests(lambda: forward.ask(port)) as outcomes:
        for pods, names in (((POD2,), {"pod2"}), ((POD2, POD3), {"pod2", "pod3"}), ((POD1,), {"pod1"})):
            before = len(outcomes)
            write(tmp_path, *pods)
            wait_until(partial(_answers, forward, port, names), f"only {names} answer")
            # One that dials the unreachable endpoint takes longer than all these changes.
            wait_until(lambda: names <= set(outcomes[before:]), f"{names} answer in the background too")  # noqa: B023

    assert {one for one in outcomes if isinstance(one, BaseException)} == set()


def _answers(forward: Forward, port: int, names: set[str]) -> bool:
    return {forward.ask(port) for _ in range(4)} == names


def test_a_killed_endpoint_fails_the_requests_that_it_has_received_and_no_others(
    start: Start, world: ServiceLab, tmp_path: Path
) -> None:
    """A proxy cannot repeat a request that a server may have begun to answer. It can every other one."""
    servers = [start_slow_server(pod) for pod in world.pods]
    manifest = write(tmp_path, POD1, POD2, POD3)
    manifest.write_text(manifest.read_text().replace("port: 8080", f"port: {SLOW_PORT}"))
    forward = start("-v", "-f", str(manifest), "svc/web", ":80")
    port = forward.port(str(SLOW_PORT))
    options = ("-t1", "-c32", "-d60s", "--timeout", "10s", "-H", "Connection: close")
    command = world.node.command("wrk", *options, f"http://127.0.0.1:{port}/")
    load = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: len(ended_connections(forward)) > 300, "the load runs")
        servers[0].send_signal(signal.SIGSTOP)
        wait_until(lambda: unread_requests(world.pods[0]) > 0, "requests wait at it")
        servers[0].kill()
        servers[0].wait(20)
        killed_at = time.time()
        before = len(ended_connections(forward))
        wait_until(lambda: len(ended_connections(forward)) > before + 300, "the load goes on")
        load.send_signal(signal.SIGINT)
        report = load.communicate(timeout=20)[0]
        assert forward.stop() == 0  # before the other servers end
    finally:
        load.kill()
        load.wait(20)
        for server in servers:
            server.kill()
            server.wait(20)

    without_answer = [one for one in ended_connections(forward) if one.bytes_to_client < len(SLOW_ANSWER)]
    # wrk leaves at its end, whatever it waits for.
    failed = [one for one in without_answer if "client" not in one.end and one.end != "cut: the proxy stops"]
    in_flight = [one for one in failed if one.was_in_flight_at(f"{POD1}:{SLOW_PORT}", killed_at)]
    errors = re.search(r"connect (\d+), read (\d+), write (\d+), timeout (\d+)", report)
    assert [one for one in failed if one not in in_flight] == []
    assert errors is not None, report
    assert [int(count) for count in errors.groups()] == [0, len(in_flight), 0, 0]
    assert 0 < len(in_flight) <= 32


SLOW_PORT = 9001
SLOW_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok"
_SLOW_SERVER = f"""
import socket, time
with socket.create_server(("", {SLOW_PORT}), backlog=128) as server:
    while True:
        sock, _ = server.accept()
        with sock:
            sock.recv(4096)
            time.sleep(0.0005)
            sock.sendall({SLOW_ANSWER!r})
"""


def start_slow_server(pod: Host) -> subprocess.Popen[bytes]:
    process = pod.start(sys.executable, "-c", _SLOW_SERVER)
    wait_until(partial(is_listening, pod), f"{pod.name} has a second server")
    return process


def is_listening(pod: Host) -> bool:
    try:
        connect(pod, "127.0.0.1", SLOW_PORT).close()
    except OSError:
        return False
    return True


def unread_requests(pod: Host) -> int:
    """Return the number of connections at SLOW_PORT with bytes that the server of *pod* has not read."""
    rows = [line.split() for line in pod.run("cat", "/proc/net/tcp").stdout.splitlines()[1:]]
    at_server = [row for row in rows if row[1].endswith(f":{SLOW_PORT:04X}") and row[3] == "01"]
    return sum(int(row[4].partition(":")[2], 16) > 0 for row in at_server)


@dataclass(frozen=True)
class EndedConnection:
    """A line about a connection in the log of `forward -v`. ``bytes_to_backend``: those that the kernel has taken."""

    client: str
    endpoint: str
    bytes_to_backend: int
    bytes_to_client: int
    began_at: float
    end: str

    def was_in_flight_at(self, endpoint: str, killed_at: float) -> bool:
        """Return whether *endpoint* had the whole request, on a connection from before it was killed."""
        return self.endpoint == endpoint and self.bytes_to_backend > 0 and self.began_at < killed_at


def ended_connections(forward: Forward) -> list[EndedConnection]:
    line = re.compile(r"(\S+)Z \S+ TCP (\S+) -> \S+ -> (\S+) \(.*\) up=(\d+) down=(\d+) (\S+)ms (.*)")
    found = []
    for at, client, endpoint, up, down, took_ms, end in line.findall(forward.text()):
        began_at = datetime.fromisoformat(f"{at}+00:00").timestamp() - float(took_ms) / 1_000
        found.append(EndedConnection(client, endpoint, int(up), int(down), began_at, end))
    return found


def test_a_headless_service_and_endpoints_of_the_other_family_are_reached(start: Start, tmp_path: Path) -> None:
    forward = start("-f", str(write(tmp_path, ServiceLab.pod_ip6(0), cluster_ip="None")), "svc/web", ":80", ":53")

    assert forward.ask(forward.port("8080")) == "pod1"
    assert ask_udp(forward.node, "127.0.0.1", forward.port("5353/udp")) == "pod1"


def test_endpoints_that_fail_their_probes_get_nothing(start: Start, tmp_path: Path) -> None:
    file = write(tmp_path, POD1, POD2)
    annotation = "annotations: {userspace-proxy/health-check: udp send=who expect=pod2}"
    file.write_text(file.read_text().replace("{name: web}", f"{{name: web, {annotation}}}"))
    forward = start("-f", str(file), "svc/web", ":53")
    port = forward.port("5353/udp")

    forward.wait_said(f"endpoint {POD1}:5353 is unhealthy")
    wait_until(lambda: {ask_udp(forward.node, "127.0.0.1", port) for _ in range(4)} == {"pod2"}, "only pod2 answers")


def test_the_port_of_the_service_is_the_local_one_if_none_is_given(start: Start, tmp_path: Path) -> None:
    file = write(tmp_path, POD1)
    file.write_text(file.read_text().replace("port: 53,", "port: 5300,"))
    forward = start("-f", str(file), "svc/web", "5300", "--address", "127.0.0.1,127.0.0.9")

    assert forward.port("5353/udp") == 5300
    assert ask_udp(forward.node, "127.0.0.9", 5300) == "pod1"


def test_a_rollout_in_a_cluster_is_followed_with_access_to_one_namespace(
    start: Start, cluster: Cluster, world: ServiceLab
) -> None:
    cluster.serve("web", "10.96.9.1", POD1)
    forward = start("--kubeconfig", str(cluster.config), "svc/web", ":80")
    port = forward.port("8080")
    assert forward.ask(port) == "pod1"

    cluster.serve("web", "10.96.9.1", POD2)
    wait_until(lambda: forward.ask(port) == "pod2", "traffic goes to the new endpoint")

    paths = {path for path, _ in cluster.api.server.requests}
    assert {path.partition("/namespaces/")[2] for path in paths} == {"default/services", "default/endpointslices"}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("svc/nope", "80"), "there is no Service default/nope; -n chooses another namespace"),
        (("svc/web", "81"), "Service default/web has no port 81; it has 80/TCP http, 53/UDP dns"),
        (("svc/web", ":80/udp"), "Service default/web has no port 80/UDP; it has 80/TCP http, 53/UDP dns"),
        (("svc/web", ":80", "--address", "192.0.2.77"), "cannot listen at 192.0.2.77:0: cannot assign requested"),
    ],
)
def test_what_cannot_be_forwarded_is_named(
    world: ServiceLab, tmp_path: Path, arguments: tuple[str, ...], expected: str
) -> None:
    assert expected in told(world, "-f", str(write(tmp_path, POD1)), *arguments)


def test_a_service_without_endpoints_that_can_be_reached_is_explained(start: Start, tmp_path: Path) -> None:
    forward = start("-f", str(write(tmp_path, "203.0.113.7")), "svc/web", ":80")
    forward.wait_said("no endpoint of default/web can be reached from here (203.0.113.7:8080: ")
    assert "run this on a node of the cluster" in forward.text()

    write(tmp_path)
    port = forward.port("8080")
    wait_until(lambda: _is_reset(forward, port), "there is no endpoint")


def _is_reset(forward: Forward, port: int) -> bool:
    try:
        forward.ask(port)
    except ConnectionError:
        return True
    return False


@pytest.fixture
def cluster(world: ServiceLab, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(world, tmp_path)
    yield made
    made.api.close()
