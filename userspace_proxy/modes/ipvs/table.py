"""ipvs mode: the virtual servers of a service port with their endpoints, and the nftables table beside them. Pure.

A virtual server stands for one portal; a node port has one for each address of the node. An endpoint that gets no new
connections has the weight 0 and stays until its connections have ended, because deleting it would cut them off.
nftables (`IpvsTable`) sees packets before IPVS does. It restricts clients, refuses, and masquerades.
"""

import ipaddress
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from userspace_proxy.model.endpoint import Address, Family, family_of
from userspace_proxy.model.names import L4Protocol, ListenerName, Scope
from userspace_proxy.model.routes import Refusal, Route
from userspace_proxy.model.service import Balance, Portal
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import IP, PORT
from userspace_proxy.modes.rule_line import RuleLine
from userspace_proxy.modes.slots.endpoint_numbers import endpoints_of
from userspace_proxy.modes.slots.packet_number import ENDPOINT_SET, OURS
from userspace_proxy.modes.slots.slot_table import SlotTable, add_hairpins
from userspace_proxy.netfilter.nft_text import merged
from userspace_proxy.netfilter.sets import Elements, SetKind, class_id, packed_ip, packed_portal

# Marks virtual servers as ours (ipvsadm shows flag-3). No scheduler of the kernel gives it a meaning.
OWN_FLAG = 0x20
# Schedulers that refuse clients whose endpoint has weight 0, unless this flag is set (sh-fallback, mh-fallback).
FALL_BACK_FLAG, FALLING_BACK = 0x8, ("sh", "mh")
DEFAULT_SCHEDULER = "rr"
# Schedulers that use weights; another algorithm gets the default scheduler. The kernel has no plain random one: twos
# takes the one with fewer connections of two.
_SCHEDULER_OF = {
    Balance.ROUND_ROBIN: "wrr",
    Balance.LEAST_CONNECTIONS: "wlc",
    Balance.RANDOM: "twos",
    Balance.SOURCE_HASH: "mh",
}


class IpvsTable(SlotTable):
    """The nftables table of ipvs mode. It refuses, drops and masquerades; all other packets reach a virtual server.

    A virtual server has one set of endpoints for all clients. Pods and the node itself may have other endpoints than
    clients from outside (traffic policy Local). Slots translate their packets, as in nftables mode.
    """

    name = "inet userspace_proxy_ipvs"
    hairpin = ""  # IPVS does not set the conntrack status

    def other_kinds(self, family: Family) -> Iterator[tuple[str, SetKind]]:
        reason, parts = "All load balancer IPs and external IPs, whatever the port.", "An element is an address."
        yield f"virtual_ips{family}", SetKind((f"ipv{family}_addr",), (), reason, parts, is_shared=True)
        reason, parts = "Health check node ports, which load balancers query.", "An element is protocol . port."
        yield f"health_checks{family}", SetKind(PORT, (), reason, parts, is_shared=True)

    def refused(self, family: Family, facts: NodeFacts) -> Iterator[RuleLine]:
        """Refuse other ports of load balancer and external IPs: they would reach other servers of this node."""
        ip = IP[family]
        own = ", ".join(own_ip for own_ip in facts.node.addresses if family_of(own_ip) == family)
        others = f"{ip} daddr != {{ {own} }} " if own else ""
        yield RuleLine(
            f"{ip} daddr @virtual_ips{family} {others}meta l4proto . th dport != @health_checks{family} goto refuse",
            "A load balancer or external IP, at a port without a Service: refused, because the address is this node's "
            "here and would reach other servers of this node. Health checks pass.",
        )

    def translate(self, family: Family) -> Iterator[RuleLine]:
        yield RuleLine(
            f"meta priority & {class_id(ENDPOINT_SET)} == {class_id(OURS)} accept",
            "The number names no endpoint set: a virtual server translates the packet, at INPUT or later at OUTPUT.",
        )
        yield from super().translate(family)

    def number_of(self, route: Route, listener: ListenerName, translation: Translation) -> int:
        if _scopes(translation)[route.portal] is listener.scope:
            return OURS
        return super().number_of(route, listener, translation)

    def translated_routes(self, translation: Translation) -> Iterable[Route]:
        scopes = _scopes(translation)
        return (r for r in translation.routes if isinstance(r.to, ListenerName) and r.to.scope != scopes[r.portal])

    def other_elements(self, translation: Translation) -> Elements:
        found: Elements = {}
        for family, scope in {(portal.family, scope) for portal, scope in _scopes(translation).items()}:
            add_hairpins(found, family, (e.ip for e in endpoints_of(translation, family, scope)))
        service_port = translation.service_port
        for ip in sorted(virtual_ips(translation).difference(service_port.cluster_ips)):
            found.setdefault(f"virtual_ips{family_of(ip)}", {})[packed_ip(ip)] = b""
            if check := service_port.health_check_node_port:
                portal = Portal("0.0.0.0", check, L4Protocol.TCP)  # noqa: S104 - any address
                found.setdefault(f"health_checks{family_of(ip)}", {})[packed_portal(portal)] = b""
        return found


