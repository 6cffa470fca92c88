"""kube-proxy's iptables chains, with its names and texts, for the Services of one node. Pure.

A rule is written as iptables-save prints it, without ``-A CHAIN``. So the desired rules can be compared with those in
the kernel as text, and `render` prints what articles about Services show.
"""

import base64
import functools
import hashlib
import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from userspace_proxy.model.endpoint import Endpoint, Family, family_of, join_address
from userspace_proxy.model.names import L4Protocol, ListenerName, ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.service import Portal, internal_portals, node_portal
from userspace_proxy.modes import xtables_script as xtables
from userspace_proxy.modes.kernel_rules import Translation
from userspace_proxy.modes.portal_names import PortalNames, host
from userspace_proxy.modes.rule_line import Reason, RuleLine
from userspace_proxy.modes.xtables_script import ChainKey
from userspace_proxy.netfilter.xtables import NO_LOOP, OUT_BY_LO

ChainRules = Mapping[ChainKey, tuple[str, ...]]
"""The rules of each chain, in order."""

ExplainedRules = Mapping[ChainKey, list[RuleLine]]
"""The same with their reasons."""

SERVICES = ChainKey("nat", "KUBE-SERVICES")
NODE_PORTS = ChainKey("nat", "KUBE-NODEPORTS")
POSTROUTING = ChainKey("nat", "KUBE-POSTROUTING")
MARK_MASQ = ChainKey("nat", "KUBE-MARK-MASQ")
REFUSED_INSIDE = ChainKey("filter", "KUBE-SERVICES")
REFUSED_OUTSIDE = ChainKey("filter", "KUBE-EXTERNAL-SERVICES")
FORWARD = ChainKey("filter", "KUBE-FORWARD")
HEALTH_CHECKS = ChainKey("filter", "KUBE-NODEPORTS")
FIREWALL = ChainKey("filter", "KUBE-PROXY-FIREWALL")
# Not kube-proxy's: it writes this rule into the kubelet's KUBE-FIREWALL, which another program owns here.
LOCALNET = ChainKey("filter", "USERSPACE-PROXY-LOCALNET")
# Not kube-proxy's: it adds no routes, so unserved packets do not come back by lo.
LOOPS = ChainKey("filter", "USERSPACE-PROXY-KUBE-LOOPS")

# The chains that all Services share, in the order in which they are written. Each service port has chains of its own
# in the table nat.
SHARED: Mapping[ChainKey, str] = {
    REFUSED_INSIDE: "Cluster IPs of Services without usable endpoints.",
    REFUSED_OUTSIDE: "External IPs, load balancer IPs and node ports of Services without usable endpoints.",
    FORWARD: "Accepts packets that were translated to an endpoint, before later rules can drop them.",
    HEALTH_CHECKS: "Health check node ports, which load balancers query.",
    FIREWALL: "Load balancer IPs that only some clients may dial (loadBalancerSourceRanges).",
    LOCALNET: "Guards 127.0.0.0/8, which the sysctl route_localnet opens for node ports.",
    LOOPS: xtables.LOOPS_REASON,
    SERVICES: "Finds the Service. Rules are tried one by one, so a new connection costs more with more Services.",
    NODE_PORTS: "Packets to an address of this node: is it a node port?",
    POSTROUTING: "Replaces the source address of marked packets (masquerade, SNAT).",
    MARK_MASQ: "Marks packets whose source address is to be replaced when they leave.",
}
OWN_PREFIXES = ("KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-SEP-")

_NEW = "-m conntrack --ctstate NEW"
_LEAVING = "-m addrtype ! --dst-type LOCAL"


class Jump(NamedTuple):
    """A jump from a built-in chain to one of `SHARED`. ``question``: what that chain decides."""

    source: str
    chain: ChainKey
    question: str
    match: str = ""
    which: str = ""

    @property
    def rule(self) -> str:
        return f"{self.match} -j {self.chain.name}".lstrip()

    @property
    def reason(self) -> str:
        new_only = "; new connections only" * (_NEW in self.match)
        return f"{xtables.BUILT_IN[self.source]}{self.which}{new_only}: {self.question}"


