"""Kernel mode ipvs: its text, the virtual servers of a Service, and that other Services stay reachable."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace

import pytest

from tests.modes.redirect_cases import TCP, UDP, assert_golden, name
from tests.modes.translation_cases import (
    ALL,
    EVERYTHING,
    FAR4,
    HERE,
    NEAR4,
    PODS,
    any_translation,
    by_name,
    translation,
)
from userspace_proxy.lab import Lab
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Balance, Portal, ServicePort
from userspace_proxy.modes.element_tables import ElementTables
from userspace_proxy.modes.ipvs.changes import (
    ConnectionCounts,
    ServerChange,
    Verb,
    record,
    removals_when_idle,
    server_changes,
)
from userspace_proxy.modes.ipvs.desired import DesiredServers
from userspace_proxy.modes.ipvs.device import device_lines
from userspace_proxy.modes.ipvs.genetlink import TICKS_A_SECOND, read, without_counts
from userspace_proxy.modes.ipvs.rules import rules
from userspace_proxy.modes.ipvs.table import (
    IpvsTable,
    VirtualServers,
    VirtualServerSpec,
    at_host,
    node_port_ips,
    virtual_ips,
    virtual_servers,
)
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation

FACTS = NodeFacts(HERE, PODS)
WEB, DNS = Portal("10.96.0.1", 80, TCP), Portal("10.96.0.10", 53, UDP)
A, B, C = ("10.244.0.2", 8080), ("10.244.0.3", 8080), ("10.244.0.4", 8080)
PROC = f"""\
IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A600001:0050 wlc persistent {10800 * TICKS_A_SECOND} FFFFFFFF
  -> 0AF40002:1F90      Masq    1      2          3
  -> 0AF40003:1F90      Masq    0      0          0
UDP  [fd00:0096:0000:0000:0000:0000:0000:000a]:0035 rr
  -> [fd00:0244:0000:0000:0000:0000:0000:0002]:14E9      Masq    3      0          0
FWM  00000007 rr
  -> 0AF40002:1F90      Masq    1      0          0
