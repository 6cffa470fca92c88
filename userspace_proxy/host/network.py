"""Network settings of this node besides rules: routes that cover cluster IPs, and a private address.

Everything added here carries this proxy's route protocol number or one of its own addresses. Cleanup can therefore find
what a crashed process left.
"""

import contextlib
import ipaddress
import logging
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from userspace_proxy.errors import SyncError
from userspace_proxy.host import rtnetlink
from userspace_proxy.host.rtnetlink import HostAddress, HostRoute, Interface, Network
from userspace_proxy.host.tool import run_tool
from userspace_proxy.model.endpoint import FAMILIES, Family, family_of

# Unassigned in rt_protos; `ip route show proto 107` lists the routes of this proxy.
ROUTE_PROTOCOL = "107"
# Types of routes that forward nothing: connect() to such a destination fails before any rule sees a packet.
_DEAD_ROUTES = (rtnetlink.UNREACHABLE, rtnetlink.BLACKHOLE, rtnetlink.PROHIBIT, rtnetlink.THROW)

# The private addresses on ``lo``, for Capture.ADDRESS.
LOCAL_ADDRESS4 = "169.254.77.7"
LOCAL_ADDRESS6 = "fd00:77::7"
# The device that holds Services' addresses in ipvs mode. They are not addresses of the node itself.
SERVICES_DEVICE = "kube-ipvs0"

log = logging.getLogger(__name__)


# ---- routes for clients on this node


def missing_routes(wanted: Iterable[Network], routes: Iterable[str | Network]) -> list[Network]:
    """Return the *wanted* networks that no destination in *routes* covers, widest first, without duplicates.

    Without a route, connect() fails before any rule sees the packet.
    """
    # Look up leading bits: 10,000 addresses cost 10,000 times some 30 look-ups.
    covered = {leading_bits(n, n.prefixlen) for n in (ipaddress.ip_network(r, strict=False) for r in routes)}
    missing: list[Network] = []
    for network in sorted(set(wanted), key=lambda n: (n.version, n.prefixlen, n)):
        if not any(leading_bits(network, length) in covered for length in range(network.prefixlen + 1)):
            missing.append(network)
            covered.add(leading_bits(network, network.prefixlen))
    return missing


async def live_routes(family: Family, *, default_only: bool = False) -> list[Network]:
    """Return the destinations of this host's routes that forward packets; the default route has length 0.

    *default_only*: only default routes.

    Raises:
        SyncError: they cannot be listed.
    """
    query = partial(rtnetlink.routes, family, table=rtnetlink.TABLE_MAIN, default_only=default_only)
    return [route.destination for route in await rtnetlink.read(query) if route.kind not in _DEAD_ROUTES]


async def own_routes(family: Family) -> list[HostRoute]:
    """Return the routes of this proxy, in whichever table. Raises SyncError."""
    return await rtnetlink.read(partial(rtnetlink.routes, family, protocol=int(ROUTE_PROTOCOL)))


def leading_bits(network: Network, length: int) -> tuple[int, int, int]:
    return network.version, length, int(network.network_address) >> (network.max_prefixlen - length)


async def add_routes(networks: Iterable[Network], sources: Iterable[str] = ()) -> list[Network]:
    """Add a route through ``lo`` for each of *networks* that has none; return the networks added.

    *sources* are addresses of this host. The first of each family is the source address of the host's packets to
    *networks*.
    """
    added = []
    desired = list(networks)
    source = {family_of(ip): f" src {ip}" for ip in reversed(tuple(sources))}
    for family in FAMILIES:
        if not (of_family := [n for n in desired if n.version == family]):
            continue
        if not await live_routes(family, default_only=True):  # there may be 100,000 others
            missing = missing_routes(of_family, await live_routes(family))
            lines = (f"route add {n} dev lo{source.get(family, '')} proto {ROUTE_PROTOCOL}" for n in missing)
            await run_batch(family, *lines)
            added += missing
    return added


async def run_batch(family: int, *lines: str) -> None:
    """Run *lines* as commands of ``ip`` for one family. A refused line does not stop the others. Raises SyncError."""
    if lines:
        await run_tool("ip", f"-{family}", "-force", "-batch", "-", stdin="".join(f"{line}\n" for line in lines))


async def remove_routes_to(networks: Iterable[Network]) -> None:
    """Remove this proxy's routes to *networks*; a missing route, or one of another program, is no error."""
    gone = list(networks)
    for family in FAMILIES:
        try:
            await run_batch(
                family, *(f"route del {n} dev lo proto {ROUTE_PROTOCOL}" for n in gone if n.version == family)
            )
        except SyncError as error:
            log.debug("some routes were not removed: %s", error)


