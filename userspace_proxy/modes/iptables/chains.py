"""The chains that kube-proxy's iptables mode is known by, with its names and texts: what a Service is in them. Pure.

A rule stands here as iptables-save prints it, without the ``-A CHAIN`` before it: so what was loaded can be compared
with what is there, and `render` shows what every tutorial does. A word changed here is a word that people grep for.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from userspace_proxy.interfaces import PodDetector, Translation
from userspace_proxy.model.endpoint import Endpoint, Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.service import Portal, internal_portals, node_portal
from userspace_proxy.modes.reasons.known import Known, host
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.xtables_script import (
    ANSWERS,
    BUILT_IN,
    LOOPS_REASON,
    NO_LOOP_REASON,
    at_own_address,
    new_chain,
)
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO


class Chain(NamedTuple):
    """A chain in its table."""

    table: str
    name: str


Rules = Mapping[Chain, tuple[str, ...]]
"""Rules in the chains that they stand in, in their order."""

Explained = Mapping[Chain, list[RuleLine]]
"""The same with their reasons."""

SERVICES = Chain("nat", "KUBE-SERVICES")
NODE_PORTS = Chain("nat", "KUBE-NODEPORTS")
POSTROUTING = Chain("nat", "KUBE-POSTROUTING")
MARK_MASQ = Chain("nat", "KUBE-MARK-MASQ")
REFUSED_INSIDE = Chain("filter", "KUBE-SERVICES")
REFUSED_OUTSIDE = Chain("filter", "KUBE-EXTERNAL-SERVICES")
FORWARD = Chain("filter", "KUBE-FORWARD")
HEALTH_CHECKS = Chain("filter", "KUBE-NODEPORTS")
FIREWALL = Chain("filter", "KUBE-PROXY-FIREWALL")
# Not kube-proxy's: it writes this rule into the kubelet's KUBE-FIREWALL, which is not ours to write into.
LOCALNET = Chain("filter", "USERSPACE-PROXY-LOCALNET")
# Nor is this: kube-proxy adds no routes, so what nobody serves does not come round by lo.
LOOPS = Chain("filter", "USERSPACE-PROXY-KUBE-LOOPS")

# The chains that services share, in the order in which they are written; each service port has others of its own beside
# them, all in the NAT table.
SHARED: Mapping[Chain, str] = {
    REFUSED_INSIDE: "Cluster IPs that nobody can serve.",
    REFUSED_OUTSIDE: "External IPs, load balancer IPs and node ports that nobody can serve.",
    FORWARD: "Lets pass through this node what was led to an endpoint, whatever the rules behind it say.",
    HEALTH_CHECKS: "Health check node ports, which load balancers ask.",
    FIREWALL: "Load balancer IPs that not everybody may dial (loadBalancerSourceRanges).",
    LOCALNET: "Guards 127.0.0.0/8, since route_localnet opens it for node ports.",
    LOOPS: LOOPS_REASON,
    SERVICES: "Which Service? Asked rule by rule, so a connection costs more the more Services there are.",
    NODE_PORTS: "Packets to an address of this node: is it a node port?",
    POSTROUTING: "Replaces the sender's address of packets with the mark (masquerade, SNAT).",
    MARK_MASQ: "Puts the mark on packets whose sender's address is to be replaced when they leave.",
}
OWN_PREFIXES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-")

_NEW = "-m conntrack --ctstate NEW"
_LEAVING = "-m addrtype ! --dst-type LOCAL"


class Jump(NamedTuple):
    """What leads from a built-in chain to one of `SHARED`, and what is asked there."""

    source: str
    chain: Chain
    asked: str
    match: str = ""
    whose: str = ""

    @property
    def rule(self) -> str:
        return f"{self.match} -j {self.chain.name}".lstrip()

    @property
    def reason(self) -> str:
        return f"{BUILT_IN[self.source]}{self.whose}{'; new connections only' * (_NEW in self.match)}: {self.asked}"


def _jump(source: str, chain: Chain, comment: str, asked: str, match: str = "", whose: str = "") -> Jump:
    return Jump(source, chain, asked, f'{match} -m comment --comment "{comment}"'.lstrip(), whose)


_OUTSIDE = ("kubernetes externally-visible service portals", "is it an external portal that nobody can serve?")
_INSIDE = ("kubernetes service portals", "is it a cluster IP that nobody can serve?")
_FIREWALL = ("kubernetes load balancer firewall", "is it a load balancer IP that this sender may not dial?")
_SERVICES = ("kubernetes service portals", "is it for a Service?")

# The later ones stand before the earlier ones, as each is put at the top of its chain.
JUMPS = (
    Jump("FORWARD", LOOPS, "is it to leave by lo, where it would come in again?", OUT_BY_LO),
    _jump("INPUT", REFUSED_OUTSIDE, *_OUTSIDE, _NEW),
    _jump("FORWARD", REFUSED_OUTSIDE, *_OUTSIDE, _NEW),
    _jump("INPUT", HEALTH_CHECKS, "kubernetes health check service ports", "is it a health check node port?"),
    _jump("FORWARD", REFUSED_INSIDE, *_INSIDE, _NEW),
    # Not kube-proxy's: it lets this node's own go on by the default route. A UDP flow would outlive its endpoints so.
    _jump("OUTPUT", REFUSED_OUTSIDE, *_OUTSIDE, f"-p udp {_LEAVING} {_NEW}", ", UDP that leaves this node"),
    _jump("OUTPUT", REFUSED_INSIDE, *_INSIDE, _NEW),
    _jump("FORWARD", FORWARD, "kubernetes forwarding rules", "was it led to an endpoint, so that it may pass?"),
    _jump("INPUT", FIREWALL, *_FIREWALL, _NEW),
    _jump("OUTPUT", FIREWALL, *_FIREWALL, _NEW),
    _jump("FORWARD", FIREWALL, *_FIREWALL, _NEW),
    Jump("INPUT", LOCALNET, "does somebody reach for 127.0.0.0/8 from outside?"),
    _jump("OUTPUT", SERVICES, *_SERVICES),
    _jump("PREROUTING", SERVICES, *_SERVICES),
    _jump("POSTROUTING", POSTROUTING, "kubernetes postrouting rules", "is the sender's address to be replaced?"),
)


@dataclass(frozen=True, slots=True)
class Manner:
    """How rules are written on this node, whatever its Services.

    ``pods`` tells pods of the node from others; ``node_ports_on`` are the CIDRs of own addresses with node ports, all
    where there are none. ``localhost_node_ports``: at 127.0.0.0/8 too. ``random_fully``: the ports of masqueraded
    connections are drawn, which iptables before 1.6.2 cannot. ``drops_invalid``: what conntrack cannot place is
    dropped, as an endpoint would reset it. ``says_endpoints``: rules name the endpoints they lead to.
    """

    pods: PodDetector | None = None
    masquerade_bit: int = 14
    node_ports_on: tuple[str, ...] = ()
    localhost_node_ports: bool = True
    random_fully: bool = True
    drops_invalid: bool = True
    says_endpoints: bool = True

    @property
    def mark(self) -> str:
        return f"{1 << self.masquerade_bit:#x}"


# ---- names


def chain_hash(name: ServicePortName, endpoint: Endpoint | None = None) -> str:
    """Return the sixteen letters by which kube-proxy's chains of a service port, or of an endpoint of it, end."""
    text = f"{name}{name.protocol.lower()}{endpoint or ''}"
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode()  # five bits a letter


