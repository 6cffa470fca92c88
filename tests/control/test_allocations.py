"""Node ports and load balancer IPs: allocation, conflicts between Services, and restarts."""

from __future__ import annotations

import contextlib
import ipaddress
import random
from typing import Any

import pytest

from tests.control.given import World, gone, named, service
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.decode import Allocation
from userspace_proxy.control.hosts import Hosts
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.pools import NodePort
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import Portal

CLUSTER_IPS = [ipaddress.ip_network("10.96.0.0/16"), ipaddress.ip_network("fd00::/112")]
POOL = [ipaddress.ip_network("203.0.113.0/28"), ipaddress.ip_network("2001:db8::/120")]
DUAL = {"ipFamilyPolicy": "RequireDualStack"}
UDP = L4Protocol.UDP


def allocations(memory: SavedAllocations | None = None) -> ManifestAllocations:
    return ManifestAllocations(CLUSTER_IPS, memory, POOL)


def assign(known: ManifestAllocations, name: str = "web", **spec: Any) -> Allocation:
    return known.assign(named(name), service(name, **spec))[0]


def node_ports(known: ManifestAllocations, name: str = "web", **spec: Any) -> list[int]:
    return list(assign(known, name, **{"type": "NodePort", **spec}).node_ports.values())


def stating(number: int, protocol: str = "TCP") -> list[dict[str, Any]]:
    return [{"port": 80, "nodePort": number, "protocol": protocol}]


# ---- node ports


@pytest.mark.parametrize("kind", ["NodePort", "LoadBalancer"])
def test_every_port_that_states_none_is_given_a_node_port(kind: str) -> None:
    ports = [{"port": 80, "name": "a"}, {"port": 81, "name": "b", "nodePort": 30_001}, {"port": 82, "name": "c"}]

    given = assign(allocations(), type=kind, ports=ports).node_ports

    assert list(given) == [("a", "TCP"), ("b", "TCP"), ("c", "TCP")]
    assert given["b", "TCP"] == 30_001
    assert len(set(given.values())) == 3
    assert all(30_000 <= number <= 32_767 for number in given.values())


