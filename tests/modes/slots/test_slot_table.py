"""Kernel mode nftables: its text, how slots are spread, and that a change comes to the same as the whole."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from tests.modes.redirect_cases import assert_golden, name
from userspace_proxy.lab import Host, Lab
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import ServicePort, load_balancer_portals
from userspace_proxy.model.topology import Node
from userspace_proxy.modes.element_tables import ElementTables
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.plans import plan
from userspace_proxy.modes.slots import slot_table as slots
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.netfilter.nft_text import removal

HERE = Node("here", addresses=("192.0.2.1",))
FACTS = NodeFacts(HERE, PodDetector(cidrs=("10.244.0.0/16",)), ("192.0.2.1/32",), ("10.96.0.0/16",))
NEAR, FAR, FAR6 = Endpoint("10.244.0.5", 8080, node_name="here"), Endpoint("10.244.1.6", 8080), Endpoint("fd00::5", 80)


def translation(
    service_port: ServicePort, *endpoints: Endpoint, allowed: tuple[str, ...] = (), detects_pods: bool = True
) -> Translation:
    made = plan(service_port, endpoints, HERE, detects_pods=detects_pods, in_kernel=True)
    ranges = dict.fromkeys(load_balancer_portals(service_port), allowed) if allowed else {}
    return Translation(service_port, made.routes, made.reaches, ranges)


WEB = translation(
    ServicePort(name("shop/web:http"), 80, ("10.96.0.1", "fd00:96::1"), node_port=30_080), NEAR, FAR, FAR6
)
PINNED = translation(ServicePort(name("shop/cart"), 80, ("10.96.0.2",), affinity_timeout_s=10_800), NEAR, FAR)
LOCAL = translation(
    ServicePort(
        name("shop/dns", L4Protocol.UDP), 53, ("10.96.0.3",), load_balancer_ips=("203.0.113.7",), external_local=True
    ),
    FAR,
    allowed=("198.51.100.0/24",),
)
NOBODY = translation(ServicePort(name("shop/empty"), 80, ("10.96.0.4",), node_port=30_081))
EVERYTHING = (WEB, PINNED, LOCAL, NOBODY)
TABLE = SlotTable.name


def slot_tables() -> ElementTables:
    return ElementTables("nftables", SlotTable())


# ---- slots


@pytest.mark.parametrize(
    ("count", "size"), [(1, 16), (2, 16), (8, 16), (9, 256), (128, 256), (129, 4_096), (4_095, 4_096)]
)
def test_a_set_has_as_many_slots_as_give_every_endpoint_its_share(count: int, size: int) -> None:
    assert slots.size_for(count) == size


def test_endpoints_have_slots_by_their_weights() -> None:
    made = translation(ServicePort(name("ns/a"), 80, ("10.96.0.9",), weights=((NEAR.ip, 3),)), NEAR, FAR)

    assert Counter(Counter(SlotTable().elements(made)["slots4_tcp_16"].values()).values()) == {12: 1, 4: 1}


def test_every_endpoint_has_slots_if_all_weights_are_0() -> None:
    found = [Endpoint(f"10.244.0.{number}", 80) for number in range(1, 31)]
    weights = tuple((endpoint.ip, 0) for endpoint in found)
    made = translation(ServicePort(name("ns/a"), 80, ("10.96.0.9",), weights=weights), *found)

    assert len(set(SlotTable().elements(made)["slots4_tcp_256"].values())) == 30


def test_the_slots_do_not_depend_on_what_was_before() -> None:
    assert SlotTable().elements(PINNED) == SlotTable().elements(PINNED)


def test_an_endpoint_keeps_its_number_when_others_come_and_go() -> None:
    table = SlotTable()
    held = PINNED.service_port
    before = table.elements(translation(held, NEAR, FAR))["endpoints4_tcp"]

    after = table.elements(translation(held, Endpoint("10.244.0.1", 80), FAR))["endpoints4_tcp"]

    by_endpoint = {endpoint: number for number, endpoint in before.items()}
    assert {
        number for endpoint, number in by_endpoint.items() if after.get(number) == endpoint
    } == before.keys() & after
    assert len(before.keys() & after) == 1


def crowd(network: int, count: int) -> Translation:
    found = [Endpoint(f"10.{network}.{n // 250}.{n % 250 + 1}", 8080) for n in range(count)]
    found += [Endpoint(f"fd00:{network}::{n + 1:x}", 8080) for n in range(count)]
    service_port = ServicePort(name("shop/crowd"), 80, ("10.96.0.7", "fd00:96::7"), affinity_timeout_s=60)
    return translation(service_port, *found)


def test_thousands_of_pinned_endpoints_can_be_replaced_at_once() -> None:
    table = SlotTable()
    table.elements(crowd(20, 4_000))
    after = crowd(30, 4_000)

    found = table.elements(after)

    assert all(len(found[f"endpoints{family}_tcp"]) == 4_000 for family in (4, 6))
    table.forget(crowd(20, 4_000), after)
    assert table.elements(after) == found


# ---- the text, and the kernel


def test_the_whole_table_reads_as_written_down() -> None:
    assert_golden("slots-everything.nft", SlotTable().rules(FACTS, EVERYTHING).text())


def test_without_services_it_reads_as_written_down() -> None:
    assert_golden("slots-nothing.nft", SlotTable().rules(NodeFacts(), ()).text())


def in_force(host: Host) -> Any:
    """Return our table as the kernel lists it, without handles and the order of elements."""
    listed = json.loads(host.run("nft", "--json", "list", "table", *TABLE.split()).stdout)["nftables"]
    return sorted((_plain(item) for item in listed if "metainfo" not in item), key=json.dumps)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _plain(inner) for key, inner in value.items() if key != "handle"}
        if isinstance(kept.get("elem"), list):
            kept["elem"] = sorted(kept["elem"], key=json.dumps)
        return kept
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def load(
    tables: ElementTables, host: Host, made: Mapping[ServicePortName, Translation], changed: set[ServicePortName]
) -> None:
    # A loop of its own, whose threads are then of the host.
    with host.inside(), asyncio.Runner() as runner:
        runner.run(tables.load(RuleUpdate(made, changed, FACTS)))
        tables.unwatch()


def by_name(*made: Translation) -> dict[ServicePortName, Translation]:
    return {each.service_port.name: each for each in made}


def test_elements_loaded_by_netlink_equal_the_rendered_text(lab: Lab) -> None:
    """By netlink on one host, as text on another: also every comment is the same."""
    ours, theirs = lab.add("netlink"), lab.add("text")

    load(slot_tables(), ours, by_name(*EVERYTHING), set())
    theirs.run("nft", "-f", "-", stdin=SlotTable().rules(FACTS, EVERYTHING).text())

    assert in_force(ours) == in_force(theirs)


def test_an_affinity_set_left_by_another_process_is_flushed(lab: Lab) -> None:
    host, shorter = lab.add("again"), translation(replace(PINNED.service_port, affinity_timeout_s=3), NEAR, FAR)
    other = translation(ServicePort(name("shop/new"), 80, ("10.96.0.8",), affinity_timeout_s=10_800), NEAR, FAR)
    load(slot_tables(), host, by_name(PINNED), set())
    tables = slot_tables()
    load(tables, host, by_name(shorter), set())

    load(tables, host, by_name(shorter, other), {other.service_port.name})

    fresh = lab.add("again-fresh")
    load(slot_tables(), fresh, by_name(shorter, other), set())
    assert in_force(host) == in_force(fresh)


def test_a_table_that_was_removed_unheard_is_loaded_whole_also_where_a_change_brings_new_rules(lab: Lab) -> None:
    host, tables = lab.add("unheard"), slot_tables()
    new = translation(ServicePort(name("shop/new"), 80, ("10.96.0.8",), affinity_timeout_s=77), NEAR, FAR)
    load(tables, host, by_name(*EVERYTHING), set())
    host.run("nft", "delete", "table", *TABLE.split())

    load(tables, host, by_name(*EVERYTHING, new), {new.service_port.name})

    fresh = lab.add("unheard-fresh")
    load(slot_tables(), fresh, by_name(*EVERYTHING, new), set())
    assert in_force(host) == in_force(fresh)


def test_a_service_removed_during_a_full_load_releases_its_numbers(lab: Lab) -> None:
    host, table = lab.add("forgetful"), SlotTable()
    tables = ElementTables("nftables", table)
    load(tables, host, by_name(*EVERYTHING), set())
    host.run("nft", "delete", "table", *TABLE.split())

    load(tables, host, by_name(WEB), {each.service_port.name for each in EVERYTHING})

    fresh = SlotTable()
    fresh.elements(WEB)
    assert table.numbers._sets.memory().keys() == fresh.numbers._sets.memory().keys()


def test_loads_and_refusals_are_counted_for_both_families(lab: Lab) -> None:
    host, tables = lab.add("counted"), slot_tables()
    load(tables, host, by_name(*EVERYTHING), set())
    load(tables, host, by_name(*EVERYTHING[1:]), {WEB.service_port.name})
    host.run("nft", "delete", "table", *TABLE.split())
    load(tables, host, by_name(*EVERYTHING), {WEB.service_port.name})

    loads = tables.loads["IPv4"]
    assert tables.loads["IPv6"] is loads
    assert (loads.whole.count, loads.changes.count, loads.refused, loads.refused_changes) == (2, 1, 1, 1)


def any_translations(chance: random.Random) -> dict[ServicePortName, Translation]:
    """Return a few service ports that have much in common with those of another call."""
    made = []
    for number in chance.sample(range(1, 7), chance.randrange(6)):
        protocol = L4Protocol.UDP if number % 3 == 0 else L4Protocol.TCP
        ips = (f"10.96.0.{1 + number // 2}", f"fd00:96::{number}")
        endpoints = [Endpoint(f"10.244.0.{n}", 80, node_name=chance.choice(("here", "there"))) for n in range(12)]
        endpoints += [Endpoint(f"fd00::{n}", 80) for n in range(3)]
        service_port = ServicePort(
            name(f"ns/s{number}", protocol),
            80 + number,
            chance.choice((ips, ips[:1])),
            node_port=chance.choice((0, 30_000 + number)),
            load_balancer_ips=chance.choice(((), (f"203.0.113.{number}",))),
            external_local=chance.choice((True, False)),
            affinity_timeout_s=chance.choice((None, None, 60, 10_800)),
        )
        some = chance.sample(endpoints, chance.choice((0, 1, 2, 2, 9, 12)))
        allowed = chance.choice(((), ("198.51.100.0/24", "192.0.2.0/28")))
        made.append(translation(service_port, *some, allowed=allowed, detects_pods=chance.choice((True, False))))
    return by_name(*made)


def test_random_changes_end_with_the_whole_new_table(lab: Lab) -> None:
    """Changes on one host, a whole table on another; both must list the same after each step."""
    ours, other, chance = lab.add("changes"), lab.add("anew"), random.Random(1)
    tables, old = slot_tables(), dict[ServicePortName, Translation]()
    load(tables, ours, by_name(PINNED, translation(PINNED.service_port)), set())  # with both time-outs from now on
    for step in range(25):
        new = any_translations(chance)
        load(tables, ours, new, {*old, *new, PINNED.service_port.name})
        whole = slot_tables()
        whole.table = tables.table  # what numbers there are depends on who came first
        whole._needs = tables._needs
        other.run("nft", "-f", "-", stdin=removal(TABLE))
        load(whole, other, new, set())

        assert _elements(in_force(ours)) == _elements(in_force(other)), f"step {step}: {old} -> {new}"
        old = new


def _elements(listed: Any) -> dict[str, Any]:
    """Return the elements by the name of their set, without empty sets."""
    found = (item[kind] for item in listed for kind in ("map", "set") if kind in item)
    return {item["name"]: item["elem"] for item in found if item.get("elem")}


def test_an_address_that_several_service_ports_share_goes_with_the_last_of_them(lab: Lab) -> None:
    host, tables = lab.add("shared"), slot_tables()
    first = translation(ServicePort(name("ns/a:http"), 80, ("10.96.0.1",)), NEAR)
    second = translation(ServicePort(name("ns/a:https"), 443, ("10.96.0.1",)), NEAR)
    names = {first.service_port.name, second.service_port.name}
    load(tables, host, by_name(first, second), names)

    load(tables, host, by_name(second), names)
    assert "10.96.0.1" in host.run("nft", "list", "set", *TABLE.split(), "cluster_ips4").stdout

    load(tables, host, {}, names)
    assert not _elements(in_force(host))


def test_pins_outlive_the_process_that_loaded_the_table(lab: Lab) -> None:
    host = lab.add("pins")
    load(slot_tables(), host, by_name(PINNED), set())
    host.run("nft", "add", "element", *TABLE.split(), "pins4 { 10.0.0.1 . 4000:1000 timeout 60s : 4000:1001 }")

    load(slot_tables(), host, by_name(PINNED, WEB), set())

    assert "10.0.0.1" in host.run("nft", "list", "map", *TABLE.split(), "pins4").stdout
