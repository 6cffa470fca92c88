"""Cluster DNS as the control process sees it: a state sink, and the process that answers."""

import asyncio
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from userspace_proxy.dataplane.channel import Channel
from userspace_proxy.dataplane.child import ChildProcess
from userspace_proxy.dns import wire
from userspace_proxy.errors import StartError, SyncError
from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.state import ProxyState

# Decoding a frame takes the DNS process well below a millisecond.
_SERVICES_A_FRAME, _HOSTS_A_FRAME = 100, 1_000
_EXIT_TIMEOUT_S = 2.0

# CoreDNS's names where they mean the same.
_TOTALS = {
    "hits": ("coredns_cache_hits", "queries answered with an answer that was packed before"),
    "misses": ("coredns_cache_misses", "queries for which an answer had to be packed"),
    "forwarded": ("coredns_forward_requests", "queries sent to other servers"),
    "forward_refused": ("coredns_forward_max_concurrent_rejects", "queries refused: too many under way, or no server"),
    "forward_hits": ("userspace_proxy_dns_forward_hits", "queries answered with what other servers answered before"),
    "forward_failures": ("userspace_proxy_dns_forward_failures", "queries that no other server answered"),
    "cut": ("userspace_proxy_dns_answers_cut", "answers with a part of their records: all do not fit in a message"),
}

_counts = msgspec.msgpack.Decoder(wire.Counts)


class DnsSink(ChildProcess[wire.Counts]):
    """A state sink that keeps the DNS process running, and sends it the names of each new state.

    *predecessors*: channels to DNS processes that serve at the same sockets; they end once this one can answer for
    every Service. *pods*: detects this node's pods, whose clients may ask for all names. ``held``: the addresses, once
    it is certain that no Service has them. ``is_left``: the process is left to a successor, which serves on by it.
    """

    def __init__(
        self,
        settings: wire.DnsSettings,
        sockets: Sequence[socket.socket],
        predecessors: Sequence[socket.socket] = (),
        pods: PodDetector | None = None,
    ) -> None:
        super().__init__("DNS", wire.MODULE, settings)
        self._addresses = settings.addresses
        self._sockets = sockets
        self._predecessors = list(predecessors)
        self._pods = pods or PodDetector()
        self._state = ProxyState()
        self._clients = wire.Clients([])
        self._is_synced = False
        self._conflict: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.held: set[str] = set()
        self.is_left = False

    def start(self) -> None:
        super().start()
        self.notify(self._clients)
        self._tell_names(self._state.names.items())
        if self._is_synced:
            self.notify(wire.Synced())
        # With a predecessor, queries are for that until this process has all names.
        if self._is_synced or not self._predecessors:
            self._give_sockets()

    def read_answer(self, body: bytes) -> wire.Counts:
        return _counts.decode(body)

    def _give_sockets(self) -> None:
        self.notify(wire.Sockets(), [sock.fileno() for sock in self._sockets])

    async def sync(self, state: ProxyState) -> None:
        """Tell the process what has changed since the last sync."""
        sent, self._state = self._state.names, state
        networks = [*self._pods.cidrs, *state.node.pod_cidrs, *state.node.addresses, *self._addresses]
        clients = wire.Clients(networks, self._pods.interface)
        if clients != self._clients:
            self._clients = clients
            self.notify(clients)
        self._tell_names((name, names) for name, names in state.names.items() if sent.get(name) is not names)
        self._tell_names((name, None) for name in sent.keys() - state.names.keys())
        if not self._is_synced:
            self._is_synced = True
            if conflict := _conflict(state, self._addresses):
                self._conflict.set_exception(StartError(conflict))
            else:
                self.held.update(self._addresses)
            self.notify(wire.Synced())
            if self._predecessors:
                self._give_sockets()
            await self.counts()  # it has taken in all of this, and answers
            end_processes(self._predecessors)
            self._predecessors.clear()

    def _tell_names(self, changes: Iterable[tuple[NamespacedName, ServiceNames | None]]) -> None:
        part: list[tuple[NamespacedName, ServiceNames | None]] = []
        hosts = 0
        for name, names in changes:
            part.append((name, names))
            hosts += sum(len(group.hosts) for group in names.groups) if names else 0
            if len(part) >= _SERVICES_A_FRAME or hosts >= _HOSTS_A_FRAME:
                self.notify(wire.Names(part))
                part, hosts = [], 0
        if part:
            self.notify(wire.Names(part))

    async def run(self) -> None:
        """Run until cancelled.

        Raises:
            StartError: a Service of the first state has an address of this server.
        """
        await asyncio.shield(self._conflict)

    async def counts(self) -> wire.Counts:
        """Return the counters of the process; none if it does not answer."""
        try:
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                return await self.send(wire.Ask())
        except (SyncError, TimeoutError):
            return wire.Counts()

    async def metrics(self) -> list[Metric]:
        """Return the metrics of the process."""
        return list(dns_metrics(await self.counts(), self.restarts))

    def inheritance(self) -> list[socket.socket]:
        """Return what a successor needs: the sockets, and the channel to the process, which continues to serve."""
        return [*self._sockets, *([self._channel.sock] if self._channel is not None else ())]

    def leave(self) -> None:
        self.is_left = True
        super().leave()

    async def close(self) -> None:
        """End the process, unless it was left to a successor, and those before it."""
        self.end_tasks()
        end_processes(self._predecessors)
        if not self.is_left:
            await self.end(wire.EndDns(), _EXIT_TIMEOUT_S, _EXIT_TIMEOUT_S)
        for sock in self._sockets:
            sock.close()


def _conflict(state: ProxyState, addresses: Iterable[str]) -> str:
    for name, service_port in state.service_ports.items():
        if taken := set(addresses) & {*service_port.cluster_ips, *service_port.external_ips}:
            return f"--dns {taken.pop()}: Service {name.service} has this address; choose another one"
    return ""


def end_processes(channels: Iterable[socket.socket]) -> None:
    """Tell the DNS processes at the other ends of *channels* to end, and close the channels."""
    for sock in channels:
        channel = Channel(sock, lambda _body, _descriptors: None, lambda: None)
        channel.send(msgspec.msgpack.encode(wire.EndDns()))
        channel.close()


def dns_metrics(counts: wire.Counts, restarts: int) -> Iterator[Metric]:
    """Yield what the DNS process has counted; *restarts*: how often it was replaced."""
    asked: Counter[tuple[str, str, str]] = Counter()
    answered: Counter[str] = Counter()
    for proto, family, kind, rcode, count in counts.requests:
        asked[proto, family, kind] += count
        answered[rcode] += count
    requests = CounterMetricFamily("coredns_dns_requests", "DNS queries", labels=["proto", "family", "type"])
    for labels, count in asked.items():
        requests.add_metric(labels, count)
    responses = CounterMetricFamily("coredns_dns_responses", "DNS answers", labels=["rcode"])
    for rcode, count in answered.items():
        responses.add_metric([rcode], count)
    yield requests
    yield responses
    for key, (name, words) in _TOTALS.items():
        yield CounterMetricFamily(name, words, value=counts.totals.get(key, 0))
    yield CounterMetricFamily("userspace_proxy_dns_restarts", "DNS processes replaced", value=restarts)
