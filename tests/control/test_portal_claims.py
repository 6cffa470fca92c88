"""A portal that several Services state: which one gets it, and which problem the others report."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from tests.control.given import World, endpoint_slice, gone, named, port_named, service
from userspace_proxy import api
from userspace_proxy.control.allocations import Allocations, ManifestAllocations
from userspace_proxy.control.memory import SavedAllocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.model.state import ProxyState

VIP = "203.0.113.8"
OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"


class Cluster(World):
    """Services as an API server reports them."""

    def __init__(self) -> None:
        self.tracker = Tracker(Allocations())
        self.state = ProxyState()


def external(name: str, cluster_ip: str, ip: str = VIP, **given: Any) -> api.Service:
    return service(name, clusterIP=cluster_ip, externalIPs=[ip], **given)


def holders(world: World, ip: str = VIP) -> list[str]:
    """Return the Services that get the portals at *ip*."""
    return sorted(
        name.service.name
        for name, port in world.state.service_ports.items()
        if ip in (*port.cluster_ips, *port.external_ips, *port.load_balancer_ips)
    )


@pytest.mark.parametrize("world", [World, Cluster])
@pytest.mark.parametrize("stated", ["externalIPs", "ingress"])
def test_a_cluster_ip_is_never_taken_by_another_service(world: type[World], stated: str) -> None:
    if stated == "externalIPs":
        thief = service("a-thief", clusterIP="10.96.0.1", externalIPs=["10.96.0.2", VIP], created=OLD)
    else:
        ingress = [{"ip": "10.96.0.2"}, {"ip": VIP}]
        thief = service("a-thief", clusterIP="10.96.0.1", type="LoadBalancer", ingress=ingress, created=OLD)
    owner = service("owner", clusterIP="10.96.0.2", created=NEW)
    for order in itertools.permutations((thief, owner)):
        for batches in (order,), tuple((one,) for one in order):
            known = world()
            for batch in batches:
                known.tell(*batch)

            assert holders(known, "10.96.0.2") == ["owner"]
            assert holders(known) == ["a-thief"], "the rest of it is served"
            (problem,) = known.problems
            assert "Service default/a-thief" in problem
            assert "10.96.0.2:80 is served for default/owner" in problem


def test_another_port_of_a_cluster_ip_is_no_conflict() -> None:
    known = World()
    known.tell(external("a", "10.96.0.1", "10.96.0.2", ports=[{"port": 81}]), service("b", clusterIP="10.96.0.2"))

    assert (holders(known, "10.96.0.2"), known.problems) == (["a", "b"], [])


def test_of_two_services_of_a_cluster_the_older_has_an_external_ip_whatever_is_heard_first() -> None:
    older, newer = external("b", "10.96.0.1", created=OLD), external("a", "10.96.0.2", created=NEW)
    for order in itertools.permutations((older, newer)):
        known = Cluster()
        for one in order:
            known.tell(one)
        assert holders(known) == ["b"]
        assert ["default/a" in problem for problem in known.problems] == [True]

        known.tell(gone("Service", "b"))

        assert (holders(known), known.problems) == (["a"], [])


def test_from_files_the_service_that_had_an_external_ip_keeps_it_also_after_a_restart() -> None:
    known = World()
    known.tell(external("b", "10.96.0.1"))
    known.tell(external("a", "10.96.0.2"))
    assert holders(known) == ["b"]

    after = World()
    after.allocations = ManifestAllocations(  # type: ignore[assignment]
        [], SavedAllocations(external_portals=known.allocations.memory().external_portals)
    )
    after.tracker = Tracker(after.allocations)
    after.tell(external("b", "10.96.0.1"), external("a", "10.96.0.2"))
    assert holders(after) == ["b"]


def test_from_files_a_portal_passes_to_the_next_service_when_its_holder_releases_it() -> None:
    known = World()
    known.tell(external("b", "10.96.0.1"))
    known.tell(external("a", "10.96.0.2"))

    known.tell(service("b", clusterIP="10.96.0.1"))
    assert (holders(known), known.problems) == (["a"], [])

    known.tell(external("b", "10.96.0.1"))
    assert holders(known) == ["a"], "it has it now"


def test_a_service_that_lost_an_external_ip_follows_its_endpoints() -> None:
    known = World()
    known.tell(external("a", "10.96.0.1"), external("b", "10.96.0.2"))

    known.tell(endpoint_slice("10.244.0.7", of="b"))

    assert known.addresses("b") == ["10.244.0.7:8080"]
    assert known.state.service_ports[port_named("b")].external_ips == ()
    assert named("b") in known.tracker.problems
