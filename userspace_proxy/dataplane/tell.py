"""Collect the details of single service ports, in steps that take a fraction of a millisecond each."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

from userspace_proxy.dataplane.connections import Connections
from userspace_proxy.dataplane.context import Shared
from userspace_proxy.dataplane.memory import Memory
from userspace_proxy.dataplane.tcp import TcpListener
from userspace_proxy.dataplane.udp import UdpListener
from userspace_proxy.model.details import (
    ConnectionDetails,
    Details,
    DetailsRequest,
    EndpointDetails,
    NextChoice,
    ServicePortDetails,
)
from userspace_proxy.model.names import ListenerName, ServicePortName

_STEP = 128
_PORTS_A_STEP = 16
# The most endpoints reported for one service port.
_ENDPOINTS_MAX = 2_000

Listeners = Mapping[ListenerName, TcpListener | UdpListener]


def tell_details(
    request: DetailsRequest,
    shared: Mapping[ServicePortName, Shared],
    listeners: Listeners,
    connections: Connections,
) -> Iterator[Details]:
    """Yield the answer to *request* in parts."""
    of_ports: dict[ServicePortName, list[TcpListener | UdpListener]] = {}
    wanted = set(request.names)
    for listener in listeners.values():
        if not wanted or listener.name.service_port in wanted:
            of_ports.setdefault(listener.name.service_port, []).append(listener)
    part: list[ServicePortDetails] = []
    for count, (name, its) in enumerate(of_ports.items() if wanted else (), 1):
        if (known := shared.get(name)) is not None:
            of_port = _service_port(name, known.memory, its, request.client_ip)
            if of_port.endpoints or of_port.choices:
                part.append(of_port)
        if not count % _PORTS_A_STEP:
            yield Details(tuple(part))
            part = []
    yield Details(tuple(part))
    if request.connections:
        yield from _connections(request.connections, wanted, of_ports, connections)


def _service_port(
    name: ServicePortName, memory: Memory, listeners: Iterable[TcpListener | UdpListener], client_ip: str
) -> ServicePortDetails:
    now, wall = memory.now(), time.time()
    pins = Counter(pin.address for pin in memory.pins.values() if pin.expires_at > now)
    endpoints = []
    for address, counters in memory.counters():
        ejection, (failed_at, why) = memory.ejected.get(address), memory.last_failures.get(address, (0.0, ""))
        since = memory.starting.get(address)
        if counters.opened or counters.dial_failures or ejection or pins[address] or since is not None:
            until = 0.0 if ejection is None else wall + max(ejection.until - now, 0.0)
            share = 1.0 if since is None else memory.share_of(since, now)
            endpoints.append(
                EndpointDetails(
                    address,
                    counters.open,
                    counters.opened,
                    counters.dial_failures,
                    pins[address],
                    until,
                    why,
                    failed_at,
                    share,
                )
            )
    choices = []
    for listener in listeners if client_ip else ():
        preview = listener.picker.preview(client_ip)
        choices.append((listener.name, tuple(NextChoice(p.endpoint.address, odds, p.why) for p, odds in preview)))
    return ServicePortDetails(name, tuple(endpoints[:_ENDPOINTS_MAX]), tuple(choices))


def _connections(
    most: int,
    wanted: set[ServicePortName],
    of_ports: Mapping[ServicePortName, Iterable[TcpListener | UdpListener]],
    connections: Connections,
) -> Iterator[Details]:
    flows = (
        listener.details()
        for listeners in of_ports.values()
        for listener in listeners
        if isinstance(listener, UdpListener)
    )
    part: list[ConnectionDetails] = []
    told = hidden = 0
    for count, known in enumerate(chain((connection.details() for connection in list(connections)), *flows), 1):
        if not wanted or known.service_port in wanted:
            if told < most:
                told += 1
                part.append(known)
            else:
                hidden += 1
        if not count % _STEP:
            yield Details((), tuple(part))
            part = []
    yield Details((), tuple(part), hidden)