def _jump(source: str, chain: ChainKey, comment: str, question: str, match: str = "", which: str = "") -> Jump:
    return Jump(source, chain, question, f'{match} -m comment --comment "{comment}"'.lstrip(), which)


_OUTSIDE = ("kubernetes externally-visible service portals", "is it an external portal without usable endpoints?")
_INSIDE = ("kubernetes service portals", "is it a cluster IP without usable endpoints?")
_FIREWALL = ("kubernetes load balancer firewall", "is it a load balancer IP that this client may not dial?")
_SERVICES = ("kubernetes service portals", "is it for a Service?")

# Each jump is inserted at the top of its chain, so later ones stand before earlier ones.
JUMPS = (
    Jump("FORWARD", LOOPS, "would it leave by lo, and come in again?", OUT_BY_LO),
    _jump("INPUT", REFUSED_OUTSIDE, *_OUTSIDE, _NEW),
    _jump("FORWARD", REFUSED_OUTSIDE, *_OUTSIDE, _NEW),
    _jump("INPUT", HEALTH_CHECKS, "kubernetes health check service ports", "is it a health check node port?"),
    _jump("FORWARD", REFUSED_INSIDE, *_INSIDE, _NEW),
    # Not kube-proxy's: it lets this node's own packets leave by the default route, and a UDP flow outlives its
    # endpoints by that.
    _jump("OUTPUT", REFUSED_OUTSIDE, *_OUTSIDE, f"-p udp {_LEAVING} {_NEW}", ", UDP that leaves this node"),
    _jump("OUTPUT", REFUSED_INSIDE, *_INSIDE, _NEW),
    _jump("FORWARD", FORWARD, "kubernetes forwarding rules", "was it translated to an endpoint, so that it may pass?"),
    _jump("INPUT", FIREWALL, *_FIREWALL, _NEW),
    _jump("OUTPUT", FIREWALL, *_FIREWALL, _NEW),
    _jump("FORWARD", FIREWALL, *_FIREWALL, _NEW),
    Jump("INPUT", LOCALNET, "is it for 127.0.0.0/8, but from another host?"),
    _jump("OUTPUT", SERVICES, *_SERVICES),
    _jump("PREROUTING", SERVICES, *_SERVICES),
    _jump("POSTROUTING", POSTROUTING, "kubernetes postrouting rules", "is its source address to be replaced?"),
)


@dataclass(frozen=True, slots=True)
class ChainOptions:
    """How rules are written on this node, independent of its Services.

    ``pods`` detects packets of pods. ``node_ports_on``: CIDRs of node addresses that serve node ports, all if empty;
    with ``localhost_node_ports`` 127.0.0.0/8 serves them, too. ``random_fully``: masquerade to random ports, which
    needs iptables 1.6.2. ``drops_invalid``: drop packets that conntrack cannot place, before an endpoint resets its
    connection for them. ``names_endpoints``: rules have a comment with the endpoint.
    """

    pods: PodDetector | None = None
    masquerade_bit: int = 14
    node_ports_on: tuple[str, ...] = ()
    localhost_node_ports: bool = True
    random_fully: bool = True
    drops_invalid: bool = True
    names_endpoints: bool = True

    @property
    def mark(self) -> str:
        return f"{1 << self.masquerade_bit:#x}"


# ---- names


def chain_hash(name: ServicePortName, endpoint: Endpoint | None = None) -> str:
    """Return the sixteen letters at the end of kube-proxy's chain names for a service port or one of its endpoints."""
    text = f"{name}{name.protocol.lower()}{endpoint or ''}"
    return base64.b32encode(hashlib.sha256(text.encode()).digest()[:10]).decode()  # five bits a letter


@functools.cache
def probability(of: int) -> str:
    """Return 1/*of* as iptables-save prints the value that kube-proxy loads: the kernel counts in units of 2^-31."""
    return f"{round(float(f'{1 / of:.10f}') * 2**31) / 2**31:.11f}"


# ---- rules that do not depend on Services


def node_rules(family: Family, options: ChainOptions) -> ChainRules:
    """Return the rules that do not depend on Services. They are the last ones of `SERVICES`."""
    return _without_reasons(node_lines(family, options))