@pytest.mark.parametrize(
    "spec",
    [
        {"type": "ClusterIP"},
        {"type": None},
        {"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False},
        {"type": "NodePort", "ports": [{"port": 80, "protocol": "SCTP"}]},
    ],
)
def test_a_load_balancer_without_node_ports_is_allocated_none(spec: dict[str, Any]) -> None:
    """P6."""
    assert not assign(allocations(), **spec).node_ports


def test_a_node_port_that_is_stated_is_there_though_none_is_to_be_allocated() -> None:
    given = assign(allocations(), type="LoadBalancer", allocateLoadBalancerNodePorts=False, ports=stating(30_080))

    assert given.node_ports == {("", "TCP"): 30_080}


def test_one_number_may_be_stated_for_tcp_and_for_udp() -> None:
    """P2."""
    known = allocations()
    both = [{**stating(30_053)[0], "name": "tcp"}, {**stating(30_053, "UDP")[0], "name": "udp"}]

    assert node_ports(known, ports=both) == [30_053, 30_053]
    with pytest.raises(ConfigError, match="30053 is already the node port of default/web"):
        node_ports(known, "second", ports=stating(30_053, "UDP"))


@pytest.mark.parametrize(
    ("number", "protocol", "why"),
    [
        (22, "TCP", "22 is the port of SSH"),
        (10_249, "TCP", "10249 is a port of Kubernetes' own components"),
        (10_256, "TCP", "10256 is a port of Kubernetes' own components"),
        (30_080, "TCP", "this node listens at TCP port 30080"),
        (30_053, "UDP", "this node listens at UDP port 30053"),
    ],
)
def test_a_node_port_at_which_the_node_listens_is_refused_and_named(number: int, protocol: str, why: str) -> None:
    listening = {NodePort("TCP", 30_080), NodePort("UDP", 30_053)}
    known = ManifestAllocations(CLUSTER_IPS, hosts=Hosts(listening=lambda: listening))

    with pytest.raises(ConfigError, match=why) as caught:
        node_ports(known, ports=stating(number, protocol))

    assert caught.value.field == "spec.ports[0].nodePort"


@pytest.mark.parametrize("number", [22, 10_249, 10_256])
def test_a_health_check_node_port_that_is_reserved_is_refused_and_named(number: int) -> None:
    with pytest.raises(ConfigError, match=f"healthCheckNodePort: {number} is ") as caught:
        assign(allocations(), type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=number)

    assert caught.value.field == "spec.healthCheckNodePort"


@pytest.mark.parametrize(
    ("number", "protocol", "why"),
    [
        (22, "TCP", "22 is the port of SSH"),
        (10_256, "TCP", "10256 is a port of Kubernetes' own components"),
        (80, "TCP", "this node listens at TCP port 80"),
        (53, "UDP", "this node listens at UDP port 53"),
    ],
)
@pytest.mark.parametrize("ip", ["192.0.2.1", "2001:db8:1::1"])
@pytest.mark.parametrize("is_external_ip", [True, False])
def test_a_port_of_the_node_is_not_taken_by_an_external_or_load_balancer_ip_that_is_the_nodes(
    number: int, protocol: str, why: str, ip: str, is_external_ip: bool
) -> None:
    listening = {NodePort("TCP", 80), NodePort("UDP", 53)}
    known = ManifestAllocations(CLUSTER_IPS, hosts=Hosts({"192.0.2.1", "2001:db8:1::1"}, listening=lambda: listening))
    ports = [{"port": number, "protocol": protocol, "name": "taken"}, {"port": 8080, "name": "free"}]
    both: Any = {"ports": ports, **DUAL}
    if is_external_ip:
        web = service("web", externalIPs=[ip, "203.0.113.9"], **both)
    else:
        web = service("web", type="LoadBalancer", ingress=[{"ip": ip}, {"ip": "203.0.113.9"}], **both)

    allocation, (problem,) = known.assign(named("web"), web)

    assert problem.field == ("spec.externalIPs[0]" if is_external_ip else "status.loadBalancer.ingress")
    assert f"{ip} is an address of this node, and {why}" in str(problem)
    assert allocation.lost == known.held(named("web")).lost == {Portal(ip, number, L4Protocol(protocol))}


def test_a_portal_at_an_address_of_the_node_stays_a_services_own_when_a_process_listens_there() -> None:
    listening: set[NodePort] = set()
    known = ManifestAllocations(CLUSTER_IPS, hosts=Hosts({"192.0.2.1"}, listening=lambda: listening))
    assign(known, externalIPs=["192.0.2.1"])

    listening.add(NodePort("TCP", 80))

    assert not assign(known, externalIPs=["192.0.2.1"], sessionAffinity="ClientIP").lost
    assert assign(known, "other", externalIPs=["192.0.2.1"]).lost


def test_a_node_port_that_a_service_has_stays_its_own_when_a_process_listens_there() -> None:
    listening: set[NodePort] = set()
    known = ManifestAllocations(CLUSTER_IPS, hosts=Hosts(listening=lambda: listening))
    node_ports(known, ports=stating(30_080))

    listening.add(NodePort("TCP", 30_080))

    assert node_ports(known, ports=stating(30_080), sessionAffinity="ClientIP") == [30_080]


def test_a_service_that_states_a_value_another_states_is_refused_and_keeps_what_it_had() -> None:
    known = allocations()
    node_ports(known, "first", ports=stating(30_080))
    before = assign(known, "second", type="NodePort", clusterIP="10.96.0.5", ports=stating(30_081))

    with pytest.raises(ConfigError, match="30080 is already the node port of default/first") as caught:
        assign(known, "second", type="NodePort", clusterIP="10.96.0.6", ports=stating(30_080))

    assert caught.value.field == "spec.ports[0].nodePort"
    assert known.held(named("second")) == before
    assert assign(known, "third", clusterIP="10.96.0.6").cluster_ips == ("10.96.0.6",)


def test_a_stated_node_port_is_taken_from_the_service_it_was_allocated_to() -> None:
    known = allocations()
    (given,) = node_ports(known, "given")

    assert node_ports(known, "states", ports=stating(given)) == [given]

    assert known.take_evicted() == {named("given")}
    assert node_ports(known, "given") == [given + 1]


def test_a_node_port_is_free_at_once_when_the_type_changes() -> None:
    """S8."""
    known = allocations()
    node_ports(known, ports=stating(30_080))

    assert not assign(known, type="ClusterIP", ports=stating(30_080)).node_ports
    assert node_ports(known, "other", ports=stating(30_080)) == [30_080]


def test_an_allocated_node_port_stays_when_the_service_changes_otherwise() -> None:
    known = allocations()
    before = node_ports(known)

    assert node_ports(known, ports=[{"port": 81}], sessionAffinity="ClientIP") == before


def test_a_new_port_leaves_the_node_ports_of_others() -> None:
    known = allocations()
    one, two = ({"port": 80, "name": "a"}, {"port": 81, "name": "b"})
    before = assign(known, type="NodePort", ports=[one]).node_ports

    after = assign(known, type="NodePort", ports=[two, one]).node_ports

    assert after["a", "TCP"] == before["a", "TCP"]


def test_when_all_are_taken_a_service_is_refused_and_nothing_of_it_stays() -> None:
    known = allocations()
    many = [{"port": n + 1, "name": f"p{n}"} for n in range(2_682)]
    node_ports(known, "all", ports=many)

    with pytest.raises(ConfigError, match="30000-32767 is used up"):
        node_ports(known, clusterIP="10.96.0.5")

    assert assign(known, "other", clusterIP="10.96.0.5").cluster_ips == ("10.96.0.5",)
    assert node_ports(known, "chooses", ports=stating(30_000)) == [30_000]


# ---- health check node ports


def test_a_load_balancer_service_of_policy_local_is_allocated_a_health_check_node_port() -> None:
    known = allocations()
    spec = {"type": "LoadBalancer", "externalTrafficPolicy": "Local"}

    given = assign(known, **spec)

    assert given.health_check_node_port in range(30_000, 32_768)
    assert given.health_check_node_port not in given.node_ports.values()
    assert assign(known, **spec) == given
    assert assign(known, **spec, healthCheckNodePort=30_010).health_check_node_port == 30_010
    assert assign(known, type="LoadBalancer").health_check_node_port == 0


def test_a_health_check_is_answered_at_no_other_services_node_port() -> None:
    known = allocations()
    node_ports(known, "first", ports=stating(30_010))

    with pytest.raises(ConfigError, match="30010 is already the node port of default/first") as caught:
        assign(known, type="LoadBalancer", externalTrafficPolicy="Local", healthCheckNodePort=30_010)

    assert caught.value.field == "spec.healthCheckNodePort"


# ---- load balancer IPs


@pytest.mark.parametrize(
    ("spec", "families"),
    [({}, [4]), ({"ipFamilies": ["IPv6"]}, [6]), (DUAL, [4, 6]), ({"clusterIPs": ["fd00::9", "10.96.0.9"]}, [4, 6])],
)
def test_a_load_balancer_gets_an_ip_of_each_of_its_families(spec: dict[str, Any], families: list[int]) -> None:
    ips = assign(allocations(), type="LoadBalancer", **spec).load_balancer_ips

    assert sorted(ipaddress.ip_address(ip).version for ip in ips) == families
    assert all(any(ipaddress.ip_address(ip) in network for network in POOL) for ip in ips)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_a_service_of_another_type_gets_no_load_balancer_ip(kind: str) -> None:
    assert assign(allocations(), type=kind, loadBalancerIP="203.0.113.5").load_balancer_ips == ()


@pytest.mark.parametrize("ingress", [[{"ip": "198.51.100.1"}], [{"hostname": "lb.example.org"}]])
def test_a_service_with_an_ingress_ip_is_allocated_no_load_balancer_ip(ingress: list[dict[str, Any]]) -> None:
    assert assign(allocations(), type="LoadBalancer", ingress=ingress).load_balancer_ips == ()


def test_a_service_of_another_load_balancers_class_gets_none() -> None:
    assert assign(allocations(), type="LoadBalancer", loadBalancerClass="example.org/lb").load_balancer_ips == ()
    assert len(assign(allocations(), type="LoadBalancer", loadBalancerClass="").load_balancer_ips) == 1


def test_without_a_pool_no_load_balancer_ip_is_allocated_and_nothing_is_reported() -> None:
    known = ManifestAllocations(CLUSTER_IPS)

    allocation, problems = known.assign(named("web"), service(type="LoadBalancer", loadBalancerIP="203.0.113.5"))

    assert (allocation.load_balancer_ips, problems) == ((), [])


def test_a_stated_load_balancer_ip_is_taken_from_the_service_it_was_allocated_to() -> None:
    known = allocations()
    (given,) = assign(known, "given", type="LoadBalancer").load_balancer_ips

    assert assign(known, "states", type="LoadBalancer", loadBalancerIP=given).load_balancer_ips == (given,)

    assert known.take_evicted() == {named("given")}
    assert assign(known, "given", type="LoadBalancer").load_balancer_ips != (given,)


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        ("198.51.100.1", "not in --load-balancer-pool"),
        ("somewhere", "no IP address"),
        ("203.0.113.9", "already the load balancer IP of default/first"),
    ],
)
def test_a_service_whose_stated_load_balancer_ip_is_taken_is_served_without_it_and_reported(
    stated: str, words: str
) -> None:
    known = allocations()
    assign(known, "first", type="LoadBalancer", loadBalancerIP="203.0.113.9")

    allocation, problems = known.assign(named("web"), service(type="LoadBalancer", loadBalancerIP=stated))

    assert allocation.load_balancer_ips == ()
    assert len(allocation.cluster_ips) == len(allocation.node_ports) == 1
    assert [problem.field for problem in problems] == ["spec.loadBalancerIP"]
    assert words in str(problems[0])


