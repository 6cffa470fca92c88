"""Options: which node addresses have node ports, and which clients are pods."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.net.contract.conftest import KNOWS_PODS, ContractProxy, Variant
from tests.net.contract.services import Given
from tests.net.contract.table import ALL, DUAL, EXTERNAL_LOCAL, LB

MakeGiven = Callable[..., Given]
MAIN, ALTERNATE, LOOPBACK = "nodePort", "nodePort@alternate", "nodePort@localhost"


# Each test has flags of its own. It parametrizes the fixture that all tests of the contract share, so that the proxy of
# the test before it has ended: there is one node in a process of pytest.


def _variants(*flags: str) -> list[Variant]:
    """Return the ways to lead clients as their own: by either rule language, and by the kernel alone."""
    by_us = [Variant(rules, "uvloop", "transparent", flags, has_table=False) for rules in ("nftables", "iptables")]
    return [*by_us, Variant("iptables", "uvloop", "transparent", flags, mode="iptables", has_table=False)]


# addresses -> who answers at the primary, alternate and loopback address, IPv4 and IPv6
NODE_PORTS = {
    "primary": ((1, 0, 0), (1, 0, 0)),
    "192.168.60.0/24": ((0, 1, 0), (1, 1, 1)),  # what names no address of a family says nothing about it
    "fd00:60::/64": ((1, 1, 1), (0, 1, 0)),
    "192.168.50.0/24,127.0.0.0/8,fd00:50::/64": ((1, 0, 1), (1, 0, 0)),
    "0.0.0.0/0,fd00:60::1/128": ((1, 1, 1), (0, 1, 0)),
}


@pytest.mark.parametrize(
    ("proxy", "served"),
    [
        (variant, served)
        for addresses, served in NODE_PORTS.items()
        for variant in _variants("--nodeport-addresses", addresses, *KNOWS_PODS)
    ],
    indirect=["proxy"],
    ids=lambda given: f"{given.said}-{given.flags[1]}" if isinstance(given, Variant) else "",
)
def test_node_ports_are_at_the_addresses_that_are_wanted(
    proxy: ContractProxy, given: MakeGiven, served: tuple[tuple[int, int, int], ...]
) -> None:
    service = given("local1", type="NodePort", families=DUAL)
    proxy.give(service)
    expected = [
        f"{clients} {target}/{family} -> {'local1' if is_served else 'refused'}"
        for family, here in zip(DUAL, served, strict=True)
        for clients, target, is_served in zip((ALL, ALL, "node-1"), (MAIN, ALTERNATE, LOOPBACK), here, strict=True)
    ]
    if proxy.variant.mode != "userspace":  # the kernel leads nobody away from ::1
        expected[-1] = f"node-1 {LOOPBACK}/6 -> refused"

    proxy.expect(service, f"{ALL} clusterIP -> local1", *expected)


@pytest.mark.parametrize(
    "proxy",
    [
        Variant(
            "iptables",
            "uvloop",
            "transparent",
            ("--nodeport-addresses", addresses, "--no-iptables-localhost-nodeports", *KNOWS_PODS),
            mode="iptables",
            has_table=False,
        )
        for addresses in ("192.168.50.0/24,127.0.0.0/8,fd00:50::/64,::1/128", "0.0.0.0/1,128.0.0.0/1,::/1,8000::/1")
    ],
    indirect=True,
    ids=lambda variant: variant.flags[1],
)
def test_clients_of_loopback_are_refused_where_it_is_wanted_but_off(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1", type="NodePort", families=DUAL)
    proxy.give(service)

    proxy.expect(
        service,
        *(f"{ALL} {MAIN}/{family} -> local1" for family in DUAL),
        *(f"node-1 {LOOPBACK}/{family} -> refused" for family in DUAL),
    )


@pytest.mark.parametrize(
    "proxy",
    [
        *_variants("--detect-local-mode", "NodeCIDR"),
        *_variants("--detect-local-mode", "InterfaceNamePrefix", "--pod-interface-name-prefix", "v-"),
    ],
    indirect=True,
    ids=lambda v: f"{v.said}-{v.flags[1]}",
)
def test_pods_are_detected_by_interface_too(proxy: ContractProxy, given: MakeGiven) -> None:
    service = given("local1 remote1", type=LB, spec=EXTERNAL_LOCAL, families=DUAL)
    proxy.give(service)

    proxy.expect(
        service,
        "caller clusterIP,nodePort,vip,externalIP -> local1 remote1 as own",
        "outside nodePort,vip,externalIP -> local1 as own",
        "outside clusterIP -> local1 remote1 as node",
    )


@pytest.mark.parametrize(
    "proxy",
    _variants("--detect-local-mode", "ClusterCIDR"),
    indirect=True,
    ids=lambda v: f"{v.said}-{v.flags[1]}",
)
def test_without_a_pod_detector_no_client_is_a_pod(proxy: ContractProxy, given: MakeGiven) -> None:
    """Packets to a cluster IP keep their source; policy Local leads no client beyond the node (behaviours M1)."""
    local = given("local1 remote1", type=LB, spec=EXTERNAL_LOCAL)
    plain = given("local1", type=LB)
    proxy.give(local, plain)

    proxy.expect(
        local,
        "caller,outside nodePort,vip,externalIP -> local1 as own",
        "node-1 nodePort,vip,externalIP -> local1 remote1 as node",
        "caller clusterIP -> local1 remote1 as own",
    )
    proxy.expect(
        plain, "caller,outside clusterIP -> local1 as own", "caller,outside nodePort,vip,externalIP -> local1 as node"
    )


@pytest.mark.parametrize("proxy", [Variant("nftables", "uvloop", "node", has_table=False)], indirect=True, ids=str)
def test_an_invalid_source_ip_annotation_is_reported_and_the_service_is_served(
    proxy: ContractProxy, given: MakeGiven
) -> None:
    service = given("local1", annotations={"userspace-proxy/source-ip": "transparnet"})
    proxy.give(service)

    proxy.expect(service, "caller clusterIP -> local1 as node")
    proxy.wait_logged("transparnet")
