"""`get`, `describe` and `why` at the control socket of a running proxy, for Services that work and that do not."""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import stat
from collections.abc import Iterator
from typing import Any

import pytest

from tests.net.world import POD1, POD2, Proxy, documents, endpoints, service, wait_until
from userspace_proxy.lab import ServiceLab, ask, connect

POD3 = ServiceLab.pod_ip(2)
CLIENT = "192.168.50.2"


def tell(proxy: Proxy, *arguments: str, check: bool = True) -> str:
    """Return the output of a command that asks *proxy*."""
    socket_at = str(proxy.folder / "state" / "control.sock")
    done = proxy.node.run(*proxy.command(*arguments, "--control-socket", socket_at), check=False)
    assert not check or done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def told(proxy: Proxy, *arguments: str) -> Any:
    return json.loads(tell(proxy, *arguments, "-o", "json", check=False))


def obstacle(proxy: Proxy, name: str, *arguments: str) -> str:
    answer = told(proxy, "why", name, *arguments)
    return "" if answer["obstacle"] is None else answer["obstacle"]["reason"]


@pytest.fixture(scope="module")
def running(world: ServiceLab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """A proxy in userspace mode."""
    one = Proxy(world, tmp_path_factory.mktemp("ask"))
    try:
        one.start()
        yield one
    finally:
        one.end()


@pytest.fixture(autouse=True)
def no_service_left(running: Proxy) -> Iterator[None]:
    """Remove every Service after each test, also if it fails."""
    yield
    for file in running.manifests.glob("*.yaml"):
        file.unlink()


@pytest.fixture
def web(running: Proxy) -> str:
    running.serve("web", "10.96.9.1", POD1, POD2, POD3)
    return "web"


def with_annotation(name: str, ip: str, annotation: str) -> str:
    return service(name, ip).replace(f"{{name: {name}}}", f"{{name: {name}, annotations: {{{annotation}}}}}")


def pod(name: str, ip: str, app: str, ready: str = "True", port_name: str = "http") -> str:
    return f"""\
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {app}}}}}
spec: {{containers: [{{name: c, ports: [{{name: {port_name}, containerPort: 8080}}]}}]}}
status: {{podIP: {ip}, conditions: [{{type: Ready, status: "{ready}"}}]}}
"""


# ---- get and describe


def test_get_lists_services_in_the_columns_of_kubectl(running: Proxy, web: str) -> None:
    lines = tell(running, "get", "services", "-o", "wide").splitlines()

    assert lines[0].split() == ["NAME", "TYPE", "CLUSTER-IP", "EXTERNAL-IP", "PORT(S)", "AGE", "SELECTOR"]
    assert lines[1].split()[:5] == ["web", "ClusterIP", "10.96.9.1", "<none>", "80/TCP,53/UDP"]
    (row,) = told(running, "get", "svc", "web")["items"]
    assert row["cluster_ips"] == ["10.96.9.1"]


def test_get_shows_open_connections_and_what_endpoints_do(running: Proxy, web: str, world: ServiceLab) -> None:
    with connect(world.client, "10.96.9.1", 80):
        wait_until(lambda: told(running, "get", "connections", "web")["items"], "the connection is listed")
        (connection,) = told(running, "get", "connections", "web")["items"]
        of_port = [row for row in told(running, "get", "endpoints", "web")["items"] if row["port"] == "http"]

    assert connection["client"] == f"{CLIENT}:{sock_port(connection)}"
    assert connection["portal"] == "10.96.9.1:80"
    assert connection["why"] == "round robin"
    assert {row["address"]: row["open"] for row in of_port} == {
        f"{ip}:8080": int(connection["endpoint"] == f"{ip}:8080") for ip in (POD1, POD2, POD3)
    }
    assert {row["state"] for row in of_port} == {"ready"}


def sock_port(connection: dict[str, Any]) -> str:
    return str(connection["client"]).rpartition(":")[2]


def test_describe_lists_events(running: Proxy, web: str) -> None:
    running.apply("web", documents(service("web", "10.96.9.1"), endpoints("web", POD1)))
    wait_until(lambda: len(told(running, "get", "endpoints", "web")["items"]) == 2, "the endpoints are gone")

    answer = told(running, "describe", "service", "web")

    assert any("removed 10.244.0.3:8080, 10.244.0.4:8080" in event["what"] for event in answer["events"])
    assert "Session Affinity:" in tell(running, "describe", "service", "web")
    assert "there is no Service default/missing" in tell(running, "describe", "service", "missing", check=False)


# ---- why


@pytest.mark.parametrize("algorithm", ["round-robin", "least-connections", "source-hash"])
def test_the_next_connection_reaches_the_endpoint_that_why_names(
    running: Proxy, world: ServiceLab, algorithm: str
) -> None:
    extra = f'"userspace-proxy/balance": {algorithm}'
    running.apply("next", documents(with_annotation("next", "10.96.9.2", extra), endpoints("next", POD1, POD2, POD3)))
    wait_until(lambda: told(running, "why", "next")["next"], "the Service is served")
    names = {f"{ServiceLab.pod_ip(index)}:8080": f"pod{index + 1}" for index in range(3)}

    for _ in range(8):
        (foretold,) = told(running, "why", "next", "--client", CLIENT)["next"]
        assert ask(world.client, "10.96.9.2") == names[foretold["endpoint"]]


def test_each_other_endpoint_has_a_reason(running: Proxy) -> None:
    running.apply(
        "mixed",
        documents(
            with_annotation("mixed", "10.96.9.3", f'"userspace-proxy/weights": "{POD2}=0"'),
            endpoints("mixed", POD1, POD2),
            endpoints("mixed", POD3, conditions="{ready: false}").replace("mixed-ipv4", "mixed-2"),
        ),
    )
    wait_until(lambda: len(told(running, "why", "mixed")["unused"]) == 2, "all endpoints are known")

    answer = told(running, "why", "mixed")

    assert [each["endpoint"] for each in answer["next"]] == [f"{POD1}:8080"]
    reasons = {each["endpoint"]: each["why"] for each in answer["unused"]}
    assert reasons[f"{POD2}:8080"] == "its weight is 0"
    assert reasons[f"{POD3}:8080"].startswith("not-ready")
    assert answer["rules"] == "loaded"


BROKEN = {
    "selector": (
        service("s", "10.96.9.10", extra="  selector: {app: wep}") + "---\n" + pod("s-1", POD1, "web"),
        "matches no Pod",
    ),
    "unready": (
        service("s", "10.96.9.10", extra="  selector: {app: un}") + "---\n" + pod("s-1", POD1, "un", ready="False"),
        "is not ready",
    ),
    "port name": (
        service("s", "10.96.9.10", ports="[{port: 80, targetPort: web}]", extra="  selector: {app: pn}")
        + "---\n"
        + pod("s-1", POD1, "pn"),
        "no Pod it selects has a port named 'web'",
    ),
    "policy": (
        service("s", "10.96.9.10", extra="  internalTrafficPolicy: Local") + "---\n" + endpoints("s", POD1),
        "internalTrafficPolicy is Local",
    ),
    "namespace": (
        service("s", "10.96.9.10", extra="  selector: {app: ns}")
        + "---\n"
        + pod("s-1", POD1, "ns").replace("name: s-1", "name: s-1, namespace: prod"),
        "s-1 in namespace 'prod' has these labels",
    ),
    "no route": (
        service("s", "10.96.9.10", ports="[{name: http, port: 80}]") + "---\n" + endpoints("s", "203.0.113.9"),
        "no route",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_why_names_the_one_reason(running: Proxy, fault: str) -> None:
    manifest, reason = BROKEN[fault]
    running.apply("s", manifest)
    wait_until(lambda: obstacle(running, "s") != "there is no such Service here", "the Service is known")
    if fault == "no route":
        default = running.node.run("ip", "route", "show", "default").stdout.strip()
        assert not default, "the lab's node has no default route"

    assert reason in obstacle(running, "s")

    assert "fix: " in tell(running, "why", "s", check=False)
    running.delete("s")
    wait_until(lambda: "no such Service" in obstacle(running, "s"), "the Service is gone")


def test_why_notes_what_is_wrong_for_some_clients_and_what_is_probably_wrong(running: Proxy) -> None:
    ports = "[{port: 80, targetPort: 8081, nodePort: 30080}]"
    extra = "  selector: {app: notes}\n  type: NodePort\n  externalTrafficPolicy: Local"
    running.apply("s", service("s", "10.96.9.11", ports=ports, extra=extra) + "---\n" + pod("s-1", POD1, "notes"))
    wait_until(lambda: told(running, "why", "s")["next"], "the Service is served")

    answer = tell(running, "why", "s")

    assert "note: clients of *:30080 are refused: externalTrafficPolicy is Local, and no endpoint is on this" in answer
    assert "note: no container of the Pods that the selector finds lists port 8081 (they list 8080)" in answer


def test_why_names_endpoints_that_fail(running: Proxy, world: ServiceLab) -> None:
    running.serve("dead", "10.96.9.4", POD1, POD2, http_port=9)
    for _ in range(4):
        # The reset may come before the connection has been seen to be there.
        with contextlib.suppress(ConnectionResetError), connect(world.client, "10.96.9.4", 80) as sock:
            sock.recv(1)

    said = obstacle(running, "dead")

    assert "every endpoint fails" in said
    assert "Connection refused" in said


def test_why_names_source_ranges_that_exclude_a_client(running: Proxy) -> None:
    extra = (
        "  type: LoadBalancer\n  loadBalancerSourceRanges: [10.1.0.0/16]\n"
        "status: {loadBalancer: {ingress: [{ip: 203.0.113.7}, {ip: '2001:db8::7'}]}}"
    )
    running.apply("lb", documents(service("lb", "10.96.9.5", extra=extra), endpoints("lb", POD1)))
    wait_until(lambda: told(running, "why", "lb")["next"], "the Service is served")

    assert "excludes 192.0.2.1" in obstacle(running, "lb", "--client", "192.0.2.1")
    assert not obstacle(running, "lb", "--client", "10.1.2.3")


def test_why_names_a_firewall_and_another_proxys_rules(running: Proxy, web: str) -> None:
    node = running.node
    node.run("nft", "table inet fw { chain in { type filter hook input priority 0; policy drop; }; }")
    try:
        assert "a firewall of this node drops" in obstacle(running, "web")
    finally:
        node.run("nft", "delete table inet fw")
    for rule in ("input { tcp dport 10000-29999", "output { ip daddr 10.0.0.0/8"):
        hook, _, match = rule.partition(" { ")
        node.run("nft", f"table inet fw {{ chain c {{ type filter hook {hook} priority 0; {match} drop; }}; }}")
        try:
            assert "a firewall of this node drops" in obstacle(running, "web")
        finally:
            node.run("nft", "delete table inet fw")
    table = "table ip kube-proxy { map service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }; }"
    node.run("nft", table)
    try:
        assert not obstacle(running, "web")
        node.run("nft", "add element ip kube-proxy service-ips { 10.96.9.1 . tcp . 80 : drop }")
        assert "another proxy's rules" in obstacle(running, "web")
    finally:
        node.run("nft", "delete table ip kube-proxy")
    assert not obstacle(running, "web")


# ---- the socket


def test_names_and_the_kubelets_variables_are_those_of_the_running_proxy(running: Proxy, web: str) -> None:
    assert "WEB_SERVICE_HOST=10.96.9.1\nWEB_SERVICE_PORT=80\n" in tell(running, "env")
    assert tell(running, "names", "-n", "shop", "--cluster-domain", "example") == (
        "10.96.9.1 web.default.svc.example web.default.svc web.default\n"
    )
    assert tell(running, "env", "-n", "shop") == ""


def test_the_socket_is_for_its_user_alone(running: Proxy) -> None:
    place = running.folder / "state" / "control.sock"

    assert stat.S_IMODE(place.stat().st_mode) == 0o600
    assert place.stat().st_uid == os.geteuid()


def test_nonsense_at_the_socket_disturbs_nothing(running: Proxy, web: str, world: ServiceLab) -> None:
    seeded = random.Random(7)
    folder = os.open(running.folder / "state", os.O_PATH)
    try:
        for size in (0, 1, 30, 3_000, 100_000):
            for head in (b"", b"GET /v1/why?name=web&port=", b"GET /v1/endpoints?namespace=%ff%00 HTTP/1.1\r\n"):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.settimeout(5)
                    sock.connect(f"/proc/self/fd/{folder}/control.sock")
                    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                        sock.sendall(head + seeded.randbytes(size))
    finally:
        os.close(folder)

    assert ask(world.client, "10.96.9.1").startswith("pod")
    assert not obstacle(running, "web")
    assert "is no IP address" in tell(running, "why", "web", "--client", "me", check=False)


def test_trace_takes_the_name_of_a_service(running: Proxy, web: str) -> None:
    assert "10.96.9.1:80" in tell(running, "trace", "web:http")
    assert "there is no such Service" in tell(running, "trace", "missing", check=False)


def test_a_stopped_proxy_leaves_no_socket(running: Proxy) -> None:
    place = running.folder / "state" / "control.sock"
    assert running.stop() == 0

    assert not place.exists()
    assert "no proxy answers at" in tell(running, "get", "services", check=False)
    running.start()


# Weights that are all 0 are ignored; iptables mode ignores all.
@pytest.mark.parametrize(
    ("mode", "first", "second", "share"), [("nftables", 0, 0, 0.5), ("nftables", 3, 1, 0.75), ("iptables", 1, 0, 0.5)]
)
def test_a_kernel_mode_names_the_facts_that_it_cannot_read(
    running: Proxy, mode: str, first: int, second: int, share: float
) -> None:
    running.stop()
    running.start("--proxy-mode", mode)
    weights = f'"userspace-proxy/weights": "{POD1}={first},{POD2}={second}"'
    running.apply("k", documents(with_annotation("k", "10.96.9.6", weights), endpoints("k", POD1, POD2)))
    wait_until(lambda: told(running, "why", "k")["next"], "the Service is served")

    answer = told(running, "why", "k")

    assert [(each["endpoint"], each["probability"]) for each in answer["next"]] == [
        (f"{POD1}:8080", share),
        (f"{POD2}:8080", 1 - share),
    ]
    assert answer["next"][0]["why"] == f"at random, by {mode}"
    assert "the kernel does not tell" in answer["unknown"][0]
    assert answer["rules"] == "loaded"
    assert answer["obstacle"] is None
