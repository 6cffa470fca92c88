"""After any history of events, the state equals that of a tracker that starts with the latest objects."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.control.given import endpoint_slice, endpoints, gone, node, pod, put, service
from userspace_proxy.api.events import EventType, ObjectEvent
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.topology import Node

CLUSTER_IPS = [ipaddress.ip_network("10.96.0.0/16"), ipaddress.ip_network("fd00::/112")]
POOL = [ipaddress.ip_network("203.0.113.0/24"), ipaddress.ip_network("2001:db8::/112")]
SERVICES = ("a", "b", "c")
SLICES = ("s1", "s2", "s3")
PODS = ("one", "two")
HERE = Node("here", addresses=("192.0.2.1",))

History = Sequence[Sequence[ObjectEvent]]


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from(values)


@st.composite
def some_service(draw: st.DrawFn) -> ObjectEvent:
    """A valid Service that states no value that another one may state, because the first to state it gets it."""
    name = draw(one_of("a", *SERVICES))
    own = SERVICES.index(name)
    spec: dict[str, Any] = {
        "type": draw(one_of(None, "NodePort", "LoadBalancer", "LoadBalancer", "ExternalName")),
        "clusterIP": draw(one_of(None, None, None, "None", f"10.96.0.{own + 1}", f"10.96.0.{own + 101}")),
        "selector": draw(one_of(None, None, {"app": "web"}, {"app": "db"})),
        "internalTrafficPolicy": draw(one_of(None, "Local")),
        "externalTrafficPolicy": draw(one_of(None, "Local")),
        "loadBalancerIP": draw(one_of(None, f"203.0.113.{own + 1}")),
        "loadBalancerSourceRanges": draw(one_of(None, ["192.0.2.0/24"])),
        "allocateLoadBalancerNodePorts": draw(one_of(None, False)),
        "sessionAffinity": draw(one_of(None, "ClientIP")),
        "ports": draw(
            st.lists(
                st.builds(
                    lambda at, protocol, number, stated: {
                        "name": f"{at}",
                        "port": number,
                        "protocol": protocol,
                        "nodePort": 30_000 + 10 * own + int(at[1:]) if stated else None,
                    },
                    one_of("p0", "p0", "p1"),
                    one_of("TCP", "TCP", "TCP", "UDP", "SCTP"),
                    st.integers(80, 83),
                    st.booleans(),
                ),
                min_size=1,
                max_size=3,
                unique_by=(lambda port: port["name"], lambda port: port["port"]),
            )
        ),
    }
    if spec["clusterIP"] is None:
        spec["ipFamilyPolicy"] = draw(one_of(None, "PreferDualStack"))
    annotation = draw(one_of(None, "transparent", "proxy-protocol-v1", "nonsense"))
    return put(
        service(
            name,
            annotations=None if annotation is None else {"userspace-proxy/source-ip": annotation},
            labels=draw(one_of(None, None, None, {"service.kubernetes.io/service-proxy-name": "other"})),
            ingress=draw(one_of(None, [{"ip": f"198.51.100.{own}"}], [{"hostname": "lb"}])),
            **spec,
        )
    )


@st.composite
def some_slice(draw: st.DrawFn) -> ObjectEvent:
    found = [
        {
            "addresses": [f"10.0.0.{draw(st.integers(1, 4))}"],
            "conditions": {"ready": draw(st.booleans()), "terminating": draw(st.booleans())},
            "nodeName": draw(one_of("here", "other")),
            "hints": draw(one_of(None, {"forZones": [{"name": "zone-a"}]}, {"forNodes": [{"name": "here"}]})),
        }
        for _ in range(draw(st.integers(1, 3)))
    ]
    return put(
        endpoint_slice(
            *found,
            of=draw(one_of("a", "a", None, *SERVICES)),
            name=draw(one_of(*SLICES)),
            ports=[{"name": draw(one_of("p0", "p0", "p1")), "port": draw(one_of(8080, 8081))}],
            labels=draw(one_of(None, None, None, {"service.kubernetes.io/headless": ""})),
        )
    )


@st.composite
def some_pod(draw: st.DrawFn) -> ObjectEvent:
    name = draw(one_of(*PODS))
    given = pod(name, f"10.0.1.{draw(st.integers(1, 3))}", labels={"app": draw(one_of("web", "db"))})
    return put(given)


SOME_ENDPOINTS = st.builds(
    lambda name, ip: put(endpoints({"addresses": [{"ip": ip}], "ports": [{"name": "p0", "port": 80}]}, name=name)),
    one_of(*SERVICES),
    one_of("10.0.2.1", "10.0.2.2"),
)
SOME_NODE = st.builds(
    lambda name, zone, ip: put(node(name, ("InternalIP", ip), zone=zone)),
    one_of("here", "other"),
    one_of(None, "zone-a", "zone-b"),
    one_of("192.0.2.1", "192.0.2.2"),
)
SOME_DELETION = st.builds(
    gone,
    one_of("Service", "EndpointSlice", "Endpoints", "Pod"),
    one_of(*SERVICES, *SLICES, *PODS),
)
EVENTS = st.one_of(
    some_service(), some_service(), some_slice(), some_slice(), some_pod(), SOME_ENDPOINTS, SOME_NODE, SOME_DELETION
)
HISTORIES = st.lists(st.lists(EVENTS, min_size=1, max_size=6), min_size=2, max_size=8)


def after(history: History, allocations: Allocations) -> Tracker:
    tracker = Tracker(allocations, here=HERE)
    for batch in history:
        tracker.apply(batch)
        tracker.state()
    return tracker


def what_is_there(history: Iterable[Sequence[ObjectEvent]]) -> list[ObjectEvent]:
    """Return the last event of each object, without those that are gone."""
    last: dict[tuple[str, NamespacedName | None], ObjectEvent] = {}
    for batch in history:
        last.update({(event.kind, event.name): event for event in batch})
    return [event for event in last.values() if event.type is EventType.SET]


@pytest.mark.parametrize("in_cluster", [False, True])
@given(history=HISTORIES, chance=st.randoms())
@settings(max_examples=300)
def test_a_history_leaves_what_a_fresh_start_finds(history: History, chance: Any, *, in_cluster: bool) -> None:
    present = what_is_there(history)
    chance.shuffle(present)

    lived, fresh = (
        after(batches, Allocations() if in_cluster else ManifestAllocations(CLUSTER_IPS, None, POOL))
        for batches in (history, [present])
    )

    assert dict(lived.state().service_ports) == dict(fresh.state().service_ports)
    assert dict(lived.state().endpoints) == dict(fresh.state().endpoints)
    assert lived.state().node == fresh.state().node
    assert lived.problems == fresh.problems


@given(history=HISTORIES)
@settings(max_examples=100)
def test_a_restart_moves_no_address_and_repeated_events_change_nothing(history: History) -> None:
    first = ManifestAllocations(CLUSTER_IPS, None, POOL)
    lived = after(history, first)

    again = after([what_is_there(history)], ManifestAllocations(CLUSTER_IPS, first.memory(), POOL))
    assert dict(again.state().service_ports) == dict(lived.state().service_ports)

    before = lived.state()
    lived.apply(what_is_there(history))
    told_again = lived.state()
    assert all(told_again.service_ports[name] is known for name, known in before.service_ports.items())
    assert all(told_again.endpoints[name] is known for name, known in before.endpoints.items())
