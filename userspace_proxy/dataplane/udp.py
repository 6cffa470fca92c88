"""One UDP listener: a flow for each client, with a backend socket of its own for its whole life.

A backend may answer twice, or late; because a flow's socket is connected to one backend and never serves
another client, such an answer can only reach the client that asked. Replies leave from the address that
the client's datagram came to (pktinfo): any other would miss the kernel's NAT entry.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct

from userspace_proxy.dataplane.context import PlaneContext
from userspace_proxy.dataplane.picker import Picker
from userspace_proxy.dataplane.poller import FAILED, READ, Poller
from userspace_proxy.dataplane.sockets import IP_PKTINFO, LOCAL_SHORTAGES, backend_socket, is_self_connected, plain_ip
from userspace_proxy.interfaces import AccessRecord, Backends, Counters, ListenerSpec
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import portals

DATAGRAM_BYTES = 65_536
DATAGRAMS_A_TURN = 64
_LINK_LOCAL = b"\xfe\x80"
_CONTROL_BYTES = socket.CMSG_SPACE(20)

# A client's address as the kernel gives it, and the control message that says which address it asked.
ClientKey = tuple[tuple[object, ...], bytes]

log = logging.getLogger(__name__)

_buffer = bytearray(DATAGRAM_BYTES)
_view = memoryview(_buffer)


class UdpFlow:
    """One client's conversation with one endpoint."""

    __slots__ = (
        "answered",
        "bytes_to_backend",
        "bytes_to_client",
        "ended",
        "endpoint",
        "key",
        "last_at",
        "listener",
        "sock",
        "started_at",
        "why",
    )

    def __init__(
        self, key: ClientKey, listener: UdpListener, sock: socket.socket, endpoint: Endpoint, why: str, now: float
    ) -> None:
        self.key = key
        self.listener = listener
        self.sock = sock
        self.endpoint = endpoint
        self.why = why
        self.started_at = self.last_at = now
        self.bytes_to_backend = 0
        self.bytes_to_client = 0
        self.answered = False
        self.ended = False

    def on_socket(self, events: int) -> None:
        """The backend answered, or an ICMP message says that it cannot."""
        if not events & (READ | FAILED):
            return
        for _ in range(DATAGRAMS_A_TURN):
            if self.ended:
                return
            try:
                count = self.sock.recv_into(_buffer)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    continue  # the way has become narrower than an earlier datagram; the kernel knows now
                self.listener.lose(self, error)
                return
            self.listener.reply(self, count)
        self.listener.poller.again(lambda: self.on_socket(READ))


