"""`trace` with real packets: in each mode it names the portal's rule and the endpoint, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

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
    told,
    wait_until,
)
from userspace_proxy.lab import CLIENT_IP, NODE_IP, Host, ServiceLab

MODES = {
    "userspace-nftables": ("nftables", "userspace", '10.96.12.1 . tcp . 80 comment "default/web:http"'),
    "userspace-iptables": ("iptables", "userspace", '--comment "default/web:http" -j REDIRECT'),
    "nftables": ("nftables", "nftables", '10.96.12.1 . tcp . 80 comment "default/web:http"'),
    "iptables": ("iptables", "iptables", '--comment "default/web:http cluster IP"'),
}
WEB = "10.96.12.1"


@contextlib.contextmanager
def running(world: ServiceLab, folder: Path, mode: str) -> Iterator[Proxy]:
    rules, proxy_mode, _ = MODES[mode]
    world.node.set_knob("ipv4/ip_forward", 1)
    world.node.set_knob("ipv6/conf/all/forwarding", 1)
    one = Proxy(world, folder, rules)
    one.apply("web", documents(service("web", WEB), endpoints("web", POD1)))
    try:
        one.start("--proxy-mode", proxy_mode)
        yield one
        assert one.stop() == 0, one.log()
    finally:
        one.end()


@pytest.fixture(scope="module", params=MODES)
def proxy(
    world: ServiceLab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[tuple[Proxy, str]]:
    """A proxy in each mode, with the text that identifies the rule of the Service web there."""
    with running(world, tmp_path_factory.mktemp("proxy"), request.param) as one:
        yield one, MODES[request.param][2]


# Tests about what is the same in every mode.
in_userspace_mode = pytest.mark.parametrize("proxy", ["userspace-nftables"], indirect=True)


@pytest.fixture
def userspace(proxy: tuple[Proxy, str]) -> Proxy:
    return proxy[0]


def traced(proxy: Proxy, *arguments: str) -> dict[str, Any]:
    before = tables(proxy.node)
    done = proxy.node.run(*proxy.command("trace", "--json", *arguments), check=False, timeout_s=20)
    assert done.returncode == 0, done.stderr
    assert tables(proxy.node) == before
    story: dict[str, Any] = json.loads(done.stdout)
    return story


def tables(node: Host) -> str:
    return node.run("nft", "list", "tables").stdout


def said(story: dict[str, Any], role: str = "client") -> list[str]:
    """Return every rule, with its map element, that the packet in this *role* met."""
    (leg, *_) = [one for one in story["legs"] if one["role"] == role]
    steps = [step for hook in leg["hooks"] for visit in hook["visits"] for step in visit["steps"]]
    return [text for step in steps for text in (step["rule"], step["element"])]


def hooks(story: dict[str, Any], role: str = "client") -> list[str]:
    return [hook["name"] for leg in story["legs"] if leg["role"] == role for hook in leg["hooks"]]


def test_from_the_node_and_from_a_pod_the_rule_and_the_endpoint_are_named(proxy: tuple[Proxy, str]) -> None:
    one, rule = proxy
    for arguments, first in (((), "OUTPUT"), (("--from-pod", "client"), "PREROUTING")):
        story = traced(one, f"{WEB}:80", *arguments)

        assert hooks(story)[0] == first
        assert [text for text in said(story) if rule in text], said(story)
        assert f"{POD1}:8080" in story["outcome"]
        assert story["outcome"].startswith(f"{WEB}:80 became ")
        assert story["outcome"].endswith("the answer was SYN+ACK")


def test_the_next_packet_of_another_client_is_followed_and_drawn(
    proxy: tuple[Proxy, str], world: ServiceLab, tmp_path: Path
) -> None:
    one, rule = proxy
    drawing = tmp_path / "way.svg"
    before = tables(one.node)
    command = one.node.command(*one.command("trace", f"{WEB}:80", "--from", CLIENT_IP, "--svg", str(drawing)))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "waiting 30 s for the next TCP packet from 192.168.50.2" in tracer.stderr.readline()
        assert answers(world.node, WEB, 80) == "pod1"  # the node's own is not the one
        assert answers(world.client, WEB, 80) == "pod1"
        shown, _ = tracer.communicate(timeout=20)

    assert tracer.returncode == 0
    assert "PREROUTING  as it comes in (in eth0)" in shown
    assert rule in shown
    ElementTree.parse(drawing)  # noqa: S314 - our own
    assert tables(one.node) == before


def test_datagrams_are_followed_too(proxy: tuple[Proxy, str], world: ServiceLab) -> None:
    one, _ = proxy
    for client in (world.client, world.node):
        wait_until(lambda client=client: ask_udp(client, WEB) == "pod1", "UDP is served")  # type: ignore[misc]
    story = traced(one, f"{WEB}:53", "--udp", "--from-pod", "client")

    assert story["protocol"] == "udp"
    assert f"{POD1}:5353" in story["outcome"]
    assert story["outcome"].endswith("the answer was a datagram")


def test_a_service_without_endpoints_is_refused_by_a_rule_that_is_named(proxy: tuple[Proxy, str]) -> None:
    one, _ = proxy
    one.apply("empty", documents(service("empty", "10.96.12.2"), endpoints("empty")))
    wait_until(lambda: "default/empty:http" in one.rules_text(), "the empty Service is known")

    story = traced(one, "10.96.12.2:80", "--from-pod", "client")

    assert "refused" in story["outcome"]
    by_a_rule = "refused at" in story["outcome"] and "reject" in story["outcome"].lower()
    assert by_a_rule or "no process listens at port" in story["outcome"]


@in_userspace_mode
def test_refused_datagrams_are_reported(userspace: Proxy) -> None:
    userspace.apply("void", documents(service("void", "10.96.12.5"), endpoints("void")))
    wait_until(lambda: "default/void:dns" in userspace.rules_text(), "the empty Service is known")

    story = traced(userspace, "10.96.12.5:53/udp", "--from-pod", "client")

    assert "the answer was ICMP unreachable, refused; no process listens at port" in story["outcome"]


@in_userspace_mode
def test_an_unserved_portal_is_translated_by_no_rule(userspace: Proxy) -> None:
    own = traced(userspace, "10.96.12.99:80")
    clients = traced(userspace, "10.96.12.99:80", "--from-pod", "client")

    unserved = "no rule translated 10.96.12.99:80: the packet went "
    assert own["outcome"] == f"{unserved}on as it was; nothing came back in time"
    assert own["listener"] is None
    # The route that makes local processes reach cluster IPs leads it out by lo: a rule of ours ends that.
    assert clients["outcome"].startswith("refused at FORWARD by the rule")
    assert hooks(clients) == ["PREROUTING", "FORWARD"]


@in_userspace_mode
def test_the_rule_that_drops_a_packet_is_named(userspace: Proxy) -> None:
    userspace.node.run("nft", "-f", "-", stdin=(
        "table inet wall { chain forbidden { type filter hook input priority 0; ip saddr 192.168.50.2 drop; }\n}\n"
    ))  # fmt: skip
    try:
        story = traced(userspace, f"{WEB}:80", "--from-pod", "client")
    finally:
        userspace.node.run("nft", "delete", "table", "inet", "wall")

    assert story["outcome"] == "dropped at INPUT by the rule 'ip saddr 192.168.50.2 drop' in forbidden"


@in_userspace_mode
def test_in_userspace_mode_the_process_and_its_second_connection_are_shown(userspace: Proxy) -> None:
    story = traced(userspace, f"{WEB}:80", "--from-pod", "client")

    assert story["listener"]["pid"] in userspace.workers()
    assert story["listener"]["name"] == "userspace-proxy worker"
    assert story["listener"]["port"] == userspace.proxy_port("default/web:http")
    assert hooks(story, "dial") == ["OUTPUT", "POSTROUTING"]
    assert story["flow"]["original"]["destination"] == WEB


@in_userspace_mode
def test_every_dial_to_a_backend_that_fails_is_shown_before_the_one_that_serves(
    userspace: Proxy, world: ServiceLab
) -> None:
    """POD3's port has no listener, and POD2 drops packets."""
    pods = (ServiceLab.pod_ip(2), POD2, POD1)
    userspace.apply("odd", documents(service("odd", "10.96.12.4"), endpoints("odd", *pods, http_port=8081)))
    wait_until(lambda: "10.96.12.4 . tcp . 80" in userspace.rules_text(), "odd is served")
    silence = "table inet silence { chain in { type filter hook input priority 0; tcp dport 8081 drop; }\n}\n"
    world.pods[1].run("nft", "-f", "-", stdin=silence)
    server = world.pods[0].start(sys.executable, "-m", "http.server", "8081")
    try:
        wait_until(lambda: not is_refused(world.pods[0], "127.0.0.1", 8081), "a server is in pod1")
        story = traced(userspace, "10.96.12.4:80", "--from-pod", "client")
    finally:
        server.kill()
        world.pods[1].run("nft", "delete", "table", "inet", "silence")

    dials = [
        (leg["hooks"][-1]["after"]["destination"], leg["answered"]) for leg in story["legs"] if leg["role"] == "dial"
    ]
    assert dials == [(pods[0], "RST+ACK"), (POD2, ""), (POD1, "SYN+ACK")]
    assert story["outcome"].startswith("10.96.12.4:80 became ")
    assert story["outcome"].endswith(f"{POD1}:8081; the answer was SYN+ACK")


