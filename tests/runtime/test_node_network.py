"""This host's own addresses are followed, with real interfaces and routes."""

from __future__ import annotations

import asyncio

from tests.ends import until
from userspace_proxy.control.allocations import Allocations
from userspace_proxy.control.tracker import Tracker
from userspace_proxy.host.network import host_addresses
from userspace_proxy.lab import Lab
from userspace_proxy.model.topology import Node
from userspace_proxy.runtime.node_network import follow_addresses


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
            synced = asyncio.Event()
            following = asyncio.create_task(follow_addresses(tracker, synced.set))
            try:
                await asyncio.sleep(0)  # until it listens
                host.ip("route", "replace", "default", "via", "10.1.0.254")
                await until(synced.is_set, "the addresses have been looked at", 20.0)
            finally:
                following.cancel()

    assert tracker.state().node.addresses == ("10.1.0.1", "10.2.0.1")