@functools.cache
def probability(of: int) -> str:
    """Return the chance 1/*of* as iptables-save prints what kube-proxy asks for: the kernel counts in 2^-31."""
    return f"{round(float(f'{1 / of:.10f}') * 2**31) / 2**31:.11f}"


# ---- what the node needs


def node_rules(family: Family, how: Manner) -> Rules:
    """Return the rules that do not depend on Services; in `SERVICES` they are the last."""
    return {chain: tuple(line.text for line in lines) for chain, lines in node_lines(family, how).items()}


def node_lines(family: Family, how: Manner) -> Explained:
    """Return the rules of `node_rules` with their reasons."""
    everywhere = "0.0.0.0/0" if family == 4 else "::/0"
    addresses = [cidr for cidr in how.node_ports_on if family_of(cidr) == family]
    if everywhere in addresses:
        addresses = []
    says = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    last = "see whether it is a node port. The last rule, as it is the most general."
    to_node_ports = [_own_address(cidr, says, last) for cidr in addresses]
    if not addresses:
        # At ::1 they cannot work, as IPv6 has no route_localnet.
        never = "::1/128" if family == 6 else "" if how.localhost_node_ports else "127.0.0.0/8"
        to_node_ports = [
            RuleLine(
                f"{f'! -d {never} ' if never else ''}{says} -m addrtype --dst-type LOCAL -j {NODE_PORTS.name}",
                f"{at_own_address()}{f', but none of {host(never)}' if never else ''}: {last}",
            )
        ]
    marked = f"--mark {how.mark}/{how.mark}"
    drawn = ", at a port drawn by chance" if how.random_fully else ""
    invalid = RuleLine(
        "-m conntrack --ctstate INVALID -j DROP",
        "Packets that conntrack cannot place are dropped: nothing would translate them, and who gets one would reset "
        "its connection.",
    )
    rules = {
        SERVICES: to_node_ports,
        POSTROUTING: [
            RuleLine(f"-m mark ! {marked} -j RETURN", f"Packets without the mark {how.mark} leave as they are."),
            RuleLine(
                f"-j MARK --set-xmark {how.mark}/0x0",
                "Take the mark away (xmark flips it), lest the packet be masqueraded again on its way through a "
                "tunnel.",
            ),
            RuleLine(
                '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE'
                + (" --random-fully" if how.random_fully else ""),
                f"Replace the sender's address by that of this node (masquerade{drawn}): answers come back here.",
            ),
        ],
        MARK_MASQ: [
            RuleLine(
                f"-j MARK --set-xmark {how.mark}/{how.mark}",
                f"Put the mark {how.mark} on the packet; POSTROUTING looks for it.",
            )
        ],
        FORWARD: [
            *((invalid,) if how.drops_invalid else ()),
            RuleLine(
                f'-m comment --comment "kubernetes forwarding rules" -m mark {marked} -j ACCEPT',
                f"Packets with the mark {how.mark} may pass through this node.",
            ),
            RuleLine(
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "Packets of a connection that conntrack knows already may pass through this node.",
            ),
        ],
    }
    if family == 4:
        rules[LOOPS] = [RuleLine(NO_LOOP, NO_LOOP_REASON)]
    if family == 4 and how.localhost_node_ports:
        # With route_localnet others could reach what listens on 127.0.0.1 only (CVE-2020-8558).
        rules[LOCALNET] = [
            RuleLine(
                '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
                " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
                "Packets to 127.0.0.0/8 not from 127.0.0.0/8 in none of the states RELATED,ESTABLISHED,DNAT are "
                "dropped: only this node itself may dial 127.0.0.1 (CVE-2020-8558).",
            )
        ]
    return rules


