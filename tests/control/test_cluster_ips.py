"""Cluster IPs: stated and allocated ones, conflicts between Services, and restarts."""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Mapping
from typing import Any

import pytest

from tests.control.given import named, service
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.errors import ConfigError


def cluster_ips(*ranges: str, remembered: Mapping[str, str] | None = None) -> ManifestAllocations:
    networks = [ipaddress.ip_network(text) for text in ranges or ("10.96.0.0/16",)]
    return ManifestAllocations(networks, SavedAllocations(cluster_ips=remembered or {}))


def assign(known: ManifestAllocations, name: str, **spec: Any) -> tuple[str, ...]:
    return known.assign(named(name), service(name, **spec))[0].cluster_ips


def held_by(known: ManifestAllocations, name: str) -> tuple[str, ...]:
    return known.held(named(name)).cluster_ips


# ---- allocation


def test_a_service_that_states_none_gets_one_of_the_range_and_keeps_it() -> None:
    known = cluster_ips("10.96.0.0/16")

    first = assign(known, "web")

    assert ipaddress.ip_address(first[0]) in ipaddress.ip_network("10.96.0.0/16")
    assert assign(known, "web") == first


def test_without_a_state_file_a_service_has_the_same_address_after_a_restart() -> None:
    before, after = cluster_ips(), cluster_ips()
    held = {name: assign(before, name) for name in ("a", "b", "c")}

    assert {name: assign(after, name) for name in ("c", "b", "a")} == held


def test_with_saved_allocations_a_service_keeps_its_address_in_an_exhausted_range() -> None:
    before = cluster_ips("10.0.0.0/28")
    names = [f"s{n}" for n in range(14)]
    held = {name: assign(before, name) for name in names}

    after = cluster_ips("10.0.0.0/28", remembered=before.memory().cluster_ips)

    assert {name: assign(after, name) for name in reversed(names)} == held


def test_the_network_and_broadcast_addresses_are_never_allocated() -> None:
    known = cluster_ips("10.0.0.0/28")

    held = {assign(known, f"s{n}")[0] for n in range(14)}

    assert held == {f"10.0.0.{n}" for n in range(1, 15)}


@pytest.mark.parametrize(
    ("network", "room"), [("10.0.0.7/32", 1), ("10.0.0.6/31", 1), ("10.0.0.4/30", 2), ("fd00::/127", 1)]
)
def test_the_smallest_ranges_allocate_their_few_addresses(network: str, room: int) -> None:
    known = cluster_ips(network)
    held = [assign(known, f"s{n}")[0] for n in range(room)]

    assert len(set(held)) == room
    assert all(ipaddress.ip_address(ip) in ipaddress.ip_network(network) for ip in held)
    with pytest.raises(ConfigError, match="used up"):
        assign(known, "one-too-many")


def test_the_first_addresses_of_a_range_are_left_for_stated_ones() -> None:
    known = cluster_ips("10.96.0.0/24")

    held = [ipaddress.IPv4Address(assign(known, f"s{n}")[0]) for n in range(200)]

    assert min(held) >= ipaddress.IPv4Address("10.96.0.16")


def test_a_huge_ipv6_range_costs_nothing() -> None:
    assert ipaddress.ip_address(assign(cluster_ips("fd00::/64"), "web")[0]) in ipaddress.ip_network("fd00::/64")


def test_an_exhausted_range_is_reported_and_holders_keep_their_addresses() -> None:
    known = cluster_ips("10.0.0.4/30", "fd00::/127")
    had = assign(known, "had")
    assign(known, "takes-the-only-ipv6", ipFamilies=["IPv6"])

    with pytest.raises(ConfigError, match="fd00::/127 is used up") as caught:
        assign(known, "had", ipFamilyPolicy="RequireDualStack")

    assert "--service-cluster-ip-range" in caught.value.fix
    assert held_by(known, "had") == had
    assert assign(known, "other") != had


def test_a_refused_allocation_leaves_nothing_taken() -> None:
    known = cluster_ips("10.0.0.6/31", "fd00::/127")
    assign(known, "takes-the-only-ipv6", ipFamilies=["IPv6"])
    with pytest.raises(ConfigError):
        assign(known, "refused", ipFamilyPolicy="RequireDualStack")

    assert assign(known, "other") == ("10.0.0.7",)


def test_a_deleted_services_address_is_free_but_waits_for_it_to_come_back() -> None:
    known = cluster_ips()
    had = assign(known, "web")

    known.release(named("web"))

    assert known.memory().cluster_ips == {}
    assert assign(known, "web") == had


# ---- families