def node_lines(family: Family, options: ChainOptions) -> ExplainedRules:
    """Return the rules of `node_rules` with their reasons."""
    marked = f"--mark {options.mark}/{options.mark}"
    random_fully, at_random = (" --random-fully", ", at a random port") if options.random_fully else ("", "")
    invalid = RuleLine(
        "-m conntrack --ctstate INVALID -j DROP",
        "Drop packets that conntrack cannot place: they would arrive untranslated, and be answered with a reset.",
    )
    rules = {
        SERVICES: _to_node_ports(family, options),
        POSTROUTING: [
            RuleLine(f"-m mark ! {marked} -j RETURN", f"Packets without the mark {options.mark} leave as they are."),
            RuleLine(
                f"-j MARK --set-xmark {options.mark}/0x0",
                "Remove the mark (xmark flips the bit): a tunnel would bring the packet here a second time.",
            ),
            RuleLine(
                f'-m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE{random_fully}',
                f"Replace the source address with this node's (masquerade{at_random}): replies come back here.",
            ),
        ],
        MARK_MASQ: [
            RuleLine(
                f"-j MARK --set-xmark {options.mark}/{options.mark}",
                f"Put the mark {options.mark} on the packet; POSTROUTING looks for it.",
            )
        ],
        FORWARD: [
            *((invalid,) if options.drops_invalid else ()),
            RuleLine(
                f'-m comment --comment "kubernetes forwarding rules" -m mark {marked} -j ACCEPT',
                f"Packets with the mark {options.mark} may pass through this node.",
            ),
            RuleLine(
                '-m comment --comment "kubernetes forwarding conntrack rule"'
                " -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
                "Packets of a connection that conntrack knows may pass through this node.",
            ),
        ],
    }
    if family == 4:
        rules[LOOPS] = [RuleLine(NO_LOOP, xtables.NO_LOOP_REASON)]
    if family == 4 and options.localhost_node_ports:
        rules[LOCALNET] = [
            RuleLine(
                '! -s 127.0.0.0/8 -d 127.0.0.0/8 -m comment --comment "block incoming localnet connections"'
                " -m conntrack ! --ctstate RELATED,ESTABLISHED,DNAT -j DROP",
                "Drop packets to 127.0.0.0/8 from other hosts, unless they belong to a known or translated "
                "connection: only this node may dial 127.0.0.1 (CVE-2020-8558).",
            )
        ]
    return rules


def _to_node_ports(family: Family, options: ChainOptions) -> list[RuleLine]:
    """Return the rules from `SERVICES` to `NODE_PORTS`: one for each CIDR, or one for all addresses of this node."""
    comment = '-m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain"'
    local, to = "-m addrtype --dst-type LOCAL", f"-j {NODE_PORTS.name}"
    last = "is it a node port? The last rule, because it matches most packets."
    # At ::1 they cannot work, as IPv6 has no route_localnet.
    never = "::1/128" if family == 6 else "" if options.localhost_node_ports else "127.0.0.0/8"
    networks = [ipaddress.ip_network(cidr, strict=False) for cidr in options.node_ports_on if family_of(cidr) == family]
    if networks and all(network.prefixlen for network in networks):
        # Also for a single address: it may be that of another node, if all nodes have the same options.
        rules = [
            RuleLine(f"-d {network} {comment} {local} {to}", f"{xtables.at_own_address(str(network))}: {last}")
            for network in networks
        ]
        if never and any(network.overlaps(ipaddress.ip_network(never)) for network in networks):
            why = f"Node ports are not served at {host(never)}, where no answer would come back."
            rules.insert(0, RuleLine(f"-d {never} {comment} -j RETURN", why))
        return rules
    match, but = (f"! -d {never} ", f", except {host(never)}") if never else ("", "")
    return [RuleLine(f"{match}{comment} {local} {to}", f"{xtables.at_own_address()}{but}: {last}")]


# ---- rules of a service port


def service_rules(translation: Translation, family: Family, options: ChainOptions) -> ChainRules:
    """Return the rules of *translation* for *family*: in `SHARED`, and in chains of its own."""
    return _without_reasons(service_lines(translation, family, options))


