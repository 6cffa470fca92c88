"""What listeners for TCP and UDP have in common: a picker, failure counts of endpoints, and the access log."""

import logging
import socket

from userspace_proxy.dataplane.context import PlaneContext, Shared
from userspace_proxy.dataplane.picker import Pick, Picker
from userspace_proxy.dataplane.proxy_protocol import header_of
from userspace_proxy.dataplane.transparent import Transparent
from userspace_proxy.model.access_record import AccessRecord
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.service import Portal

log = logging.getLogger(__name__)


class BaseListener:
    """One proxy port of a service port. ``sock`` may be passed to another process, with the ``backends`` given last."""

    def __init__(self, spec: ListenerSpec, sock: socket.socket, context: PlaneContext, shared: Shared) -> None:
        self.sock = sock
        self.context = context
        self.shared = shared
        self.backends: Backends | None = None
        self.counters = shared.counters
        self.suspects = shared.memory.suspects
        self.picker = Picker(shared.memory, mixes_families=bool(spec.at))
        self.transparent = Transparent(context.tables, self.counters) if spec.transparent else None
        self.configure(spec)

    def configure(self, spec: ListenerSpec) -> None:
        """Apply new portals, affinity, balancing, source IP and connection policy. The proxy port stays."""
        self.spec, self.name, service_port = spec, spec.name, spec.service_port
        self._header_of = header_of(service_port.source_ip, spec.name.protocol)
        self.shared.memory.set_affinity(service_port.affinity_timeout_s)
        self.shared.memory.set_slow_start(service_port.slow_start_s)
        self.picker.balance(service_port.balance, service_port.weights)

    def seen_client(self, client_ip: str, endpoint: Endpoint) -> str:
        """Return *client_ip* if *endpoint* sees it, "" if it sees this node's address."""
        is_seen = self.transparent is not None and self.transparent.concerns(client_ip, endpoint.ip)
        return client_ip if is_seen else ""

    def hold_against(self, pick: Pick, client_ip: str, why: str) -> bool:
        """Count a failure of *pick*'s endpoint towards its ejection. Return whether this ejects it for all clients."""
        seen_client = self.seen_client(client_ip, pick.endpoint)
        if not self.picker.report_failure(pick.endpoint, seen_client, why):
            return False
        self.note_ejection(pick, why)
        return not seen_client

    def note_ejection(self, pick: Pick, why: str) -> None:
        self.counters.ejections += 1
        pick.counters.ejections += 1
        log.info("endpoint %s is ejected for a while: %s", pick.endpoint, why)

    def count(self, of_endpoint: EndpointCounters, before: tuple[int, int], now: tuple[int, int]) -> None:
        """Count the bytes, to the backend and to the client, that were moved since *before*."""
        for counters in (self.counters, of_endpoint):
            counters.bytes_to_backends += now[0] - before[0]
            counters.bytes_to_clients += now[1] - before[1]

    def record(
        self,
        client: Address,
        portal: Portal | None,
        pick: Pick | None,
        why: str,
        moved: tuple[int, int],
        started_at: float,
        how: str,
    ) -> None:
        """Write a connection or flow that has ended to the access log, if there is one."""
        if self.context.access_log is None:
            return
        endpoint, duration_s = None if pick is None else pick.endpoint, self.context.now() - started_at
        self.context.access_log(
            AccessRecord(self.name.service_port, client, portal, endpoint, why, *moved, duration_s, how)
        )