def test_node_ports_are_portals_as_well(proxy: tuple[Proxy, str], world: ServiceLab) -> None:
    one, _ = proxy
    ports = "[{name: http, port: 80, nodePort: 30812}]"
    one.apply("open", documents(service("open", "10.96.12.6", ports, "  type: NodePort"), endpoints("open", POD1)))
    wait_until(lambda: answers(world.client, NODE_IP, 30812) == "pod1", "the node port is served")

    for arguments in ((), ("--from-pod", "client")):
        story = traced(one, f"{NODE_IP}:30812", *arguments)

        assert [text for text in said(story) if "30812" in text and "default/open:http" in text], said(story)
        assert f"{POD1}:8080" in story["outcome"]


@in_userspace_mode
def test_ipv6_is_followed_as_well(userspace: Proxy) -> None:
    userspace.apply("six", documents(service("six", "fd00:96::12"), endpoints("six", ServiceLab.pod_ip6(1))))
    wait_until(lambda: "fd00:96::12 . tcp . 80" in userspace.rules_text(), "IPv6 is served")

    story = traced(userspace, "[fd00:96::12]:80", "--from-pod", "client")

    assert "[fd00:244::3]:8080; the answer was SYN+ACK" in story["outcome"]


@in_userspace_mode
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_behind_however_it_ends(userspace: Proxy, signum: signal.Signals) -> None:
    before = tables(userspace.node)
    command = userspace.node.command(*userspace.command("trace", f"{WEB}:80", "--wait"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as tracer:
        assert tracer.stderr is not None
        assert "waiting" in tracer.stderr.readline()
        assert "userspace_proxy_trace" in tables(userspace.node)
        os.kill(tracer.pid, signum)
        _, words = tracer.communicate(timeout=10)

    if signum is not signal.SIGKILL:
        assert (tracer.returncode, words) == (1, "userspace-proxy: stopped\n")
    wait_until(lambda: tables(userspace.node) == before, "the table is gone")


@in_userspace_mode
def test_a_missing_packet_is_reported(userspace: Proxy) -> None:
    done = userspace.node.run(
        *userspace.command("trace", f"{WEB}:80", "--wait", "--timeout", "200ms"), check=False, timeout_s=20
    )

    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "userspace-proxy: no packet came"


@in_userspace_mode
def test_missing_capabilities_are_reported_in_one_line(userspace: Proxy) -> None:
    line = told(
        userspace.node, userspace, "trace", f"{WEB}:80", prefix=("setpriv", "--bounding-set=-all", "--inh-caps=-all")
    )

    assert line == "userspace-proxy: tracing packets is not permitted; run as root or with CAP_NET_ADMIN"


@in_userspace_mode
def test_a_second_trace_at_once_is_refused(userspace: Proxy) -> None:
    command = userspace.node.command(*userspace.command("trace", f"{WEB}:80", "--wait"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        first.stderr.readline()

        line = told(userspace.node, userspace, "trace", f"{WEB}:80")
        assert "another trace is running here" in line

        first.send_signal(signal.SIGINT)
        first.communicate(timeout=10)


def test_each_available_mode_is_drawn(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.drawings", str(tmp_path), "userspace", "no-such-mode"]

    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)

    assert done.returncode == 0, done.stderr
    assert "userspace: 10.96.0.11:80 became 192.168.50.1:" in done.stdout
    assert done.stderr.startswith("no-such-mode: not drawn, the proxy did not start: ")
    assert done.stderr.count("\n") == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == ["userspace-wide.svg", "userspace.svg"]
    for file in tmp_path.iterdir():
        ElementTree.parse(file)  # noqa: S314 - our own


def test_a_recording_of_another_machine_is_drawn(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.drawings", str(tmp_path)]
    said = subprocess.run([*command, "nftables", "--print"], capture_output=True, timeout=50, check=True).stdout
    assert not list(tmp_path.iterdir())
    (tmp_path / "theirs.json").write_bytes(said)

    subprocess.run([*command, str(tmp_path / "theirs.json")], capture_output=True, timeout=50, check=True)

    assert "Mode theirs: a packet to 10.96.0.11:80" in (tmp_path / "theirs.svg").read_text()
