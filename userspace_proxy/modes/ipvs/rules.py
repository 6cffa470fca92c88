"""The rules of ipvs mode as input of its tools: nft, ``ip -batch`` and ``ipvsadm --restore``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.device import device_lines
from userspace_proxy.modes.ipvs.table import (
    FALLING_BACK,
    IpvsTable,
    VirtualServerSpec,
    at_host,
    node_port_ips,
    virtual_ips,
    virtual_servers,
)
from userspace_proxy.modes.kernel_rules import NodeFacts, Translation
from userspace_proxy.modes.nft_blocks import NftTable
from userspace_proxy.modes.portal_names import PortalNames
from userspace_proxy.modes.rule_line import RuleLine, Rules

_SCHEDULERS = {
    "rr": "each new connection goes to the next endpoint (rr: round robin)",
    "wrr": "each new connection goes to the next endpoint, more often to those with more weight (wrr)",
    "lc": "a new connection goes to the endpoint with the fewest connections (lc: least connections)",
    "wlc": "a new connection goes to the endpoint with the fewest connections for its weight (wlc)",
    "lblc": "as wlc, but a destination keeps its endpoint until that is overloaded (lblc)",
    "lblcr": "as lblc, with a set of endpoints for each destination (lblcr)",
    "dh": "a hash of the destination address chooses the endpoint (dh)",
    "sh": "a hash of the client's address chooses the endpoint (sh)",
    "sed": "a new connection goes to the endpoint with the shortest expected delay (sed)",
    "nq": "a new connection goes to an idle endpoint, else as with sed (nq: never queue)",
    "fo": "all connections go to the endpoint with the highest weight (fo: failover)",
    "ovf": "connections go to the endpoint with the highest weight, above that number to the next (ovf: overflow)",
    "mh": "a hash of the client's address chooses the endpoint in Maglev's table (mh)",
    "twos": "of two random endpoints, the one with fewer connections for its weight (twos)",
}
_NFT = RuleLine("# nft -f -", "First nftables, which sees packets before IPVS: it restricts, refuses and masquerades.")
_IP = RuleLine("# ip -batch -", "Then Services' addresses become addresses of this node: packets to them reach INPUT.")
_IPVSADM = RuleLine(
    "# ipvsadm --restore", "Then the virtual servers, which translate the packets that nftables accepts."
)


@dataclass(frozen=True, slots=True)
class IpvsRules(Rules):
    """The nftables table, then the input of `ip` and `ipvsadm`."""

    table: NftTable
    others: tuple[RuleLine, ...]

    def lines(self) -> Iterator[RuleLine]:
        yield _NFT
        yield from self.table.lines()
        yield from self.others

    def without_unused(self) -> IpvsRules:
        return replace(self, table=self.table.without_unused())


def rules(translations: Iterable[Translation], facts: NodeFacts, host_ips: Iterable[str], scheduler: str) -> IpvsRules:
    """Return the rules for *translations*. The first line of each part names its tool."""
    translations = list(translations)
    host_ips = tuple(host_ips)
    node_ips = node_port_ips(facts, host_ips)
    servers: dict[Portal, tuple[VirtualServerSpec, ServicePortName]] = {}
    owners: dict[str, set[ServicePortName]] = {}  # the service ports of each address
    for translation in translations:
        name = translation.service_port.name
        servers |= {at: (each, name) for at, each in virtual_servers(translation, node_ips, scheduler).items()}
        for ip in sorted(virtual_ips(translation), key=lambda ip: (":" in ip, ip)):
            owners.setdefault(ip, set()).add(name)
    of_servers = (line for at, (server, name) in servers.items() for line in server_lines(at, server, name))
    device, *addresses = device_lines(set(), owners, is_new=True)
    only = [next(iter(names)) if len(names) == 1 else None for names in owners.values()]
    addresses = [line._replace(service=owner) for line, owner in zip(addresses, only, strict=True)]
    return IpvsRules(
        IpvsTable().rules(at_host(facts, host_ips), translations),
        (_IP, device, *addresses, _IPVSADM, *of_servers),
    )


def server_lines(portal: Portal, server: VirtualServerSpec, name: ServicePortName) -> Iterator[RuleLine]:
    """Yield a virtual server and its endpoints as input of ``ipvsadm --restore``."""
    at = f"-{portal.protocol[0].lower()} {join_address(portal.ip, portal.port)}"
    affinity = f" -p {server.affinity_timeout_s}" if server.affinity_timeout_s is not None else ""
    fallback = f"{server.scheduler}-fallback," if server.scheduler in FALLING_BACK else ""
    line = f"-A {at} -s {server.scheduler}{affinity} -b {fallback}flag-3"
    yield RuleLine(line, partial(_server, portal, server), name)
    for endpoint, weight in server.weights.items():
        ip_port = join_address(*endpoint)
        yield RuleLine(f"-a {at} -r {ip_port} -m -w {weight}", partial(_endpoint, portal, ip_port, weight), name)


def _server(portal: Portal, server: VirtualServerSpec, names: PortalNames) -> str:
    how = _SCHEDULERS.get(server.scheduler, f"the scheduler {server.scheduler} chooses the endpoint")
    affinity = ""
    if server.affinity_timeout_s is not None:
        affinity = (
            " Affinity: a client keeps its endpoint until it has been silent for "
            f"{server.affinity_timeout_s} s (-p: persistent)."
        )
    return f"A virtual server for {names.of(portal)}: {how}.{affinity} flag-3 marks it as ours; no scheduler reads it."


def _endpoint(portal: Portal, endpoint: str, weight: int, names: PortalNames) -> str:
    share = "weight 0: it gets no new connections, and open ones continue"
    if weight:
        share = f"weight {weight}: its share, with schedulers that use weights"
    return (
        f"{endpoint} is an endpoint of {names.of(portal)}. Its address and port replace the packet's "
        f"destination (-m: masquerading, which is NAT); {share}."
    )