@dataclass(frozen=True, slots=True)
class VirtualServerSpec:
    """One virtual server. ``weights``: endpoint -> weight. ``affinity_timeout_s``: duration of affinity."""

    scheduler: str = DEFAULT_SCHEDULER
    affinity_timeout_s: int | None = None
    weights: Mapping[Address, int] = field(default_factory=dict)


VirtualServers = dict[Portal, VirtualServerSpec]


def virtual_servers(
    translation: Translation,
    node_ips: Iterable[str],
    scheduler: str = DEFAULT_SCHEDULER,
    missing: Collection[str] = (),
) -> VirtualServers:
    """Return the virtual servers of one service port. *node_ips* are the addresses that serve node ports.

    *scheduler* is the default for service ports that ask for none, or for one that is *missing* in the kernel. A
    virtual server has the endpoints for clients from anywhere. If nftables refuses those clients, it has the endpoints
    for pods and the node itself.
    """
    service_port = translation.service_port
    given = dict(service_port.weights)
    of_balance = _SCHEDULER_OF.get(service_port.balance) if service_port.balance else None
    asked = (service_port.ipvs_scheduler, of_balance, scheduler, DEFAULT_SCHEDULER)
    chosen = next((each for each in asked if each and each not in missing), DEFAULT_SCHEDULER)
    found: VirtualServers = {}
    for portal, scope in _scopes(translation).items():
        endpoints = endpoints_of(translation, portal.family, scope)
        weights = {endpoint.address: given.get(endpoint.ip, 1) for endpoint in endpoints}
        if not any(weights.values()):  # an endpoint with weight 0 gets no connections, unless every weight is 0
            weights = dict.fromkeys(weights, 1)
        if portal.protocol is L4Protocol.UDP:
            # A UDP flow has no visible end: it stays as long as its endpoint serves.
            weights = {e.address: 0 for e in translation.serving if family_of(e.ip) == portal.family} | weights
        server = VirtualServerSpec(chosen, service_port.affinity_timeout_s, weights)
        found |= dict.fromkeys(_at_addresses(portal, node_ips), server)
    return found


def virtual_ips(translation: Translation) -> set[str]:
    """Return the addresses of the portals of *translation*, which become addresses of this node."""
    return {portal.ip for portal, _, _ in translation.routes if not portal.is_node_port}


def at_host(facts: NodeFacts, host_ips: Iterable[str]) -> NodeFacts:
    """Return *facts* with *host_ips* as the addresses of the node."""
    return replace(facts, node=replace(facts.node, addresses=tuple(host_ips)))


def node_port_ips(facts: NodeFacts, host_ips: Iterable[str]) -> tuple[str, ...]:
    """Return the addresses of the host that serve node ports."""
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
    """Return the scope of the endpoints of each portal's virtual server."""
    scopes: dict[Portal, Scope] = {}
    for portal, _, to in translation.routes:
        if not isinstance(to, Refusal):
            scopes.setdefault(portal, to.scope)
    return scopes