def service_lines(translation: Translation, family: Family, options: ChainOptions) -> ExplainedRules:
    """Return the rules of `service_rules` with their reasons."""
    rules: dict[ChainKey, list[RuleLine]] = {}
    if family in translation.reaches:
        for chain, rule, reason in _Writer(translation, family, options).rules():
            rules.setdefault(chain, []).append(RuleLine(rule, reason, translation.service_port.name))
    return rules


def _without_reasons(rules: ExplainedRules) -> ChainRules:
    return {chain: tuple(line.text for line in lines) for chain, lines in rules.items()}


def own_chains(translation: Translation) -> Mapping[ChainKey, RuleLine]:
    """Return the chains that *translation* may have, each with the line that creates it."""
    name = translation.service_port.name
    reasons = (
        f"{name}: all endpoints that traffic from the cluster may use.",
        f"{name}: its endpoints on this node (traffic policy Local).",
        f"{name}: packets to another address than the cluster IP.",
        f"{name}: clients that may dial its load balancer IP (loadBalancerSourceRanges).",
    )
    found = dict(zip(_service_chains(name), reasons, strict=True))
    for reach in translation.reaches.values():
        for endpoint in (*reach.cluster, *reach.local):
            found[_endpoint_chain(name, endpoint)] = f"The endpoint {endpoint} of {name}."
    return {chain: xtables.new_chain(chain.name, reason, name) for chain, reason in found.items()}


def _service_chains(name: ServicePortName) -> list[ChainKey]:
    own = chain_hash(name)
    return [ChainKey("nat", f"{prefix}{own}") for prefix in OWN_PREFIXES[:4]]


def _endpoint_chain(name: ServicePortName, endpoint: Endpoint) -> ChainKey:
    return ChainKey("nat", f"{OWN_PREFIXES[4]}{chain_hash(name, endpoint)}")


_Line = tuple[ChainKey, str, Reason]
_Lines = Iterator[_Line]

_MASQUERADED = "get the mark: their source address is replaced, so that replies come back to this node."


