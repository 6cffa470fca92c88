"""What the proxy counts, each with the metric that shows it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName

_METRIC = "metric"


class CounterMetric(NamedTuple):
    """The metric that shows a counter, without its prefix. ``rises``: it is a counter for Prometheus, else a gauge."""

    name: str
    text: str
    rises: bool


def _shown_by(*metrics: CounterMetric) -> Any:
    return field(default=0, metadata={_METRIC: metrics})


def _counter(name: str, text: str) -> Any:
    return _shown_by(CounterMetric(name, text, rises=True))


def _gauge(name: str, text: str) -> Any:
    return _shown_by(CounterMetric(name, text, rises=False))


def metrics_of(counted: type) -> Iterator[tuple[CounterMetric, str]]:
    """Yield each metric of the class *counted*, and the field that it shows; second metrics of fields come last."""
    for place in (0, 1):
        for each in fields(counted):
            yield from ((metric, each.name) for metric in each.metadata.get(_METRIC, ())[place : place + 1])


@dataclass(slots=True)
class Counters:
    """Counters of one service port: plain ints that the hot path increments and a scrape reads."""

    endpoints: int = _gauge("endpoints", "endpoints that may take new traffic, as the cluster says")
    ejected: int = _gauge("ejected_endpoints", "of these, the ones that are ejected now because they failed")
    starting: int = _gauge("slow_start_endpoints", "endpoints in slow start, which get a part of their connections")
    accepted: int = _counter("connections", "TCP connections accepted for a service port")
    open: int = _gauge("open_connections", "TCP connections open now")
    failed: int = _counter("failed_connections", "TCP connections reset because no endpoint could be reached")
    unanswered: int = _counter("unanswered_connections", "TCP connections that a backend reset before it sent a byte")
    closed_by_removal: int = _counter("removal_closed_connections", "TCP connections ended by on-endpoint-removal")
    closed_by_age: int = _counter("age_closed_connections", "TCP connections ended by max-connection-age")
    waiting: int = _gauge("waiting_connections", "TCP connections that wait for an endpoint now")
    waits_released: int = _counter("waits_released_connections", "TCP connections for which an endpoint came")
    waits_expired: int = _counter("waits_expired_connections", "TCP connections for which no endpoint came in time")
    waits_abandoned: int = _counter("waits_abandoned_connections", "TCP connections whose client left while it waited")
    refused: int = _counter(
        "refused_connections", "TCP connections that came to a proxy port by another way than a portal"
    )
    limited: int = _counter("limited_connections", "TCP connections reset because their client or Service had too many")
    bytes_to_backends: int = _counter("to_backends_bytes", "bytes from clients to backends")
    bytes_to_clients: int = _counter("to_clients_bytes", "bytes from backends to clients")
    dial_failures: int = _counter("dial_failures", "attempts to reach an endpoint that failed")
    port_exhaustions: int = _counter("port_exhaustions", "attempts for which every local port was in use")
    sources_refused: int = _counter(
        "refused_sources", "dials for which the kernel refused the client's address as source"
    )
    retries: int = _counter("retries", "attempts after the first one of a connection or flow")
    ejections: int = _counter("ejections", "times an endpoint was ejected for a while")
    pins: int = _gauge("affinity_pins", "clients that stay with an endpoint, by sessionAffinity")
    flows_total: int = _counter("udp_flows", "UDP flows begun")
    flows: int = _gauge("udp_open_flows", "UDP flows now")
    flows_evicted: int = _counter("udp_evicted_flows", "UDP flows evicted to make room for others")
    datagrams_dropped: int = _counter("udp_dropped_datagrams", "datagrams dropped because they could not be forwarded")


@dataclass(slots=True)
class EndpointCounters:
    """Counters of one endpoint of a service port: plain ints, as in `Counters`.

    ``dialling``: TCP connections that may become open.
    """

    opened: int = _shown_by(
        CounterMetric("connections", "TCP connections to an endpoint", rises=True),
        CounterMetric("udp_flows", "UDP flows to an endpoint", rises=True),
    )
    open: int = _shown_by(
        CounterMetric("open_connections", "TCP connections to an endpoint that are open now", rises=False),
        CounterMetric("udp_open_flows", "UDP flows to an endpoint now", rises=False),
    )
    dialling: int = _gauge("open_dials", "attempts to reach an endpoint that are under way")
    bytes_to_backends: int = _counter("to_backends_bytes", "bytes from clients to an endpoint")
    bytes_to_clients: int = _counter("to_clients_bytes", "bytes from an endpoint to clients")
    dial_failures: int = _counter("dial_failures", "attempts to reach an endpoint that failed")
    retries: int = _counter("retries", "attempts to reach an endpoint after another one had failed")
    ejections: int = _counter("ejections", "times an endpoint was ejected for a while")


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
    connections_open: int = _gauge("connections_open_all", "TCP connections open now, all service ports")
    hidden_endpoints: int = _gauge("hidden_endpoints", "endpoints without metrics: more than --metrics-endpoint-series")
    accept_paused: int = _counter("accept_pauses", "times accepting was paused because descriptors were short")
    local_shortages: int = _counter("local_shortages", "times this host ran out of ports, descriptors or memory")
    worker_restarts: int = _counter("worker_restarts", "times a data-plane process died or hung, and was replaced")
    access_lines_dropped: int = _counter("access_log_lines_dropped", "access-log lines that were not written")
    log_lines_dropped: int = _counter("log_lines_dropped", "log lines dropped because stderr did not take them")


@dataclass(slots=True)
class ControlStats:
    """Gauges and counters of the control process: service ports, rule loads, syncs and problems."""

    is_plane_failing: bool = _gauge("data_plane_failing", "1 while a data-plane process serves nothing")
    service_ports: int = _gauge("service_ports", "service ports that are served")
    rule_loads: int = _counter("rule_loads", "rule loads that succeeded")
    rule_repairs: int = _counter("rule_repairs", "rule loads because another program had changed rules")
    repair_failing_s: float = _gauge("rule_repair_failing_seconds", "seconds for which repairs of rules have failed")
    last_sync_at: float = _gauge("last_sync_timestamp_seconds", "when the last sync succeeded")
    sync_failures: int = _counter("sync_failures", "syncs that failed; the previous state stayed in force")
    sync_failing_s: float = _gauge("sync_failing_seconds", "seconds for which every sync has failed")
    problems: int = _gauge("object_problems", "objects and files that cannot be used as they are")
    unopened: int = _gauge("unopened_service_ports", "service ports without a listener")
