"""Clients notice no backend that refuses, vanishes, dies under load, or returns."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.net.world import Proxy, ask_udp, background_requests, documents, endpoints, service, udp_socket, wait_until
from userspace_proxy.lab import ServiceLab, ask, connect

POD1, POD2, POD3 = (ServiceLab.pod_ip(index) for index in range(3))
# Nobody has this address: a neighbour that the node asks for in vain, so that a dial vanishes.
BLACK_HOLE = "10.244.0.99"
AFFINITY = "  sessionAffinity: ClientIP"


@pytest.fixture
def refusing_pod(world: ServiceLab) -> Iterator[str]:
    """pod3, whose HTTP port has no listener for a while: the node's SYN gets a reset."""
    rules = "table ip refuse { chain in { type filter hook input priority 0; tcp dport 8080 reject with tcp reset; }; }"
    world.pods[2].run("nft", rules)
    yield POD3
    world.pods[2].run("nft", "delete table ip refuse")


@pytest.fixture
def vanishing_pod(world: ServiceLab) -> Iterator[str]:
    """pod2, which drops packets to its HTTP port for a while."""
    world.pods[1].run(
        "nft", "table ip vanish { chain in { type filter hook input priority 0; tcp dport 8080 drop; }; }"
    )
    yield POD2
    world.pods[1].run("nft", "delete table ip vanish")


def test_no_request_fails_while_one_backend_refuses_and_another_is_silent(
    proxy: Proxy, world: ServiceLab, refusing_pod: str, vanishing_pod: str
) -> None:
    proxy.serve("hard-times", "10.96.3.1", POD1, vanishing_pod, refusing_pod)

    seen = [ask(world.client, "10.96.3.1") for _ in range(60)]
    started_at = time.monotonic()
    seen += [ask(world.client, "10.96.3.1") for _ in range(20)]

    assert Counter(seen) == {"pod1": 80}
    assert time.monotonic() - started_at < 8.0
    assert proxy.metric("userspace_proxy_ejections_total", service="hard-times") >= 2
    assert proxy.metric("userspace_proxy_retries_total", service="hard-times") >= 2


def test_a_backend_that_comes_back_gets_its_turns_again(proxy: Proxy, world: ServiceLab) -> None:
    rules = "table ip refuse { chain in { type filter hook input priority 0; tcp dport 8080 reject with tcp reset; }; }"
    world.pods[2].run("nft", rules)
    try:
        proxy.serve("returning", "10.96.3.2", POD1, POD3)
        assert {ask(world.client, "10.96.3.2") for _ in range(4)} == {"pod1"}
        assert proxy.metric("userspace_proxy_ejected_endpoints", service="returning", port="http") == 1
    finally:
        world.pods[2].run("nft", "delete table ip refuse")

    wait_until(lambda: ask(world.client, "10.96.3.2") == "pod3", "the trial succeeds", 5.0)

    assert Counter(ask(world.client, "10.96.3.2") for _ in range(10)) == {"pod1": 5, "pod3": 5}
    proxy.wait_logged("takes connections again")


def test_an_affine_client_whose_backend_failed_is_pinned_to_another(
    proxy: Proxy, world: ServiceLab, refusing_pod: str
) -> None:
    proxy.serve("affine", "10.96.3.3", refusing_pod, POD1, POD2, extra=AFFINITY)

    seen = {ask(world.client, "10.96.3.3") for _ in range(6)}

    assert seen == {"pod1"}


def test_when_no_backend_can_be_reached_the_client_gets_a_reset(
    proxy: Proxy, world: ServiceLab, refusing_pod: str
) -> None:
    proxy.serve("hopeless", "10.96.3.4", refusing_pod)

    with pytest.raises(ConnectionResetError):
        ask(world.client, "10.96.3.4")

    assert proxy.metric("userspace_proxy_failed_connections_total", service="hopeless") == 1


def test_a_lone_backend_that_answers_late_is_waited_for(proxy: Proxy, world: ServiceLab) -> None:
    # The address appears while the dial is under way.
    proxy.serve("late", "10.96.3.5", BLACK_HOLE)
    pod = world.pods[0]

    with connect(world.client, "10.96.3.5", 80) as sock:
        wait_until(
            lambda: proxy.metric("userspace_proxy_connections_total", service="late") >= 1, "the dial is under way"
        )
        pod.ip("address", "add", f"{BLACK_HOLE}/24", "dev", "eth0")
        try:
            sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
            assert b"pod1" in sock.recv(4096)
        finally:
            pod.ip("address", "del", f"{BLACK_HOLE}/24", "dev", "eth0")