class _Writer:
    """Writes the rules of one service port in one family.

    Without usable endpoints its own chains are left out, and packets to it meet REJECT or DROP in the table filter.
    Packets that the table nat has translated have another destination by then, and do not match.
    """

    def __init__(self, translation: Translation, family: Family, options: ChainOptions) -> None:
        self._sp = translation.service_port
        self._there = translation.reaches[family]
        self._allowed = translation.allowed
        self._family: Family = family
        self._options = options
        self._name = str(self._sp.name)
        self._protocol = self._sp.name.protocol.lower()
        self._endpoint_chains: dict[Endpoint, ChainKey] = {}
        self._svc, self._svl, self._ext, self._fw = _service_chains(self._sp.name)
        self._internal = self._svl if self._sp.internal_local else self._svc
        self._serves_inside = bool(self._there.local) if self._sp.internal_local else self._there.has_any
        self._serves_outside = bool(self._there.local) if self._sp.external_local else self._there.has_any
        self._portals = {route.portal for route in translation.routes}  # those that no other service port has
        inside = set(internal_portals(self._sp))
        self._masquerades_all = not any(
            isinstance(to, ListenerName) and to.transparent for portal, _, to in translation.routes if portal in inside
        )

    def rules(self) -> _Lines:
        there = self._there
        for portal in self._own_portals(self._sp.cluster_ips):
            yield from self._cluster_ip(portal)
        # An address that is both is a load balancer IP: its source ranges apply, whichever rule comes first.
        for portal in self._own_portals(ip for ip in self._sp.external_ips if ip not in self._sp.load_balancer_ips):
            yield from self._external_ip(portal, " external IP", self._ext)
        yield from self._load_balancer_ips()
        yield from self._node_port()
        if port := self._sp.health_check_node_port:
            yield (
                HEALTH_CHECKS,
                f"-p tcp {self._comment(' health check node port')} -m tcp --dport {port} -j ACCEPT",
                f"Packets to the health check node port {port} (TCP) may pass.",
            )
        if there.has_any and self._sp.is_externally_accessible:
            yield from self._from_outside()
        for chain, endpoints in ((self._svc, there.cluster), (self._svl, there.local)):
            yield from self._choice(chain, endpoints)
        for endpoint in dict.fromkeys((*there.cluster, *there.local)):
            yield from self._endpoint(endpoint)

    def _cluster_ip(self, portal: Portal) -> _Lines:
        """Yield the rules for a cluster IP: where it leads, and which packets are masqueraded."""
        if not self._serves_inside:
            yield self._refusal(REFUSED_INSIDE, portal, self._at(portal, self._why_not()))
            return
        here = self._at(portal, self._comment(" cluster IP"))
        yield self._jump_to(SERVICES, portal, here, self._internal)
        pods, masq = self._options.pods, f"-j {MARK_MASQ.name}"
        if self._masquerades_all:
            yield self._internal, f"{here} {masq}", _packets_to(portal, _MASQUERADED)
        elif pods is not None and pods.interface:
            others = self._at(portal, self._comment(" cluster IP"), f"! {_in_by(pods)}")
            which = f"that do not arrive at {_in_by(pods)[3:]} (so from no pod)"
            yield self._internal, f"{others} {masq}", _packets_to(portal, f"{which} {_MASQUERADED}")
        elif len(cidrs := self._pod_cidrs()) == 1:
            which = f"not from {host(cidrs[0])} (so from no pod)"
            yield self._internal, f"! -s {cidrs[0]} {here} {masq}", _packets_to(portal, f"{which} {_MASQUERADED}")
        elif cidrs:
            yield self._internal, f"{here} {masq}", _packets_to(portal, _MASQUERADED)
            for cidr in cidrs:
                which = f"from {host(cidr)} lose the mark again: they come from a pod, whose address endpoints may see."
                unmark = f"-j MARK --set-xmark 0x0/{self._options.mark}"
                yield self._internal, f"-s {cidr} {here} {unmark}", _packets_to(portal, which)

    def _external_ip(self, portal: Portal, comment: str, to: ChainKey) -> _Lines:
        if self._there.has_any:
            yield self._jump_to(SERVICES, portal, self._at(portal, self._comment(comment)), to)
        if not self._serves_outside:
            yield self._refusal(REFUSED_OUTSIDE, portal, self._at(portal, self._why_not()))

    def _load_balancer_ips(self) -> _Lines:
        allowed: dict[str, None] = {}
        for portal in self._own_portals(self._sp.load_balancer_ips):
            ranges = self._allowed.get(portal, ())
            if not ranges or any(cidr.endswith("/0") for cidr in ranges):
                yield from self._external_ip(portal, " loadbalancer IP", self._ext)
                continue
            allowed |= dict.fromkeys(ranges)
            yield from self._external_ip(portal, " loadbalancer IP", self._fw)
            if self._there.has_any:
                comment = self._comment(f" traffic not accepted by {self._fw.name}")
                why = "are dropped: packets of allowed clients were translated, and have another destination here."
                yield FIREWALL, f"{self._at(portal, comment)} -j DROP", _packets_to(portal, why)
        if allowed and self._there.has_any:
            yield from self._allowed_sources(allowed)

    def _allowed_sources(self, cidrs: Iterable[str]) -> _Lines:
        for source in cidrs:
            reason = f"Packets from {host(source)} may dial the load balancer IP: continue in {_kind(self._ext)}"
            yield self._fw, f"-s {source} {self._comment(' loadbalancer IP')} -j {self._ext.name}", reason
        yield (
            self._fw,
            f'-m comment --comment "other traffic to {self._name} will be dropped by {FIREWALL.name}"',
            "Only a note: packets of other clients leave this chain here, and the table filter drops them.",
        )

    def _node_port(self) -> _Lines:
        port = self._sp.node_port
        if (portal := node_portal(self._family, port, self._sp.name.protocol)) not in self._portals:
            return
        to_port = f"-m {self._protocol} --dport {port}"
        if self._there.has_any:
            yield self._jump_to(NODE_PORTS, portal, f"-p {self._protocol} {self._comment()} {to_port}", self._ext)
        if not self._serves_outside:
            here = f"-p {self._protocol} {self._why_not()} -m addrtype --dst-type LOCAL {to_port}"
            yield self._refusal(REFUSED_OUTSIDE, portal, here)

    def _from_outside(self) -> _Lines:
        """Yield the chain for packets to other addresses than the cluster IP, which treats clients differently."""

        def comment(what: str) -> str:
            return f'-m comment --comment "{what} {self._name} external destinations"'

        masq = f"-j {MARK_MASQ.name}"
        if not self._sp.external_local:
            yield self._ext, f"{comment('masquerade traffic for')} {masq}", f"Packets {_MASQUERADED}"
            if self._serves_outside:
                yield self._ext, f"-j {self._svc.name}", "Then: continue with all endpoints."
            return
        if self._there.cluster:
            short = "may use all endpoints, as if a load balancer had sent them back (short circuit)."
            for match, which in self._pod_matches():
                rule = f"{match} {comment('pod traffic for')} -j {self._svc.name}"
                yield self._ext, rule, f"Packets {which} (pods) {short}"
            local, own = "-m addrtype --src-type LOCAL", "Packets from this node itself"
            yield self._ext, f"{comment('masquerade LOCAL traffic for')} {local} {masq}", f"{own} {_MASQUERADED}"
            yield self._ext, f"{comment('route LOCAL traffic for')} {local} -j {self._svc.name}", f"{own} {short}"
        if self._serves_outside:
            reason = "All others: continue with the endpoints on this node (traffic policy Local)."
            yield self._ext, f"-j {self._svl.name}", reason

    def _choice(self, chain: ChainKey, endpoints: tuple[Endpoint, ...]) -> _Lines:
        """Yield the rules that choose one of *endpoints*: with affinity the client's last one, else a random one."""
        chains = [self._chain_of(endpoint) for endpoint in endpoints]
        if timeout_s := self._sp.affinity_timeout_s:
            for endpoint, sep in zip(endpoints, chains, strict=True):
                seen = f"-m recent --rcheck --seconds {timeout_s} --reap {self._list(sep)}"
                reason = partial(_seen, endpoint, timeout_s)
                yield chain, f"{self._endpoint_comment(endpoint)}{seen} -j {sep.name}", reason
        for at, (endpoint, sep) in enumerate(zip(endpoints, chains, strict=True)):
            left = len(endpoints) - at
            chance = f"-m statistic --mode random --probability {probability(left)} " if left > 1 else ""
            reason = partial(_chance, endpoint, at, len(endpoints))
            yield chain, f"{self._endpoint_comment(endpoint)}{chance}-j {sep.name}", reason

    def _endpoint(self, endpoint: Endpoint) -> _Lines:
        sep = self._chain_of(endpoint)
        comment = f"{self._comment()} " if self._options.names_endpoints else ""
        yield sep, f"-s {_cidr(endpoint.ip)} {comment}-j {MARK_MASQ.name}", partial(_hairpin, endpoint)
        seen = f"-m recent --set {self._list(sep)} " if self._sp.affinity_timeout_s else ""
        to = join_address(endpoint.ip, endpoint.port)
        rule = f"-p {self._protocol} {comment}{seen}-m {self._protocol} -j DNAT --to-destination {to}"
        noted = " The client's address is added to the list of this endpoint (affinity)." if seen else ""
        reason = f"DNAT: the packet's destination becomes the endpoint {to} ({self._sp.name.protocol}).{noted}"
        yield sep, rule, reason

    # ---- parts of rules

    def _own_portals(self, ips: Iterable[str]) -> Iterator[Portal]:
        """Yield the portals at *ips* of this family that belong to this service port."""
        portals = (Portal(ip, self._sp.port, self._sp.name.protocol) for ip in ips if family_of(ip) == self._family)
        return (portal for portal in portals if portal in self._portals)

    def _pod_cidrs(self) -> list[str]:
        pods = self._options.pods
        return [cidr for cidr in pods.cidrs if family_of(cidr) == self._family] if pods is not None else []

    def _pod_matches(self) -> list[tuple[str, str]]:
        """Return what matches packets of pods, each in iptables' words and in plain ones."""
        pods = self._options.pods
        if pods and pods.interface:
            return [(_in_by(pods), f"that arrive at {_in_by(pods)[3:]}")]
        return [(f"-s {cidr}", f"from {host(cidr)}") for cidr in self._pod_cidrs()]

    def _chain_of(self, endpoint: Endpoint) -> ChainKey:
        if (chain := self._endpoint_chains.get(endpoint)) is None:
            chain = self._endpoint_chains[endpoint] = _endpoint_chain(self._sp.name, endpoint)
        return chain

    def _list(self, sep: ChainKey) -> str:
        mask = "255.255.255.255" if self._family == 4 else "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
        return f"--name {sep.name} --mask {mask} --rsource"

    def _comment(self, what: str = "") -> str:
        return f'-m comment --comment "{self._name}{what}"'

    def _endpoint_comment(self, endpoint: Endpoint) -> str:
        return f"{self._comment(f' -> {endpoint}')} " if self._options.names_endpoints else ""

    def _why_not(self) -> str:
        return self._comment(" has no local endpoints" if self._there.has_any else " has no endpoints")

    def _at(self, portal: Portal, comment: str, interface: str = "") -> str:
        by = f" {interface}" if interface else ""
        return f"-d {_cidr(portal.ip)}{by} -p {self._protocol} {comment} -m {self._protocol} --dport {portal.port}"

    def _jump_to(self, chain: ChainKey, portal: Portal, match: str, to: ChainKey) -> _Line:
        reason = _packets_to(portal, f"are for {self._name}: continue in its chain {_kind(to)}")
        return chain, f"{match} -j {to.name}", reason

    def _refusal(self, chain: ChainKey, portal: Portal, match: str) -> _Line:
        if self._there.has_any:
            why = "are dropped without an answer: no endpoint is on this node (traffic policy Local)."
            return chain, f"{match} -j DROP", _packets_to(portal, why)
        # Unlike kube-proxy, TCP is reset:
        # 1. connect() acts on an ICMPv6 error only at its second SYN, after a second.
        # 2. Without a default route cluster IPs are routed through lo, where IPv4 sends no ICMP error: connect() hangs.
        answer = "icmp-port-unreachable" if self._family == 4 else "icmp6-port-unreachable"
        if self._sp.name.protocol is L4Protocol.TCP:
            answer = "tcp-reset"
        why = f"are refused with {xtables.ANSWERS[answer]}: the Service has no endpoints."
        return chain, f"{match} -j REJECT --reject-with {answer}", _packets_to(portal, why)