@pytest.mark.parametrize(
    ("spec", "families"),
    [
        ({}, [4]),
        ({"ipFamilies": ["IPv6"]}, [6]),
        ({"ipFamilyPolicy": "PreferDualStack"}, [4, 6]),
        ({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}, [6, 4]),
        ({"ipFamilies": ["IPv6", "IPv4"]}, [6, 4]),
        ({"ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv6"]}, [6]),
        ({"clusterIP": "10.96.0.20", "ipFamilyPolicy": "PreferDualStack"}, [4, 6]),
        ({"clusterIP": "fd00::20", "ipFamilyPolicy": "RequireDualStack"}, [6, 4]),
        ({"clusterIP": "fd00::20", "ipFamilies": ["IPv6", "IPv4"]}, [6, 4]),
        ({"clusterIP": "fd00::20"}, [6]),
    ],
)
def test_a_service_gets_an_address_of_each_family_it_wants(spec: dict[str, Any], families: list[int]) -> None:
    held = assign(cluster_ips("10.96.0.0/16", "fd00::/112"), "web", **spec)

    assert [ipaddress.ip_address(ip).version for ip in held] == families


def test_preferring_two_families_is_content_with_the_one_there_is() -> None:
    assert len(assign(cluster_ips("10.96.0.0/16"), "web", ipFamilyPolicy="PreferDualStack")) == 1


def test_two_families_of_which_there_is_one_range_are_served_by_that_one() -> None:
    (held,) = assign(cluster_ips("10.96.0.0/16"), "web", ipFamilies=["IPv6", "IPv4"])

    assert ipaddress.ip_address(held).version == 4


def test_a_family_that_no_range_has_is_refused_not_replaced() -> None:
    with pytest.raises(ConfigError, match="no cluster IP range is IPv6") as caught:
        assign(cluster_ips("10.96.0.0/16"), "web", ipFamilies=["IPv6"])

    assert caught.value.field == "spec.ipFamilies[0]"


def test_a_second_family_is_added_and_the_first_address_stays() -> None:
    known = cluster_ips("10.96.0.0/16", "fd00::/112")
    single = assign(known, "web")

    dual = assign(known, "web", ipFamilyPolicy="PreferDualStack")

    assert dual[:1] == single
    assert assign(known, "web") == single


# ---- stated addresses


def test_a_stated_address_is_taken_as_it_is_in_canonical_form() -> None:
    assert assign(cluster_ips(), "web", clusterIPs=["010.096.000.010", "FD00::1"]) == ("10.96.0.10", "fd00::1")


@pytest.mark.parametrize(
    ("stated", "why"),
    [
        ("172.30.0.1", "172.30.0.1 is outside of the Service range 10.96.0.0/16"),
        ("10.96.0.0", "10.96.0.0 is the network address of"),
        ("10.96.255.255", "10.96.255.255 is the broadcast address of"),
        ("10.96.7.7", "10.96.7.7 is an address of this node"),
        ("10.96.7.8", "10.96.7.8 is in 10.96.7.0/24, a network of this node"),
    ],
)
def test_an_address_that_is_a_hosts_or_no_services_is_refused_from_files_and_reported_from_a_cluster(
    stated: str, why: str
) -> None:
    ranges = [ipaddress.ip_network("10.96.0.0/16")]
    hosts = Hosts({"10.96.7.7"}, [ipaddress.ip_network("10.96.7.0/24")])
    web = service(clusterIP=stated)

    with pytest.raises(ConfigError, match=why) as caught:
        ManifestAllocations(ranges, hosts=hosts).assign(named("web"), web)
    assert caught.value.field == "spec.clusterIP"

    allocation, problems = Allocations(ranges, hosts).assign(named("web"), web)
    assert allocation.cluster_ips == (stated,)
    assert why in problems[0].reason
    assert "it is served" in problems[0].fix


def test_a_family_without_a_range_has_nothing_to_be_outside_of() -> None:
    assert assign(cluster_ips(), "web", clusterIP="fd00:96::1") == ("fd00:96::1",)
    assert Allocations().assign(named("web"), service(clusterIP="172.30.0.1"))[1] == []


def test_a_taken_address_is_refused_with_the_name_of_its_holder() -> None:
    known = cluster_ips()
    assign(known, "first", clusterIP="10.96.0.5")

    with pytest.raises(ConfigError, match="already the cluster IP of default/first") as caught:
        assign(known, "second", clusterIP="10.96.000.5")

    assert caught.value.field == "spec.clusterIP"


def test_an_address_that_was_allocated_cannot_be_stated_by_another() -> None:
    known = cluster_ips()
    (ip,) = assign(known, "allocated")

    with pytest.raises(ConfigError, match="default/allocated"):
        assign(known, "states", clusterIP=ip)


def test_a_stated_address_is_never_allocated_to_another() -> None:
    known = cluster_ips("10.0.0.4/30")
    assign(known, "states", clusterIP="10.0.0.5")

    assert assign(known, "wants-one") == ("10.0.0.6",)
    with pytest.raises(ConfigError, match="used up"):
        assign(known, "wants-one-too")