def test_when_the_pool_is_used_up_a_service_is_served_without() -> None:
    known = allocations()
    for n in range(14):
        assert assign(known, f"s{n}", type="LoadBalancer").load_balancer_ips

    allocation, problems = known.assign(named("web"), service(type="LoadBalancer"))

    assert allocation.cluster_ips
    assert allocation.load_balancer_ips == ()
    assert "203.0.113.0/28 is used up" in str(problems[0])


# ---- restarts

MANY: dict[str, dict[str, Any]] = {
    "a": {"type": "NodePort"},
    "b": {"type": "LoadBalancer", **DUAL},
    "c": {"type": "LoadBalancer", "externalTrafficPolicy": "Local"},
    "d": {"type": "NodePort", "ports": [{"port": 53, "name": "u", "protocol": "UDP"}, {"port": 53, "name": "t"}]},
}


@pytest.mark.parametrize("remembers", [True, False])
def test_after_a_restart_every_service_has_its_values_again(remembers: bool) -> None:
    before = allocations()
    held = {name: assign(before, name, **spec) for name, spec in MANY.items()}

    after = allocations(before.memory() if remembers else None)

    assert {name: assign(after, name, **spec) for name, spec in reversed(MANY.items())} == dict(reversed(held.items()))


def test_only_allocated_values_are_saved_under_unique_keys() -> None:
    known = allocations()
    assign(known, "stated", type="LoadBalancer", loadBalancerIP="203.0.113.5", ports=stating(30_080))
    web = assign(known, type="LoadBalancer", externalTrafficPolicy="Local")

    memory = known.memory()

    assert memory.node_ports == {
        "default/web/TCP": web.node_ports["", "TCP"],
        "default/web/health-check": web.health_check_node_port,
    }
    assert memory.load_balancer_ips == {"default/web/load-balancer/IPv4": web.load_balancer_ips[0]}


