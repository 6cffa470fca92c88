"""The tracker: events in, states out; which Services a change concerns, and how invalid objects are handled."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.control.given import (
    SYNCED,
    World,
    endpoint_slice,
    endpoints,
    gone,
    named,
    node,
    pod,
    port_named,
    put,
    service,
)
from userspace_proxy import api
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.names import L4Protocol
from userspace_proxy.model.service import SourceIP
from userspace_proxy.model.topology import Node

SELECTING: dict[str, Any] = {"selector": {"app": "web"}}


# ---- from objects to a state


def test_a_service_and_its_pods_become_a_service_port_with_endpoints() -> None:
    world = World()

    world.tell(service(**SELECTING), pod("a", "10.244.0.1"), pod("b", "10.244.0.2"), SYNCED)

    assert list(world.state.service_ports) == [port_named("web")]
    assert world.addresses() == ["10.244.0.1:80", "10.244.0.2:80"]


def test_objects_may_come_in_any_order() -> None:
    things: list[api.KubernetesObject] = [
        service(**SELECTING),
        pod("a", "10.244.0.1"),
        pod("b", "10.244.0.2"),
        endpoint_slice("10.9.9.9", of="db", name="db-2"),
        endpoint_slice("10.9.9.1", of="db", name="db-3"),
        endpoint_slice("10.9.9.5", of="db", name="db-1"),
        service("db"),
    ]
    expected = World()
    expected.tell(*things)
    for seed in range(10):
        world = World()
        for thing in random.Random(seed).sample(things, len(things)):
            world.tell(thing)

        assert world.state.service_ports == expected.state.service_ports
        assert world.state.endpoints == expected.state.endpoints


def test_a_service_without_endpoints_is_there_with_none() -> None:
    world = World()

    world.tell(service(**SELECTING))

    assert world.endpoints() == ()


def test_every_port_has_its_own_endpoints() -> None:
    world = World()
    ports = [{"port": 80, "name": "http", "targetPort": "web"}, {"port": 53, "name": "dns", "protocol": "UDP"}]

    world.tell(service(**SELECTING, ports=ports), pod(ports=[{"name": "web", "containerPort": 8080}]))

    assert world.addresses(port="http") == ["10.244.0.1:8080"]
    assert [str(e) for e in world.state.endpoints[port_named("web", "dns", L4Protocol.UDP)]] == ["10.244.0.1:53"]


@pytest.mark.parametrize("kind", ["slice", "endpoints"])
def test_a_service_without_a_selector_takes_the_slices_and_endpoints_of_its_name(kind: str) -> None:
    world = World()
    given: api.KubernetesObject = (
        endpoint_slice("10.0.0.1", "10.0.0.2")
        if kind == "slice"
        else endpoints({"addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2"}], "ports": [{"port": 8080}]})
    )

    world.tell(service(), given)

    assert world.addresses() == ["10.0.0.1:8080", "10.0.0.2:8080"]


def test_selected_pods_take_precedence_over_slices() -> None:
    world = World()

    world.tell(service(**SELECTING), endpoint_slice("10.0.0.9"), pod())

    assert world.addresses() == ["10.244.0.1:80"]


def test_a_selector_without_pods_takes_the_slices_of_a_dumped_cluster() -> None:
    world = World()

    world.tell(service(**SELECTING), endpoint_slice("10.0.0.9"))

    assert world.addresses() == ["10.0.0.9:8080"]


def test_all_labels_of_a_selector_must_match_and_the_namespace_too() -> None:
    world = World()
    both = {"app": "web", "tier": "front"}
    elsewhere = put(pod("d", "10.0.0.4", labels=both))

    world.tell(
        service(selector=both),
        pod("a", "10.0.0.1", labels={**both, "more": "x"}),
        pod("b", "10.0.0.2", labels={"app": "web"}),
        pod("c", "10.0.0.3", labels={}),
        ObjectEvent(
            EventType.SET,
            "Pod",
            elsewhere.name._replace(namespace="other") if elsewhere.name else None,
            elsewhere.object,
        ),
    )

    assert world.addresses() == ["10.0.0.1:80"]


def test_an_empty_selector_selects_nothing() -> None:
    world = World()

    world.tell(service(selector={}), pod(labels={}))

    assert world.endpoints() == ()


# ---- changes


def test_a_pod_that_changes_its_labels_joins_and_leaves() -> None:
    world = World()
    world.tell(service(**SELECTING), pod(labels={"app": "db"}))

    world.tell(pod())
    assert world.addresses() == ["10.244.0.1:80"]

    world.tell(pod(labels={"app": "db"}))
    assert world.addresses() == []


def test_a_selector_that_changes_selects_others_from_then_on() -> None:
    world = World()
    world.tell(service(**SELECTING), pod("a", "10.0.0.1"), pod("b", "10.0.0.2", labels={"app": "new"}))

    world.tell(service(selector={"app": "new"}))
    assert world.addresses() == ["10.0.0.2:80"]

    world.tell(pod("a", "10.0.0.7"), pod("c", "10.0.0.3", labels={"app": "new"}))
    assert world.addresses() == ["10.0.0.2:80", "10.0.0.3:80"]


def test_a_pod_that_stops_being_ready_is_not_ready_any_more() -> None:
    world = World()
    world.tell(service(**SELECTING), pod())

    world.tell(pod(ready=False))

    assert [e.ready for e in world.endpoints()] == [False]


def test_one_slice_takes_away_only_what_the_others_do_not_hold() -> None:
    """S9."""
    world = World()
    world.tell(service(), endpoint_slice("10.0.0.1", "10.0.0.2"), endpoint_slice("10.0.0.2", "10.0.0.3", name="web-2"))

    world.tell(gone("EndpointSlice", "web-1"))

    assert world.addresses() == ["10.0.0.2:8080", "10.0.0.3:8080"]


def test_of_one_address_in_two_slices_the_one_that_stays_counts() -> None:
    """S9: reuse of a pod's address."""
    world = World()
    ending = {"addresses": ["10.0.0.1"], "conditions": {"ready": False, "terminating": True}}

    world.tell(service(), endpoint_slice(ending), endpoint_slice("10.0.0.1", name="web-2"))

    assert [(e.ready, e.terminating) for e in world.endpoints()] == [(True, False)]