class UdpListener:
    """The proxy port of one UDP service port, and its flows, least recently used first."""

    def __init__(self, spec: ListenerSpec, sock: socket.socket, context: PlaneContext) -> None:
        self.counters = Counters()
        self.picker = Picker(context.now, spec.service_port.affinity_timeout_s)
        self._context = context
        self._spec = spec
        self._flows: dict[ClientKey, UdpFlow] = {}
        self._closed = False
        self._serving: frozenset[Address] = frozenset()
        self._sock = sock
        context.poller.watch(self._sock, self._on_front)

    @property
    def name(self) -> ServicePortName:
        return self._spec.name

    @property
    def spec(self) -> ListenerSpec:
        return self._spec

    @property
    def sock(self) -> socket.socket:
        """The proxy port's socket; for handing it on."""
        return self._sock

    @property
    def poller(self) -> Poller:
        return self._context.poller

    def configure(self, spec: ListenerSpec) -> None:
        self._spec = spec
        self.picker.set_affinity(spec.service_port.affinity_timeout_s)

    def update(self, backends: Backends) -> None:
        """Take new endpoints; flows whose endpoint serves no more end, and their next datagram starts anew."""
        self.picker.set_endpoints(backends.usable)
        self._serving = frozenset(e.address for e in backends.serving)
        for flow in [f for f in self._flows.values() if f.endpoint.address not in self._serving]:
            self._end(flow, "endpoint gone")

    def leave(self) -> None:
        """Read no more from clients: another process does, at the same socket. Answers are still passed on."""
        self._closed = True
        self._context.poller.forget(self._sock)

    def close(self) -> None:
        self._closed = True
        for flow in list(self._flows.values()):
            self._end(flow, "service gone")
        self._context.poller.close(self._sock)

    # ---- client to backend

    def _on_front(self, events: int) -> None:
        if not events & READ:
            return
        recvmsg_into, buffers = self._sock.recvmsg_into, [_buffer]
        for _ in range(DATAGRAMS_A_TURN):
            if self._closed:
                return
            try:
                count, ancillary, _, client = recvmsg_into(buffers, _CONTROL_BYTES)
            except BlockingIOError:
                return
            except OSError as error:
                log.debug("%s: receiving failed: %s", self.name, error)
                continue
            self._forward((client, ancillary[0][2] if ancillary else b""), count)
        self._context.poller.again(lambda: self._on_front(READ))

    def _forward(self, key: ClientKey, count: int) -> None:
        flow = self._flows.pop(key, None)
        for _ in range(2):
            if flow is None:
                flow = self._begin(key)
                if flow is None:
                    self.counters.datagrams_dropped += 1
                    return
            try:
                flow.sock.send(_view[:count])
            except BlockingIOError:
                self.counters.datagrams_dropped += 1
            except OSError as error:
                if error.errno == errno.EMSGSIZE:
                    # Too long for this way, which is not the endpoint's fault; shorter ones go on.
                    self.counters.datagrams_dropped += 1
                    self._flows[key] = flow
                    return
                # What was refused is an earlier datagram of this flow; this one was not sent and can go elsewhere.
                self._flows[key] = flow
                self.lose(flow, error)
                flow = None
                continue
            else:
                flow.bytes_to_backend += count
            flow.last_at = self._context.now()
            self._flows[key] = flow  # most recently used: at the end
            return
        self.counters.datagrams_dropped += 1

    def _begin(self, key: ClientKey) -> UdpFlow | None:
        """Open a flow to the picked endpoint, or to the next one where there is no way to it."""
        if len(self._flows) >= self._context.limits.udp_flows_per_service or not self._context.connections.fits(1):
            self._evict()
        client_ip = plain_ip(str(key[0][0]))
        tried: dict[Address, bool] = {}
        while (pick := self.picker.pick(client_ip, tried)) is not None:
            address = pick.endpoint.address
            tried[address] = True
            sock = self._socket_to(address)
            if sock is None:
                return None
            flow = UdpFlow(key, self, sock, pick.endpoint, pick.why, self._context.now())
            try:
                sock.connect(address)
                if is_self_connected(sock, address):
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
                self._context.poller.watch(sock, flow.on_socket)
            except OSError as error:
                sock.close()
                self._hold_against(pick.endpoint, error)
                self.counters.retries += 1
                continue
            self.counters.flows_total += 1
            self.counters.flows += 1
            self._context.connections.udp_flows += 1
            return flow
        return None

    def _socket_to(self, address: Address) -> socket.socket | None:
        try:
            return backend_socket(socket.SOCK_DGRAM, address)
        except OSError as error:
            # Out of descriptors: the flow that has been idle for longest makes way, once its socket is closed.
            self._context.connections.note_shortage(error)
            self._evict()
            return None

    def _evict(self) -> None:
        oldest = next(iter(self._flows.values()), None)
        if oldest is not None:
            self.counters.flows_evicted += 1
            self._end(oldest, "evicted: too many flows")

    # ---- backend to client

    def reply(self, flow: UdpFlow, count: int) -> None:
        """Send the datagram in the shared buffer to the client of *flow*, from the address it asked."""
        client, asked = flow.key
        if not flow.answered:
            flow.answered = True
            if self.picker.report_success(flow.endpoint):
                log.info("endpoint %s answers again", flow.endpoint)
        flow.last_at = self._context.now()
        self._flows[flow.key] = self._flows.pop(flow.key)  # most recently used: at the end
        flow.bytes_to_client += count
        try:
            self._sock.sendmsg([_view[:count]], self._from_address(asked), 0, client)
        except OSError as error:
            self.counters.datagrams_dropped += 1
            log.debug("%s: the reply to %s was not sent: %s", self.name, client, error)

    def _from_address(self, asked: bytes) -> list[tuple[int, int, bytes]]:
        if len(asked) == 12:  # struct in_pktinfo: interface, local address, destination
            return [(socket.IPPROTO_IP, IP_PKTINFO, struct.pack("=i4s4s", 0, asked[4:8], bytes(4)))]
        if len(asked) == 20:  # struct in6_pktinfo: address, interface (which a link-local address needs)
            interface = asked[16:] if asked.startswith(_LINK_LOCAL) else bytes(4)
            return [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, asked[:16] + interface)]
        return []

    # ---- endings

    def lose(self, flow: UdpFlow, error: OSError) -> None:
        """The endpoint refused: hold it against it, and end the flow so that the next datagram goes elsewhere."""
        self._hold_against(flow.endpoint, error)
        self._end(flow, f"refused: {os.strerror(error.errno or 0)}")

    def _hold_against(self, endpoint: Endpoint, error: OSError) -> None:
        self.counters.dial_failures += 1
        if error.errno == errno.EPERM:
            log.debug("%s: a firewall of this host forbids datagrams to %s", self.name, endpoint)
        elif error.errno in LOCAL_SHORTAGES:
            self._context.connections.note_shortage(error)
        elif self.picker.report_failure(endpoint):
            self.counters.ejections += 1
            log.info("endpoint %s is passed over for a while: %s", endpoint, error.strerror)

    def expire(self, now: float) -> None:
        """End flows that were idle for as long as conntrack would keep them."""
        limits = self._context.limits
        shortest = min(limits.udp_timeout_s, limits.udp_stream_timeout_s)
        expired = []
        for flow in self._flows.values():
            idle_s = now - flow.last_at
            if idle_s < shortest:
                break  # in order of use: all that follow are younger
            if idle_s >= (limits.udp_stream_timeout_s if flow.answered else limits.udp_timeout_s):
                expired.append(flow)
        for flow in expired:
            self._end(flow, "idle")

    def _end(self, flow: UdpFlow, how: str) -> None:
        if self._flows.pop(flow.key, None) is None:
            return
        flow.ended = True
        self._context.poller.close(flow.sock)
        self.counters.flows -= 1
        self._context.connections.udp_flows -= 1
        self.counters.bytes_to_backends += flow.bytes_to_backend
        self.counters.bytes_to_clients += flow.bytes_to_client
        if self._context.access_log is None:
            return
        client = flow.key[0]
        self._context.access_log(
            AccessRecord(
                service_port=self.name,
                client=(plain_ip(str(client[0])), int(str(client[1]))),
                portal=known[0] if len(known := portals(self._spec.service_port)) == 1 else None,
                endpoint=flow.endpoint,
                why=flow.why,
                bytes_to_backend=flow.bytes_to_backend,
                bytes_to_client=flow.bytes_to_client,
                duration_s=self._context.now() - flow.started_at,
                how=how,
            )
        )
