"""The UDP sockets of a plane, in a level-triggered epoll of their own.

Level-triggered, because one call for each datagram is then enough: what is left in a socket is reported
again by the next poll, which is made anyway, while edge-triggered a socket has to be read until it says
EAGAIN. Answers are gathered, and leave for the clients of a proxy port in one call.

A flow's socket is bound to a local port that is chosen here (`local_ports.py`) and connected to one endpoint for as
long as it is open. A flow that makes way for another to the same endpoint, and has been silent for as long as a port
rests, leaves it its socket.
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
from socket import MSG_PEEK, SocketType
from typing import NamedTuple, Protocol

from userspace_proxy.dataplane.local_ports import LocalPorts, first_index, local_ports
from userspace_proxy.dataplane.mmsg import MESSAGES, Batch, client_of
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.sockets import bind_anywhere, datagram_socket
from userspace_proxy.model.endpoint import Address

_EVENTS_A_POLL = 256
_POLLS_A_TURN = 4
# The kernel needs microseconds from its lookup of a socket to the socket's queue, unless a hypervisor stops it there.
_REST_MIN_S = 0.03
# This part of all descriptors is not for UDP flows, so that TCP clients find some.
_SPARE_PART = 8
# A client with fewer flows than this may have one of the last ports towards an endpoint.
_FEW_FLOWS = 64
# Other programs may have some of our ports.
_TRIES = 16

log = logging.getLogger(__name__)

_nowhere = bytearray(1)


class Front(Protocol):
    """Where the clients of a proxy port are: the owner of flows."""

    @property
    def fd(self) -> int: ...

    @property
    def proxy_port(self) -> int: ...

    @property
    def touch(self) -> Callable[[bytes], None]:
        """Makes the flow with this key the most recently used one."""
        ...

    def receive(self) -> None:
        """Take what waits at the proxy port."""
        ...

    def answered(self, flow: UdpFlow) -> None:
        """The endpoint of *flow* has answered for the first time."""
        ...

    def lose(self, flow: UdpFlow, error: OSError) -> None:
        """The endpoint of *flow* refused."""
        ...

    def apply_moves(self, flow: UdpFlow, destination: Destination, source: str, *, if_rested: bool) -> Leased | None:
        """End *flow* for another one, which goes to *destination*; return its socket where that has rested."""
        ...

    def not_sent(self, datagrams: int) -> None:
        """So many answers were not taken by the kernel."""
        ...


class Destination:
    """One endpoint: the local ports towards it, and whose flows have them.

    Where flows have to make way, the client that asks gives up its own if it has at least its share of all; else the
    client with the most does.
    """

    __slots__ = ("_biggest", "_flows", "clients", "ports")

    def __init__(self) -> None:
        self.ports: dict[str, LocalPorts] = {}  # by the flows' source
        # The flows of each client: those that were used since they were put there are put to the end when found.
        self.clients: dict[bytes, OrderedDict[UdpFlow, None]] = {}
        self._flows = 0
        self._biggest: OrderedDict[UdpFlow, None] = OrderedDict()  # of a client that began a flow, the most

    def join(self, flow: UdpFlow) -> None:
        client = client_of(flow.key)
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
        """Return the flow that makes way for one of *client*: the one that was idle for longest.

        *by_asking*: answers are no use of a flow. So flows that wait for one are not ended sooner than answered ones.
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
    """A connected socket and its local port, for one flow."""

    destination: Destination
    source: str
    port: int
    sock: SocketType