def test_a_service_that_is_refused_another_address_keeps_the_one_before() -> None:
    known = cluster_ips()
    assign(known, "first", clusterIP="10.96.0.5")
    assign(known, "second", clusterIP="10.96.0.6")
    with pytest.raises(ConfigError):
        assign(known, "second", clusterIP="10.96.0.5")

    with pytest.raises(ConfigError, match="default/second"):
        assign(known, "third", clusterIP="10.96.0.6")


def test_stating_the_address_one_was_given_changes_nothing() -> None:
    known = cluster_ips()
    (ip,) = assign(known, "web")
    changes = known.changes

    assert assign(known, "web", clusterIP=ip) == (ip,)
    assert known.changes == changes


def test_an_address_that_is_left_can_be_had_by_others() -> None:
    known = cluster_ips()
    assign(known, "web", clusterIP="10.96.0.5")
    assign(known, "web", clusterIP="10.96.0.6")

    assert assign(known, "other", clusterIP="10.96.0.5") == ("10.96.0.5",)


def test_only_allocated_values_are_saved() -> None:
    known = cluster_ips()
    assign(known, "stated", clusterIP="10.96.0.5")
    (ip,) = assign(known, "allocated")

    assert known.memory().cluster_ips == {"default/allocated/IPv4": ip}


# ---- order


def test_remembered_addresses_are_assigned_before_stated_and_stated_before_allocated_ones() -> None:
    known = cluster_ips(remembered={"default/had/IPv4": "10.96.9.9"})
    wishes = {"wants": service(), "states": service(clusterIP="10.96.0.5"), "had": service()}

    order = known.in_order({named(name): wish for name, wish in wishes.items()})

    assert [name.name for name in order] == ["had", "states", "wants"]


@pytest.mark.parametrize("ip", ["10.97.0.1", "fd00::1", "10.96.0.1", "10.96.255.255"])
def test_a_remembered_address_that_cannot_be_given_any_more_is_replaced(ip: str) -> None:
    """The range was changed, or the file edited."""
    known = cluster_ips(remembered={"default/web/IPv4": ip})

    assert assign(known, "web") == assign(cluster_ips(), "web")


# ---- moving


def move(known: ManifestAllocations, **stated: str) -> dict[str, tuple[str, ...]]:
    """Let each Service state a new address, all in one change; return the addresses that they have then."""
    wishes = {named(name): service(name, clusterIP=ip) for name, ip in stated.items()}
    for name in known.in_order(wishes):
        try:
            known.assign(name, wishes[name])
        except ConfigError:
            continue
    return {name: held_by(known, name) for name in stated}


def test_two_services_can_swap_their_addresses() -> None:
    known = cluster_ips()
    move(known, a="10.96.0.1", b="10.96.0.2")

    assert move(known, a="10.96.0.2", b="10.96.0.1") == {"a": ("10.96.0.2",), "b": ("10.96.0.1",)}


def test_addresses_can_be_passed_on_in_a_row() -> None:
    known = cluster_ips()
    move(known, a="10.96.0.1", b="10.96.0.2", c="10.96.0.3")

    moved = move(known, a="10.96.0.2", b="10.96.0.3", c="10.96.0.4")

    assert moved == {"a": ("10.96.0.2",), "b": ("10.96.0.3",), "c": ("10.96.0.4",)}


def test_a_chain_of_moves_stops_if_one_of_them_is_blocked() -> None:
    known = cluster_ips()
    move(known, stays="10.96.0.9", a="10.96.0.1", b="10.96.0.2")

    assert move(known, a="10.96.0.2", b="10.96.0.9") == {"a": ("10.96.0.1",), "b": ("10.96.0.2",)}


def test_of_two_services_that_state_one_free_address_one_gets_it_and_the_other_keeps_its_own() -> None:
    known = cluster_ips()
    move(known, a="10.96.0.1", b="10.96.0.2")

    assert move(known, a="10.96.0.3", b="10.96.0.3") == {"a": ("10.96.0.3",), "b": ("10.96.0.2",)}


@pytest.mark.parametrize("seed", range(20))
def test_no_address_has_two_holders_after_any_moves(seed: int) -> None:
    chance = random.Random(seed)
    known = cluster_ips("10.0.0.0/28")
    names = [f"s{n}" for n in range(8)]
    move(known, **{name: f"10.0.0.{n + 1}" for n, name in enumerate(names)})
    for _ in range(30):
        moving = chance.sample(names, chance.randrange(1, 8))
        held = move(known, **{name: f"10.0.0.{chance.randrange(1, 12)}" for name in moving})
        everybody = [held_by(known, name) for name in names]

        assert all(held.values())
        assert len(set(everybody)) == len(names)
        assert known._claims._holders == {ip: named(name) for name in names for ip in held_by(known, name)}


def test_a_reserved_address_is_allocated_to_no_service() -> None:
    known = ManifestAllocations([ipaddress.ip_network("10.96.0.0/28")], reserved=["10.96.0.10"])

    given = {assign(known, f"s{number}")[0] for number in range(13)}
    assert given == {f"10.96.0.{number}" for number in range(1, 15)} - {"10.96.0.10"}
