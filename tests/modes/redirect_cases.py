"""Redirects in few words, and their texts on file."""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import L4Protocol, ListenerName, NamespacedName, Scope, ServicePortName
from userspace_proxy.model.redirects import DROPPED, Capture, PodDetector
from userspace_proxy.model.routes import Refusal, Route, Sender
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.modes.kernel_rules import NodeFacts, RuleUpdate, Translation
from userspace_proxy.modes.userspace import iptables
from userspace_proxy.modes.userspace.nft import RedirectTable

TCP, UDP = L4Protocol.TCP, L4Protocol.UDP
REFUSE_PORT = 29_999
# A node port's address.
ANY4, ANY6 = "0.0.0.0", "::"
_GOLDEN = Path(__file__).parent.parent / "golden"

# The longest names that the API allows: a port of a container has 15, that of a Service 63.
LONGEST = ServicePortName(NamespacedName("n" * 63, "s" * 63), "a" * 15, TCP)
LONGEST_WITH_PORT = LONGEST._replace(port_name="p" * 63)


def name(text: str, protocol: L4Protocol = TCP) -> ServicePortName:
    """Return the name that is shown as ``namespace/name:port``."""
    service, _, port = text.partition(":")
    return ServicePortName(NamespacedName(*service.split("/")), port, protocol)


@dataclass(frozen=True)
class Redirects:
    """The rules of userspace mode: the proxy port for each portal, or DROPPED; ``exceptions`` for some senders.

    A portal without a name in ``names`` belongs to the service port "ns/any".
    """

    ports: Mapping[Portal, int] = field(default_factory=dict)
    names: Mapping[Portal, ServicePortName] = field(default_factory=dict)
    refuse_port: int = 0
    capture: Capture = Capture.REDIRECT
    exceptions: Mapping[Sender, Mapping[Portal, int]] = field(default_factory=dict)
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    node_ports_on: tuple[str, ...] = ()
    pods: PodDetector | None = None
    transparent: bool = False

    @property
    def facts(self) -> NodeFacts:
        return NodeFacts(
            pods=self.pods,
            node_ports_on=self.node_ports_on,
            refuse_port=self.refuse_port,
            capture=self.capture,
            transparent=self.transparent,
        )

    @property
    def translations(self) -> dict[ServicePortName, Translation]:
        rows: dict[ServicePortName, list[tuple[Portal, Sender, int]]] = {}
        for sender, ports in {Sender.ANYBODY: self.ports, **self.exceptions}.items():
            for portal, port in ports.items():
                rows.setdefault(self._owner(portal), []).append((portal, sender, port))
        allowed: dict[ServicePortName, dict[Portal, tuple[str, ...]]] = {}
        for portal, cidrs in self.allowed.items():
            allowed.setdefault(self._owner(portal), {})[portal] = cidrs
        owners = {**rows, **allowed}
        return {owner: self._translation(owner, rows.get(owner, ()), allowed.get(owner, {})) for owner in owners}

    def _owner(self, portal: Portal) -> ServicePortName:
        return self.names.get(portal) or name("ns/any", portal.protocol)

    def _translation(
        self,
        owner: ServicePortName,
        rows: Sequence[tuple[Portal, Sender, int]],
        allowed: Mapping[Portal, tuple[str, ...]],
    ) -> Translation:
        targets: dict[int, ListenerName | Refusal] = {DROPPED: Refusal.DROP}
        if self.refuse_port:
            targets[self.refuse_port] = Refusal.REJECT
        listeners = (ListenerName(owner, *each) for each in product(Scope, (False, True)))
        routes = [
            Route(portal, sender, targets[port] if port in targets else targets.setdefault(port, next(listeners)))
            for portal, sender, port in rows
        ]
        ports = tuple(port for _, _, port in rows)
        return Translation(ServicePort(owner, 1, ()), tuple(routes), {}, allowed, (), ports)

    def update(self, before: Redirects | None = None) -> RuleUpdate:
        """Return what turns the rules *before* into these."""
        old, new = before.translations if before is not None else {}, self.translations
        changed = [name for name in {**old, **new} if old.get(name) != new.get(name)]
        return RuleUpdate(new, changed, self.facts)

    def nft(self) -> str:
        """Return the script that creates our table or replaces it."""
        return RedirectTable().rules(self.facts, self.translations.values()).text()

    def iptables(self, family: Family, saved: str) -> str:
        """Return the input of iptables-restore, on a host with the rules *saved*."""
        return iptables.restore(self.translations.values(), self.facts, family, saved)


def redirects(*rows: tuple[str, int, ServicePortName, int], capture: Capture = Capture.REDIRECT) -> Redirects:
    """Return redirects from (ip, port, name, proxy port)."""
    portals = [Portal(ip, port, service_port.protocol) for ip, port, service_port, _ in rows]
    return Redirects(
        ports={portal: row[3] for portal, row in zip(portals, rows, strict=True)},
        names={portal: row[2] for portal, row in zip(portals, rows, strict=True)},
        refuse_port=REFUSE_PORT,
        capture=capture,
    )