class UdpFlow:
    """One client's conversation with one endpoint. ``front`` is None once it has ended.

    ``header`` goes in front of each datagram to the endpoint; mostly it is empty. ``counted``: the bytes, to the
    backend and to the client, that counters know of. ``source``: the client's IP where the endpoint sees that, else "".
    ``queued_at`` and ``queued_bytes``: when it was put where it is among its client's flows, and what it had sent.
    """

    __slots__ = (
        "answered",
        "bytes_to_backend",
        "bytes_to_client",
        "counted",
        "counters",
        "destination",
        "endpoint",
        "front",
        "header",
        "key",
        "last_at",
        "port",
        "queued_at",
        "queued_bytes",
        "reply",
        "sock",
        "source",
        "started_at",
        "why",
    )

    def __init__(
        self,
        key: bytes,
        reply: bytes,
        front: Front,
        leased: Leased,
        pick: Pick,
        now: float,
        header: bytes = b"",
    ) -> None:
        self.key = key
        self.reply = reply
        self.front: Front | None = front
        self.destination, self.source, self.port, self.sock = leased
        self.header = header
        self.endpoint, self.why, self.counters = pick
        self.started_at = self.last_at = self.queued_at = now
        self.queued_bytes = 0
        self.bytes_to_backend = 0
        self.bytes_to_client = 0
        self.counted = (0, 0)
        self.answered = False

    def send(self, datagram: memoryview) -> None:
        """Send *datagram* to the endpoint; raises OSError."""
        if self.header:
            self.sock.sendmsg((self.header, datagram))
        else:
            self.sock.send(datagram)