def _own_address(cidr: str, says: str, last: str) -> RuleLine:
    network = ipaddress.ip_network(cidr, strict=False)
    if network.num_addresses == 1:
        return RuleLine(f"-d {network} {says} -j {NODE_PORTS.name}", f"Packets to {host(str(network))}: {last}")
    rule = f"-d {network} {says} -m addrtype --dst-type LOCAL -j {NODE_PORTS.name}"
    return RuleLine(rule, f"{at_own_address(str(network))}: {last}")


# ---- what a service port needs


def service_rules(translation: Translation, family: Family, how: Manner) -> Rules:
    """Return what *translation* is in *family*: rules in `SHARED`, and chains of its own."""
    rules: dict[Chain, list[str]] = {}
    if family in translation.reaches:
        for chain, rule, _ in _Writer(translation, family, how).rules():
            rules.setdefault(chain, []).append(rule)
    return {chain: tuple(lines) for chain, lines in rules.items()}


def service_lines(translation: Translation, family: Family, how: Manner) -> Explained:
    """Return the rules of `service_rules` with their reasons."""
    rules: dict[Chain, list[RuleLine]] = {}
    if family in translation.reaches:
        for chain, rule, reason in _Writer(translation, family, how).rules():
            rules.setdefault(chain, []).append(RuleLine(rule, reason, translation.service_port.name))
    return rules