def test_a_slice_that_changes_its_service_leaves_the_one_before() -> None:
    world = World()
    world.tell(service("a"), service("b"), endpoint_slice("10.0.0.1", of="a"))

    world.tell(endpoint_slice("10.0.0.1", of="b"))

    assert (world.addresses("a"), world.addresses("b")) == ([], ["10.0.0.1:8080"])


def test_a_slice_marked_headless_takes_its_endpoints_away() -> None:
    """S3."""
    world = World()
    world.tell(service(), endpoint_slice("10.0.0.1"))

    world.tell(endpoint_slice("10.0.0.1", labels={"service.kubernetes.io/headless": ""}))

    assert world.addresses() == []


@pytest.mark.parametrize("kind", ["Service", "EndpointSlice", "Endpoints", "Pod", "Node"])
def test_deleting_an_unknown_object_changes_nothing(kind: str) -> None:
    world = World()
    before = world.tell(service(**SELECTING), pod())

    world.tell(gone(kind, "unknown"))

    assert world.state.service_ports == before.service_ports
    assert world.state.endpoints == before.endpoints


def test_a_deleted_service_is_gone_and_back_with_its_address_and_endpoints_when_set_again() -> None:
    world = World()
    world.tell(service(**SELECTING), pod())
    ips = world.ips("web")

    world.tell(gone("Service", "web"))
    assert not world.state.service_ports
    assert not world.state.endpoints

    world.tell(service(**SELECTING))
    assert world.ips("web") == ips
    assert world.addresses() == ["10.244.0.1:80"]


@pytest.mark.parametrize(
    "other",
    [
        service(clusterIP="None"),
        service(type="ExternalName", externalName="example.org"),
        service(labels={"service.kubernetes.io/service-proxy-name": "other"}),
    ],
)
def test_a_service_that_is_no_longer_proxied_is_removed_and_may_come_back(other: api.Service) -> None:
    """S2, S8."""
    world = World()
    world.tell(service(clusterIP="10.96.0.5"), endpoint_slice("10.0.0.1"))

    world.tell(other)
    assert not world.state.service_ports
    world.tell(service("heir", clusterIP="10.96.0.5"))
    assert world.ips("heir") == ("10.96.0.5",)

    world.tell(gone("Service", "heir"), service())
    assert world.addresses() == ["10.0.0.1:8080"]