# ---- reasons


def _packets_to(portal: Portal, what: str) -> Reason:
    """Return the reason "Packets to *portal* *what*". The portal is put in words only if the reason is shown."""
    return partial(_packets, portal, what)


def _packets(portal: Portal, what: str, names: PortalNames) -> str:
    return f"Packets to {names.of(portal)} {what}"


def _kind(chain: ChainKey) -> str:
    """Return a chain's name without its hash."""
    return f"{chain.name.rpartition('-')[0]}-..."


def _seen(endpoint: Endpoint, timeout_s: int, _: PortalNames) -> str:
    return (
        f"Affinity: a client that was sent to {endpoint} within the last {timeout_s} s is sent there again "
        "(-m recent keeps a list of clients for each endpoint)."
    )


def _chance(endpoint: Endpoint, at: int, of: int, _: PortalNames) -> str:
    if of == 1:
        return f"Always {endpoint}: it is the only endpoint."
    if at == of - 1:
        return f"One of {of} endpoints at random, the last: all packets that are left go to {endpoint}, 1 in {of}."
    if at == 0:
        return f"One of {of} endpoints at random, the first: {endpoint} with probability 1/{of}."
    return f"The next: {endpoint} with probability 1/{of - at} of the packets that are left, 1 in {of} of all."


def _hairpin(endpoint: Endpoint, _: PortalNames) -> str:
    return (
        f"Hairpin: the endpoint {endpoint.ip} dialled its own Service. It gets the mark; with its own source address "
        "it would reply to itself directly, untranslated."
    )


def _cidr(ip: str) -> str:
    return f"{ip}/{32 if family_of(ip) == 4 else 128}"


def _in_by(pods: PodDetector) -> str:
    return f"-i {pods.interface.replace('*', '+')}"
