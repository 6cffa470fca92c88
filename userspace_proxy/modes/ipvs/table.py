"""Kernel mode ipvs: virtual servers with their endpoints, and the steps from those there to those wanted. Pure.

A virtual server stands for one portal; of a node port there is one for each address of the node. An endpoint that is to
get no new connections has the weight 0 and stays until its connections have ended: who deletes it cuts them off.
Who may dial, and who is refused or masqueraded, is nftables' to say (`IpvsTable`): it sees packets before IPVS does.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.endpoint import Address, Endpoint, Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope
from userspace_proxy.model.routes import Refusal
from userspace_proxy.model.service import Balance, Portal
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.packet_number import ENDPOINT_SET, OURS
from userspace_proxy.modes.slots.portal_table import IP, add_hairpins
from userspace_proxy.modes.slots.slot_table import SlotTable
from userspace_proxy.netfilter.nft_text import merged
from userspace_proxy.netfilter.sets import Elements, SetKind, class_id, packed_ip, packed_portal

# How ours are told from others' (ipvsadm shows flag-3): no scheduler of the kernel's gives it a meaning.
OWN_FLAG = 0x20
DEFAULT_SCHEDULER = "rr"
# Those that heed weights. The kernel has no plain random: of two drawn at random, twos takes the one with fewer
# connections.
_SCHEDULER_OF = {
    Balance.ROUND_ROBIN: "wrr",
    Balance.LEAST_CONNECTIONS: "wlc",
    Balance.RANDOM: "twos",
    Balance.SOURCE_HASH: "mh",
}


class IpvsTable(SlotTable):
    """The table of mode ipvs: who is refused, dropped or masqueraded; who is led on meets a virtual server.

    A virtual server has one set of endpoints, whoever dials. Pods and the node itself, where they are to meet others
    than clients from outside (the policy Local), are led to these by slots, as in mode nftables.
    """

    name = "inet userspace_proxy_ipvs"
    hairpin = ""  # IPVS leaves no status

    def kinds_of(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        yield from super().kinds_of(family)
        reason, parts = "All load balancer IPs and external IPs, whatever the port.", "An element is an address."
        address = f"ipv{family}_addr"
        yield f"virtual_ips{family}", SetKind(f"type {address}", (address,), (), reason, parts, is_shared=True)
        reason = "Ports at which this node answers health checks of load balancers."
        declared, key = "type inet_proto . inet_service", ("inet_proto", "inet_service")
        parts = "An element is protocol . port."
        yield f"health_checks{family}", SetKind(declared, key, (), reason, parts, is_shared=True)

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
        """Load balancer IPs and external IPs are this node's own here: its other servers are not to be met by them."""
        ip = IP[family]
        own = ", ".join(own_ip for own_ip in facts.node.addresses if family_of(own_ip) == family)
        others = f"{ip} daddr != {{ {own} }} " if own else ""
        yield RuleLine(
            f"{ip} daddr @virtual_ips{family} {others}meta l4proto . th dport != @health_checks{family} goto refuse",
            "A load balancer IP or an external IP, here this node's own, at a port that no Service has there: refused "
            "at once, so that this node's own servers are not met by it; health checks are.",
        )

    def translate(self, family: Family) -> Iterator[RuleLine]:
        yield RuleLine(
            f"meta priority & {class_id(ENDPOINT_SET)} == {class_id(OURS)} accept",
            "Of no set here: a virtual server leads it on, as IPVS sees it at INPUT, or at OUTPUT after us.",
        )
        yield from super().translate(family)

    def number_of(self, portal: Portal, listener: ListenerName, translation: Translation) -> int:
        if _scopes(translation)[portal] is listener.scope:
            return OURS
        return super().number_of(portal, listener, translation)

    def mode_elements(self, translation: Translation) -> Elements:
        scopes = _scopes(translation)
        others = [r for r in translation.routes if isinstance(r.to, ListenerName) and r.to.scope != scopes[r.portal]]
        found = self.slots_for(translation, others)
        for family, scope in {(portal.family, scope) for portal, scope in scopes.items()}:
            add_hairpins(found, family, (e.ip for e in _endpoints(translation, family, scope)))
        service_port = translation.service_port
        for ip in sorted(virtual_ips(translation).difference(service_port.cluster_ips)):
            found.setdefault(f"virtual_ips{family_of(ip)}", {})[packed_ip(ip)] = b""
            if check := service_port.health_check_node_port:
                portal = Portal("0.0.0.0", check, L4Protocol.TCP)  # noqa: S104 - whatever the address
                found.setdefault(f"health_checks{family_of(ip)}", {})[packed_portal(portal)] = b""
        return found