NOTHING = redirects()
# Both families, both protocols, a node port, one without endpoints, and one number that serves TCP and UDP.
EVERYTHING_ROWS = (
    ("10.96.0.1", 80, name("shop/web:http"), 10_001),
    ("fd00:96::1", 80, name("shop/web:http"), 10_001),
    ("10.96.0.10", 53, name("kube-system/dns:dns", UDP), 10_002),
    ("10.96.0.10", 53, name("kube-system/dns:dns-tcp"), 10_003),
    ("fd00:96::10", 53, name("kube-system/dns:dns", UDP), 10_002),
    ("203.0.113.7", 443, name("shop/outside"), REFUSE_PORT),
    (ANY4, 30_080, name("shop/web:http"), 10_001),
    (ANY6, 30_080, name("shop/web:http"), 10_001),
    (ANY4, 30_053, name("kube-system/dns:dns", UDP), 10_002),
)
EVERYTHING = redirects(*EVERYTHING_ROWS)
EVERYTHING_BY_ADDRESS = redirects(*EVERYTHING_ROWS, capture=Capture.ADDRESS)
LONG_NAMES = redirects(
    ("10.96.0.1", 80, LONGEST, 10_001),
    ("fd00:96::1", 80, LONGEST, 10_001),
    ("10.96.0.2", 80, LONGEST_WITH_PORT, 10_002),
    (ANY4, 30_000, LONGEST_WITH_PORT, 10_002),
    (ANY6, 30_000, LONGEST_WITH_PORT, 10_002),
)
_LOCAL_ROWS = (
    ("10.96.0.1", 80, name("shop/web:http"), DROPPED),
    ("203.0.113.7", 80, name("shop/web:http"), 10_001),
    ("fd00:cb::7", 80, name("shop/web:http"), 10_001),
    (ANY4, 30_080, name("shop/web:http"), DROPPED),
    (ANY6, 30_080, name("shop/web:http"), 10_001),
)
_BALANCER4, _BALANCER6 = Portal("203.0.113.7", 80, TCP), Portal("fd00:cb::7", 80, TCP)
_NODE_PORT4 = Portal(ANY4, 30_080, TCP)
# A Service with the policy Local, ranges that may dial it, and node ports on some addresses only.
LOCAL = replace(
    redirects(*_LOCAL_ROWS),
    exceptions={
        Sender.POD: {_BALANCER4: 10_002, _BALANCER6: 10_002, _NODE_PORT4: REFUSE_PORT},
        Sender.NODE: {_BALANCER4: DROPPED, _NODE_PORT4: 10_003},
    },
    allowed={_BALANCER4: ("192.0.2.0/24", "192.0.2.128/25", "198.51.100.1/32"), _BALANCER6: ("2001:db8::/32", "::/0")},
    node_ports_on=("192.168.0.0/24", "127.0.0.0/8", "192.168.1.0/24"),
    pods=PodDetector(cidrs=("10.244.0.0/24", "fd00:244::/64")),
)
LOCAL_BY_INTERFACE = replace(
    LOCAL, pods=PodDetector(interface="cali*"), node_ports_on=(), capture=Capture.ADDRESS, transparent=True
)
CASES = {
    "nothing": NOTHING,
    "everything": EVERYTHING,
    "everything-by-address": EVERYTHING_BY_ADDRESS,
    "long-names": LONG_NAMES,
    "local": LOCAL,
    "local-by-interface": LOCAL_BY_INTERFACE,
}


def any_redirects(chance: random.Random) -> Redirects:
    """Return redirects of a few portals, so that two results have much in common."""
    ips = [ANY4, ANY6, "10.96.0.1", "10.96.0.2", "10.96.0.3", "fd00:96::1", "fd00:96::2"]
    portals = [Portal(ip, port, protocol) for ip in ips for port in (53, 80, 30_000) for protocol in (TCP, UDP)]

    def some(most: int) -> list[Portal]:
        return chance.sample(portals, chance.randrange(most))

    def any_ports(most: int) -> dict[Portal, int]:
        return {portal: chance.choice((10_001, 10_002, 10_003, REFUSE_PORT, DROPPED)) for portal in some(most)}

    def some_cidrs() -> tuple[str, ...]:
        known = ("10.0.0.0/8", "10.96.0.0/16", "10.97.0.0/16", "192.0.2.1/32", "0.0.0.0/0", "fd00::/16", "fd00:5::/64")
        return tuple(chance.sample(known, chance.randrange(len(known))))

    ports = any_ports(14)
    pods = (None, PodDetector(cidrs=some_cidrs()), PodDetector(interface="veth*"))
    return Redirects(
        ports=ports,
        names={portal: name(f"ns/{chance.choice('abc')}:p", portal.protocol) for portal in ports},
        refuse_port=REFUSE_PORT,
        capture=chance.choice(list(Capture)),
        exceptions={sender: any_ports(6) for sender in (Sender.POD, Sender.NODE) if chance.randrange(2)},
        allowed={portal: some_cidrs() for portal in some(5) if not portal.is_node_port},
        node_ports_on=chance.choice(((), some_cidrs())),
        pods=chance.choice(pods),
        transparent=chance.choice((True, False)),
    )


def assert_golden(file_name: str, text: str) -> None:
    """Compare *text* with the file; with UPDATE_GOLDEN=1 in the environment, write it instead."""
    path = _GOLDEN / file_name
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    assert path.exists(), f"{path} is missing; UPDATE_GOLDEN=1 in the environment writes it"
    assert path.read_text() == text