SCTP 0A600001:0050 rr
"""


def test_all_of_it_reads_as_written_down() -> None:
    assert_golden("ipvs-everything.txt", rules(EVERYTHING.values(), FACTS, HERE.addresses, "rr").text())


def test_the_kernel_takes_every_element_of_the_table(lab: Lab) -> None:
    """By netlink on one host, as text on another."""
    ours, theirs, facts = lab.add("ipvs-netlink"), lab.add("ipvs-text"), at_host(FACTS, HERE.addresses)
    with ours.inside(), asyncio.Runner() as runner:  # a loop of its own, whose threads are then of the host
        tables = ElementTables("ipvs", IpvsTable())
        runner.run(tables.load(RuleUpdate(by_name(EVERYTHING.values()), (), facts)))
        tables.unwatch()
    theirs.run("nft", "-f", "-", stdin=IpvsTable().rules(facts, EVERYTHING.values()).text())

    listed = [host.run("nft", "list", "table", *IpvsTable.name.split()).stdout for host in (ours, theirs)]
    assert [sorted(re.findall(r"[^\s,]+", text)) for text in listed] == [sorted(re.findall(r"[^\s,]+", listed[0]))] * 2


# ---- which virtual servers


def test_a_node_port_has_a_virtual_server_at_each_address_of_its_family_and_is_no_address_itself() -> None:
    made = translation(ServicePort(name("ns/a"), 80, ("10.96.0.1",), node_port=30_080), *ALL)

    found = virtual_servers(made, ("192.0.2.1", "192.0.2.2", "fd00::1"))

    assert set(found) == {WEB, Portal("192.0.2.1", 30_080, TCP), Portal("192.0.2.2", 30_080, TCP)}
    assert virtual_ips(made) == {"10.96.0.1"}


def test_node_ports_are_at_the_hosts_own_addresses_that_were_asked_for_and_never_on_loopback() -> None:
    own = ("192.0.2.1", "198.51.100.1", "127.0.0.1", "fd00::1", "::1")

    assert node_port_ips(NodeFacts(), own) == ("192.0.2.1", "198.51.100.1", "fd00::1")
    assert node_port_ips(NodeFacts(node_ports_on=("192.0.2.0/24",)), own) == ("192.0.2.1", "fd00::1")


def test_clients_that_wait_without_local_endpoints_get_the_listener_for_pods() -> None:
    """The rules drop clients from outside before IPVS sees their packets."""
    service_port = ServicePort(
        name("ns/a"), 80, ("10.96.0.1",), load_balancer_ips=("203.0.113.1",), external_local=True
    )

    remote_only = virtual_servers(translation(service_port, FAR4), ())[Portal("203.0.113.1", 80, TCP)]
    both = virtual_servers(translation(service_port, FAR4, NEAR4), ())[Portal("203.0.113.1", 80, TCP)]

    assert list(remote_only.weights) == [FAR4.address]
    assert list(both.weights) == [NEAR4.address]


def test_a_udp_endpoint_that_only_serves_keeps_its_flows_and_gets_no_new_ones() -> None:
    leaving = Endpoint("10.244.0.9", 53, ready=False, serving=True, terminating=True)
    gone = Endpoint("10.244.0.8", 53, ready=False, serving=False, terminating=True)
    for protocol, weights in ((UDP, {NEAR4.address: 1, leaving.address: 0}), (TCP, {NEAR4.address: 1})):
        made = translation(ServicePort(name("ns/a", protocol), 53, ("10.96.0.1",)), NEAR4, leaving, gone)

        assert virtual_servers(made, ())[Portal("10.96.0.1", 53, protocol)].weights == weights


def test_annotations_choose_the_scheduler_and_the_weights() -> None:
    service_port = ServicePort(name("ns/a"), 80, ("10.96.0.1",), ipvs_scheduler="wrr", weights=((NEAR4.ip, 3),))
    made = translation(service_port, NEAR4, FAR4)

    assert virtual_servers(made, ())[WEB] == VirtualServerSpec("wrr", None, {NEAR4.address: 3, FAR4.address: 1})
    assert virtual_servers(made, (), "lc", missing={"wrr"})[WEB].scheduler == "lc"
    assert virtual_servers(made, (), "lc", missing={"wrr", "lc"})[WEB].scheduler == "rr"


SCHEDULERS = {
    Balance.ROUND_ROBIN: "wrr",
    Balance.LEAST_CONNECTIONS: "wlc",
    Balance.RANDOM: "twos",
    Balance.SOURCE_HASH: "mh",
}


def test_every_balancing_algorithm_has_a_scheduler() -> None:
    assert SCHEDULERS.keys() == set(Balance)


@pytest.mark.parametrize(("balance", "scheduler"), SCHEDULERS.items(), ids=SCHEDULERS)
def test_a_balancing_algorithm_is_a_scheduler_unless_another_one_is_annotated(balance: Balance, scheduler: str) -> None:
    service_port = ServicePort(name("ns/a"), 80, ("10.96.0.1",), balance=balance)

    def chosen(service_port: ServicePort, missing: Collection[str] = ()) -> str:
        return virtual_servers(translation(service_port, NEAR4), (), "lc", missing)[WEB].scheduler

    assert chosen(service_port) == scheduler
    assert chosen(service_port, {scheduler}) == "lc"
    assert chosen(replace(service_port, ipvs_scheduler="sed")) == "sed"


def test_endpoints_that_all_have_the_weight_0_have_all_the_same() -> None:
    nobody = ServicePort(name("ns/a"), 80, ("10.96.0.1",), weights=((NEAR4.ip, 0), (FAR4.ip, 0)))

    assert virtual_servers(translation(nobody, NEAR4, FAR4), ())[WEB].weights == {NEAR4.address: 1, FAR4.address: 1}
    assert virtual_servers(translation(nobody, NEAR4, FAR4, Endpoint("10.244.0.9", 80)), ())[WEB].weights == {
        NEAR4.address: 0,
        FAR4.address: 0,
        ("10.244.0.9", 80): 1,
    }


def test_a_service_without_endpoints_has_no_virtual_server() -> None:
    assert virtual_servers(translation(ServicePort(name("ns/a"), 80, ("10.96.0.1",))), ()) == {}


# ---- what all want together


def test_an_external_ip_at_a_node_ports_address_takes_precedence_until_it_is_removed() -> None:
    by_node_port = translation(ServicePort(name("ns/a"), 80, ("10.96.0.1",), node_port=30_080), NEAR4)
    by_ip = translation(ServicePort(name("ns/b"), 30_080, ("10.96.0.2",), external_ips=("192.0.2.1",)), FAR4)
    both, met = by_name([by_node_port, by_ip]), Portal("192.0.2.1", 30_080, TCP)
    wanted = DesiredServers()

    def endpoints_after(given: Mapping[ServicePortName, Translation]) -> list[Address]:
        wanted.change(both, given, ("192.0.2.1",), "rr")
        return list(wanted.servers[met].weights) if met in wanted.servers else []

    for _ in range(2):
        assert endpoints_after(by_name([by_ip, by_node_port])) == [FAR4.address]
        assert endpoints_after(by_name([by_node_port])) == [NEAR4.address]
        assert endpoints_after(both) == [FAR4.address]
        assert endpoints_after(by_name([by_ip])) == [FAR4.address]
        assert endpoints_after({}) == []
    assert not wanted.servers
    assert not wanted.ips


def test_an_address_is_wanted_until_the_last_service_port_gives_it_up() -> None:
    tcp, udp = (translation(ServicePort(name("ns/a", p), 53, ("10.96.0.1",)), NEAR4) for p in (TCP, UDP))
    both, wanted = by_name([tcp, udp]), DesiredServers()
    for given, ips in ((both, {"10.96.0.1"}), (by_name([udp]), {"10.96.0.1"}), ({}, set())):
        wanted.change(both, given, (), "rr")

        assert set(wanted.ips) == ips


# ---- steps


def test_new_endpoints_are_added_before_old_ones_are_removed() -> None:
    taken = list(
        server_changes({WEB: VirtualServerSpec(weights={A: 1})}, {WEB: (now := VirtualServerSpec(weights={B: 1}))})
    )

    assert taken == [ServerChange(Verb.ADD, WEB, now, B, 1), ServerChange(Verb.SET, WEB, now, A, 0)]


def test_udp_endpoints_go_at_once_so_that_their_flows_find_another() -> None:
    taken = list(
        server_changes({DNS: VirtualServerSpec(weights={A: 1})}, {DNS: (now := VirtualServerSpec(weights={B: 1}))})
    )

    assert taken == [ServerChange(Verb.ADD, DNS, now, B, 1), ServerChange(Verb.DELETE, DNS, now, A)]


def test_an_endpoint_goes_when_its_last_connection_has_ended() -> None:
    present = {WEB: VirtualServerSpec(weights={A: 0, B: 1})}
    wanted = {WEB: VirtualServerSpec(weights={B: 1})}

    assert list(removals_when_idle(present, wanted, {(WEB, A): ConnectionCounts(1, 0)})) == []
    assert list(removals_when_idle(present, wanted, {(WEB, A): ConnectionCounts(0, 1)})) == []
    assert list(removals_when_idle(present, wanted, {(WEB, B): ConnectionCounts(1, 0)})) == [
        ServerChange(Verb.DELETE, WEB, present[WEB], A)
    ]


def test_an_undesired_virtual_server_is_deleted_after_its_last_established_connection() -> None:
    present = {WEB: VirtualServerSpec(weights={A: 0, B: 0})}

    assert list(removals_when_idle(present, {}, {(WEB, A): ConnectionCounts(1, 0)})) == []
    assert list(removals_when_idle(present, {}, {(WEB, A): ConnectionCounts(0, 9)})) == [
        ServerChange(Verb.DELETE, WEB, present[WEB])
    ]


def test_an_endpoint_that_comes_back_while_it_leaves_gets_its_weight_again() -> None:
    present = {WEB: VirtualServerSpec(weights={A: 0, B: 1})}

    assert list(server_changes(present, {WEB: (now := VirtualServerSpec(weights={A: 1, B: 1}))})) == [
        ServerChange(Verb.SET, WEB, now, A, 1)
    ]


def walk(present: VirtualServers, wanted: Mapping[Portal, VirtualServerSpec]) -> None:
    record(present, list(server_changes(present, wanted)))


def test_many_endpoints_at_many_portals_are_noted_and_none_copied_for_each_step() -> None:
    many = VirtualServerSpec(weights={(f"10.244.{n // 250}.{n % 250}", 8080): 1 for n in range(4_000)})
    wanted = {Portal(f"203.0.113.{n}", 80, TCP): many for n in range(5)}
    present = VirtualServers()
    held: list[Mapping[Address, int]] = []

    def noting() -> Iterator[ServerChange]:
        for step in list(server_changes(present, wanted)):
            yield step
            weights = present[step.portal].weights
            if not any(weights is each for each in held):
                held.append(weights)

    record(present, noting())

    assert present == wanted
    assert len(held) <= 2 * len(wanted), "one of each server when it was made, one with what was added to it"
    record(present, [ServerChange(Verb.SET, Portal("203.0.113.1", 80, TCP), many, ("10.244.0.1", 8080), 0)])
    assert [server.weights["10.244.0.1", 8080] for server in present.values()] == [1, 0, 1, 1, 1]


@pytest.mark.parametrize("seed", range(20))
def test_random_changes_reach_the_desired_servers_and_cut_no_tcp_connection(seed: int) -> None:
    chance, present = random.Random(seed), VirtualServers()
    for _ in range(15):
        made = [any_translation(chance, number) for number in chance.sample(range(1, 7), chance.randrange(7))]
        wanted = VirtualServers()
        for each in made:
            wanted |= virtual_servers(each, HERE.addresses)
        before = {(portal, e) for portal, server in present.items() for e in server.weights if portal.protocol == TCP}

        walk(present, wanted)

        assert before <= {(portal, e) for portal, server in present.items() for e in server.weights}
        for portal, server in wanted.items():
            taking = {endpoint: weight for endpoint, weight in present[portal].weights.items() if weight}
            assert taking == {endpoint: weight for endpoint, weight in server.weights.items() if weight}
        if chance.random() < 0.5:
            record(present, list(removals_when_idle(present, wanted, {})))
            assert present == wanted
        assert not list(server_changes(present, wanted))


def test_the_device_loses_addresses_before_it_gets_others() -> None:
    lines = device_lines({"10.96.0.1", "10.96.0.2"}, ["10.96.0.2", "fd00::1"], is_new=False)
    assert [line.text for line in lines] == [
        "address del 10.96.0.1/32 dev kube-ipvs0",
        "address replace fd00::1/128 nodad dev kube-ipvs0",
    ]


# ---- what the kernel says


def test_a_listing_without_counts_is_equal_until_a_virtual_server_changes() -> None:
    same = PROC.replace("1      2          3", "1      17         0")
    assert same != PROC
    assert without_counts(same) == without_counts(PROC)

    for old, new in (
        ("Masq    1  ", "Masq    2  "),
        (f"persistent {10800 * TICKS_A_SECOND} ", "persistent 100 "),
        (":0035 rr", ":0035 wrr"),
        ("0AF40003:1F90      Masq    0", "0AF40004:1F90      Masq    0"),
    ):
        assert old in PROC
        assert without_counts(PROC.replace(old, new)) != without_counts(PROC)


def test_a_listing_of_ipvs_is_parsed() -> None:
    listing = read(PROC)

    dns6 = Portal("fd00:96::a", 53, UDP)
    assert listing.servers == {
        WEB: VirtualServerSpec("wlc", 10_800, {A: 1, B: 0}),
        dns6: VirtualServerSpec("rr", None, {("fd00:244::2", 5353): 3}),
    }
    assert listing.connections == {
        (WEB, A): ConnectionCounts(2, 3),
        (WEB, B): ConnectionCounts(0, 0),
        (dns6, ("fd00:244::2", 5353)): ConnectionCounts(0, 0),
    }