def own_chains(translation: Translation) -> Mapping[Chain, RuleLine]:
    """Return the chains that *translation* alone may have, as they are made."""
    name = translation.service_port.name
    reaches = translation.reaches.values()
    reasons = (
        f"{name}: all its endpoints that traffic from the cluster may meet.",
        f"{name}: its endpoints on this node (traffic policy Local).",
        f"{name}: who dialled it at another address than the cluster IP.",
        f"{name}: who may dial its load balancer IP (loadBalancerSourceRanges).",
    )
    own = chain_hash(name)
    found = {Chain("nat", f"{prefix}{own}"): said for prefix, said in zip(OWN_PREFIXES[:4], reasons, strict=True)}
    for endpoint in (endpoint for reach in reaches for endpoint in (*reach.cluster, *reach.local)):
        found[_sep(name, endpoint)] = f"The endpoint {endpoint} of {name}."
    return {chain: new_chain(chain.name, reason, name) for chain, reason in found.items()}


def _sep(name: ServicePortName, endpoint: Endpoint) -> Chain:
    return Chain("nat", f"{OWN_PREFIXES[4]}{chain_hash(name, endpoint)}")


_Lines = Iterator[tuple[Chain, str, Reason]]

_MASQUERADED = (
    "get the mark: their sender's address will be replaced, so that the endpoint's answers come back to this node."
)


