"""Discard routes: a packet to a Service address that no Service serves ends here, and is not forwarded.

Clients send packets for Service addresses to this node. While no rule takes them (a Service is gone, the proxy
restarts), the node would forward them by its default route: out of the interface that they came in by, with an ICMP
redirect (``ip_forward``, ``ip6_forward`` in the kernel). A client obeys that for minutes and passes this node by.

Two routing rules and one table of ours prevent it. They act on forwarded packets alone: the node's own connect() needs
a route before any rule translates its packets. Packets that are served are translated before they are routed, by
whichever proxy. So the discard routes may stay after a stop, for the restart, without harm to another proxy.

iptables mode rejects at FORWARD, behind routing. The addresses that it rejects have exceptions in the same table.
"""

import ipaddress
from collections.abc import Collection, Iterable
from functools import partial

from userspace_proxy.errors import SyncError
from userspace_proxy.host import rtnetlink
from userspace_proxy.host.network import ROUTE_PROTOCOL, leading_bits, live_routes, own_routes, run_batch
from userspace_proxy.host.rtnetlink import HostRoute, Network, RoutingRule
from userspace_proxy.model.endpoint import FAMILIES, Family

# A forwarded packet to one of the ranges:
# 1. follows a route of the main table that is narrower than the range, such as one to a network inside of it;
# 2. is discarded. `iif lo` stands for what this node itself sends.
# In the order of their priorities, before the main table (32766) and behind the table of the node's own addresses (0).
_NARROWER = 10778
_DISCARD = 10779
_TABLE = "10778"
# A higher metric than an exception's, so that an exception for a single address takes precedence.
_METRIC = "metric 100"
_EXCEPTION = {4: "dev lo scope link metric 1", 6: "metric 1"}


async def discard(ranges: Collection[Network], addresses: Collection[Network] = ()) -> None:
    """Discard forwarded packets to *ranges* and *addresses*, and to nothing else. May be repeated.

    An address with a more specific route than the default route is skipped: another host has it.

    Raises:
        SyncError: the kernel refused the routes of one IP family, or of both.
    """
    refused = []
    for version in FAMILIES:
        its_ranges = {network for network in ranges if network.version == version}
        its_addresses = {network for network in addresses if network.version == version}
        try:
            await _discard(version, its_ranges, its_addresses)
        except SyncError as error:
            if its_ranges or its_addresses:
                refused.append(str(error))
    if refused:
        raise SyncError("; ".join(dict.fromkeys(refused)))


async def remove_discard_routes() -> None:
    """Remove every discard route and rule, also those of a crashed process. Raises SyncError."""
    await except_addresses(())
    await discard(())


async def except_addresses(ips: Collection[str]) -> None:
    """Let forwarded packets to *ips*, and to no other discarded address, reach the rules at FORWARD.

    IPv4 routes them out by ``lo``, so no ICMP redirect is sent. IPv6 rejects such a route: they follow the main table.

    Raises:
        SyncError: the kernel refused a route.
    """
    for version in FAMILIES:
        listed = await _listed(version)
        held = {route.destination for route in listed if route.kind != rtnetlink.BLACKHOLE}
        wanted = {network for network in map(ipaddress.ip_network, ips) if network.version == version}
        kind = "" if version == 4 else "throw "
        route = f"table {_TABLE} proto {ROUTE_PROTOCOL} {_EXCEPTION[version]}"
        await run_batch(
            version,
            *(f"route add {kind}{n} {route}" for n in _in_order(wanted - held)),
            *(f"route del {kind}{n} {route}" for n in _in_order(held - wanted)),
        )


async def _listed(version: Family) -> list[HostRoute]:
    """Return the routes in the table of discard routes."""
    return [route for route in await own_routes(version) if route.table == int(_TABLE)]


async def _discard(version: Family, ranges: set[Network], addresses: set[Network]) -> None:
    rules = await rtnetlink.read(partial(rtnetlink.routing_rules, version))
    held = {route.destination for route in await _listed(version) if route.kind == rtnetlink.BLACKHOLE}
    wanted = ranges | (await _led_to_by_default(version, addresses) if addresses else set())
    await run_batch(
        version,
        *(f"route add blackhole {n} table {_TABLE} proto {ROUTE_PROTOCOL} {_METRIC}" for n in _in_order(wanted - held)),
        *_rule_changes(rules, ranges, discards=bool(wanted)),
        *(f"route del blackhole {n} table {_TABLE} proto {ROUTE_PROTOCOL} {_METRIC}" for n in _in_order(held - wanted)),
    )


def _rule_changes(rules: Collection[RoutingRule], ranges: set[Network], *, discards: bool) -> list[str]:
    """Return the `ip rule` commands that turn *rules* into the desired ones.

    Routes narrower than a range are looked up before anything is discarded.
    """
    narrower = {rule.destination for rule in rules if rule.priority == _NARROWER and rule.destination is not None}
    wanted = {network for network in ranges if network.prefixlen}
    is_there = any(rule.priority == _DISCARD for rule in rules)
    return [
        *(
            f"rule add priority {_NARROWER} to {n} lookup main suppress_prefixlength {n.prefixlen - 1}"
            for n in _in_order(wanted - narrower)
        ),
        *([f"rule add priority {_DISCARD} not iif lo lookup {_TABLE}"] if discards and not is_there else []),
        *([f"rule del priority {_DISCARD}"] if is_there and not discards else []),
        *(f"rule del priority {_NARROWER} to {n}" for n in _in_order(narrower - wanted)),
    ]


async def _led_to_by_default(version: Family, addresses: set[Network]) -> set[Network]:
    """Return those of *addresses* that only the default route covers."""
    routes = await live_routes(version)
    if all(route.prefixlen for route in routes):
        return set()
    covered = {leading_bits(route, route.prefixlen) for route in routes if route.prefixlen}
    return {
        network
        for network in addresses
        if not any(leading_bits(network, length) in covered for length in range(1, network.prefixlen + 1))
    }


def _in_order(networks: Iterable[Network]) -> list[Network]:
    return sorted(networks, key=lambda n: (n.prefixlen, int(n.network_address)))
