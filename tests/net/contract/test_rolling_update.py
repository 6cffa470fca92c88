"""A Deployment is rolled over under wrk, with the EndpointSlices that the real controllers would write on the way.

One surge pod at a time, none unavailable: a new pod is listed as not ready, nginx starts in it, it becomes ready; then
an old one terminates and leaves the slice. The load from outside asks the node port, the one from a pod the cluster IP.
"""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.net.contract.cluster import PRIMARY, Place
from tests.net.contract.conftest import ContractProxy, Variant
from tests.net.contract.services import Given
from tests.net.contract.table import EXTERNAL_LOCAL
from tests.net.world import answers, wait_until

MakeGiven = Callable[..., Given]

WEB_PORT = 8090
# Each old pod and its successor.
ROLLOUT = {"local1": "local3", "remote1": "remote2", "local2": "local4"}
CONNECTIONS = 8
# Requests of one load.
ENOUGH = 1_000
# What a preStop hook sleeps, and how long a slice may lag behind a process that is gone.
PRE_STOP_S = 0.6
STALE_S = 0.2

# A master process, as only a worker of it stops gracefully, and connections that end by themselves now and then.
_NGINX = """\
daemon off; user root; worker_processes 1; pid {folder}/nginx.pid; error_log stderr error;
events {{ worker_connections 512; }}
http {{
  access_log off; keepalive_requests 50;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{ listen {port}; location / {{ return 200 "{name}\\n"; }} }}
}}
"""


class Load:
    """wrk, for at least *seconds* and until `lost`; either a connection for each request or keep-alive."""

    def __init__(self, place: Place, ip: str, port: int, *, keep_alive: bool = False, seconds: int = 6) -> None:
        options = ["-t1", f"-c{CONNECTIONS}", "-d120s", "--timeout", "3s"]
        options += [] if keep_alive else ["-H", "Connection: close"]
        command = place.host.command("wrk", *options, f"http://{ip}:{port}/")
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._ends_at = time.monotonic() + seconds

    def is_on(self) -> bool:
        return self._process.poll() is None

    def lost(self) -> dict[str, int]:
        """Stop the load; return the number of requests without an answer, by kind of failure."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(max(0.0, self._ends_at - time.monotonic()))
        self._process.send_signal(signal.SIGINT)
        out = self._process.communicate(timeout=20)[0]
        done = int(re.findall(r"(\d+) requests in", out)[0])
        assert done > ENOUGH, out
        lost = dict.fromkeys(("connect", "read", "write", "timeout"), 0)
        lost |= {kind: int(n) for kind, n in re.findall(r"(connect|read|write|timeout) (\d+)", out)}
        return lost | {"refused": sum(map(int, re.findall(r"Non-2xx or 3xx responses: (\d+)", out)))}


class Deployment:
    """The pods of a Service and its slice, as the controllers and the kubelet bring them about."""

    def __init__(self, proxy: ContractProxy, service: Given, folder: Path) -> None:
        self._proxy = proxy
        self._folder = folder
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._listed = dict.fromkeys(ROLLOUT, "")
        self.service = service
        for pod in ROLLOUT:
            self._run(pod)
        self._write()

    def roll(self, stop: Callable[[Deployment, str], None]) -> None:
        """Replace each pod once its successor is known to the data plane.

        The rollout takes a second. Where the control process gets no CPU for as long, all pods that it knows are gone,
        and what comes then is reset: 300 to 500 requests of each load with 1.1 s of SIGSTOP. No proxy can prevent that.
        """
        for old, new in ROLLOUT.items():
            self.mark(new, ":unready")
            self._run(new)
            self.mark(new, "")
            self._wait_known(len(ROLLOUT) + 1)
            stop(self, old)
            del self._listed[old]
            self._write()
            self._wait_known(len(ROLLOUT))

    def mark(self, pod: str, condition: str) -> None:
        self._listed[pod] = condition
        self._write()

    def signal(self, pod: str, signum: int) -> subprocess.Popen[bytes]:
        process = self._running[pod]
        process.send_signal(signum)
        return process

    def _wait_known(self, pods: int) -> None:
        def are_known() -> bool:
            return self._proxy.metric("userspace_proxy_endpoints", service=self.service.name) == pods

        wait_until(are_known, f"{pods} pods are known")

    def has_connections(self, pod: str) -> bool:
        command = ("ss", "-Htn", "state", "established", "sport", "=", f":{WEB_PORT}")
        return bool(self._proxy.cluster.places[pod].host.run(*command).stdout)

    def explain(self) -> None:
        """Print the proxy's counters and log, which pytest shows if the test fails."""
        _, counted = self._proxy.get("/metrics", 10249)
        ours = (line for line in counted.splitlines() if f'"{self.service.name}"' in line and not line.endswith(" 0.0"))
        sys.stdout.write("\n".join([*ours, self._proxy.log()[-4_000:]]))

    def close(self) -> None:
        for process in self._running.values():
            process.terminate()
            process.wait(20)
        self._proxy.delete(self.service.name)

    def _run(self, pod: str) -> None:
        folder = self._folder / pod
        folder.mkdir()
        config = folder / "nginx.conf"
        config.write_text(_NGINX.format(folder=folder, name=pod, port=WEB_PORT))
        host = self._proxy.cluster.places[pod].host
        self._running[pod] = host.start("nginx", "-p", str(folder), "-c", str(config), log=folder / "log")
        wait_until(lambda: answers(host, "127.0.0.1", WEB_PORT), f"nginx answers in {pod}")

    def _write(self) -> None:
        words = " ".join(pod + condition for pod, condition in self._listed.items())
        self._proxy.give(self.service.but(slices=(words,)))