def test_ports_that_are_renamed_added_and_removed_follow_the_manifest() -> None:
    world = World()
    world.tell(service(ports=[{"port": 80, "name": "a"}, {"port": 81, "name": "b"}]))

    world.tell(service(ports=[{"port": 80, "name": "a"}, {"port": 82, "name": "c"}]))

    assert [(n.port_name, p.port) for n, p in world.state.service_ports.items()] == [("a", 80), ("c", 82)]
    assert world.state.endpoints.keys() == world.state.service_ports.keys()


def test_an_object_added_and_deleted_in_one_batch_changes_nothing() -> None:
    """S10."""
    world = World()

    world.tell(put(service()), gone("Service", "web"))

    assert not world.state.service_ports
    assert world.allocations.memory() == SavedAllocations()


# ---- what did not change is the same object


def test_the_state_is_the_same_object_if_nothing_changed() -> None:
    world = World()
    before = world.tell(service())

    assert world.tell(SYNCED) is before


def test_only_what_changed_is_another_object() -> None:
    world = World()
    before = world.tell(service(**SELECTING), pod(), service("db"), endpoint_slice("10.0.0.1", of="db"))

    after = world.tell(pod("b", "10.244.0.2"))

    web, db = port_named("web"), port_named("db")
    assert after.endpoints[web] is not before.endpoints[web]
    assert after.service_ports[web] is before.service_ports[web]
    assert after.endpoints[db] is before.endpoints[db]
    assert after.service_ports[db] is before.service_ports[db]


def test_a_repeated_event_changes_no_value() -> None:
    world = World()
    things = (service(**SELECTING), pod(), service("db"), endpoint_slice("10.0.0.1", of="db"))
    before = world.tell(*things)

    after = world.tell(*things)

    assert all(after.service_ports[name] is value for name, value in before.service_ports.items())
    assert all(after.endpoints[name] is value for name, value in before.endpoints.items())


def test_a_returned_state_never_changes() -> None:
    world = World()
    before = world.tell(service(), endpoint_slice("10.0.0.1"))

    world.tell(gone("Service", "web"), service("db"))

    assert list(before.service_ports) == [port_named("web")]
    assert [str(e) for e in before.endpoints[port_named("web")]] == ["10.0.0.1:8080"]
    with pytest.raises(TypeError):
        before.service_ports[port_named("x")] = before.service_ports[port_named("web")]  # type: ignore[index]


# ---- the cost of a change


def test_a_pod_concerns_only_services_that_could_select_it() -> None:
    world = World()
    world.tell(
        service("web", selector={"app": "web"}),
        service("db", selector={"app": "db"}),
        service("none"),
        service("headless", clusterIP="None", selector={"app": "web"}),
        pod("a"),
        pod("b", "10.0.0.2", labels={"app": "db"}),
    )

    assert world.worked_out_for(pod("c", "10.0.0.3")) == {"web"}
    assert world.worked_out_for(pod("c", "10.0.0.3", labels={"app": "db"})) == {"web", "db"}
    assert world.worked_out_for(gone("Pod", "b")) == {"db"}
    assert world.worked_out_for(pod("d", "10.0.0.4", labels={"app": "cache"})) == set()


def test_a_slice_concerns_its_own_service_only() -> None:
    world = World()
    world.tell(service("a"), service("b"), endpoint_slice("10.0.0.1", of="a"))

    assert world.worked_out_for(endpoint_slice("10.0.0.2", of="a")) == {"a"}
    assert world.worked_out_for(endpoint_slice("10.0.0.2", of="b")) == {"a", "b"}
    assert world.worked_out_for(endpoint_slice("10.0.0.9", of="unknown", name="other")) == set()


def test_a_service_concerns_itself_only() -> None:
    world = World()
    world.tell(*(service(f"s{n}", **SELECTING) for n in range(20)), pod())

    assert world.worked_out_for(service("s3", **SELECTING, ports=[{"port": 81}])) == {"s3"}
    assert world.worked_out_for(gone("Service", "s4")) == set()


