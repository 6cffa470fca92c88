"""Health-check node ports of the running proxy, asked as load balancers ask; no probe fails in a hand-over."""

from __future__ import annotations

import json
import signal
import socket

from tests.net.test_handover import second, variants
from tests.net.world import (
    PATIENCE,
    POD1,
    POD2,
    Proxy,
    background_requests,
    documents,
    endpoints,
    is_refused,
    service,
    wait_until,
)
from userspace_proxy.lab import NODE_IP, ServiceLab, connect

__all__ = ["second"]  # a fixture

PORT = 30_100


def serve(proxy: Proxy, *pods: str, policy: str = "Local", conditions: str = "{}") -> None:
    """Have a Service of type LoadBalancer with *pods*, all of which are on this node."""
    node = socket.gethostname().lower()
    extra = f"  type: LoadBalancer\n  externalTrafficPolicy: {policy}\n  healthCheckNodePort: {PORT}"
    slices = endpoints("web", *pods, conditions=conditions).replace("conditions:", f"nodeName: {node}, conditions:")
    proxy.apply("web", documents(service("web", "10.96.4.1", extra=extra), slices))


def probe(world: ServiceLab) -> tuple[int, int]:
    """Return the status and the count in the answer to a load balancer.

    The probe waits as long as a start may take. Clients of a process that starts anew wait in the accept queue.
    """
    with connect(world.client, NODE_IP, PORT, 20 * PATIENCE) as sock:
        sock.sendall(b"GET /healthz HTTP/1.1\r\nHost: node\r\n\r\n")
        answer = b""
        while part := sock.recv(4096):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)["localEndpoints"]


def test_load_balancers_get_the_number_of_local_ready_endpoints(fresh_proxy: Proxy, world: ServiceLab) -> None:
    serve(fresh_proxy, POD1, POD2)
    fresh_proxy.start()
    wait_until(lambda: probe(world) == (200, 2), "two are told of")

    serve(fresh_proxy, POD1)
    wait_until(lambda: probe(world) == (200, 1), "one is told of")
    serve(fresh_proxy, POD1, conditions="{ready: false, serving: true, terminating: true}")
    wait_until(lambda: probe(world) == (503, 0), "one that ends is not told of")
    serve(fresh_proxy, POD1, policy="Cluster")
    wait_until(lambda: is_refused(world.client, NODE_IP, PORT), "the port is closed")
    assert fresh_proxy.stop() == 0


@variants()
def test_no_probe_fails_while_a_second_run_takes_over(
    fresh_proxy: Proxy, second: Proxy, world: ServiceLab, rules: str, loop: str, workers: int
) -> None:
    for proxy in (fresh_proxy, second):
        proxy.rules, proxy.loop = rules, loop
    serve(fresh_proxy, POD1)
    fresh_proxy.start("--workers", str(workers))

    with background_requests(lambda: probe(world)) as told:
        wait_until(lambda: len(told) > 20, "probes are answered")
        second.start("--workers", str(workers))
        assert fresh_proxy.process is not None
        assert fresh_proxy.process.wait(20) == 0
        flowed = len(told)
        wait_until(lambda: len(told) > flowed + 20, "probes are still answered")

    assert set(told) == {(200, 1)}
    assert second.stop() == 0
    assert is_refused(world.client, NODE_IP, PORT)


@variants()
def test_no_probe_fails_while_it_starts_anew(
    fresh_proxy: Proxy, world: ServiceLab, rules: str, loop: str, workers: int
) -> None:
    fresh_proxy.rules, fresh_proxy.loop = rules, loop
    serve(fresh_proxy, POD1)
    fresh_proxy.start("--workers", str(workers))
    assert fresh_proxy.process is not None

    with background_requests(lambda: probe(world)) as told:
        wait_until(lambda: len(told) > 20, "probes are answered")
        fresh_proxy.process.send_signal(signal.SIGUSR2)
        wait_until(lambda: fresh_proxy.log().count("ready:") == 2, "it is ready again")
        flowed = len(told)
        wait_until(lambda: len(told) > flowed + 20, "probes are still answered")

    assert set(told) == {(200, 1)}
    assert fresh_proxy.stop() == 0
    assert is_refused(world.client, NODE_IP, PORT)