async def remove_routes() -> None:
    """Remove this proxy's routes from the tables main and local, and with them the addresses of `add_own_address`."""
    for family in FAMILIES:
        try:
            held = {route.table for route in await own_routes(family)}
        except SyncError as error:
            log.debug("no routes were removed: %s", error)
            continue
        for table in held & {rtnetlink.TABLE_MAIN, rtnetlink.TABLE_LOCAL}:
            try:
                await run_tool("ip", f"-{family}", "route", "flush", "table", str(table), "proto", ROUTE_PROTOCOL)
            except SyncError as error:
                log.debug("routes were not removed: %s", error)


async def add_own_address(ip: str) -> None:
    """Make *ip* an address of this host, without a device. Raises SyncError.

    A local route with this proxy's protocol number does this, so a later process finds the route after a crash. It is
    in the table of the host's own addresses, which the kernel looks up before all others.
    """
    await run_batch(family_of(ip), f"route replace {_own_route(ip)}")


async def remove_own_addresses(keep: Collection[str] = ()) -> None:
    """Remove the addresses of `add_own_address`, also those of earlier processes, except the addresses in *keep*."""
    for family in FAMILIES:
        try:
            listed = (route for route in await own_routes(family) if route.table == rtnetlink.TABLE_LOCAL)
            added = [str(route.destination.network_address) for route in listed]
            await run_batch(family, *(f"route del {_own_route(ip)}" for ip in added if ip not in keep))
        except SyncError as error:
            log.debug("some addresses were not removed: %s", error)


def _own_route(ip: str) -> str:
    return f"local {ip} dev lo table local proto {ROUTE_PROTOCOL}"


# ---- the private address, where REDIRECT cannot work


async def add_local_addresses() -> None:
    """Add the private addresses to ``lo``; skip a family that this host does not have."""
    for address in (f"{LOCAL_ADDRESS4}/32", f"{LOCAL_ADDRESS6}/128"):
        try:
            await run_tool("ip", "address", "replace", address, "dev", "lo")
        except SyncError as error:
            log.warning("%s could not be put on lo: %s", address, error)


async def remove_local_addresses() -> None:
    held = {address.ip for link, address in await _addresses() if link.name == "lo"}
    for ip, length in ((LOCAL_ADDRESS4, 32), (LOCAL_ADDRESS6, 128)):
        if ip in held:
            await run_tool("ip", "address", "del", f"{ip}/{length}", "dev", "lo")


async def lacks_addresses() -> bool:
    """Return whether this host has no IPv4 address except those of ``lo``."""
    try:
        return not any(_is_global(address) and family_of(address.ip) == 4 for _, address in await _addresses())
    except SyncError:
        return False


async def host_addresses() -> tuple[str, ...]:
    """Return this host's global addresses; none if they cannot be listed.

    Addresses of the interface with the default route come first. They are the primary ones, even if other interfaces
    (container bridges, VPNs) are older. Of these, temporary (RFC 8981) and deprecated ones come last: they end.
    """
    try:
        listed = await _addresses()
        addresses = _of_host(listed).host
        first: list[str] = []
        for family in FAMILIES:
            query = partial(rtnetlink.routes, family, table=rtnetlink.TABLE_MAIN, default_only=True)
            for route in sorted(await rtnetlink.read(query), key=lambda route: route.metric)[:1]:
                on_it = [a for link, a in listed if link.name == (route.device or "lo") and family_of(a.ip) == family]
                lasting_first = sorted(on_it, key=lambda each: _is_ending(each, family))
                preferred = (route.source, *(address.ip for address in lasting_first))
                first += (ip for ip in preferred if ip in addresses)
        return tuple(dict.fromkeys((*first, *addresses)))
    except SyncError as error:
        log.warning("this host's addresses cannot be looked at: %s", error)
        return ()


def _is_ending(address: HostAddress, family: Family) -> bool:
    """Return whether *address* is temporary or deprecated. The first flag has another meaning for IPv4."""
    return bool(address.flags & (rtnetlink.IS_DEPRECATED | (rtnetlink.IS_TEMPORARY if family == 6 else 0)))


class Addresses(NamedTuple):
    """This host's addresses.

    ``host``: global ones, except the private addresses that this proxy adds. ``device``: those of the device that holds
    Services' addresses.
    """

    host: tuple[str, ...]
    device: frozenset[str]


async def look_at_addresses() -> Addresses:
    """Return the addresses of this host. Raises SyncError if they cannot be listed."""
    return _of_host(await _addresses())