def test_a_deleted_object_leaves_nothing_in_memory() -> None:
    world = World()
    things = (service(**SELECTING), pod(), endpoint_slice("10.0.0.1"), endpoints({"addresses": [{"ip": "10.0.0.1"}]}))
    world.tell(*things)

    world.tell(gone("Service", "web"), gone("Pod", "pod"), gone("EndpointSlice", "web-1"), gone("Endpoints", "web"))

    tracker = world.tracker
    tracker.take_endpoint_changes()  # as after each sync
    kept = {name: value for name, value in vars(tracker).items() if isinstance(value, dict | set) and value}
    assert kept == {}


# ---- this node

HERE = Node("here", addresses=("192.0.2.1",))


def test_before_its_node_object_a_proxy_uses_the_name_and_addresses_of_the_host() -> None:
    world = World(here=HERE)

    world.tell(node("other", zone="zone-b"), SYNCED)

    assert world.state.node == HERE


def test_a_state_has_the_facts_of_its_node() -> None:
    world = World(here=HERE)

    world.tell(node("here", ("InternalIP", "10.0.0.1"), zone="zone-a", pod_cidrs=["10.244.0.0/24"]))

    assert world.state.node == Node("here", "zone-a", ("10.0.0.1",), ("10.244.0.0/24",))


@pytest.mark.parametrize(
    "changed",
    [
        node("here", ("InternalIP", "10.0.0.1"), zone="zone-b"),
        node("here", ("InternalIP", "10.0.0.2"), zone="zone-a"),
        node("here", ("InternalIP", "10.0.0.1"), zone="zone-a", pod_cidrs=["10.244.0.0/24"]),
    ],
)
def test_a_node_that_changes_gives_a_new_state_of_the_same_services(changed: api.Node) -> None:
    """C6: a zone label that changes is a full sync."""
    world = World(here=HERE)
    before = world.tell(service(), endpoint_slice("10.0.0.9"), node("here", ("InternalIP", "10.0.0.1"), zone="zone-a"))

    assert world.worked_out_for(changed) == set()

    assert world.state.node != before.node
    assert world.state.service_ports is before.service_ports
    assert world.state.endpoints is before.endpoints


def test_other_fields_of_a_node_change_nothing() -> None:
    world = World(here=HERE)
    before = world.tell(service(), node("here", zone="zone-a"))

    after = world.tell(node("here", ("Hostname", "here.example.org"), zone="zone-a"), node("other", zone="zone-c"))

    assert after is before


def test_a_node_that_is_deleted_stays_what_it_was() -> None:
    """Z2."""
    world = World(here=HERE)
    before = world.tell(node("here", zone="zone-a"))

    assert world.tell(gone("Node", "here")) is before


# ---- bad objects


class At:
    """An origin: line 7 of a file."""

    def where(self, field: str = "") -> str:
        return f"web.yaml:7[{field}]"


def bad(name: str = "web", **spec: Any) -> ObjectEvent:
    return put(service(name, **{"ports": [{"port": 0}], **spec}))


def test_a_bad_service_is_reported_and_harms_no_other() -> None:
    world = World()

    world.tell(bad("broken"), service("fine"), endpoint_slice("10.0.0.1", of="fine"))

    assert world.addresses("fine") == ["10.0.0.1:8080"]
    assert world.ips("broken") == ()
    assert len(world.problems) == 1
    assert "default/broken" in world.problems[0]


@pytest.mark.parametrize(
    "given",
    [
        service("other", clusterIP="None"),
        service("other", clusterIPs=["None"]),
        service("other", type="ExternalName", clusterIP="nonsense"),
        service("other", clusterIPs=["10.96.0.7", "10.96.0.7"]),
        service("other", externalIPs=["fe80::1%eth0"]),
        service("other", clusterIP="none"),
        service("other", ipFamilies=["IPv5"]),
        service("other", ipFamilies=[]),
        service("other", ports=[{"port": 80, "targetPort": "²"}], **SELECTING),
        service("other", ports=[{"port": 80, "protocol": "SCTP"}]),
        api.Service(api.ObjectMeta(name="other")),
        api.EndpointSlice(api.ObjectMeta(name="other", labels={"kubernetes.io/service-name": "web"})),
        api.Endpoints(api.ObjectMeta(name="web")),
        api.Pod(api.ObjectMeta(name="other", labels={"app": "web"})),
        api.Node(api.ObjectMeta(name="other")),
    ],
)
def test_a_bad_object_leaves_every_other_service_as_it_was(given: api.KubernetesObject) -> None:
    world = World()
    world.tell(given, service(**SELECTING), pod())
    assert world.addresses() == ["10.244.0.1:80"]

    world.tell(pod("second", "10.244.0.2"))
    assert world.addresses() == ["10.244.0.1:80", "10.244.0.2:80"]

    world.tell(gone(type(given).__name__, given.metadata.name), gone("Pod", "pod"))
    assert world.addresses() == ["10.244.0.2:80"]
    assert world.problems == []


