"""Session affinity: one pin for a client over all addresses of a service port (behaviours A1 to A4)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.net.contract.conftest import ContractProxy
from tests.net.contract.probes import Probe, ask_once
from tests.net.contract.services import Given
from tests.net.contract.table import EXTERNAL_LOCAL, LB
from tests.net.world import wait_until

MakeGiven = Callable[..., Given]
PROTOCOLS = ("TCP", "UDP")
SPREAD = {"sessionAffinity": "None"}


def sticky(timeout_s: int = 10_800) -> dict[str, Any]:
    return {"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": timeout_s}}}


def who(proxy: ContractProxy, service: Given, client: str, target: str, protocol: str = "TCP") -> str:
    ip, port = Probe(service, client, target, protocol, 4, "").address()
    return ask_once(proxy.cluster.places[client].host, ip, port, protocol, timeout_s=0.4)[0]


def all_of(proxy: ContractProxy, service: Given, client: str, target: str, protocol: str, times: int) -> set[str]:
    return {who(proxy, service, client, target, protocol) for _ in range(times)}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_has_one_endpoint_at_all_addresses(proxy: ContractProxy, given: MakeGiven, protocol: str) -> None:
    service = given("local1 local2 local3 local4", type=LB, spec=sticky())
    proxy.give(service)
    wait_until(lambda: who(proxy, service, "caller", "clusterIP", protocol).startswith("local"), "it is served")

    for client in ("caller", "outside", "node-1", "local1"):
        targets: tuple[str, ...] = ("clusterIP", "nodePort", "vip", "externalIP")
        if client != "node-1":  # which speaks to each of its own addresses from that address
            targets += ("nodePort@alternate",)
        seen = {who(proxy, service, client, target, protocol) for target in targets * 4}
        assert len(seen) == 1, client


def test_clients_are_spread(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 local2", spec=sticky())
    proxy.give(service)
    wait_until(lambda: who(proxy, service, "caller", "clusterIP").startswith("local"), "it is served")

    clients = ("caller", "outside", "local1", "local2", "local3", "local4", "remote2")
    assert len({who(proxy, service, client, "clusterIP") for client in clients}) == 2


def test_a_pin_ends_when_its_client_was_away_and_only_then(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 local2 remote1", type="NodePort", spec=sticky(3))
    proxy.give(service)
    for protocol in PROTOCOLS:
        wait_until(
            lambda p=protocol: who(proxy, service, "caller", "clusterIP", p).startswith(("local", "remote")),  # type: ignore[misc]
            "it is served",
        )
    first = {protocol: who(proxy, service, "caller", "clusterIP", protocol) for protocol in PROTOCOLS}
    for target in ("nodePort", "clusterIP"):
        time.sleep(2.0)
        for protocol in PROTOCOLS:
            assert who(proxy, service, "caller", target, protocol) == first[protocol], "each request renews it"

    seen = {protocol: {first[protocol]} for protocol in PROTOCOLS}
    give_up_at = time.monotonic() + 15
    while any(len(names) == 1 for names in seen.values()) and time.monotonic() < give_up_at:
        time.sleep(3.3)
        for protocol in PROTOCOLS:
            seen[protocol].add(who(proxy, service, "caller", "clusterIP", protocol))

    assert all(len(names) > 1 for names in seen.values()), seen


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_new_endpoint_moves_no_pin_and_a_removed_one_moves_only_its_own(
    proxy: ContractProxy, given: MakeGiven, protocol: str
) -> None:
    service = given("local1", spec=sticky())
    proxy.give(service)
    wait_until(lambda: who(proxy, service, "caller", "clusterIP", protocol) == "local1", "it is served")

    def pins(slices: str, is_lost: bool) -> str:
        proxy.give(service.but(slices=(slices,)))
        watcher = f"caller clusterIP/{protocol.lower()}"
        if is_lost:
            wait_until(lambda: who(proxy, service, "caller", "clusterIP", protocol) not in lost, "it has moved")
        else:
            time.sleep(0.3)
        (name,) = all_of(proxy, service, "caller", "clusterIP", protocol, 6) or {watcher}
        return name

    lost: set[str] = set()
    assert pins("local1 local2 remote1", is_lost=False) == "local1"
    for how in ("local1:unready", "local1:leaving", "local1:gone"):
        lost = {"local1"}
        second = pins(f"{how} local2 remote1", is_lost=True)
        assert pins("local2 remote1", is_lost=True) == second
        lost = {"local2", "remote1"}
        assert pins("local1", is_lost=True) == "local1"
        assert pins("local1 local2 remote1", is_lost=False) == "local1"


def test_another_policy_takes_its_own_endpoint(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1 remote2", type=LB, spec=sticky() | EXTERNAL_LOCAL)
    proxy.give(service)
    wait_until(lambda: who(proxy, service, "outside", "vip") == "local1", "it is served")

    assert all_of(proxy, service, "outside", "nodePort", "TCP", 6) == {"local1"}
    assert len(all_of(proxy, service, "caller", "nodePort", "TCP", 6)) == 1
    assert len(all_of(proxy, service, "outside", "clusterIP", "TCP", 6)) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_affinity_is_switched_while_it_is_served(proxy: ContractProxy, given: MakeGiven, protocol: str) -> None:
    service = given("local1 local2 remote1", type="NodePort", spec=SPREAD)
    for spec, is_one in ((SPREAD, False), (sticky(), True), (SPREAD, False), (sticky(), True)):
        proxy.give(service.but(spec=spec))
        for target in ("clusterIP", "nodePort"):
            wait_until(
                lambda t=target, one=is_one: (len(all_of(proxy, service, "caller", t, protocol, 8)) == 1) is one,  # type: ignore[misc]
                f"it is {'one' if is_one else 'spread'}",
            )