def gracefully(deployment: Deployment, pod: str) -> None:
    """Terminate a pod gracefully: it still serves while its preStop hook sleeps, then nginx finishes its requests.

    The hook is what such Deployments have it for: nginx that is told to quit closes connections that were established
    and not accepted yet, and idle ones, upon which a request may just be on its way - whatever proxy stands before it.
    So the hook has to last until the keep-alive connections have had their 50 requests, also on a busy machine.
    """
    deployment.mark(pod, ":leaving")
    time.sleep(PRE_STOP_S)
    wait_until(lambda: not deployment.has_connections(pod), "the pod has no connection left", 60)
    deployment.signal(pod, signal.SIGQUIT).wait(20)


def abruptly(deployment: Deployment, pod: str) -> None:
    """Gone with all of its connections, and listed as ready for a while yet."""
    deployment.signal(pod, signal.SIGTERM).wait(20)
    time.sleep(STALE_S)
    deployment.mark(pod, ":gone")


@pytest.fixture(params=["Cluster", "Local"])
def deployment(
    proxy: ContractProxy, given: MakeGiven, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[Deployment]:
    spec: dict[str, Any] = EXTERNAL_LOCAL if request.param == "Local" else {}
    web = ({"name": "web", "port": 80, "protocol": "TCP"},)
    made = Deployment(proxy, given(type="NodePort", spec=spec, ports=web, targets={"web": WEB_PORT}), tmp_path)
    outside = proxy.cluster.places["outside"].host
    wait_until(lambda: answers(outside, PRIMARY[4], made.service.node_port), "the node port answers")
    yield made
    made.close()


def roll_under_load(proxy: ContractProxy, deployment: Deployment, stop: Callable[[Deployment, str], None]) -> list[Any]:
    """Return the lost requests: of clients outside, with new connections and with keep-alive, and of a pod."""
    service, places = deployment.service, proxy.cluster.places
    outside, caller = places["outside"], places["caller"]
    loads = [
        Load(outside, PRIMARY[4], service.node_port),
        Load(outside, PRIMARY[4], service.node_port, keep_alive=True),
        Load(caller, service.cluster_ip(4), 80),
    ]
    time.sleep(0.5)
    deployment.roll(stop)
    assert all(load.is_on() for load in loads), "the rollout took longer than the load"
    lost = [load.lost() for load in loads]
    deployment.explain()

    heirs = {pod for pod in ROLLOUT.values() if not service.spec or pod.startswith("local")}
    assert {answers(outside.host, PRIMARY[4], service.node_port) for _ in range(30)} == heirs
    return lost


ONE_PROXY = pytest.mark.parametrize("proxy", [Variant("nftables", "uvloop", "node")], indirect=True, ids=str)


@ONE_PROXY
def test_a_rolling_update_fails_no_request(proxy: ContractProxy, deployment: Deployment) -> None:
    lost = roll_under_load(proxy, deployment, gracefully)

    assert [sum(kinds.values()) for kinds in lost] == [0, 0, 0], lost


@ONE_PROXY
def test_pods_that_vanish_before_their_endpoints_fail_those_in_their_hands_alone(
    proxy: ContractProxy, deployment: Deployment
) -> None:
    """Connections that nginx has accepted, or has in its backlog, end with its SIGTERM: no layer 4 proxy can prevent
    that. All later clients reach other pods, though the slice still says ready: for `STALE_S` long a third or a half of
    them would fail, which is far more than the connections there are. They are counted all the same, as wrk calls a
    connection that is refused a failed write more often than a failed connect.
    """
    lost = roll_under_load(proxy, deployment, abruptly)

    for kinds in lost:
        cut = kinds.pop("read") + kinds.pop("write")
        assert cut <= CONNECTIONS * len(ROLLOUT), lost
        assert sum(kinds.values()) == 0, lost


@ONE_PROXY
def test_a_pod_that_is_gone_but_listed_as_ready_fails_no_request_that_begins_then(
    proxy: ContractProxy, deployment: Deployment
) -> None:
    """No earlier request has found that the pod refuses, as requests of a rollout would."""
    deployment.signal("local1", signal.SIGTERM).wait(20)

    load = Load(proxy.cluster.places["outside"], PRIMARY[4], deployment.service.node_port, seconds=2)
    name = deployment.service.name
    wait_until(
        lambda: proxy.metric("userspace_proxy_connections_total", service=name) > 1.1 * ENOUGH, "there were enough", 60
    )
    lost = load.lost()

    assert sum(lost.values()) == 0, lost