ANNOTATION = "userspace-proxy/source-ip"


def test_a_problem_of_a_part_is_reported_while_it_lasts_and_the_rest_is_served() -> None:
    world = World()
    ports = [{"port": 80, "name": "web"}, {"port": 81, "name": "sctp", "protocol": "SCTP"}]

    world.tell(service(ports=ports, annotations={ANNOTATION: "mine"}), service("other"))
    assert set(world.state.service_ports) == {port_named("web", "web"), port_named("other")}
    (said,) = world.problems
    assert "spec.ports[1].protocol: 'SCTP' cannot be proxied" in said
    assert f"metadata.annotations.{ANNOTATION}: 'mine' says no source IP" in said

    assert world.worked_out_for(service("other", ports=[{"port": 81}])) == {"other"}
    assert world.problems == [said]

    world.tell(service(ports=ports[:1], annotations={ANNOTATION: "transparent"}))
    assert world.problems == []
    assert world.port("web", "web").source_ip is SourceIP.TRANSPARENT


def test_a_problem_of_a_part_ends_when_the_service_is_deleted_or_not_proxied() -> None:
    world = World()
    for end in (gone("Service", "web"), service(clusterIP="None", annotations={ANNOTATION: "mine"})):
        world.tell(service(annotations={ANNOTATION: "mine"}))
        assert len(world.problems) == 1

        world.tell(end)
        assert world.problems == []


def test_a_rejected_version_is_reported_instead_of_the_problems_of_the_one_before() -> None:
    world = World()
    world.tell(service(annotations={ANNOTATION: "mine"}, **SELECTING))

    world.tell(bad(**SELECTING))
    world.tell(pod())

    (said,) = world.problems
    assert "0 is not a port" in said


def test_in_a_cluster_a_service_without_a_cluster_ip_is_not_served_and_none_is_allocated() -> None:
    """S1."""
    tracker = Tracker(Allocations())

    tracker.apply([put(service("without", externalIPs=["1.2.3.4"])), put(service("web", clusterIP="10.96.0.1"))])

    assert list(tracker.state().service_ports) == [port_named("web")]


def test_in_a_cluster_two_services_may_share_what_the_api_lets_them_share() -> None:
    tracker = Tracker(Allocations())
    shared: dict[str, Any] = {"type": "LoadBalancer", "ingress": [{"ip": "203.0.113.1"}]}

    tracker.apply(
        [
            put(service("a", clusterIP="10.96.0.1", **shared)),
            put(service("b", clusterIP="10.96.0.2", ports=[{"port": 81}], **shared)),
        ]
    )

    assert [p.load_balancer_ips for p in tracker.state().service_ports.values()] == [("203.0.113.1",)] * 2
    assert not tracker.problems


def test_the_last_good_version_of_a_service_is_served_and_follows_its_pods() -> None:
    world = World()
    world.tell(service(**SELECTING), pod())

    world.tell(bad(**SELECTING))
    world.tell(gone("Pod", "pod"), pod("b", "10.244.0.2"))

    assert world.addresses() == ["10.244.0.2:80"]
    assert len(world.problems) == 1


def test_a_problem_is_reported_until_the_object_is_repaired() -> None:
    world = World()
    world.tell(service(), bad())

    world.tell(service("other"), pod())
    assert len(world.problems) == 1

    world.tell(service())
    assert world.problems == []


def test_a_problem_goes_with_the_object() -> None:
    world = World()
    world.tell(bad())

    world.tell(gone("Service", "web"))

    assert world.problems == []


