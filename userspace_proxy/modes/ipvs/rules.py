"""All of mode ipvs as lines for its tools: nft, ``ip -batch`` and ``ipvsadm --restore``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import NamedTuple

from userspace_proxy.interfaces import NodeFacts, Translation
from userspace_proxy.model.endpoint import join_address
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.modes.ipvs.device import device_lines
from userspace_proxy.modes.ipvs.table import (
    IpvsTable,
    VirtualServer,
    at_host,
    node_port_ips,
    virtual_ips,
    virtual_servers,
)
from userspace_proxy.modes.nft_blocks import NftTable
from userspace_proxy.modes.reasons.known import Known
from userspace_proxy.modes.rule_line import RuleLine

_SCHEDULERS = {
    "rr": "each new connection goes to the next endpoint (rr: round robin)",
    "wrr": "each new connection goes to the next endpoint, more often to those of more weight (wrr)",
    "lc": "a new connection goes to the endpoint that has fewest (lc: least connections)",
    "wlc": "a new connection goes to the endpoint that has fewest for its weight (wlc)",
    "lblc": "as wlc, but one destination keeps its endpoint while that is not overloaded (lblc)",
    "lblcr": "as lblc, with a set of endpoints for one destination (lblcr)",
    "dh": "a hash of the destination's address chooses the endpoint (dh)",
    "sh": "a hash of the client's address chooses the endpoint (sh)",
    "sed": "a new connection goes to where it is expected to wait least (sed)",
    "nq": "a new connection goes to an idle endpoint, else as with sed (nq: never queue)",
    "fo": "all go to the endpoint of the highest weight (fo: failover)",
    "ovf": "all go to the endpoint of the highest weight, what is more than its weight to the next (ovf: overflow)",
    "mh": "a hash of the client's address chooses the endpoint, by Maglev's table (mh)",
    "twos": "of two endpoints drawn by chance, the one with fewer connections for its weight (twos)",
}
_NFT = RuleLine(
    "# nft -f -", "First nftables, which sees packets before ipvs does: who may dial, who is refused or masqueraded."
)
_IP = RuleLine(
    "# ip -batch -",
    "Then the addresses of Services: this node's own, so that packets to them come to INPUT.",
)
_IPVSADM = RuleLine("# ipvsadm --restore", "Then the virtual servers: who is led on by nftables meets one of them.")


class IpvsRules(NamedTuple):
    """The table of nftables, then what `ip` and `ipvsadm` read."""

    table: NftTable
    others: tuple[RuleLine, ...]

    def lines(self) -> Iterator[RuleLine]:
        yield _NFT
        yield from self.table.lines()
        yield from self.others

    def text(self) -> str:
        return "".join(f"{line.text}\n" for line in self.lines())

    def without_unused(self) -> IpvsRules:
        return self._replace(table=self.table.without_unused())


def rules(translations: Iterable[Translation], facts: NodeFacts, host_ips: Iterable[str], scheduler: str) -> IpvsRules:
    """Return all of mode ipvs for *translations*, each part for the tool that its first line names."""
    translations = list(translations)
    host_ips = tuple(host_ips)
    node_ips = node_port_ips(facts, host_ips)
    servers: dict[Portal, tuple[VirtualServer, ServicePortName]] = {}
    owners: dict[str, set[ServicePortName]] = {}  # of addresses
    for translation in translations:
        name = translation.service_port.name
        servers |= {at: (each, name) for at, each in virtual_servers(translation, node_ips, scheduler).items()}
        for ip in sorted(virtual_ips(translation), key=lambda ip: (":" in ip, ip)):
            owners.setdefault(ip, set()).add(name)
    of_servers = (line for at, (server, name) in servers.items() for line in server_lines(at, server, name))
    device, *addresses = device_lines(set(), owners, is_new=True)
    alone = [next(iter(names)) if len(names) == 1 else None for names in owners.values()]
    addresses = [line._replace(service=owner) for line, owner in zip(addresses, alone, strict=True)]
    return IpvsRules(
        IpvsTable().rules(at_host(facts, host_ips), translations),
        (_IP, device, *addresses, _IPVSADM, *of_servers),
    )


def server_lines(portal: Portal, server: VirtualServer, name: ServicePortName) -> Iterator[RuleLine]:
    """Yield a virtual server and its endpoints as ``ipvsadm --restore`` reads them."""
    at = f"-{portal.protocol[0].lower()} {join_address(portal.ip, portal.port)}"
    affinity = f" -p {server.affinity_timeout_s}" if server.affinity_timeout_s is not None else ""
    yield RuleLine(f"-A {at} -s {server.scheduler}{affinity} -b flag-3", partial(_server, portal, server), name)
    for endpoint, weight in server.weights.items():
        ip_port = join_address(*endpoint)
        yield RuleLine(f"-a {at} -r {ip_port} -m -w {weight}", partial(_endpoint, portal, ip_port, weight), name)


def _server(portal: Portal, server: VirtualServer, known: Known) -> str:
    how = _SCHEDULERS.get(server.scheduler, f"the scheduler {server.scheduler} chooses the endpoint")
    affinity = ""
    if server.affinity_timeout_s is not None:
        affinity = (
            " Affinity: a client meets the same endpoint again until it has been away for "
            f"{server.affinity_timeout_s} s (-p: persistent)."
        )
    return (
        f"A virtual server for {known.portal_words(portal)}: {how}.{affinity} flag-3 means nothing to the scheduler; "
        "it tells ours from others'."
    )


def _endpoint(portal: Portal, endpoint: str, weight: int, known: Known) -> str:
    share = "weight 0: no new connections, open ones go on"
    if weight:
        share = f"weight {weight}: its share beside the others', where the scheduler asks for weights"
    return (
        f"{endpoint} is an endpoint of {known.portal_words(portal)}; the packet's destination becomes the endpoint's "
        f"address and port (-m: masquerading, which is NAT); {share}."
    )