def test_the_numbers_are_the_same_in_every_release() -> None:
    """A changed number would move node ports and addresses of proxies without a state file."""
    given = assign(allocations(), type="LoadBalancer")

    assert (given.node_ports, given.load_balancer_ips) == ({("", "TCP"): 31_225}, ("203.0.113.13",))


# ---- whatever happens


@pytest.mark.parametrize("seed", range(20))
def test_no_value_has_two_holders_and_pools_forget_nothing(seed: int) -> None:
    chance = random.Random(seed)
    known = ManifestAllocations([ipaddress.ip_network("10.96.0.0/27")], None, [ipaddress.ip_network("203.0.113.0/29")])
    held: dict[str, Allocation] = {}
    for _ in range(200):
        name = f"s{chance.randrange(8)}"
        if chance.random() < 0.2:
            known.release(named(name))
            held.pop(name, None)
        else:
            spec: dict[str, Any] = {
                "type": chance.choice(["ClusterIP", "NodePort", "LoadBalancer"]),
                "clusterIP": chance.choice([None, f"10.96.0.{chance.randrange(1, 12)}"]),
                "ports": chance.choice([stating(30_080 + chance.randrange(4)), [{"port": 80}]]),
                "loadBalancerIP": chance.choice([None, f"203.0.113.{chance.randrange(1, 7)}"]),
                "externalTrafficPolicy": chance.choice(["Local", "Cluster"]),
            }
            known.in_order({named(name): service(name, **spec)})
            with contextlib.suppress(ConfigError):
                assign(known, name, **spec)
        held = {f"s{n}": known.held(named(f"s{n}")) for n in range(8)}
        values = [
            value
            for have in held.values()
            for value in (
                *have.cluster_ips,
                *have.load_balancer_ips,
                *have.node_ports.values(),
                *filter(None, [have.health_check_node_port]),
            )
        ]
        assert len(values) == len(set(values))
    for n in range(8):
        known.release(named(f"s{n}"))
    assert known.memory() == SavedAllocations()
    assert [pool._allocator.memory() for pool in known._claims._pools] == [{}] * 4


