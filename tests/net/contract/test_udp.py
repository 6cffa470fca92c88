"""UDP flows from a fixed client port: they always reach a present endpoint (behaviours U1 to U4)."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial

import pytest

from tests.net.contract.cluster import DNS, ECHO, OTHER_DNS, WEB
from tests.net.contract.conftest import ContractProxy
from tests.net.contract.probes import PATIENCE_S, Probe, failure
from tests.net.contract.services import Given
from tests.net.contract.table import BOTH_LOCAL, LB
from tests.net.world import wait_until
from userspace_proxy.lab import Host, connect

MakeGiven = Callable[..., Given]
# As the e2e suite has them: a pod, a process of the node, and whoever comes to a node port.
CLIENTS = [
    ("caller", "clusterIP"),
    ("node-1", "clusterIP"),
    ("outside", "nodePort"),
    ("node-1", "nodePort"),
    ("outside", "externalIP"),
]


class Flow:
    """One socket that sends requests repeatedly."""

    def __init__(self, sock: socket.socket, name: str) -> None:
        self._sock = sock
        self._name = name
        self._asked = 0

    def ask(self, timeout_s: float = 0.1) -> str:
        """Return the server that answers now; late answers to earlier requests do not count."""
        self._asked += 1
        give_up_at = time.monotonic() + timeout_s
        try:
            self._sock.send(str(self._asked).encode())
            while True:
                self._sock.settimeout(max(0.001, give_up_at - time.monotonic()))
                server, _, question = self._sock.recv(1024).decode().split()
                if question == str(self._asked):
                    return server
        except OSError as error:
            return failure(error)

    def finds(self, name: str) -> None:
        seen: list[str] = []

        def is_found() -> bool:
            seen.append(self.ask())
            return seen[-1] == name

        try:
            wait_until(is_found, name)
        except AssertionError:
            pytest.fail(f"{self._name} finds {seen[-1]}, not {name}")

    def stays_with(self, name: str, duration_s: float = 0.6) -> None:
        """Check that *name* answers every request. A busy machine answers late; a request that is lost, never."""
        end_at = time.monotonic() + duration_s
        while time.monotonic() < end_at:
            assert (self._name, self.ask(PATIENCE_S)) == (self._name, name)
            time.sleep(0.02)


@contextmanager
def flows(proxy: ContractProxy, service: Given) -> Iterator[list[Flow]]:
    """A flow for each of CLIENTS, at once."""
    with ExitStack() as stack:
        made = []
        for client, target in CLIENTS:
            host = proxy.cluster.places[client].host
            ip, port = Probe(service, client, target, "UDP", 4, "").address()
            sock = stack.enter_context(connect(host, ip, port, kind=socket.SOCK_DGRAM))
            made.append(Flow(sock, f"{client} {target}"))
        yield made


def test_a_flow_follows_its_service_to_another_endpoint(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type=LB)
    proxy.give(service)
    with flows(proxy, service) as clients:
        for slices, answer in (
            ("local1", "local1"),
            ("local2", "local2"),
            ("remote1", "remote1"),
            ("local1", "local1"),
        ):
            proxy.give(service.but(slices=(slices,)))
            for flow in clients:
                flow.finds(answer)
        for flow in clients:
            flow.stays_with("local1", 0.1)


def test_a_flow_follows_its_endpoint_to_another_port(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1:unready", type=LB)
    proxy.give(service)
    with flows(proxy, service) as clients:
        for port, answer in ((DNS, "local1"), (OTHER_DNS, "local1-2"), (DNS, "local1")):
            proxy.give(service.but(targets={"web": WEB, "dns": port}))
            for flow in clients:
                flow.finds(answer)


def test_no_flow_is_lost_when_a_service_is_scaled_to_zero_and_back(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("", type=LB)
    proxy.give(service)
    with flows(proxy, service) as clients:
        for slices, answer in (
            ("local1:unready", "refused"),
            ("local1", "local1"),
            ("", "refused"),
            ("remote1", "remote1"),
        ):
            proxy.give(service.but(slices=(slices,)))
            if answer == "refused" and proxy.variant.mode != "userspace":
                continue  # where nobody is left who could answer, flows are where they were (behaviours U2)
            for flow in clients:
                if answer == "refused" and not slices and proxy.variant.mode != "userspace":
                    continue  # the kernel leaves such flows where they are (U2)
                if answer == "refused":
                    wait_until(lambda flow=flow: flow.ask() in ("refused", "forbidden"), "it is refused")  # type: ignore[misc]
                else:
                    flow.finds(answer)


def test_no_flow_is_lost_when_a_service_is_deleted_and_made_again(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type=LB)
    proxy.give(service)
    with flows(proxy, service) as clients:
        for flow in clients:
            flow.finds("local1")
        proxy.delete(service.name)
        for flow in clients:
            wait_until(lambda flow=flow: flow.ask() != "local1", "it is gone")  # type: ignore[misc]
        proxy.give(service.but(slices=("local2",)))
        for flow in clients:
            flow.finds("local2")


def test_a_flow_before_its_service_finds_it_when_it_comes(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("remote1", type=LB)
    with flows(proxy, service) as clients:
        for flow in clients:
            flow.ask()
        proxy.give(service)
        for flow in clients:
            flow.finds("remote1")


def test_a_flow_stays_while_its_endpoint_serves_whatever_else_changes(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("remote1", type=LB)
    proxy.give(service)
    proxy.expect(service, "caller clusterIP/udp -> remote1")
    with flows(proxy, service) as clients:
        for flow in clients:
            flow.finds("remote1")
        for changed, now in (
            (service.but(slices=("remote1:leaving local1",)), "local1"),
            (service.but(slices=("remote1:serving local1",)), "local1"),
            (service.but(slices=("remote1:zone-b local1:zone-a",)), "local1"),
        ):
            proxy.give(changed)
            proxy.expect(service, f"outside nodePort/udp -> {now}", f"caller clusterIP/udp -> {now}")
            for flow in clients:
                flow.stays_with("remote1", 0.1)
        proxy.give(service.but(slices=("remote1:gone local1",)))
        for flow in clients:
            flow.finds("local1")


def test_a_flow_stays_when_policies_change(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("remote1", type=LB)
    proxy.give(service)
    proxy.expect(service, "caller clusterIP/udp -> remote1")
    with flows(proxy, service) as clients:
        for flow in clients:
            flow.finds("remote1")
        # Over an API the Service and its endpoints change one after the other.
        proxy.give(service.but(slices=("remote1",), spec=BOTH_LOCAL))
        proxy.expect(service, "outside nodePort/udp -> timeout", "caller clusterIP/udp -> timeout")
        for flow in clients:
            flow.stays_with("remote1", 0.1)
        proxy.give(service.but(slices=("remote1 local1",), spec=BOTH_LOCAL))
        proxy.expect(service, "outside nodePort/udp -> local1", "caller clusterIP/udp -> local1")
        for flow in clients:
            flow.stays_with("remote1", 0.1)


def test_an_open_connection_outlives_any_change_of_its_endpoint(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type="NodePort", targets={"web": ECHO})
    proxy.give(service)
    with ExitStack() as stack:
        connections: list[socket.socket] = []

        def is_connected(host: Host, ip: str, port: int) -> bool:
            with suppress(OSError):
                connections.append(stack.enter_context(connect(host, ip, port, 0.4)))
                return True
            return False

        for client, target in (("caller", "clusterIP"), ("outside", "nodePort")):
            place, address = proxy.cluster.places[client], Probe(service, client, target, "TCP", 4, "").address()
            wait_until(partial(is_connected, place.host, *address), f"{client} is served at {target}")
        for slices in ("local1:leaving local2", "local1:unready local2", "local2", ""):
            for sock in connections:
                sock.sendall(b"?")
                assert sock.recv(100) == b"local1 ?"
            proxy.give(service.but(slices=(slices,), targets={"web": WEB}))
            proxy.expect(service, f"caller clusterIP/tcp -> {'local2' if slices else 'refused'}")
        for sock in connections:
            sock.sendall(b"!")
            assert sock.recv(100) == b"local1 !"
