"""This host's own addresses are followed, with real interfaces and routes."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network

import pytest

from tests.ends import until
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.host.network import host_addresses
from userspace_proxy.lab import Lab
from userspace_proxy.model.names import L4Protocol, NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.state import ProxyState
from userspace_proxy.model.topology import Node
from userspace_proxy.runtime.node_network import NodeRoutes, follow_addresses


async def test_the_primary_address_is_that_of_the_default_route_also_when_it_moves() -> None:
    with Lab() as lab:
        host, router = lab.add("moving"), lab.add("gateways")
        for number in (1, 2):
            lab.link(host, f"eth{number}", router, f"eth{number}")
            host.ip("address", "add", f"10.{number}.0.1/24", "dev", f"eth{number}")
        host.ip("route", "add", "default", "via", "10.2.0.254")
        with host.inside():
            tracker = Tracker(Allocations(), here=Node("host", addresses=await host_addresses()))
            assert tracker.state().node.addresses == ("10.2.0.1", "10.1.0.1")
            synced, routes = asyncio.Event(), NodeRoutes(())
            following = asyncio.create_task(follow_addresses(tracker, synced.set, routes.add_missing))
            try:
                await asyncio.sleep(0)  # until it listens
                host.ip("route", "replace", "default", "via", "10.1.0.254")
                await until(synced.is_set, "the addresses have been looked at", 20.0)
            finally:
                following.cancel()

    assert tracker.state().node.addresses == ("10.1.0.1", "10.2.0.1")


async def test_a_change_before_the_first_notice_is_found() -> None:
    with Lab() as lab:
        host = lab.add("changed")
        host.ip("address", "add", "192.0.2.1/32", "dev", "lo")
        with host.inside():
            tracker = Tracker(Allocations(), here=Node("host"))
            synced = asyncio.Event()
            following = asyncio.create_task(follow_addresses(tracker, synced.set, NodeRoutes(()).add_missing))
            try:
                await until(synced.is_set, "the address is found", 20.0)
            finally:
                following.cancel()

    assert tracker.state().node.addresses == ("192.0.2.1",)


@pytest.mark.parametrize(
    ("gone", "source"),
    [("address del 10.1.0.1/24 dev eth0", "10.2.0.1"), ("route del default", "10.1.0.1")],
)
async def test_a_route_to_cluster_ips_that_a_change_took_away_or_made_necessary_is_added(
    gone: str, source: str
) -> None:
    with Lab() as lab:
        host, router = lab.add("moving"), lab.add("gateway")
        lab.link(host, "eth0", router, "eth0")
        for number in (1, 2):
            host.ip("address", "add", f"10.{number}.0.1/24", "dev", "eth0")
        if "default" in gone:
            host.ip("route", "add", "default", "via", "10.1.0.254")
        with host.inside():
            found = await host_addresses()
            routes = NodeRoutes([ip_network("10.96.0.0/16")], found)
            port = ServicePort(ServicePortName(NamespacedName("a", "b"), "", L4Protocol.TCP), 80, ("10.97.0.1",))
            await routes.sync(ProxyState({port.name: port}, {port.name: ()}))
            has_outside = "10.97.0.1" in host.ip("route", "show")
            tracker = Tracker(Allocations(), here=Node("host", addresses=found))
            following = asyncio.create_task(follow_addresses(tracker, lambda: None, routes.add_missing))
            try:
                await asyncio.sleep(0)  # until it listens
                host.ip(*gone.split())
                route = f"10.96.0.0/16 dev lo proto 107 scope link src {source}"
                await until(lambda: route in host.ip("route", "show"), "there is a route", 20.0)
                assert ("10.97.0.1" in host.ip("route", "show")) is has_outside
            finally:
                following.cancel()
