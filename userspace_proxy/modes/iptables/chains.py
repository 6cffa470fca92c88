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
from typing import NamedTuple

from userspace_proxy.interfaces import PodDetector, Translation
from userspace_proxy.model.endpoint import Endpoint, Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.service import Portal, internal_portals, node_portal
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO


class Chain(NamedTuple):
    """A chain in its table."""

    table: str
    name: str


Rules = Mapping[Chain, tuple[str, ...]]
"""Rules in the chains that they stand in, in their order."""

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

# The chains that services share; each service port has others of its own beside them, all in the NAT table.
SHARED = (
    *(REFUSED_INSIDE, REFUSED_OUTSIDE, FORWARD, HEALTH_CHECKS, FIREWALL, LOCALNET, LOOPS),
    *(SERVICES, NODE_PORTS, POSTROUTING, MARK_MASQ),
)
OWN_PREFIXES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-")

_NEW = "-m conntrack --ctstate NEW"
_LEAVING = "-m addrtype ! --dst-type LOCAL"


class Jump(NamedTuple):
    """What leads from a built-in chain to one of `SHARED`."""

    source: str
    chain: Chain
    match: str = ""

    @property
    def rule(self) -> str:
        return f"{self.match} -j {self.chain.name}".lstrip()


def _jump(source: str, chain: Chain, comment: str, match: str = "") -> Jump:
    return Jump(source, chain, f'{match} -m comment --comment "{comment}"'.lstrip())


