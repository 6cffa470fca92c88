"""`forward`: a Service at local ports, without a capability; from files and from an API server, through a rollout."""

from __future__ import annotations

import re
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
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
from userspace_proxy.lab import Host, ServiceLab, ask

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
    seen: list[object] = []

    with background_requests(lambda: forward.ask(port)) as outcomes:
        for pods, names in (((POD2,), {"pod2"}), ((POD2, POD3), {"pod2", "pod3"}), ((POD1,), {"pod1"})):
            write(tmp_path, *pods)
            wait_until(partial(_answers, forward, port, names), f"only {names} answer")
        seen += outcomes

    assert {one for one in seen if isinstance(one, BaseException)} == set()
    assert {"pod1", "pod2", "pod3"} <= set(map(str, seen))


def _answers(forward: Forward, port: int, names: set[str]) -> bool:
    return {forward.ask(port) for _ in range(4)} == names


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
