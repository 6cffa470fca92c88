"""What a data plane counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName


@dataclass(slots=True)
class Counters:
    """Counters of one service port: plain ints that the hot path increments and a scrape reads.

    ``refused``: connections to the proxy port that did not come by a portal. ``limited``: connections refused because
    their client or service port had too many open. ``port_exhaustions``: dials for which every local port towards the
    endpoint was in use. ``sources_refused``: dials for which the kernel refused the client's address as source.
    ``unanswered``: connections that a backend reset before it sent a byte. ``closed_by_removal``, ``closed_by_age``:
    connections that ended by the Service's policy. ``waiting``: connections that wait for an endpoint now;
    ``waits_released``, ``waits_expired``, ``waits_abandoned``: those for which one came, none came in time, or whose
    client left.
    """

    accepted: int = 0
    open: int = 0
    bytes_to_backends: int = 0
    bytes_to_clients: int = 0
    dial_failures: int = 0
    retries: int = 0
    ejections: int = 0
    failed: int = 0
    refused: int = 0
    limited: int = 0
    port_exhaustions: int = 0
    sources_refused: int = 0
    unanswered: int = 0
    closed_by_removal: int = 0
    closed_by_age: int = 0
    waiting: int = 0
    waits_released: int = 0
    waits_expired: int = 0
    waits_abandoned: int = 0
    flows: int = 0
    flows_total: int = 0
    flows_evicted: int = 0
    datagrams_dropped: int = 0
    pins: int = 0
    endpoints: int = 0
    ejected: int = 0
    starting: int = 0


@dataclass(slots=True)
class EndpointCounters:
    """Counters of one endpoint of a service port: plain ints, as in `Counters`.

    ``opened``, ``open``: TCP connections or UDP flows to the endpoint. ``dialling``: TCP connections that may become
    open. ``retries``: those that came after another endpoint had failed.
    """

    opened: int = 0
    open: int = 0
    dialling: int = 0
    bytes_to_backends: int = 0
    bytes_to_clients: int = 0
    dial_failures: int = 0
    retries: int = 0
    ejections: int = 0


class ServiceStats(NamedTuple):
    """The counters of one service port, and of its endpoints if requested."""

    name: ServicePortName
    counters: Counters
    endpoints: list[tuple[Address, EndpointCounters]]


@dataclass(slots=True)
class PlaneStats:
    """The data plane's counters at one moment.

    ``endpoints``: all endpoints, and removed ones that still have open connections. If there are too many, it is empty
    and ``hidden_endpoints`` has their number.
    """

    services: Mapping[ServicePortName, Counters]
    endpoints: Mapping[ServicePortName, Mapping[Address, EndpointCounters]] = field(default_factory=dict)
    hidden_endpoints: int = 0
    connections_open: int = 0
    accept_paused: int = 0
    local_shortages: int = 0
    access_lines_dropped: int = 0
    log_lines_dropped: int = 0
    worker_restarts: int = 0
