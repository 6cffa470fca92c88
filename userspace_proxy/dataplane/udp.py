"""One UDP listener: a flow for each client, with a backend socket of its own until it ends.

A backend may answer twice, or late; because a flow's socket is connected to one backend, and serves no other
client before it has been dissolved, such an answer can only reach the client that asked. Replies leave from
the address that the client's datagram came to (pktinfo): any other would miss the kernel's NAT entry.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import OrderedDict

from userspace_proxy.dataplane.context import PlaneContext, Shared
from userspace_proxy.dataplane.datagrams import UdpFlow
from userspace_proxy.dataplane.mmsg import anybody_like, asked_ip, client_address, reply_record
from userspace_proxy.dataplane.picker import Picker
from userspace_proxy.dataplane.proxy_protocol import header_of
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, is_self_connected
from userspace_proxy.dataplane.transparent import Transparent
from userspace_proxy.interfaces import AccessRecord, Backends, EndpointCounters, ListenerSpec
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.names import ListenerName
from userspace_proxy.model.service import portals

# Not the endpoint's fault: there is no room now, or the datagram is too long for this way and shorter ones go on.
_DROPPED = {errno.EAGAIN, errno.EMSGSIZE}

log = logging.getLogger(__name__)


class UdpListener:
    """One proxy port of a UDP service port, and its flows, least recently used first."""

    def __init__(self, spec: ListenerSpec, sock: socket.socket, context: PlaneContext, shared: Shared) -> None:
        self.counters = shared.counters
        self.picker = Picker(shared.memory)
        self._context = context
        self._transparent = Transparent(context.tables, self.counters) if spec.transparent else None
        self.configure(spec)
        self._flows: OrderedDict[bytes, UdpFlow] = OrderedDict()
        self._serving: frozenset[Address] = frozenset()
        self.touch = self._flows.move_to_end
        self._sock = sock
        self._datagrams = context.datagrams
        self._datagrams.serve(self)

    @property
    def name(self) -> ListenerName:
        return self._spec.name

    @property
    def spec(self) -> ListenerSpec:
        return self._spec

    @property
    def sock(self) -> socket.socket:
        """The proxy port's socket; for handing it on."""
        return self._sock

    @property
    def fd(self) -> int:
        return self._sock.fileno()

    def configure(self, spec: ListenerSpec) -> None:
        self._spec = spec
        self._header_of = header_of(spec.service_port.source_ip, spec.name.protocol)
        affinity = spec.service_port.affinity_timeout_s is not None
        self._knows_clients = affinity or spec.transparent or self._header_of is not None

    def update(self, backends: Backends) -> None:
        """Take new endpoints; flows whose endpoint serves no more end, and their next datagram starts anew."""
        self.picker.set_endpoints(backends.usable)
        self._serving = frozenset(e.address for e in backends.serving)
        for flow in [f for f in self._flows.values() if f.endpoint.address not in self._serving]:
            self._end(flow, "endpoint gone")

    def leave(self) -> None:
        """Read no more from clients: another process does, at the same socket. Answers are still passed on."""
        self._datagrams.leave(self)

    def close(self, heir: UdpListener | None = None) -> None:
        """Serve no more. *heir*, of the same service port, goes on with the flows whose endpoint serves it too."""
        for flow in list(self._flows.values()):
            if heir is not None and heir.take_over(flow):
                del self._flows[flow.key]
            else:
                self._end(flow, "service gone", rest=False)
        self._datagrams.leave(self)
        self._sock.close()

    def take_over(self, flow: UdpFlow) -> bool:
        """Go on with *flow*, whose client is led here from now on; return whether that can be."""
        flows = self._flows
        if flow.endpoint.address not in self._serving or flow.key in flows:
            return False
        if len(flows) >= self._context.limits.udp_flows_per_service:
            return False
        flows[flow.key] = flow
        flow.front = self
        return True

    # ---- client to backend

    def receive(self) -> None:
        now = self._context.now()
        flow_of, touch = self._flows.get, self.touch
        for record, length, room in self._datagrams.inbox.receive(self.fd):
            flow = flow_of(record)
            if flow is not None:
                touch(record)
            elif (flow := self._begin(record, now)) is None:
                self.counters.datagrams_dropped += 1
                continue
            try:
                if flow.header:
                    flow.send(room[:length])
                else:
                    flow.sock.send(room[:length])  # a call less, for nearly all
            except OSError as error:
                self._send_anew(flow, room[:length], error, now)
                continue
            flow.last_at = now
            flow.bytes_to_backend += length

    def _send_anew(self, flow: UdpFlow, datagram: memoryview, error: OSError, now: float) -> None:
        """Give *datagram*, which *flow* could not send, to another flow where that is right."""
        if error.errno not in _DROPPED:
            # What was refused is an earlier datagram of this flow; this one was not sent and can go elsewhere.
            self.lose(flow, error)
            again = self._begin(flow.key, now)
            if again is not None:
                try:
                    again.send(datagram)
                except OSError as refused:
                    if refused.errno not in _DROPPED:
                        self.lose(again, refused)
                else:
                    again.bytes_to_backend += len(datagram)
                    return
        self.counters.datagrams_dropped += 1

    def _begin(self, key: bytes, now: float) -> UdpFlow | None:
        """Open a flow to the picked endpoint, or to the next one where there is no way to it."""
        flows, datagrams, counters = self._flows, self._datagrams, self.counters
        if len(flows) >= self._context.limits.udp_flows_per_service:
            self._evict()
        client_ip = client_address(key)[0] if self._knows_clients else anybody_like(key)
        tried: dict[Address, bool] = {}
        while (pick := self.picker.pick(client_ip, tried)) is not None:
            address = pick.endpoint.address
            if tried:
                counters.retries += 1
                pick.counters.retries += 1
            tried[address] = True
            if self._transparent is None:
                sock = datagrams.lease(address) or self._open_socket(address)
            else:
                sock = self._socket_as(client_ip, address, self._transparent)
            if sock is None:
                return None
            try:
                sock.connect(address)
                if is_self_connected(sock, address):
                    raise ConnectionRefusedError(errno.ECONNREFUSED, os.strerror(errno.ECONNREFUSED))
            except OSError as error:
                datagrams.close(sock)
                self._hold_against(pick.endpoint, pick.counters, error)
                continue
            header = self._header(key) if self._header_of else b""
            flow = flows[key] = UdpFlow(key, reply_record(key), self, sock, pick, now, header)
            datagrams.begin(flow)
            counters.flows_total += 1
            counters.flows += 1
            pick.counters.opened += 1
            pick.counters.open += 1
            return flow
        return None

    def _header(self, key: bytes) -> bytes:
        """Return what goes in front of each datagram of this client."""
        assert self._header_of is not None
        client = client_address(key)
        return self._header_of(client, self._context.tables.dialled_by(client, (asked_ip(key), self._spec.proxy_port)))

    def _socket_as(self, client_ip: str, address: Address, transparent: Transparent) -> socket.socket | None:
        """Return a socket that speaks as the client, where the endpoint is to see it; nobody else had it before."""
        sock = self._open_socket(address)
        if sock is not None and transparent.concerns(client_ip, address[0]):
            try:
                transparent.speak_as(sock, client_ip)
            except OSError:
                self._datagrams.close(sock)
                return None
        return sock

    def _open_socket(self, address: Address) -> socket.socket | None:
        fits = self._context.connections.fits
        if not fits(1):  # sockets that nobody uses make way first, then the flow idle for longest
            self._datagrams.shed()
            if not fits(1):
                self._evict(rest=False)
        try:
            return self._datagrams.open(address)
        except OSError as error:
            # Out of descriptors: the flow that has been idle for longest makes way, once its socket is closed.
            self._context.connections.note_shortage(error)
            self._datagrams.shed()
            self._evict(rest=False)
            return None

    def _evict(self, *, rest: bool = True) -> None:
        oldest = next(iter(self._flows.values()), None)
        if oldest is not None:
            self.counters.flows_evicted += 1
            self._end(oldest, "evicted: too many flows", rest=rest)

    # ---- backend to client

    def answered(self, flow: UdpFlow) -> None:
        flow.answered = True
        if self.picker.report_success(flow.endpoint):
            log.info("endpoint %s answers again", flow.endpoint)

    def not_sent(self, datagrams: int) -> None:
        self.counters.datagrams_dropped += datagrams
        log.debug("%s: the kernel did not take %d replies", self.name, datagrams)

    # ---- endings

    def lose(self, flow: UdpFlow, error: OSError) -> None:
        """The endpoint refused: hold it against it, and end the flow so that the next datagram goes elsewhere."""
        self._hold_against(flow.endpoint, flow.counters, error)
        self._end(flow, f"refused: {os.strerror(error.errno or 0)}")

    def _hold_against(self, endpoint: Endpoint, counters: EndpointCounters, error: OSError) -> None:
        self.counters.dial_failures += 1
        counters.dial_failures += 1
        if error.errno == errno.EPERM:
            log.debug("%s: a firewall of this host forbids datagrams to %s", self.name, endpoint)
        elif error.errno in LOCAL_SHORTAGES:
            self._context.connections.note_shortage(error)
        elif self.picker.report_failure(endpoint):
            self.counters.ejections += 1
            counters.ejections += 1
            log.info("endpoint %s is passed over for a while: %s", endpoint, error.strerror)

    def count_bytes(self) -> None:
        """Bring the byte counters up to date."""
        for flow in self._flows.values():
            self._count_bytes(flow)

    def _count_bytes(self, flow: UdpFlow) -> None:
        to_backend, to_client = flow.counted
        flow.counted = flow.bytes_to_backend, flow.bytes_to_client
        for counters in (self.counters, flow.counters):
            counters.bytes_to_backends += flow.bytes_to_backend - to_backend
            counters.bytes_to_clients += flow.bytes_to_client - to_client

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
        self._datagrams.expire(now)

    def _end(self, flow: UdpFlow, how: str, *, rest: bool = True) -> None:
        if self._flows.pop(flow.key, None) is None:
            return
        now = self._context.now()
        self._datagrams.end(flow, now, rest=rest and self._transparent is None)
        self.counters.flows -= 1
        flow.counters.open -= 1
        self._count_bytes(flow)
        if self._context.access_log is None:
            return
        self._context.access_log(
            AccessRecord(
                service_port=self.name.service_port,
                client=client_address(flow.key),
                portal=known[0] if len(known := portals(self._spec.service_port)) == 1 else None,
                endpoint=flow.endpoint,
                why=flow.why,
                bytes_to_backend=flow.bytes_to_backend,
                bytes_to_client=flow.bytes_to_client,
                duration_s=now - flow.started_at,
                how=how,
            )
        )