# The later ones stand before the earlier ones, as each is put at the top of its chain.
JUMPS = (
    Jump("FORWARD", LOOPS, OUT_BY_LO),
    _jump("INPUT", REFUSED_OUTSIDE, "kubernetes externally-visible service portals", _NEW),
    _jump("FORWARD", REFUSED_OUTSIDE, "kubernetes externally-visible service portals", _NEW),
    _jump("INPUT", HEALTH_CHECKS, "kubernetes health check service ports"),
    _jump("FORWARD", REFUSED_INSIDE, "kubernetes service portals", _NEW),
    # Not kube-proxy's: it lets this node's own go on by the default route. A UDP flow would outlive its endpoints so.
    _jump("OUTPUT", REFUSED_OUTSIDE, "kubernetes externally-visible service portals", f"-p udp {_LEAVING} {_NEW}"),
    _jump("OUTPUT", REFUSED_INSIDE, "kubernetes service portals", _NEW),
    _jump("FORWARD", FORWARD, "kubernetes forwarding rules"),
    _jump("INPUT", FIREWALL, "kubernetes load balancer firewall", _NEW),
    _jump("OUTPUT", FIREWALL, "kubernetes load balancer firewall", _NEW),
    _jump("FORWARD", FIREWALL, "kubernetes load balancer firewall", _NEW),
    Jump("INPUT", LOCALNET),
    _jump("OUTPUT", SERVICES, "kubernetes service portals"),
    _jump("PREROUTING", SERVICES, "kubernetes service portals"),
    _jump("POSTROUTING", POSTROUTING, "kubernetes postrouting rules"),
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
    everywhere = "0.0.0.0/0" if family == 4 else "::/0"
    addresses = [cidr for cidr in how.node_ports_on if family_of(cidr) == family]
    if everywhere in addresses:
        addresses = []
    says = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    to_node_ports = [f"{_own_address(cidr, says)} -j {NODE_PORTS.name}" for cidr in addresses]
    if not addresses:
        # At ::1 they cannot work, as IPv6 has no route_localnet.
        never = "! -d ::1/128 " if family == 6 else "" if how.localhost_node_ports else "! -d 127.0.0.0/8 "
        to_node_ports = [f"{never}{says} -m addrtype --dst-type LOCAL -j {NODE_PORTS.name}"]
    marked = f"--mark {how.mark}/{how.mark}"
    rules = {
        SERVICES: tuple(to_node_ports),
        POSTROUTING: (
            f"-m mark ! {marked} -j RETURN",
            f"-j MARK --set-xmark {how.mark}/0x0",  # lest it be masqueraded again on its way through a tunnel
            '-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE'
            + (" --random-fully" if how.random_fully else ""),
        ),
        MARK_MASQ: (f"-j MARK --set-xmark {how.mark}/{how.mark}",),
        FORWARD: (
            *(("-m conntrack --ctstate INVALID -j DROP",) if how.drops_invalid else ()),
            f'-m comment --comment "kubernetes forwarding rules" -m mark {marked} -j ACCEPT',
            '-m comment --comment "kubernetes forwarding conntrack rule"'
            " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
        ),
    }
    if family == 4:
        rules[LOOPS] = (NO_LOOP,)
    if family == 4 and how.localhost_node_ports:
        # With route_localnet others could reach what listens on 127.0.0.1 only (CVE-2020-8558).
        rules[LOCALNET] = (
            '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
            " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
        )
    return rules


def _own_address(cidr: str, says: str) -> str:
    network = ipaddress.ip_network(cidr, strict=False)
    if network.num_addresses == 1:
        return f"-d {network} {says}"
    return f"-d {network} {says} -m addrtype --dst-type LOCAL"


# ---- what a service port needs


def service_rules(translation: Translation, family: Family, how: Manner) -> Rules:
    """Return what *translation* is in *family*: rules in `SHARED`, and chains of its own."""
    rules: dict[Chain, list[str]] = {}
    if family in translation.reaches:
        for chain, rule in _Writer(translation, family, how).rules():
            rules.setdefault(chain, []).append(rule)
    return {chain: tuple(lines) for chain, lines in rules.items()}


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

    def rules(self) -> Iterator[tuple[Chain, str]]:
        yield from self._inside()
        yield from self._outside()
        if port := self._sp.health_check_node_port:
            yield HEALTH_CHECKS, f"-p tcp {self._says(' health check node port')} -m tcp --dport {port} -j ACCEPT"
        there = self._there
        if there.has_any and self._sp.is_externally_accessible:
            yield from self._by_sender()
        for chain, endpoints in ((self._svc, there.cluster), (self._svl, there.local)):
            yield from self._choice(chain, endpoints)
        for endpoint in dict.fromkeys((*there.cluster, *there.local)):
            yield from self._endpoint(endpoint)

    def _inside(self) -> Iterator[tuple[Chain, str]]:
        """Where cluster IPs lead; whose address is replaced."""
        for ip in self._mine(self._sp.cluster_ips):
            if not self._serves_inside:
                yield REFUSED_INSIDE, self._refusal(self._at(ip, self._why_not()))
                continue
            here = self._at(ip, self._says(" cluster IP"))
            yield SERVICES, f"{here} -j {self._internal.name}"
            pods = self._how.pods
            if self._masquerades_all:
                yield self._internal, f"{here} -j {MARK_MASQ.name}"
            elif pods is not None and pods.interface:
                others = self._at(ip, self._says(" cluster IP"), f"! {_in_by(pods)}")
                yield self._internal, f"{others} -j {MARK_MASQ.name}"
            elif cidrs := self._pod_cidrs():
                yield from ((self._internal, rule) for rule in _unless_from(cidrs, here, self._how.mark))

    def _outside(self) -> Iterator[tuple[Chain, str]]:
        """Where other addresses lead."""
        has_any = self._there.has_any
        for ip in self._mine(self._sp.external_ips):
            if has_any:
                yield SERVICES, f"{self._at(ip, self._says(' external IP'))} -j {self._ext.name}"
            if not self._serves_outside:
                yield REFUSED_OUTSIDE, self._refusal(self._at(ip, self._why_not()))
        allowed: dict[str, None] = {}
        for ip in self._mine(self._sp.load_balancer_ips):
            ranges = self._ranges(ip)
            allowed |= dict.fromkeys(ranges)
            if has_any:
                to = self._fw if ranges else self._ext
                yield SERVICES, f"{self._at(ip, self._says(' loadbalancer IP'))} -j {to.name}"
            if has_any and ranges:
                says = self._says(f" traffic not accepted by {self._fw.name}")
                yield FIREWALL, f"{self._at(ip, says)} -j DROP"
            if not self._serves_outside:
                yield REFUSED_OUTSIDE, self._refusal(self._at(ip, self._why_not()))
        if has_any and allowed:
            for source in allowed:
                yield self._fw, f"-s {source} {self._says(' loadbalancer IP')} -j {self._ext.name}"
            yield self._fw, f'-m comment --comment "other traffic to {self._name} will be dropped by {FIREWALL.name}"'
        yield from self._node_port()

    def _node_port(self) -> Iterator[tuple[Chain, str]]:
        port = self._sp.node_port
        if node_portal(self._family, port, self._sp.name.protocol) not in self._portals:
            return
        to_port = f"-m {self._protocol} --dport {port}"
        if self._there.has_any:
            yield NODE_PORTS, f"-p {self._protocol} {self._says()} {to_port} -j {self._ext.name}"
        if not self._serves_outside:
            here = f"-p {self._protocol} {self._why_not()} -m addrtype --dst-type LOCAL {to_port}"
            yield REFUSED_OUTSIDE, self._refusal(here)

    def _by_sender(self) -> Iterator[tuple[Chain, str]]:
        """The chain in which those who dialled another address are told apart."""

        def says(what: str) -> str:
            return f'-m comment --comment "{what} {self._name} external destinations"'

        if not self._sp.external_local:
            yield self._ext, f"{says('masquerade traffic for')} -j {MARK_MASQ.name}"
        elif self._there.cluster:
            pods = self._how.pods
            # Pods and the node itself meet all endpoints, as if they had gone out to a load balancer and come back.
            for match in [_in_by(pods)] if pods and pods.interface else [f"-s {c}" for c in self._pod_cidrs()]:
                yield self._ext, f"{match} {says('pod traffic for')} -j {self._svc.name}"
            local = "-m addrtype --src-type LOCAL"
            yield self._ext, f"{says('masquerade LOCAL traffic for')} {local} -j {MARK_MASQ.name}"
            yield self._ext, f"{says('route LOCAL traffic for')} {local} -j {self._svc.name}"
        if self._serves_outside:
            yield self._ext, f"-j {(self._svl if self._sp.external_local else self._svc).name}"

    def _choice(self, chain: Chain, endpoints: tuple[Endpoint, ...]) -> Iterator[tuple[Chain, str]]:
        """One of *endpoints*: the one that this client met before, where it is to meet it again, else any."""
        chains = [self._sep(endpoint) for endpoint in endpoints]
        if timeout_s := self._sp.affinity_timeout_s:
            for endpoint, sep in zip(endpoints, chains, strict=True):
                seen = f"-m recent --rcheck --seconds {timeout_s} --reap {self._list(sep)}"
                yield chain, f"{self._says_endpoint(endpoint)}{seen} -j {sep.name}"
        for at, (endpoint, sep) in enumerate(zip(endpoints, chains, strict=True)):
            left = len(endpoints) - at
            chance = f"-m statistic --mode random --probability {probability(left)} " if left > 1 else ""
            yield chain, f"{self._says_endpoint(endpoint)}{chance}-j {sep.name}"

    def _endpoint(self, endpoint: Endpoint) -> Iterator[tuple[Chain, str]]:
        sep = self._sep(endpoint)
        says = f"{self._says()} " if self._how.says_endpoints else ""
        # Who comes back to itself would answer itself past us, and not know the address that it answers from.
        yield sep, f"-s {_host(endpoint.ip)} {says}-j {MARK_MASQ.name}"
        seen = f"-m recent --set {self._list(sep)} " if self._sp.affinity_timeout_s else ""
        to = f"-m {self._protocol} -j DNAT --to-destination {join_address(endpoint.ip, endpoint.port)}"
        yield sep, f"-p {self._protocol} {says}{seen}{to}"

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
            known = self._seps[endpoint] = Chain("nat", f"{OWN_PREFIXES[4]}{chain_hash(self._sp.name, endpoint)}")
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

    def _refusal(self, match: str) -> str:
        if self._there.has_any:
            return f"{match} -j DROP"
        # Unlike kube-proxy, TCP is reset:
        # 1. connect() acts on an ICMPv6 error only at its second SYN, after a second.
        # 2. Without a default route cluster IPs are routed through lo, where IPv4 sends no ICMP error: connect() hangs.
        unreachable = "icmp-port-unreachable" if self._family == 4 else "icmp6-port-unreachable"
        is_tcp = self._sp.name.protocol is L4Protocol.TCP
        return f"{match} -j REJECT --reject-with {'tcp-reset' if is_tcp else unreachable}"


def _unless_from(cidrs: list[str], here: str, mark: str) -> Iterator[str]:
    """Yield what has those at *here* masqueraded who are in none of *cidrs*: one rule, where that is one."""
    if len(cidrs) == 1:
        yield f"! -s {cidrs[0]} {here} -j {MARK_MASQ.name}"
        return
    yield f"{here} -j {MARK_MASQ.name}"
    yield from (f"-s {cidr} {here} -j MARK --set-xmark 0x0/{mark}" for cidr in cidrs)


def _host(ip: str) -> str:
    return f"{ip}/{32 if family_of(ip) == 4 else 128}"


def _in_by(pods: PodDetector) -> str:
    return f"-i {pods.interface.replace('*', '+')}"