class _Writer:
    """Writes the rules of one service port in one family.

    Where nobody is there, the chains of its own are left out, and packets to it meet REJECT or DROP in the filter
    table; what the NAT table has led elsewhere by then is not addressed to it any more.
    """

    def __init__(self, translation: Translation, family: Family, how: Manner) -> None:
        self._sp = translation.service_port
        self._there = translation.reaches[family]
        self._allowed = translation.allowed
        self._family: Family = family
        self._how = how
        self._name = str(self._sp.name)
        self._protocol = self._sp.name.protocol.lower()
        self._seps: dict[Endpoint, Chain] = {}
        own = chain_hash(self._sp.name)
        self._svc, self._svl, self._ext, self._fw = (Chain("nat", f"{p}{own}") for p in OWN_PREFIXES[:4])
        self._internal = self._svl if self._sp.internal_local else self._svc
        self._serves_inside = bool(self._there.local) if self._sp.internal_local else self._there.has_any
        self._serves_outside = bool(self._there.local) if self._sp.external_local else self._there.has_any
        self._portals = {route.portal for route in translation.routes}  # those that no other service port has
        inside = set(internal_portals(self._sp))
        self._masquerades_all = not any(
            isinstance(to, ListenerName) and to.transparent for portal, _, to in translation.routes if portal in inside
        )

    def rules(self) -> _Lines:
        yield from self._inside()
        yield from self._outside()
        if port := self._sp.health_check_node_port:
            yield (
                HEALTH_CHECKS,
                f"-p tcp {self._says(' health check node port')} -m tcp --dport {port} -j ACCEPT",
                f"Packets to the health check node port {port} (TCP) may pass.",
            )
        there = self._there
        if there.has_any and self._sp.is_externally_accessible:
            yield from self._by_sender()
        for chain, endpoints in ((self._svc, there.cluster), (self._svl, there.local)):
            yield from self._choice(chain, endpoints)
        for endpoint in dict.fromkeys((*there.cluster, *there.local)):
            yield from self._endpoint(endpoint)

    def _inside(self) -> _Lines:
        """Where cluster IPs lead; whose address is replaced."""
        for ip in self._mine(self._sp.cluster_ips):
            portal = Portal(ip, self._sp.port, self._sp.name.protocol)
            if not self._serves_inside:
                yield self._refusal(REFUSED_INSIDE, portal, self._at(ip, self._why_not()))
                continue
            here = self._at(ip, self._says(" cluster IP"))
            yield self._led(SERVICES, portal, here, self._internal)
            pods, masq = self._how.pods, f"-j {MARK_MASQ.name}"
            if self._masquerades_all:
                yield self._internal, f"{here} {masq}", _said(portal, _MASQUERADED)
            elif pods is not None and pods.interface:
                others = self._at(ip, self._says(" cluster IP"), f"! {_in_by(pods)}")
                whose = f"that do not come in by {_in_by(pods)[3:]} (so from no pod)"
                yield self._internal, f"{others} {masq}", _said(portal, f"{whose} {_MASQUERADED}")
            elif len(cidrs := self._pod_cidrs()) == 1:
                whose = f"not from {host(cidrs[0])} (so from no pod)"
                yield self._internal, f"! -s {cidrs[0]} {here} {masq}", _said(portal, f"{whose} {_MASQUERADED}")
            elif cidrs:
                yield self._internal, f"{here} {masq}", _said(portal, _MASQUERADED)
                for cidr in cidrs:
                    again = f"from {host(cidr)} lose the mark again: a pod, and the endpoint may see its own address."
                    unmarked = f"-j MARK --set-xmark 0x0/{self._how.mark}"
                    yield self._internal, f"-s {cidr} {here} {unmarked}", _said(portal, again)

    def _outside(self) -> _Lines:
        """Where other addresses lead."""
        has_any = self._there.has_any
        for ip in self._mine(self._sp.external_ips):
            portal = Portal(ip, self._sp.port, self._sp.name.protocol)
            if has_any:
                yield self._led(SERVICES, portal, self._at(ip, self._says(" external IP")), self._ext)
            if not self._serves_outside:
                yield self._refusal(REFUSED_OUTSIDE, portal, self._at(ip, self._why_not()))
        allowed: dict[str, None] = {}
        for ip in self._mine(self._sp.load_balancer_ips):
            portal = Portal(ip, self._sp.port, self._sp.name.protocol)
            ranges = self._ranges(ip)
            allowed |= dict.fromkeys(ranges)
            if has_any:
                to = self._fw if ranges else self._ext
                yield self._led(SERVICES, portal, self._at(ip, self._says(" loadbalancer IP")), to)
            if has_any and ranges:
                says = self._says(f" traffic not accepted by {self._fw.name}")
                why = "are dropped: who may dial it was led to an endpoint by now, and is not addressed to it any more."
                yield FIREWALL, f"{self._at(ip, says)} -j DROP", _said(portal, why)
            if not self._serves_outside:
                yield self._refusal(REFUSED_OUTSIDE, portal, self._at(ip, self._why_not()))
        if has_any and allowed:
            for source in allowed:
                reason = f"Packets from {host(source)} may dial the load balancer IP: on to {_kind(self._ext)}"
                yield self._fw, f"-s {source} {self._says(' loadbalancer IP')} -j {self._ext.name}", reason
            yield (
                self._fw,
                f'-m comment --comment "other traffic to {self._name} will be dropped by {FIREWALL.name}"',
                "A note only: who comes to this line is none of the senders above, and is dropped in the table filter.",
            )
        yield from self._node_port()

    def _node_port(self) -> _Lines:
        port = self._sp.node_port
        if (portal := node_portal(self._family, port, self._sp.name.protocol)) not in self._portals:
            return
        to_port = f"-m {self._protocol} --dport {port}"
        if self._there.has_any:
            yield self._led(NODE_PORTS, portal, f"-p {self._protocol} {self._says()} {to_port}", self._ext)
        if not self._serves_outside:
            here = f"-p {self._protocol} {self._why_not()} -m addrtype --dst-type LOCAL {to_port}"
            yield self._refusal(REFUSED_OUTSIDE, portal, here)

    def _by_sender(self) -> _Lines:
        """The chain in which those who dialled another address are told apart."""

        def says(what: str) -> str:
            return f'-m comment --comment "{what} {self._name} external destinations"'

        masq = f"-j {MARK_MASQ.name}"
        if not self._sp.external_local:
            yield self._ext, f"{says('masquerade traffic for')} {masq}", f"Packets {_MASQUERADED}"
        elif self._there.cluster:
            pods = self._how.pods
            # Pods and the node itself meet all endpoints, as if they had gone out to a load balancer and come back.
            again = "may meet all endpoints, as if they had gone out to a load balancer and come back."
            matches = [(f"-s {cidr}", f"from {host(cidr)}") for cidr in self._pod_cidrs()]
            if pods and pods.interface:
                matches = [(_in_by(pods), f"that come in by {_in_by(pods)[3:]}")]
            for match, whose in matches:
                rule = f"{match} {says('pod traffic for')} -j {self._svc.name}"
                yield self._ext, rule, f"Packets {whose} (pods) {again}"
            local, own = "-m addrtype --src-type LOCAL", "Packets from this node itself"
            yield self._ext, f"{says('masquerade LOCAL traffic for')} {local} {masq}", f"{own} {_MASQUERADED}"
            yield self._ext, f"{says('route LOCAL traffic for')} {local} -j {self._svc.name}", f"{own} {again}"
        if self._serves_outside and self._sp.external_local:
            reason = "All others: on to the endpoints on this node (traffic policy Local)."
            yield self._ext, f"-j {self._svl.name}", reason
        elif self._serves_outside:
            yield self._ext, f"-j {self._svc.name}", "Then: on to all endpoints."

    def _choice(self, chain: Chain, endpoints: tuple[Endpoint, ...]) -> _Lines:
        """One of *endpoints*: the one that this client met before, where it is to meet it again, else any."""
        chains = [self._sep(endpoint) for endpoint in endpoints]
        if timeout_s := self._sp.affinity_timeout_s:
            for endpoint, sep in zip(endpoints, chains, strict=True):
                seen = f"-m recent --rcheck --seconds {timeout_s} --reap {self._list(sep)}"
                reason = partial(_seen, endpoint, timeout_s)
                yield chain, f"{self._says_endpoint(endpoint)}{seen} -j {sep.name}", reason
        for at, (endpoint, sep) in enumerate(zip(endpoints, chains, strict=True)):
            left = len(endpoints) - at
            chance = f"-m statistic --mode random --probability {probability(left)} " if left > 1 else ""
            reason = partial(_chance, endpoint, at, len(endpoints))
            yield chain, f"{self._says_endpoint(endpoint)}{chance}-j {sep.name}", reason

    def _endpoint(self, endpoint: Endpoint) -> _Lines:
        sep = self._sep(endpoint)
        says = f"{self._says()} " if self._how.says_endpoints else ""
        # Who comes back to itself would answer itself past us, and not know the address that it answers from.
        yield sep, f"-s {_host(endpoint.ip)} {says}-j {MARK_MASQ.name}", partial(_hairpin, endpoint)
        seen = f"-m recent --set {self._list(sep)} " if self._sp.affinity_timeout_s else ""
        to = join_address(endpoint.ip, endpoint.port)
        rule = f"-p {self._protocol} {says}{seen}-m {self._protocol} -j DNAT --to-destination {to}"
        noted = " Before, the client's address is noted in the list of this endpoint (affinity)." if seen else ""
        destination = f"DNAT: the packet's destination becomes the endpoint {to} ({self._sp.name.protocol}).{noted}"
        yield sep, rule, destination

    # ---- parts of rules

    def _mine(self, ips: Iterable[str]) -> Iterator[str]:
        """Yield those of *ips* of this family that are this service port's, whoever else names them."""
        port, protocol = self._sp.port, self._sp.name.protocol
        return (ip for ip in ips if family_of(ip) == self._family and Portal(ip, port, protocol) in self._portals)

    def _pod_cidrs(self) -> list[str]:
        pods = self._how.pods
        return [cidr for cidr in pods.cidrs if family_of(cidr) == self._family] if pods is not None else []

    def _ranges(self, ip: str) -> tuple[str, ...]:
        """Return who may dial the load balancer IP *ip*, nobody in particular for all."""
        ranges = self._allowed.get(Portal(ip, self._sp.port, self._sp.name.protocol), ())
        return () if any(cidr.endswith("/0") for cidr in ranges) else ranges

    def _sep(self, endpoint: Endpoint) -> Chain:
        if (known := self._seps.get(endpoint)) is None:
            known = self._seps[endpoint] = _sep(self._sp.name, endpoint)
        return known

    def _list(self, sep: Chain) -> str:
        mask = "255.255.255.255" if self._family == 4 else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
        return f"--name {sep.name} --mask {mask} --rsource"

    def _says(self, what: str = "") -> str:
        return f'-m comment --comment "{self._name}{what}"'

    def _says_endpoint(self, endpoint: Endpoint) -> str:
        return f"{self._says(f' -> {endpoint}')} " if self._how.says_endpoints else ""

    def _why_not(self) -> str:
        return self._says(" has no local endpoints" if self._there.has_any else " has no endpoints")

    def _at(self, ip: str, says: str, interface: str = "") -> str:
        by = f" {interface}" if interface else ""
        return f"-d {_host(ip)}{by} -p {self._protocol} {says} -m {self._protocol} --dport {self._sp.port}"

    def _led(self, chain: Chain, portal: Portal, match: str, to: Chain) -> tuple[Chain, str, Reason]:
        reason = _said(portal, f"are for {self._name}: on to its chain {_kind(to)}")
        return chain, f"{match} -j {to.name}", reason

    def _refusal(self, chain: Chain, portal: Portal, match: str) -> tuple[Chain, str, Reason]:
        if self._there.has_any:
            why = "are dropped, without an answer: none of its endpoints is on this node (traffic policy Local)."
            return chain, f"{match} -j DROP", _said(portal, why)
        # Unlike kube-proxy, TCP is reset:
        # 1. connect() acts on an ICMPv6 error only at its second SYN, after a second.
        # 2. Without a default route cluster IPs are routed through lo, where IPv4 sends no ICMP error: connect() hangs.
        answer = "icmp-port-unreachable" if self._family == 4 else "icmp6-port-unreachable"
        if self._sp.name.protocol is L4Protocol.TCP:
            answer = "tcp-reset"
        why = f"are refused with {ANSWERS[answer]}: no endpoint is there."
        return chain, f"{match} -j REJECT --reject-with {answer}", _said(portal, why)


