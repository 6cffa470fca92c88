"""Probes: clients, addresses and expected answers, in lines such as

    outside,caller  nodePort,vip/udp,6 -> local1 remote1 as node

From there, at these addresses of a Service (both protocols and all its families, unless one is named), both backends
answer in turn and nobody else does, and they saw the node as their client. `own` instead: they saw the client itself -
but for a backend that reached itself, which sees the node (behaviours M3). Without `as` nobody looks. Instead of names:
`refused`, at once (ECONNREFUSED); `forbidden`, at once (EPERM), as the node itself is told where a rule at OUTPUT
rejects its datagram; `timeout`, no answer of any kind, or EPERM where such a rule drops it.
"""

from __future__ import annotations

import errno
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.net.contract.cluster import ALTERNATE, BALANCER, GATEWAY, LOCALHOST, PRIMARY, Cluster
from tests.net.contract.services import Given
from tests.net.world import PATIENCE
from userspace_proxy.lab import Host, connect

REFUSED, FORBIDDEN, TIMEOUT = "refused", "forbidden", "timeout"
_SILENT_S = 1.0 * PATIENCE
# A backend that has its turn is patiently waited for: the machine may be busy.
PATIENCE_S = 3.0 * PATIENCE
_TRIES = 40
_THREADS = 24
_NOBODY = (REFUSED, FORBIDDEN, TIMEOUT)


class Probe(NamedTuple):
    """One client, one address; *expected* is written as `observe` writes what it sees."""

    given: Given
    client: str
    target: str
    protocol: str
    family: int
    expected: str

    def __str__(self) -> str:
        family = "" if self.family == 4 else "6"
        return f"{self.given.name}: {self.client} {self.target}/{self.protocol.lower()}{family}"

    def address(self) -> tuple[str, int]:
        """Return the address to dial: 'clusterIP', 'clusterIP:81', 'nodePort@alternate', 'vip@251' (other number)."""
        target, _, port = self.target.partition(":")
        kind, _, at = target.partition("@")
        family, given = self.family, self.given.but(number=int(at)) if at.isdigit() else self.given
        if kind == "nodePort":
            ips = {"": PRIMARY, "alternate": ALTERNATE, "localhost": LOCALHOST, "gateway": GATEWAY}[at]
            return ips[family], int(port or given.node_port)
        ip = {
            "clusterIP": given.cluster_ip,
            "vip": given.vip,
            "externalIP": given.external_ip,
            "balancer": BALANCER.__getitem__,
        }[kind](family)
        return ip, int(port or 80)


def probes(given: Given, *lines: str) -> Iterator[Probe]:
    """Yield the probes of *given* that *lines* stand for."""
    for line in lines:
        asked, _, expected = line.partition(" -> ")
        clients, targets = asked.split()
        targets, _, kinds = targets.partition("/")
        named = kinds.upper().split(",")
        for family in [f for f in given.families if str(f) in named] or given.families:
            for protocol in [p for p in ("TCP", "UDP") if p in named] or ("TCP", "UDP"):
                for client in clients.split(","):
                    for target in targets.split(","):
                        yield Probe(given, client, target, protocol, family, _ordered(expected))


def _ordered(expected: str) -> str:
    names, said, source = expected.strip().partition(" as ")
    return f"{' '.join(sorted(names.split()))}{said}{source}"


# ---- asking


def observe(cluster: Cluster, probe: Probe, patience_s: float = PATIENCE_S) -> str:
    """Send requests until every expected backend has answered, or clearly will not; return the results."""
    names, _, wanted_source = probe.expected.partition(" as ")
    expected = set(names.split())
    if names in _NOBODY:
        patience_s = min(patience_s, _SILENT_S)
    place = cluster.places[probe.client]
    ip, port = probe.address()
    seen: dict[str, str] = {}
    for tried in range(1, _TRIES + 1):
        answer, peer = ask_once(place.host, ip, port, probe.protocol, patience_s)
        # The kernel tells the node's own sender the same of a drop at OUTPUT. Node ports are judged at INPUT.
        if answer == FORBIDDEN and names == TIMEOUT and not probe.target.startswith("nodePort"):
            answer = TIMEOUT
        seen[answer] = _source(cluster, probe, peer)
        enough = names not in _NOBODY and tried > 2 * len(expected)
        if not peer or not seen.keys() <= expected or (enough and seen.keys() == expected):
            break
        if tried >= 2 * len(expected):  # two who ask in step, turn about, would each meet one backend for ever
            time.sleep(random.uniform(0, 0.02))
    told = " ".join(sorted(seen))
    # To itself through a Service it comes from the node, always (behaviours M3); what others saw is the question.
    sources = {source for name, source in seen.items() if source and (name, source) != (probe.client, "node")}
    source = " ".join(sorted(sources)) or "node"
    return f"{told} as {source}" if wanted_source and peer else told


def _source(cluster: Cluster, probe: Probe, peer: str) -> str:
    """Return whom a backend took for its client: own, node, or an address that is neither."""
    if not peer:
        return ""
    if peer in cluster.node_ips:
        return "node"
    return "own" if peer == cluster.places[probe.client].ips[probe.family] else peer


def ask_once(host: Host, ip: str, port: int, protocol: str = "TCP", timeout_s: float = PATIENCE_S) -> tuple[str, str]:
    """Return the server that answered and the client that it saw; or how the request failed, and ""."""
    try:
        if protocol == "TCP":
            said = _ask_tcp(host, ip, port, timeout_s)
        else:
            with connect(host, ip, port, timeout_s, socket.SOCK_DGRAM) as sock:
                said = _ask_udp(sock)
    except OSError as error:
        return failure(error), ""
    name, peer, *_ = (*said.split(), "", "")
    return name or "closed", peer


def _ask_tcp(host: Host, ip: str, port: int, timeout_s: float) -> str:
    with connect(host, ip, port, timeout_s) as sock:
        received = b""
        while part := sock.recv(1024):
            received += part
    return received.decode()


def _ask_udp(sock: socket.socket) -> str:
    sock.send(b"who")
    return sock.recv(1024).decode()


def failure(error: OSError) -> str:
    """Return the one word for how it failed."""
    if isinstance(error, TimeoutError):
        return TIMEOUT
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    if isinstance(error, ConnectionResetError):
        return "reset"
    if isinstance(error, PermissionError):
        return FORBIDDEN
    return errno.errorcode.get(error.errno or 0, str(error)).lower()


def observe_all(cluster: Cluster, wanted: list[Probe], patience_s: float = PATIENCE_S) -> dict[Probe, str]:
    """Observe all of *wanted*, many at a time."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(wanted, pool.map(lambda probe: observe(cluster, probe, patience_s), wanted), strict=True))
