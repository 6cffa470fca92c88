"""The UDP sockets of a data plane, in their own level-triggered epoll.

Level-triggered, because one system call per datagram is then enough: the next poll, which is made anyway, reports the
remaining datagrams. An edge-triggered socket must be read until EAGAIN. Replies are collected and leave for the clients
of a proxy port in one call.

A flow's socket is bound to a local port chosen here (`local_ports.py`) and stays connected to one endpoint. If a flow
is evicted for another flow to the same endpoint, and has been silent for as long as a port rests, its socket is reused.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import math
import resource
import select
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from socket import MSG_PEEK, SOL_SOCKET, SocketType
from typing import TYPE_CHECKING, NamedTuple

from userspace_proxy.dataplane.local_ports import LocalPorts, first_index, local_ports
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, client_of, flow_record_bytes
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.sockets import bind_anywhere, datagram_socket
from userspace_proxy.model.endpoint import Address

if TYPE_CHECKING:
    from userspace_proxy.dataplane.udp import UdpListener

_EVENTS_A_POLL = 256
_POLLS_A_TURN = 4
# From the socket look-up to the socket's queue the kernel needs microseconds, unless a hypervisor stops it there.
_REST_MIN_S = 0.03
# UDP flows may not use this part (1/8) of all descriptors, so that some are left for TCP clients.
_SPARE_PART = 8
# A client with fewer flows than this may get one of the last ports towards an endpoint.
_FEW_FLOWS = 64
# The first number in SO_MEMINFO is the memory of received datagrams (include/uapi/linux/sock_diag.h).
_SO_MEMINFO = 55
_MEMORY_BYTES = 4
_NO_MEMORY = bytes(_MEMORY_BYTES)
# Attempts to bind; other programs may hold some of the ports.
_TRIES = 16

log = logging.getLogger(__name__)

_nowhere = bytearray(1)


class Destination:
    """One endpoint: the local ports towards it, and the flows that use them, by client.

    A new flow may have to evict another one. If its client already has its fair share of flows, one of these is
    evicted; otherwise one of the client with the most flows.
    """

    __slots__ = ("_biggest", "_flows", "clients", "ports")

    def __init__(self) -> None:
        self.ports: dict[str, LocalPorts] = {}  # by source address of the flows
        # The flows of each client. A flow used since it was queued moves to the end when `oldest` meets it.
        self.clients: dict[bytes, OrderedDict[UdpFlow, None]] = {}
        self._flows = 0
        self._biggest: OrderedDict[UdpFlow, None] = OrderedDict()  # of the client with most flows

    def join(self, flow: UdpFlow, client: bytes) -> None:
        flows = self.clients.get(client)
        if flows is None:
            flows = self.clients[client] = OrderedDict()
        flows[flow] = None
        self._flows += 1
        if len(flows) > len(self._biggest):
            self._biggest = flows

    def leave(self, flow: UdpFlow) -> None:
        client = client_of(flow.key)
        flows = self.clients[client]
        del flows[flow]
        self._flows -= 1
        if not flows:
            del self.clients[client]

    def has_few(self, client: bytes) -> bool:
        flows = self.clients.get(client)
        return flows is None or len(flows) < _FEW_FLOWS

    def oldest(self, client: bytes, *, by_asking: bool = False) -> UdpFlow | None:
        """Return the flow to evict for *client*: the one idle for longest.

        *by_asking*: replies do not count as use. So flows that wait for a reply are not evicted before answered ones.
        """
        flows = self.clients.get(client)
        if flows is None or len(flows) * len(self.clients) < self._flows:
            flows = self._biggest
        while flows:
            flow = next(iter(flows))
            used = flow.bytes_to_backend > flow.queued_bytes if by_asking else flow.last_at > flow.queued_at
            if not used:
                return flow
            flow.queued_at, flow.queued_bytes = flow.last_at, flow.bytes_to_backend
            flows.move_to_end(flow)
        return None


class Leased(NamedTuple):
    """A bound socket and its local port, for one flow."""

    destination: Destination
    source: str
    port: int
    sock: SocketType


@dataclass(slots=True, eq=False)
class UdpFlow:
    """The datagrams between one client and one endpoint. ``front`` is None once the flow has ended.

    ``header`` precedes each datagram to the endpoint; usually it is empty. ``counted``: bytes to the backend and to the
    client that are in the counters already. ``source``: the client's IP if the endpoint sees it, else "".
    ``queued_at``, ``queued_bytes``: time of last use and bytes sent, when the flow was last queued among its client's
    flows.
    """

    key: bytes
    reply: bytes
    front: UdpListener | None
    destination: Destination
    source: str
    port: int
    sock: SocketType
    pick: Pick
    started_at: float
    last_at: float
    queued_at: float
    queued_bytes: int
    header: bytes = b""
    bytes_to_backend: int = 0
    bytes_to_client: int = 0
    counted: tuple[int, int] = (0, 0)
    answered: bool = False

    def send(self, datagram: memoryview) -> None:
        """Send *datagram* with its header to the endpoint; raises OSError."""
        if self.header:
            self.sock.sendmsg((self.header, datagram))
        else:
            self.sock.send(datagram)


class DatagramPoller:
    """Reads fronts and flows when they are ready. Not thread-safe: use it in the loop's thread only."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        port_rest_s: float,
        udp_flows: Callable[[], dict[tuple[str, Address], set[int]]],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Make it. *share*: (worker, workers).

        *udp_flows* returns the local ports of the UDP flows in conntrack, by local IP (or "") and endpoint. It is
        called before the first proxy port is served and again before new flows reach ports at
        which the predecessor may have continued.
        """
        self._inboxes: dict[int, Batch] = {}
        self._outbox = Batch()
        self._loop = loop
        self._now = now
        self._epoll = select.epoll()
        self._fronts: dict[int, UdpListener] = {}
        self.proxy_ports: set[int] = set()
        self.biggest: UdpListener | None = None  # the front with the most flows, as far as new flows tell
        self._flows: dict[int, UdpFlow] = {}
        self.spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SPARE_PART
        self._rest_s = max(port_rest_s, _REST_MIN_S)
        self._ports = local_ports(share)
        self._first = first_index(self._ports, ())
        self._destinations: dict[Address, Destination] = {}
        self._udp_flows = udp_flows
        self._looked_at = -math.inf  # when conntrack was last read
        self._used: dict[tuple[str, Address], set[int]] = {}
        self._pruned_at = now()
        loop.add_reader(self._epoll.fileno(), self._turn)

    # ---- proxy ports

    def inbox(self, family: int) -> Batch:
        """Return the batch for proxy ports of *family* alone: the kernel writes only a part of an IPv4 record."""
        if family not in self._inboxes:
            self._inboxes[family] = Batch(flow_record_bytes(family))
        return self._inboxes[family]

    def serve(self, front: UdpListener) -> None:
        """Begin to read from *front*; no effect if it is read already."""
        if front.fd in self._fronts:
            return
        if self._looked_at == -math.inf:
            self._look()
        self._epoll.register(front.fd, select.EPOLLIN)
        self._fronts[front.fd] = front
        self.proxy_ports.add(front.spec.proxy_port)

    def leave(self, front: UdpListener) -> None:
        """Stop reading from *front*, whose owner closes it."""
        if self._fronts.pop(front.fd, None) is not None:
            self._epoll.unregister(front.fd)
            self.proxy_ports.discard(front.spec.proxy_port)
        if front is self.biggest:
            self.biggest = max(self._fronts.values(), key=lambda each: each.size, default=None)

    # ---- sockets of flows

    def __len__(self) -> int:
        """Return the number of flows."""
        return len(self._flows)

    def towards(self, address: Address) -> Destination:
        """Return the state of the endpoint at *address*."""
        destination = self._destinations.get(address)
        if destination is None:
            destination = self._destinations[address] = Destination()
        return destination

    def open(
        self,
        destination: Destination,
        address: Address,
        client: bytes,
        source: str,
        now: float,
        bind: Callable[[SocketType, int], None] = bind_anywhere,
    ) -> Leased | None:
        """Return an unconnected socket that *bind* bound to a rested port, or None if no port is free.

        Raises:
            OSError: no socket could be opened or bound.
        """
        ports = destination.ports.get(source)
        if ports is None:
            ports = destination.ports[source] = self._local_ports(source, address)
        has_few = destination.has_few(client)
        for _ in range(_TRIES):
            port = ports.take(now, has_few=has_few)
            if port is None:
                return None
            if port in self.proxy_ports:  # workers share proxy ports by SO_REUSEPORT, as flows do
                ports.rest(port, now + self._rest_s)
                continue
            try:
                sock = datagram_socket(address, port, bind)
            except OSError as error:
                ports.rest(port, now + self._rest_s)
                if error.errno != errno.EADDRINUSE:
                    raise
                continue  # another program has it
            leased = Leased(destination, source, port, sock)
            try:
                self._epoll.register(sock.fileno(), select.EPOLLIN)
            except BaseException:
                self.close(leased, now)
                raise
            return leased
        return None

    def _local_ports(self, source: str, address: Address) -> LocalPorts:
        ports, (taken, free_at) = self._ports, self._taken(source, address)
        first = first_index(ports, taken) if taken else self._first

        def look() -> tuple[Collection[int], float]:
            if (source, address) not in self._used:  # else another endpoint's ports have caused the read already
                self._look()
            return self._taken(source, address)

        # Never the endpoint's own port: if the endpoint is on this node, the socket could be its own peer.
        return LocalPorts(ports, first, taken, free_at, never=address[1], look=look)

    def _look(self) -> None:
        self._looked_at = self._now()
        self._used = self._udp_flows()

    def _taken(self, source: str, address: Address) -> tuple[Collection[int], float]:
        """Return the ports in use at the last look at conntrack, and the time when they will have rested."""
        return self._used.pop((source, address), ()), self._looked_at + self._rest_s

    def connect(self, leased: Leased, address: Address) -> None:
        """Connect the new socket of *leased* and discard what it has received; raises OSError.

        Before connect(), it receives datagrams from any sender, such as late replies to ended flows of other endpoints.
        """
        sock = leased.sock
        sock.connect(address)
        # Ask first: a read that finds nothing raises, which costs several times as much.
        if sock.getsockopt(SOL_SOCKET, _SO_MEMINFO, _MEMORY_BYTES) != _NO_MEMORY:
            _drain(sock)

    def begin(self, flow: UdpFlow, client: bytes) -> None:
        """Forward the replies that arrive at *flow* of *client*."""
        self._flows[flow.sock.fileno()] = flow
        flow.destination.join(flow, client)
        assert flow.front is not None
        if self.biggest is None or flow.front.size > self.biggest.size:
            self.biggest = flow.front

    def has_rested(self, flow: UdpFlow, destination: Destination, source: str) -> bool:
        """Return whether the socket of *flow* may be reused at once for a flow to *destination* from *source*."""
        return (
            flow.destination is destination
            and flow.source == source
            and self._now() - flow.last_at >= self._rest_s
            and _is_empty(flow.sock)
        )

    def end(self, flow: UdpFlow, *, keep: bool = False) -> None:
        """Stop forwarding replies. Close the socket and let its port rest, unless *keep*: another flow reuses it."""
        flow.front = None
        flow.destination.leave(flow)
        if not keep:
            self.close(flow, flow.last_at)

    def close(self, leased: Leased | UdpFlow, last_at: float) -> None:
        """Close the socket of *leased*. Its port rests from *last_at* on."""
        self._flows.pop(leased.sock.fileno(), None)
        leased.sock.close()
        leased.destination.ports[leased.source].rest(leased.port, last_at + self._rest_s)

    def expire(self, now: float) -> None:
        """Drop the state of endpoints whose ports have all rested."""
        if now - self._pruned_at < self._rest_s:
            return
        self._pruned_at = now
        if now - self._looked_at >= self._rest_s:
            self._used = {}
        for address, destination in list(self._destinations.items()):
            rested = [source for source, ports in destination.ports.items() if ports.is_idle(now)]
            if "" in rested:
                self._first = destination.ports[""].at  # continue behind its flows
            for source in rested:
                del destination.ports[source]
            if not destination.ports and not destination.clients:
                del self._destinations[address]

    # ---- turns

    def _turn(self) -> None:
        for _ in range(_POLLS_A_TURN):
            ready = self._epoll.poll(0, _EVENTS_A_POLL)
            try:
                self._handle(ready, self._now())
            except Exception:
                log.exception("a bug: datagrams were not handled")
            if len(ready) < 2:
                return  # little traffic: another poll would find nothing

    def _handle(self, ready: list[tuple[int, int]], now: float) -> None:
        fronts = self._fronts
        asked = [fronts[fd] for fd, _ in ready if fd in fronts]
        # Replies first: a new flow may evict the flow idle for longest, but not while a reply to it waits.
        if len(asked) < len(ready):
            self._return_replies(ready, now)
        for front in asked:
            front.receive(now)

    def _return_replies(self, ready: list[tuple[int, int]], now: float) -> None:
        flows, outbox = self._flows, self._outbox
        room, address = outbox.room, outbox.address
        front: UdpListener | None = None
        count = 0
        for fd, _ in ready:
            if (flow := flows.get(fd)) is None:
                continue
            if flow.front is not front or count == MESSAGES:
                if front is not None:
                    self._send(front, count)
                front, count = flow.front, 0
            assert front is not None
            try:
                length = flow.sock.recv_into(room[count])
            except BlockingIOError:
                continue
            except OSError as error:
                # EMSGSIZE: the path MTU has shrunk since an earlier datagram. The kernel has noted the new one.
                if error.errno != errno.EMSGSIZE:
                    front.lose(flow, error)
                continue
            address(count, flow.reply, length)
            count += 1
            flow.last_at = now
            flow.bytes_to_client += length
            front.touch(flow.key)
            if not flow.answered:
                front.answered(flow)
        if front is not None:
            self._send(front, count)

    def _send(self, front: UdpListener, count: int) -> None:
        if count and (refused := self._outbox.send(front.sock.fileno(), count)):
            front.not_sent(refused)

    def stop(self) -> None:
        """Close the epoll."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()


def _is_empty(sock: SocketType) -> bool:
    """Return whether *sock* has neither a datagram nor an error to read."""
    try:
        sock.recv_into(_nowhere, 1, MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _drain(sock: SocketType) -> None:
    """Discard the datagrams in *sock*; raises OSError if it has an error."""
    while True:
        try:
            sock.recv_into(_nowhere)
        except BlockingIOError:
            return