# ---- reasons


def _said(portal: Portal, what: str) -> Reason:
    """Return the reason that says *what* of packets to *portal*."""
    return partial(_packets, portal, what)


def _packets(portal: Portal, what: str, known: Known) -> str:
    return f"Packets to {known.portal_words(portal)} {what}"


def _kind(chain: Chain) -> str:
    """Return a chain's name without its hash."""
    return f"{chain.name.rpartition('-')[0]}-..."


def _seen(endpoint: Endpoint, timeout_s: int, _: Known) -> str:
    return (
        f"Affinity: who was led to {endpoint} within the last {timeout_s} s is led there again "
        "(-m recent keeps a list of clients' addresses for each endpoint)."
    )


def _chance(endpoint: Endpoint, at: int, of: int, _: Known) -> str:
    if of == 1:
        return f"Always {endpoint}: there is one endpoint only."
    if at == of - 1:
        rest = f"who was not led elsewhere by now goes to {endpoint}, 1 in {of}"
        return f"One of {of} endpoints by chance, the last: {rest}."
    if at == 0:
        return f"One of {of} endpoints by chance, the first: {endpoint} with probability 1/{of}."
    return f"The next: {endpoint} with probability 1/{of - at} of those who came here, which is 1 in {of} of all."


def _hairpin(endpoint: Endpoint, _: Known) -> str:
    return (
        f"The endpoint itself ({endpoint.ip}) dialled its Service and was chosen: it gets the mark, for with its own "
        "address as sender it would answer itself, past this node."
    )


def _host(ip: str) -> str:
    return f"{ip}/{32 if family_of(ip) == 4 else 128}"


def _in_by(pods: PodDetector) -> str:
    return f"-i {pods.interface.replace('*', '+')}"