def _of_host(listed: Iterable[tuple[Interface, HostAddress]]) -> Addresses:
    own: dict[str, None] = {}
    device: set[str] = set()
    for link, address in listed:
        if link.name == SERVICES_DEVICE:
            device |= {address.ip} if address.scope != rtnetlink.SCOPE_LINK else set()
        elif _is_own(address):
            own[address.ip] = None
    return Addresses(tuple(own), frozenset(device))


def _is_own(address: HostAddress) -> bool:
    """Return whether *address* is global, in use, and not one that this proxy adds.

    A tentative IPv6 address may be another host's, and no socket can be bound to it yet.
    """
    is_added = address.ip in (LOCAL_ADDRESS4, LOCAL_ADDRESS6)
    return _is_global(address) and not is_added and not address.flags & rtnetlink.IS_TENTATIVE


def _is_global(address: HostAddress) -> bool:
    return address.scope == rtnetlink.SCOPE_GLOBAL


async def look_at_networks() -> tuple[frozenset[str], tuple[Network, ...]]:
    """Return this host's addresses and the networks it is attached to; none if they cannot be listed.

    Dummy devices are skipped: those of this proxy, kube-proxy and NodeLocal DNSCache hold Services' addresses.
    """
    try:
        listed = await _addresses()
    except SyncError as error:
        log.warning("this host's networks cannot be looked at: %s", error)
        return frozenset(), ()
    dummy = rtnetlink.IS_BROADCAST | rtnetlink.HAS_NO_ARP
    own = [a for link, a in listed if _is_global(a) and link.flags & dummy != dummy]
    networks = (ipaddress.ip_network(f"{a.ip}/{a.prefix_length}", strict=False) for a in own)
    attached = dict.fromkeys(network for network in networks if network.num_addresses > 1)
    return frozenset(a.ip for a in own), tuple(attached)


async def _addresses() -> list[tuple[Interface, HostAddress]]:
    """Return each address of this host after its interface. Raises SyncError."""
    return [(link, address) for link in await rtnetlink.read(rtnetlink.interfaces) for address in link.addresses]


def listening_ports() -> set[tuple[str, int]]:
    """Return (protocol, port number) for each port with a listener in this network namespace."""
    found = set()
    for protocol, state in (("TCP", "0A"), ("UDP", "07")):  # TCP_LISTEN; a UDP socket that is connected to no peer
        for file in (protocol.lower(), f"{protocol.lower()}6"):
            with contextlib.suppress(OSError):
                for line in Path("/proc/net", file).read_text().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == state:
                        found.add((protocol, int(fields[1].rpartition(":")[2], 16)))
    return found


def unnumbered_interfaces(links: Iterable[Interface], routes: Iterable[HostRoute]) -> list[str]:
    """Return the interfaces that carry IPv4 traffic but have no IPv4 address (as with Calico).

    REDIRECT sends a packet to the first address of the interface it arrived at. If there is none, it drops the packet.
    *routes* are those of IPv4. Bridge ports are skipped: their packets arrive at the bridge.
    """
    routed = {route.device for route in routes}
    return [
        link.name
        for link in links
        if link.name in routed
        and not link.flags & rtnetlink.IS_LOOPBACK
        and not link.has_master
        and not any(family_of(address.ip) == 4 for address in link.addresses)
    ]


async def find_unnumbered_interfaces() -> list[str]:
    links = await rtnetlink.read(rtnetlink.interfaces)
    return unnumbered_interfaces(links, await rtnetlink.read(partial(rtnetlink.routes, 4)))


# ---- kernel settings


def forwards() -> bool:
    """Return whether this host forwards packets of either family."""
    files = ("ipv4/ip_forward", "ipv6/conf/all/forwarding")
    return any(path.exists() and path.read_text().strip() != "0" for path in (Path("/proc/sys/net") / f for f in files))


def reserved_ports() -> frozenset[int]:
    """Return the ports reserved for applications (``ip_local_reserved_ports``); none if unreadable."""
    found: set[int] = set()
    with contextlib.suppress(OSError, ValueError):
        for part in Path("/proc/sys/net/ipv4/ip_local_reserved_ports").read_text().strip().split(","):
            first, _, last = part.partition("-")
            found.update(range(int(first), int(last or first) + 1))
    return frozenset(found)


def conntrack_udp_timeouts() -> tuple[float, float]:
    """Return conntrack's UDP time-outs in seconds: (unanswered, answered); the kernel's defaults if unreadable."""
    folder = Path("/proc/sys/net/netfilter")
    try:
        unanswered = float((folder / "nf_conntrack_udp_timeout").read_text())
        answered = float((folder / "nf_conntrack_udp_timeout_stream").read_text())
    except (OSError, ValueError):
        return 30.0, 120.0
    return unanswered, answered