# ---- in a cluster


def test_in_a_cluster_services_have_the_values_of_the_api_and_no_others() -> None:
    given = service(type="LoadBalancer", clusterIPs=["10.96.0.1", "fd00::1"], ipFamilies=["IPv4", "IPv6"])

    assert Allocations().assign(named("web"), given) == (Allocation(("10.96.0.1", "fd00::1")), [])


# ---- through the tracker


def test_a_service_that_loses_an_allocated_node_port_gets_another_in_the_same_state() -> None:
    world = World()
    world.tell(service(type="NodePort"))
    number = world.port().node_port

    world.tell(service("states", type="NodePort", ports=stating(number)))

    assert world.port("states").node_port == number
    assert world.port().node_port == number + 1
    assert world.problems == []


def test_node_ports_can_be_swapped_in_one_change() -> None:
    world = World()
    world.tell(
        service("a", type="NodePort", ports=stating(30_001)), service("b", type="NodePort", ports=stating(30_002))
    )

    world.tell(
        service("a", type="NodePort", ports=stating(30_002)), service("b", type="NodePort", ports=stating(30_001))
    )

    assert (world.port("a").node_port, world.port("b").node_port) == (30_002, 30_001)
    assert world.problems == []


def test_a_refused_node_port_is_assigned_once_it_is_free() -> None:
    world = World()
    world.tell(service("first", type="NodePort", ports=stating(30_001)))
    world.tell(service("second", type="NodePort", ports=stating(30_001)))
    assert ["default/first" in problem for problem in world.problems] == [True]
    assert world.ips("second") == ()

    world.tell(service("first", type="ClusterIP"))

    assert world.port("second").node_port == 30_001
    assert world.problems == []


def test_a_load_balancer_that_waits_for_an_ip_has_it_as_soon_as_it_is_free() -> None:
    world = World(load_balancer_pool=["203.0.113.0/32"])
    world.tell(service("first", type="LoadBalancer"), service("second", type="LoadBalancer"))
    assert world.port("second").load_balancer_ips == ()
    assert len(world.problems) == 1

    world.tell(gone("Service", "first"))

    assert world.port("second").load_balancer_ips == ("203.0.113.0",)
    assert world.problems == []
