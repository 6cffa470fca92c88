"""One UDP listener: a flow for each client, with its own backend socket until it ends.

A backend may reply twice, or late. A flow's socket is connected to one backend, and its local port rests before another
flow gets it. So such a reply reaches the client that asked, or is dropped. Replies leave from the address that the
client's datagram arrived at (pktinfo); any other address would miss the kernel's NAT entry.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections import OrderedDict
from collections.abc import Iterator

from userspace_proxy.dataplane.context import PlaneContext, Shared
from userspace_proxy.dataplane.datagrams import Destination, Leased, UdpFlow
from userspace_proxy.dataplane.dial import DIALS_MAX
from userspace_proxy.dataplane.listener import BaseListener
from userspace_proxy.dataplane.mmsg import anybody_like, asked_ip, client_address, client_of
from userspace_proxy.dataplane.picker import Pick
from userspace_proxy.dataplane.sockets import LOCAL_SHORTAGES, bind_anywhere
from userspace_proxy.model.details import ConnectionDetails
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.service import Balance, Portal, SourceIP, portals

# Errors that drop the datagram but do not count against the endpoint: no buffer space now, or longer than the
# path MTU (shorter datagrams pass).
_DROPPED = {errno.EAGAIN, errno.EMSGSIZE}

log = logging.getLogger(__name__)


class UdpListener(BaseListener):
    """One proxy port of a UDP service port, with its flows, least recently used first."""

    def __init__(self, spec: ListenerSpec, sock: socket.socket, context: PlaneContext, shared: Shared) -> None:
        self._flows: OrderedDict[bytes, UdpFlow] = OrderedDict()
        super().__init__(spec, sock, context, shared)
        self._serving: frozenset[Address] = frozenset()
        self.touch = self._flows.move_to_end
        self._datagrams = context.datagrams
        self._inbox = context.datagrams.inbox(sock.family)

    @property
    def fd(self) -> int:
        return self.sock.fileno()

    def begin(self) -> None:
        """Begin to read from clients."""
        self._datagrams.serve(self)

    def configure(self, spec: ListenerSpec) -> None:
        before = self.__dict__.get("_header_of")
        super().configure(spec)
        if self._header_of is not before:
            for flow in list(self._flows.values()):
                self._end(flow, "source-ip has changed")
        by_client = spec.service_port.affinity_timeout_s is not None or spec.service_port.balance is Balance.SOURCE_HASH
        self._needs_clients = by_client or spec.transparent or self._header_of is not None

    def update(self, backends: Backends) -> None:
        """Apply new endpoints. The caller then calls `end_if_gone` for each of `flows`."""
        self.picker.set_endpoints(backends.usable)
        self._serving = frozenset(e.address for e in backends.serving)

    @property
    def size(self) -> int:
        """Return the number of flows."""
        return len(self._flows)

    def least_recent(self) -> UdpFlow | None:
        """Return the flow that was used least recently, by either side."""
        return next(iter(self._flows.values()), None)

    def flows(self) -> list[UdpFlow]:
        """Return the flows, least recently used first. Of thousands, the event loop does a part at a time."""
        return list(self._flows.values())

    def end_if_gone(self, flow: UdpFlow) -> None:
        """End *flow* if its endpoint no longer serves; its client's next datagram begins a new flow."""
        if self._flows.get(flow.key) is flow and flow.pick.endpoint.address not in self._serving:
            self._end(flow, "endpoint gone")

    def leave(self) -> None:
        """Stop reading from clients: another process reads from the same socket. Replies are still forwarded."""
        self._datagrams.leave(self)

    def let_go(self, flow: UdpFlow, replacement: UdpListener | None) -> None:
        """End *flow*, unless *replacement*, of the same service port, serves its endpoint and takes it over."""
        if self._flows.get(flow.key) is not flow:
            return
        if replacement is not None and replacement.take_over(flow, self.spec.service_port.source_ip):
            del self._flows[flow.key]
        else:
            self._end(flow, "service gone")

    def close(self) -> None:
        """Close the listener, which has no flows any more."""
        self._datagrams.leave(self)
        self.sock.close()

    def take_over(self, flow: UdpFlow, source_ip: SourceIP) -> bool:
        """Take over *flow* from a listener that closes. Return False if that is not possible.

        *source_ip*: that of the flow's headers.
        """
        flows = self._flows
        if source_ip is not self.spec.service_port.source_ip:
            return False
        if flow.pick.endpoint.address not in self._serving or flow.key in flows:
            return False
        if len(flows) >= self.context.limits.udp_flows_per_service:
            return False
        flows[flow.key] = flow
        flow.front = self
        return True

    # ---- client to backend

    def receive(self, now: float) -> None:
        flow_of, touch = self._flows.get, self.touch
        for record, length, room in self._inbox.receive(self.sock.fileno()):
            flow = flow_of(record)
            if flow is not None:
                touch(record)
            elif (flow := self._begin(record, now, length)) is None:
                self.counters.datagrams_dropped += 1
                continue
            try:
                if flow.header:
                    flow.send(room[:length])
                else:
                    flow.sock.send(room[:length])  # saves a call for nearly all flows
            except OSError as error:
                self._resend(flow, room[:length], error, now)
                continue
            flow.last_at = now
            flow.bytes_to_backend += length

    def _resend(self, flow: UdpFlow, datagram: memoryview, error: OSError, now: float) -> None:
        """Send *datagram*, which *flow* failed to send, again if possible; otherwise count it as dropped."""
        if error.errno in _DROPPED:
            is_sent = error.errno == errno.EMSGSIZE and _is_sent_now(flow, datagram, now)
        else:
            # The error belongs to an earlier datagram of this flow. This one was not sent and can go to another
            # endpoint.
            self.lose(flow, error)
            is_sent = self._is_sent_by_another(flow, datagram, now)
        self.counters.datagrams_dropped += not is_sent

    def _is_sent_by_another(self, flow: UdpFlow, datagram: memoryview, now: float) -> bool:
        again = self._begin(flow.key, now, len(datagram))
        if again is None:
            return False
        try:
            again.send(datagram)
        except OSError as refused:
            if refused.errno not in _DROPPED:
                self.lose(again, refused)
            return False
        again.bytes_to_backend += len(datagram)
        return True

    def _begin(self, key: bytes, now: float, length: int) -> UdpFlow | None:
        """Open a flow for a datagram of *length* bytes, to the picked endpoint or the next one that can be reached.

        Give up after DIALS_MAX failures that eject nothing, as for TCP.
        """
        client, counters = client_of(key), self.counters
        client_ip = client_address(key)[0] if self._needs_clients else anybody_like(key)
        tried: dict[Address, bool] = {}
        left = DIALS_MAX
        while left and (pick := self.picker.pick(client_ip, tried)) is not None:
            endpoint, _, of_endpoint = pick
            address = endpoint.address
            counters.retries += bool(tried)
            of_endpoint.retries += bool(tried)
            try:
                leased = self._lease(address, client, client_ip, now)
            except OSError as error:
                left -= not self._note_failure(pick, error, key)
                tried[address] = True
                continue
            if leased is None:
                return None
            header = self._header(key) if self._header_of else b""
            flow = UdpFlow(key, self._inbox.reply_record(key), self, *leased, pick, now, now, now, length, header)
            self._flows[key] = flow
            self._datagrams.begin(flow, client)
            counters.flows_total += 1
            counters.flows += 1
            of_endpoint.opened += 1
            of_endpoint.open += 1
            return flow
        return None

    def _header(self, key: bytes) -> bytes:
        """Return the PROXY protocol header for each datagram of this client."""
        assert self._header_of is not None
        client = client_address(key)
        return self._header_of(client, self.context.tables.dialled_by(client, (asked_ip(key), self.spec.proxy_port)))

    def _lease(self, address: Address, client: bytes, client_ip: str, now: float) -> Leased | None:
        """Return a socket connected to *address*, or None if this host has none for the client now.

        At the flow limit, or short of descriptors, a flow is evicted first. Without a free port, a flow is evicted only
        if it has been silent for as long as a port rests.

        Raises:
            OSError: *address* cannot be reached.
        """
        datagrams = self._datagrams
        if address[1] in datagrams.proxy_ports and self._is_proxy_port(address):
            raise ConnectionRefusedError(errno.ECONNREFUSED, "the endpoint is a proxy port: an endless loop")
        destination = datagrams.towards(address)
        transparent, source, bind = self.transparent, "", bind_anywhere
        if transparent is not None and transparent.concerns(client_ip, address[0]):
            source, bind = client_ip, lambda sock, port: transparent.speak_as(sock, client_ip, port)
        is_full = len(self._flows) >= self.context.limits.udp_flows_per_service
        if is_full or not self.context.connections.fits(1 + datagrams.spare):
            left = self._evict_at_limit(destination, client, source, by_asking=not is_full)
            if left is not None:
                return left
        try:
            leased = datagrams.open(destination, address, client, source, now, bind)
        except OSError as error:
            if not source:
                self.context.connections.note_shortage(error)
            return None
        if leased is None:
            # Every port is in use or rests. Evict a flow that has been silent as long as a port rests, and reuse its
            # socket.
            oldest = destination.oldest(client)
            if oldest is not None and oldest.front is not None:
                leased = oldest.front.evict(oldest, destination, source, if_rested=True)
            if leased is None:
                self._note_exhaustion(address)
            return leased
        try:
            datagrams.connect(leased, address)
        except OSError:
            datagrams.close(leased, now)
            raise
        return leased

    def _is_proxy_port(self, address: Address) -> bool:
        """Return whether *address*, whose port is that of a proxy port, is at the same address as this one."""
        at = self.spec.at or address[0]
        return address[0] == at and self.context.tables.is_local(at)

    def _evict_at_limit(
        self, destination: Destination, client: bytes, source: str, *, by_asking: bool
    ) -> Leased | None:
        """Evict a flow: there are too many, or too few descriptors. Return its socket if that can be reused.

        Descriptors are shared by all service ports, so the one that has the most flows gives one up.
        """
        front, among, biggest = self, destination, self._datagrams.biggest
        if by_asking and biggest is not None and biggest.size > self.size and (flow := biggest.least_recent()):
            front, among = biggest, flow.destination
        oldest = among.oldest(client, by_asking=by_asking)
        if oldest is None or oldest.front is not front:
            oldest = front.least_recent()
        return None if oldest is None else front.evict(oldest, destination, source)

    def evict(self, flow: UdpFlow, destination: Destination, source: str, *, if_rested: bool = False) -> Leased | None:
        rested = self._datagrams.has_rested(flow, destination, source)
        if if_rested and not rested:
            return None
        self.counters.flows_evicted += 1
        self._end(flow, "evicted: too many flows", keep=rested)
        return Leased(destination, source, flow.port, flow.sock) if rested else None

    def _note_exhaustion(self, address: Address) -> None:
        level = logging.DEBUG if self.counters.port_exhaustions else logging.WARNING
        self.counters.port_exhaustions += 1
        log.log(
            level,
            "%s: every local port towards %s is in use or rests, new clients' datagrams are dropped and counted;"
            " add endpoints, widen net.ipv4.ip_local_port_range, or lower --udp-port-rest",
            *(self.name, "{}:{}".format(*address)),
        )

    # ---- backend to client

    def answered(self, flow: UdpFlow) -> None:
        flow.answered = True
        if self.transparent is None and not self.shared.memory.ejected:
            return
        endpoint = flow.pick.endpoint
        client_ip = "" if self.transparent is None else self.seen_client(client_address(flow.key)[0], endpoint)
        if self.picker.report_success(endpoint, client_ip):
            log.info("endpoint %s answers again", endpoint)

    def not_sent(self, datagrams: int) -> None:
        self.counters.datagrams_dropped += datagrams
        log.debug("%s: the kernel did not take %d replies", self.name, datagrams)

    # ---- endings

    def lose(self, flow: UdpFlow, error: OSError) -> None:
        """Count a failure of the endpoint of *flow* and end the flow; the next datagram uses another endpoint."""
        self._note_failure(flow.pick, error, flow.key)
        self._end(flow, f"refused: {os.strerror(error.errno or 0)}")

    def _note_failure(self, pick: Pick, error: OSError, key: bytes) -> bool:
        """Count a failure of the endpoint of *pick*. Return whether this ejects it for all clients."""
        self.counters.dial_failures += 1
        pick.counters.dial_failures += 1
        if error.errno == errno.EPERM:
            log.debug("%s: a firewall of this host forbids datagrams to %s", self.name, pick.endpoint)
        elif error.errno in LOCAL_SHORTAGES:
            self.context.connections.note_shortage(error)
        else:
            return self.hold_against(pick, client_address(key)[0], error.strerror or str(error))
        return False

    def details(self) -> Iterator[ConnectionDetails]:
        """Yield the addresses, age and byte counts of each flow, the longest unused first."""
        now, portal = self.context.now(), self._only_portal()
        for flow in self._flows.values():
            yield ConnectionDetails(
                self.name.service_port,
                client_address(flow.key),
                "" if portal is None else str(portal),
                flow.pick.endpoint.address,
                flow.pick.why,
                now - flow.started_at,
                flow.bytes_to_backend,
                flow.bytes_to_client,
            )

    def _only_portal(self) -> Portal | None:
        """Return the portal of this service port, or None if it has several."""
        all_portals = portals(self.spec.service_port)
        return all_portals[0] if len(all_portals) == 1 else None

    def count_bytes(self, flow: UdpFlow) -> None:
        """Update the byte counters with what *flow* has moved."""
        before, flow.counted = flow.counted, (flow.bytes_to_backend, flow.bytes_to_client)
        self.count(flow.pick.counters, before, flow.counted)

    def expire(self, now: float) -> None:
        """End flows idle for longer than their timeout, which follows conntrack's."""
        limits = self.context.limits
        shortest = min(limits.udp_timeout_s, limits.udp_stream_timeout_s)
        expired = []
        for flow in self._flows.values():
            idle_s = now - flow.last_at
            if idle_s < shortest:
                break  # in order of use: the rest were used later
            if idle_s >= (limits.udp_stream_timeout_s if flow.answered else limits.udp_timeout_s):
                expired.append(flow)
        for flow in expired:
            self._end(flow, "idle")

    def _end(self, flow: UdpFlow, how: str, *, keep: bool = False) -> None:
        if self._flows.pop(flow.key, None) is None:
            return
        self._datagrams.end(flow, keep=keep)
        self.counters.flows -= 1
        flow.pick.counters.open -= 1
        self.count_bytes(flow)
        if self.context.access_log is not None:
            client, portal = client_address(flow.key), self._only_portal()
            self.record(client, portal, flow.pick, flow.pick.why, flow.counted, flow.started_at, how)


def _is_sent_now(flow: UdpFlow, datagram: memoryview, now: float) -> bool:
    """Send *datagram* again. The path MTU became known by an earlier one of *flow*, and this one may be shorter."""
    try:
        flow.send(datagram)
    except OSError:
        return False
    flow.last_at = now
    flow.bytes_to_backend += len(datagram)
    return True