@dataclass(frozen=True, slots=True)
class VirtualServer:
    """``weights``: endpoint -> weight. ``affinity_timeout_s``: how long a client stays with its endpoint."""

    scheduler: str = DEFAULT_SCHEDULER
    affinity_timeout_s: int | None = None
    weights: Mapping[Address, int] = field(default_factory=dict)


VirtualServers = dict[Portal, VirtualServer]


def virtual_servers(
    translation: Translation,
    node_ips: Iterable[str],
    scheduler: str = DEFAULT_SCHEDULER,
    missing: Collection[str] = (),
) -> VirtualServers:
    """Return the virtual servers of one service port; *node_ips* are those at which there are node ports.

    *scheduler* is this node's default, for service ports that ask for none, or for one that is *missing*.

    Each has the endpoints that ANYBODY is led to, or, where these are refused by nftables, those of pods and the node
    itself.
    """
    service_port = translation.service_port
    given = dict(service_port.weights)
    of_balance = _SCHEDULER_OF[service_port.balance] if service_port.balance else ""
    asked = (service_port.ipvs_scheduler, of_balance, scheduler, DEFAULT_SCHEDULER)
    chosen = next((each for each in asked if each and each not in missing), DEFAULT_SCHEDULER)
    found: VirtualServers = {}
    for portal, scope in _scopes(translation).items():
        endpoints = _endpoints(translation, portal.family, scope)
        weights = {endpoint.address: given.get(endpoint.ip, 1) for endpoint in endpoints}
        if not any(weights.values()):  # who asks for nothing has nothing, unless nobody asks for anything
            weights = dict.fromkeys(weights, 1)
        if portal.protocol is L4Protocol.UDP:
            # A flow has no end that could be waited for: it stays as long as its endpoint serves.
            weights = {e.address: 0 for e in translation.serving if family_of(e.ip) == portal.family} | weights
        server = VirtualServer(chosen, service_port.affinity_timeout_s, weights)
        found |= dict.fromkeys(_at_addresses(portal, node_ips), server)
    return found


def virtual_ips(translation: Translation) -> set[str]:
    """Return the addresses of *translation*'s portals, which are to be this node's own."""
    return {portal.ip for portal, _, _ in translation.routes if not portal.is_node_port}


def at_host(facts: NodeFacts, host_ips: Iterable[str]) -> NodeFacts:
    """Return *facts* of a node that has just the addresses *host_ips*."""
    return replace(facts, node=replace(facts.node, addresses=tuple(host_ips)))


def node_port_ips(facts: NodeFacts, host_ips: Iterable[str]) -> tuple[str, ...]:
    """Return which of the host's own addresses have node ports."""
    found: list[str] = []
    for ip in host_ips:
        address = ipaddress.ip_address(ip)
        networks = merged(facts.node_ports_on, 4 if address.version == 4 else 6)
        if not address.is_loopback and (not networks or any(address in ipaddress.ip_network(n) for n in networks)):
            found.append(ip)
    return tuple(found)


def _at_addresses(portal: Portal, node_ips: Iterable[str]) -> list[Portal]:
    if not portal.is_node_port:
        return [portal]
    here = (Portal(ip, portal.port, portal.protocol) for ip in node_ips)
    return [each for each in here if each.family == portal.family]


def _scopes(translation: Translation) -> dict[Portal, Scope]:
    """Return which endpoints the virtual server of each portal has."""
    scopes: dict[Portal, Scope] = {}
    for portal, _, to in translation.routes:
        if not isinstance(to, Refusal):
            scopes.setdefault(portal, to.scope)
    return scopes


def _endpoints(translation: Translation, family: Family, scope: Scope) -> Collection[Endpoint]:
    reach = translation.reaches[family]
    return reach.cluster if scope is Scope.CLUSTER else reach.local


# ---- steps


class Verb(StrEnum):
    ADD = "add"
    SET = "set"
    DELETE = "del"