def test_a_udp_endpoint_that_refuses_is_ejected(proxy: Proxy, world: ServiceLab) -> None:
    rules = "table ip refuse { chain in { type filter hook input priority 0; udp dport 5353 reject; }; }"
    world.pods[0].run("nft", rules)
    try:
        proxy.serve("refusing-udp", "10.96.3.6", POD1, POD2)
        with udp_socket(world.client, "10.96.3.6", 53, timeout_s=0.1) as sock:

            def answer() -> str:
                sock.send(b"who")
                try:
                    return sock.recv(100).decode()
                except TimeoutError:
                    return ""

            wait_until(lambda: answer() == "pod2", "the next datagram goes elsewhere")
        assert [ask_udp(world.client, "10.96.3.6") for _ in range(4)] == ["pod2"] * 4
    finally:
        world.pods[0].run("nft", "delete table ip refuse")


def test_a_udp_flow_moves_when_its_endpoint_stops_serving(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("moving", "10.96.3.7", POD1)
    with udp_socket(world.client, "10.96.3.7", 53) as sock:
        sock.send(b"who")
        assert sock.recv(100) == b"pod1"

        proxy.apply(
            "moving",
            documents(
                service("moving", "10.96.3.7"),
                endpoints("moving", POD1, conditions="{ready: false, serving: false}"),
                endpoints("moving", POD2).replace("moving-ipv4", "moving-two"),
            ),
        )

        sock.settimeout(0.2)

        def answer() -> bytes:
            sock.send(b"who")
            with contextlib.suppress(TimeoutError):  # an answer under way while the flow moves is dropped
                return sock.recv(100)
            return b""

        wait_until(lambda: answer() == b"pod2", "the flow has moved")


def test_a_udp_flow_stays_while_its_endpoint_terminates_and_serves(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("staying", "10.96.3.8", POD1)
    with udp_socket(world.client, "10.96.3.8", 53) as sock:
        sock.send(b"who")
        assert sock.recv(100) == b"pod1"
        terminating = endpoints("staying", POD1, conditions="{ready: false, serving: true, terminating: true}")
        proxy.apply(
            "staying",
            documents(
                service("staying", "10.96.3.8"),
                terminating,
                endpoints("staying", POD2).replace("staying-ipv4", "staying-two"),
            ),
        )
        wait_until(lambda: ask_udp(world.client, "10.96.3.8") == "pod2", "new flows go to the ready endpoint")

        sock.send(b"who")
        assert sock.recv(100) == b"pod1"


def test_no_request_fails_while_endpoints_come_and_go_under_load(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("rolling", "10.96.3.9", POD1, POD2, POD3)

    with background_requests(lambda: ask(world.client, "10.96.3.9")) as outcomes:
        for pods in ((POD1, POD2), (POD2, POD3), (POD3,), (POD1, POD3), (POD1, POD2, POD3)):
            before = len(outcomes)
            proxy.serve("rolling", "10.96.3.9", *pods)
            wait_until(lambda before=before: len(outcomes) > before + 20, "requests go on")  # type: ignore[misc]

    assert not [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert {"pod1", "pod2", "pod3"} == set(outcomes)


def test_an_open_connection_survives_that_its_endpoint_leaves(proxy: Proxy, world: ServiceLab) -> None:
    proxy.serve("leaving", "10.96.3.10", POD1)
    with connect(world.client, "10.96.3.10", 80) as sock:
        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"pod1" in sock.recv(4096)

        proxy.serve("leaving", "10.96.3.10", POD2)

        sock.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b"pod1" in sock.recv(4096), "existing connections are not cut (behaviours U4)"
        wait_until(lambda: ask(world.client, "10.96.3.10") == "pod2", "new connections go elsewhere")


def test_an_endpoint_that_is_a_portal_of_ours_does_not_lead_back_to_us(proxy: Proxy, world: ServiceLab) -> None:
    """Without end, one connection would take every descriptor there is."""
    proxy.serve("loop", "10.96.3.11", "10.96.3.12", http_port=80)
    proxy.serve("pool", "10.96.3.12", "10.96.3.11", http_port=80)
    proxy.serve("other", "10.96.3.13", POD1)

    for address in ("10.96.3.11", "10.96.3.12"):
        with pytest.raises(OSError, match=r"reset|refused|timed out"):
            ask(world.client, address, timeout_s=6)
        ask_udp(world.client, address, timeout_s=0.2)

    assert ask(world.client, "10.96.3.13") == "pod1"
    assert proxy.metric("userspace_proxy_connections_total", service="pool") == 1