class DatagramPoller:
    """Reads fronts and flows as they become ready. Not thread-safe: it belongs to the loop's thread."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        now: Callable[[], float],
        port_rest_s: float,
        udp_flows: Callable[[], dict[tuple[str, Address], set[int]]],
        share: tuple[int, int] = (0, 1),
    ) -> None:
        """Make it for the worker *share*: which of how many.

        *udp_flows*: the local ports of the kernel's, by local IP or "" and endpoint. It is asked before the first proxy
        port is served, and before flows come to where the process before may have gone on.
        """
        self.inbox = Batch()
        self._outbox = Batch()
        self._loop = loop
        self._now = now
        self._epoll = select.epoll()
        self._fronts: dict[int, Front] = {}
        self.proxy_ports: set[int] = set()
        self._flows: dict[int, UdpFlow] = {}
        self.spare = resource.getrlimit(resource.RLIMIT_NOFILE)[0] // _SPARE_PART
        self._rest_s = max(port_rest_s, _REST_MIN_S)
        self._ports = local_ports(share)
        self._first = first_index(self._ports, ())
        self._destinations: dict[Address, Destination] = {}
        self._udp_flows = udp_flows
        self._looked_at = -math.inf  # when the kernel was asked which ports others used
        self._used: dict[tuple[str, Address], set[int]] = {}
        self._pruned_at = now()
        loop.add_reader(self._epoll.fileno(), self._turn)

    # ---- proxy ports

    def serve(self, front: Front) -> None:
        """Read from *front*, if that is not done already."""
        if front.fd in self._fronts:
            return
        if self._looked_at == -math.inf:
            self._look()
        self._epoll.register(front.fd, select.EPOLLIN)
        self._fronts[front.fd] = front
        self.proxy_ports.add(front.proxy_port)

    def leave(self, front: Front) -> None:
        """Read no more from *front*, whose owner closes it."""
        if self._fronts.pop(front.fd, None) is not None:
            self._epoll.unregister(front.fd)
            self.proxy_ports.discard(front.proxy_port)

    # ---- sockets of flows

    def __len__(self) -> int:
        """How many flows there are."""
        return len(self._flows)

    def towards(self, address: Address) -> Destination:
        """Return what is known of the endpoint at *address*."""
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
        bind: Callable[[SocketType, int], None] = bind_anywhere,
    ) -> Leased | None:
        """Return a socket that *bind* gave a rested port, not connected yet; None where no port is free.

        Raises:
            OSError: none could be opened.
        """
        now = self._now()
        ports = destination.ports.get(source)
        if ports is None:
            ports = destination.ports[source] = self._local_ports(source, address)
        has_few = destination.has_few(client)
        for _ in range(_TRIES):
            port = ports.take(now, has_few=has_few)
            if port is None:
                return None
            if port in self.proxy_ports:  # several workers share it by the same option as flows do
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
            if (source, address) not in self._used:  # else another endpoint's ports have come to this before
                self._look()
            return self._taken(source, address)

        # A socket at the endpoint's own port might be its own peer, where the endpoint is this node's.
        return LocalPorts(ports, first, taken, free_at, never=address[1], look=look)

    def _look(self) -> None:
        self._looked_at = self._now()
        self._used = self._udp_flows()

    def _taken(self, source: str, address: Address) -> tuple[Collection[int], float]:
        """Return the ports that were used when the kernel was asked, and when they will have rested."""
        return self._used.pop((source, address), ()), self._looked_at + self._rest_s

    def connect(self, leased: Leased, address: Address) -> None:
        """Connect the socket of *leased*, which is new; raises OSError.

        Until then, anybody's datagrams to its port came to it, as those for ended flows towards other endpoints.
        """
        leased.sock.connect(address)
        _drain(leased.sock)

    def begin(self, flow: UdpFlow) -> None:
        """Carry the answers that come to *flow*."""
        self._flows[flow.sock.fileno()] = flow
        flow.destination.join(flow)

    def has_rested(self, flow: UdpFlow, destination: Destination, source: str) -> bool:
        """Return whether the socket of *flow* may go to another one, to *destination* and with *source*, at once."""
        return (
            flow.destination is destination
            and flow.source == source
            and self._now() - flow.last_at >= self._rest_s
            and _is_empty(flow.sock)
        )

    def end(self, flow: UdpFlow, *, keep: bool = False) -> None:
        """Carry no more answers; close the socket, and let its port rest. *keep*: not where it is for another flow."""
        flow.front = None
        flow.destination.leave(flow)
        if not keep:
            self.close(flow, flow.last_at)

    def close(self, leased: Leased | UdpFlow, last_at: float) -> None:
        """Close the socket of *leased*, whose port rests from *last_at* on."""
        self._flows.pop(leased.sock.fileno(), None)
        leased.sock.close()
        leased.destination.ports[leased.source].rest(leased.port, last_at + self._rest_s)

    def expire(self, now: float) -> None:
        """Forget the endpoints towards which every port has rested."""
        if now - self._pruned_at < self._rest_s:
            return
        self._pruned_at = now
        if now - self._looked_at >= self._rest_s:
            self._used = {}
        for address, destination in list(self._destinations.items()):
            for source, ports in list(destination.ports.items()):
                if ports.is_idle(now):
                    if not source:
                        self._first = ports.at  # go on where its flows were
                    del destination.ports[source]
            if not destination.ports and not destination.clients:
                del self._destinations[address]

    # ---- turns

    def _turn(self) -> None:
        for _ in range(_POLLS_A_TURN):
            ready = self._epoll.poll(0, _EVENTS_A_POLL)
            if not ready:
                return
            now = self._now()
            try:
                self._handle(ready, now)
            except Exception:
                log.exception("a bug: datagrams were not handled")

    def _handle(self, ready: list[tuple[int, int]], now: float) -> None:
        flows, outbox = self._flows, self._outbox
        room, address = outbox.room, outbox.address
        front: Front | None = None
        count = 0
        asked: list[Front] = []
        for fd, _ in ready:
            flow = flows.get(fd)
            if flow is None:
                if fd in self._fronts:
                    asked.append(self._fronts[fd])
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
                # Too long: the way has become narrower than an earlier datagram; the kernel knows now.
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
        # Answers first: a new flow may end the one that was idle for longest, and not while an answer to it waits.
        for each in asked:
            each.receive()

    def _send(self, front: Front, count: int) -> None:
        if count and (refused := self._outbox.send(front.fd, count)):
            front.not_sent(refused)

    def stop(self) -> None:
        """Close the epoll."""
        if not self._epoll.closed:
            self._loop.remove_reader(self._epoll.fileno())
            self._epoll.close()


def _is_empty(sock: SocketType) -> bool:
    """Return whether *sock* has received nothing that was not read: no datagram, and no error."""
    try:
        sock.recv_into(_nowhere, 1, MSG_PEEK)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


def _drain(sock: SocketType) -> None:
    """Throw away the datagrams in *sock*; raises OSError where it has received an error."""
    while True:
        try:
            sock.recv_into(_nowhere)
        except BlockingIOError:
            return