class Step(NamedTuple):
    """One change: of *server* at *portal*, or of *endpoint* behind it."""

    verb: Verb
    portal: Portal
    server: VirtualServer
    endpoint: Address | None = None
    weight: int = 0

    @property
    def is_beginning(self) -> bool:
        """Whether steps for endpoints behind the same portal are of no use without it."""
        return self.endpoint is None and self.verb is not Verb.DELETE

    def __str__(self) -> str:
        what = f"server ({self.server.scheduler})" if self.endpoint is None else join_address(*self.endpoint)
        return f"{self.verb} {what} at {self.portal.protocol} {self.portal}"


def steps(present: Mapping[Portal, VirtualServer], wanted: Mapping[Portal, VirtualServer]) -> Iterator[Step]:
    """Yield what leads from *present* to *wanted*, of the portals in either; nobody's connection is cut.

    TCP endpoints that are wanted no more stay with the weight 0, and so does a whole virtual server with any, until
    `endings` says that they have none left. UDP ones go at once: their flows are to find another.
    """
    for portal, server in wanted.items():
        there = present.get(portal)
        if there is None:
            yield Step(Verb.ADD, portal, server)
            there = VirtualServer(server.scheduler, server.affinity_timeout_s)
        elif _settings(there) != _settings(server):
            yield Step(Verb.SET, portal, server)
        # First who comes: at no moment is there nobody.
        for endpoint, weight in server.weights.items():
            if (held := there.weights.get(endpoint)) is None:
                yield Step(Verb.ADD, portal, server, endpoint, weight)
            elif held != weight:
                yield Step(Verb.SET, portal, server, endpoint, weight)
        yield from _leave(portal, server, there, server.weights)
    for portal, server in present.items():
        if portal not in wanted:
            yield from _leave(portal, server, server, ())
            if portal.protocol is L4Protocol.UDP or not server.weights:
                yield Step(Verb.DELETE, portal, server)


def _leave(portal: Portal, server: VirtualServer, there: VirtualServer, stay: Collection[Address]) -> Iterator[Step]:
    for endpoint, weight in there.weights.items():
        if endpoint in stay:
            continue
        if portal.protocol is L4Protocol.UDP:
            yield Step(Verb.DELETE, portal, server, endpoint)
        elif weight:
            yield Step(Verb.SET, portal, server, endpoint, 0)


def _settings(server: VirtualServer) -> tuple[str, int | None]:
    return server.scheduler, server.affinity_timeout_s


class Connections(NamedTuple):
    """How many connections an endpoint has: ``active`` are established, the others begin or end (IPVS's own words)."""

    active: int
    inactive: int


def endings(
    present: Mapping[Portal, VirtualServer],
    wanted: Mapping[Portal, VirtualServer],
    connections: Mapping[tuple[Portal, Address], Connections],
) -> Iterator[Step]:
    """Yield what takes away those of *present* that are wanted no more and have no *connections* left.

    Where nobody is to be there any more, only established ones are waited for: the address is free soon.
    """
    for portal, server in present.items():
        counts = {endpoint: connections.get((portal, endpoint), Connections(0, 0)) for endpoint in server.weights}
        if portal not in wanted:
            if not any(count.active for count in counts.values()):
                yield Step(Verb.DELETE, portal, server)
            continue
        for endpoint, count in counts.items():
            if endpoint not in wanted[portal].weights and not any(count):
                yield Step(Verb.DELETE, portal, server, endpoint)


def after(present: VirtualServers, taken: Iterable[Step]) -> None:
    """Have *present* be as it is when the steps *taken* were done."""
    changed: dict[Portal, dict[Address, int]] = {}  # whose weights are no longer those of anybody else
    for verb, portal, server, endpoint, weight in taken:
        held = present.get(portal, VirtualServer())
        if endpoint is None:
            if verb is Verb.DELETE:
                present.pop(portal, None)
                changed.pop(portal, None)
            else:
                present[portal] = VirtualServer(server.scheduler, server.affinity_timeout_s, held.weights)
            continue
        if (weights := changed.get(portal)) is None:
            weights = changed[portal] = dict(held.weights)
            present[portal] = VirtualServer(held.scheduler, held.affinity_timeout_s, weights)
        if verb is Verb.DELETE:
            weights.pop(endpoint, None)
        else:
            weights[endpoint] = weight