def test_a_problem_names_the_place_and_what_is_still_served(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    event = ObjectEvent(EventType.SET, "Service", named("web"), service(ports=[{"port": 0}]), At())
    world.tell(event)
    world.tell(event)

    said = "web.yaml:7[spec.ports[0].port]: Service default/web: spec.ports[0].port: 0 is not a port"
    assert [record.getMessage().startswith(said) for record in caplog.records] == [True]
    assert "last good version" not in caplog.text

    world.tell(service())
    world.tell(bad())
    assert "its last good version goes on serving" in caplog.text


def test_an_sctp_port_is_reported_and_the_others_are_served(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    ports = [{"port": 80, "name": "a"}, {"port": 81, "name": "b", "protocol": "SCTP"}]

    world.tell(service(ports=ports), endpoint_slice("10.0.0.1", ports=[{"port": 8080, "name": "a"}]))
    world.tell(service(ports=ports, sessionAffinity="ClientIP"))

    assert [name.port_name for name in world.state.service_ports] == ["a"]
    assert ["SCTP" in problem for problem in world.problems] == [True]
    assert "last good version" not in caplog.text


# ---- cluster IPs that another Service has


def test_a_duplicate_cluster_ip_is_refused_and_comes_to_life_when_its_holder_is_deleted() -> None:
    world = World()
    world.tell(service("first", clusterIP="10.96.0.5"))
    world.tell(service("second", clusterIP="10.96.0.5"), endpoint_slice("10.0.0.1", of="second"))
    assert world.ips("second") == ()
    assert ["already the cluster IP of default/first" in problem for problem in world.problems] == [True]

    world.tell(gone("Service", "first"))

    assert world.ips("second") == ("10.96.0.5",)
    assert world.addresses("second") == ["10.0.0.1:8080"]
    assert world.problems == []


@pytest.mark.parametrize(
    "leaves",
    [
        put(service("first", clusterIP="10.96.0.6")),
        put(service("first")),
        put(service("first", clusterIP="None")),
        put(service("first", type="ExternalName")),
        gone("Service", "first"),
    ],
)
@pytest.mark.parametrize("heir", ["a-heir", "z-heir"])
def test_an_address_left_in_the_same_batch_can_be_had_by_another(leaves: ObjectEvent, heir: str) -> None:
    world = World()
    world.tell(service("first", clusterIP="10.96.0.5"))

    world.tell(leaves, service(heir, clusterIP="10.96.0.5"))

    assert world.ips(heir) == ("10.96.0.5",)
    assert world.problems == []


def test_of_two_in_one_batch_that_state_one_address_the_first_by_name_has_it() -> None:
    for order in (["a", "b"], ["b", "a"]):
        world = World()
        world.tell(*(service(name, clusterIP="10.96.0.5") for name in order))

        assert (world.ips("a"), world.ips("b")) == (("10.96.0.5",), ())


def test_two_services_swap_their_addresses_in_one_batch() -> None:
    world = World()
    world.tell(service("blue", clusterIP="10.96.0.5"), service("green", clusterIP="10.96.0.6"))

    world.tell(service("blue", clusterIP="10.96.0.6"), service("green", clusterIP="10.96.0.5"))

    assert (world.ips("blue"), world.ips("green")) == (("10.96.0.6",), ("10.96.0.5",))
    assert world.problems == []


def test_a_service_that_states_a_taken_address_keeps_its_last_good_version_with_current_endpoints() -> None:
    world = World()
    world.tell(service("first", clusterIP="10.96.0.5"), service(clusterIP="10.96.0.6", **SELECTING), pod())

    world.tell(service(clusterIP="10.96.0.5", selector={"app": "new"}, ports=[{"port": 81}]))
    world.tell(pod("second", "10.244.0.2"), pod("c", "10.244.0.3", labels={"app": "new"}))
    assert world.ips("web") == ("10.96.0.6",)
    assert world.addresses() == ["10.244.0.1:80", "10.244.0.2:80"]
    assert len(world.problems) == 1

    world.tell(gone("Service", "first"))
    assert world.ips("web") == ("10.96.0.5",)
    assert world.addresses() == ["10.244.0.3:81"]
    world.tell(pod("d", "10.244.0.4", labels={"app": "new"}))
    assert world.addresses() == ["10.244.0.3:81", "10.244.0.4:81"]


def test_a_range_that_is_used_up_refuses_one_and_serves_the_rest_until_there_is_room() -> None:
    world = World("10.0.0.4/30")
    world.tell(service("a"), service("b"), service("c"))
    assert [bool(world.ips(name)) for name in "abc"] == [True, True, False]
    assert "used up" in world.problems[0]

    world.tell(gone("Service", "a"))

    assert world.ips("c") != ()
    assert world.problems == []


# ---- restarts


def test_after_a_restart_every_service_has_its_address_in_whatever_order_it_comes(tmp_path: Path) -> None:
    before = World("10.0.0.0/28")
    names = [f"s{n}" for n in range(12)]
    for name in names:
        before.tell(service(name))
    held = {name: before.ips(name) for name in names}

    after = World("10.0.0.0/28", remembered=before.allocations.memory().cluster_ips)
    after.tell(*(service(name) for name in reversed(names)))

    assert {name: after.ips(name) for name in names} == held


def test_a_new_service_cannot_take_the_address_of_one_that_had_it_before_the_restart() -> None:
    before = World()
    before.tell(service("old"))
    (ip,) = before.ips("old")

    after = World(remembered=before.allocations.memory().cluster_ips)
    after.tell(service("a-new", clusterIP=ip), service("old"))

    assert after.ips("old") == (ip,)
    assert ["default/old" in problem for problem in after.problems] == [True]


def test_a_batch_of_allocated_services_leaves_stated_addresses_alone() -> None:
    crowded = World("10.0.0.4/30")

    crowded.tell(service("a"), service("z", clusterIP="10.0.0.5"))

    assert (crowded.ips("a"), crowded.ips("z")) == (("10.0.0.6",), ("10.0.0.5",))


@pytest.mark.parametrize("seed", range(10))
def test_many_small_changes_and_one_big_one_come_to_the_same(seed: int) -> None:
    """After any events, the state is that of the existing objects, and no two Services share an address."""
    chance = random.Random(seed)
    world, last = World(), dict[tuple[str, str], ObjectEvent]()

    def change() -> ObjectEvent:
        label = {"app": chance.choice(["web", "db"])}
        match chance.randrange(6):
            case 0:
                return put(service(f"s{chance.randrange(6)}", selector=label))
            case 1:
                ip = f"10.96.0.{chance.randrange(1, 5)}"
                return put(service(f"s{chance.randrange(6)}", clusterIP=ip, selector=label))
            case 2:
                return put(endpoint_slice("10.0.0.1", of=f"s{chance.randrange(6)}", name=f"e{chance.randrange(6)}"))
            case 3:
                return put(pod(f"p{chance.randrange(6)}", f"10.1.0.{chance.randrange(9)}", labels=label))
            case 4:
                return gone("Pod", f"p{chance.randrange(6)}")
            case _:
                return gone("Service", f"s{chance.randrange(6)}")

    for _ in range(60):
        events = [change() for _ in range(chance.randrange(1, 4))]
        for event in events:
            assert event.name is not None
            last[event.kind, event.name.name] = event
        world.tell(*events)
        ips = [port.cluster_ips for port in world.state.service_ports.values()]
        assert len(set(ips)) == len(ips)
        assert world.state.service_ports.keys() == world.state.endpoints.keys()

    at_once = World()
    at_once.tell(*last.values())
    served = world.state.service_ports.keys() & at_once.state.service_ports.keys()
    refused = {name.service for name in world.state.service_ports.keys() ^ at_once.state.service_ports.keys()}
    assert refused <= world.tracker.problems.keys() | at_once.tracker.problems.keys()
    troubled = world.tracker.problems.keys() | at_once.tracker.problems.keys()
    for name in served:
        if name.service not in troubled:
            assert set(world.state.endpoints[name]) == set(at_once.state.endpoints[name])


def test_states_share_their_service_ports_while_only_endpoints_change() -> None:
    world = World()
    before = world.tell(service(**SELECTING), pod("a", "10.244.0.1"), SYNCED)
    after = world.tell(pod("b", "10.244.0.2"))

    assert after.endpoints != before.endpoints
    assert after.service_ports is before.service_ports
    assert world.tell(service("db")).service_ports is not before.service_ports
