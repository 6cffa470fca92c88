"""Collect the details of single service ports, in steps that take a fraction of a millisecond each."""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

from userspace_proxy.dataplane.connections import Connections
from userspace_proxy.dataplane.memory import Memory
from userspace_proxy.dataplane.tcp import TcpListener
from userspace_proxy.dataplane.udp import UdpListener
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.details import (
    ConnectionDetails,
    Details,
    DetailsRequest,
    EndpointDetails,
    NextChoice,
    ServicePortDetails,
)
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ListenerName, ServicePortName

_STEP = 128
_PORTS_A_STEP = 16
# The most endpoints reported for one service port.
_ENDPOINTS_MAX = 2_000


def collect_details(
    request: DetailsRequest, listeners: Mapping[ListenerName, TcpListener | UdpListener], connections: Connections
) -> Iterator[Details]:
    """Yield the answer to *request* in parts."""
    listeners_of: dict[ServicePortName, list[TcpListener | UdpListener]] = {}
    wanted = set(request.names)
    for listener in listeners.values():
        if not wanted or listener.name.service_port in wanted:
            listeners_of.setdefault(listener.name.service_port, []).append(listener)
    names = list(listeners_of) if wanted else []
    for start in range(0, len(names), _PORTS_A_STEP):
        part = (_service_port(n, listeners_of[n], request.client_ip) for n in names[start : start + _PORTS_A_STEP])
        yield Details(tuple(details for details in part if details.endpoints or details.choices))
    if request.connections:
        flows = (
            listener.details() for its in listeners_of.values() for listener in its if isinstance(listener, UdpListener)
        )
        found = chain((connection.details() for connection in list(connections)), *flows)
        yield from _connections(request.connections, wanted, found)


def _service_port(
    name: ServicePortName, listeners: Sequence[TcpListener | UdpListener], client_ip: str
) -> ServicePortDetails:
    memory = listeners[0].shared.memory
    now = memory.now()
    pins = Counter(pin.address for pin in memory.pins.values() if pin.expires_at > now)
    endpoints = (_endpoint(address, counters, memory, pins[address]) for address, counters in memory.counters())
    choices = []
    for listener in listeners if client_ip else ():
        preview = listener.picker.preview(client_ip)
        choices.append((listener.name, tuple(NextChoice(p.endpoint.address, odds, p.why) for p, odds in preview)))
    return ServicePortDetails(name, tuple(islice(filter(None, endpoints), _ENDPOINTS_MAX)), tuple(choices))


def _endpoint(address: Address, counters: EndpointCounters, memory: Memory, pins: int) -> EndpointDetails | None:
    """Return the details of one endpoint, or None if there is nothing to report."""
    now, ejection, since = memory.now(), memory.ejected.get(address), memory.starting.get(address)
    if not (counters.opened or counters.dial_failures or ejection or pins or since is not None):
        return None
    failed_at, why = memory.last_failures.get(address, (0.0, ""))
    until = 0.0 if ejection is None else time.time() + max(ejection.until - now, 0.0)
    share = 1.0 if since is None else memory.share_of(since, now)
    return EndpointDetails(
        address, counters.open, counters.opened, counters.dial_failures, pins, until, why, failed_at, share
    )


def _connections(most: int, wanted: set[ServicePortName], found: Iterable[ConnectionDetails]) -> Iterator[Details]:
    """Yield the first *most* of *found* that belong to *wanted*, or to any service port if that is empty."""
    part: list[ConnectionDetails] = []
    matching = 0
    for count, connection in enumerate(found, 1):
        if not wanted or connection.service_port in wanted:
            matching += 1
            if matching <= most:
                part.append(connection)
        if not count % _STEP:
            yield Details((), tuple(part))
            part = []
    yield Details((), tuple(part), max(0, matching - most))
