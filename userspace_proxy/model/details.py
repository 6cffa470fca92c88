"""What a data plane reports of single service ports on request: endpoints, next choices, connections. Pure.

Times are wall-clock seconds.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import NamedTuple

from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ListenerName, ServicePortName


class EndpointDetails(NamedTuple):
    """What a data plane has seen of one endpoint.

    ``open``, ``opened``: connections or flows now, and ever. ``failures``: failed dials. ``pins``: clients with
    affinity to it. ``ejected_until``: 0 if it is not ejected. ``last_failure``: the reason, "" for none.
    ``share``: its present part (0 to 1) of its usual connections; below 1 in slow start.
    """

    address: Address
    open: int = 0
    opened: int = 0
    failures: int = 0
    pins: int = 0
    ejected_until: float = 0.0
    last_failure: str = ""
    failed_at: float = 0.0
    share: float = 1.0


class NextChoice(NamedTuple):
    """An endpoint that the next connection may get, with the probability (0 to 1) and the reason."""

    address: Address
    probability: float
    why: str


@dataclass(frozen=True, slots=True)
class ServicePortDetails:
    """The endpoints of one service port that have details, and the next choices of each listener.

    ``workers``: the number of worker processes that reported; each of them chooses by itself.
    """

    name: ServicePortName
    endpoints: tuple[EndpointDetails, ...] = ()
    choices: tuple[tuple[ListenerName, tuple[NextChoice, ...]], ...] = ()
    workers: int = 1


@dataclass(frozen=True, slots=True)
class ConnectionDetails:
    """One open connection or flow. ``portal``: "" if it is not known. ``endpoint``: None while being dialled."""

    service_port: ServicePortName
    client: Address
    portal: str
    endpoint: Address | None
    why: str
    age_s: float
    bytes_to_backend: int
    bytes_to_client: int


@dataclass(frozen=True, slots=True)
class DetailsRequest:
    """A request for details of the service ports ``names``.

    ``client_ip``: the client whose next choices are requested; "" for none. ``connections``: the maximum number of
    connections from each worker, the oldest first; of every service port if ``names`` is empty.
    """

    names: tuple[ServicePortName, ...]
    client_ip: str = ""
    connections: int = 0


@dataclass(frozen=True, slots=True)
class Details:
    """The answer to a `DetailsRequest`. ``hidden_connections``: number of open ones beyond the requested maximum."""

    service_ports: tuple[ServicePortDetails, ...] = ()
    connections: tuple[ConnectionDetails, ...] = ()
    hidden_connections: int = 0


def merge(reports: list[Details]) -> Details:
    """Merge the answers of several workers."""
    by_name: dict[ServicePortName, list[ServicePortDetails]] = defaultdict(list)
    for of_one in chain.from_iterable(details.service_ports for details in reports):
        by_name[of_one.name].append(of_one)
    connections = sorted(chain.from_iterable(details.connections for details in reports), key=lambda each: -each.age_s)
    hidden = sum(details.hidden_connections for details in reports)
    return Details(tuple(map(_merge_service_ports, by_name.values())), tuple(connections), hidden)


def _merge_service_ports(parts: list[ServicePortDetails]) -> ServicePortDetails:
    endpoints: dict[Address, list[EndpointDetails]] = defaultdict(list)
    for endpoint in chain.from_iterable(part.endpoints for part in parts):
        endpoints[endpoint.address].append(endpoint)
    choices: dict[ListenerName, dict[tuple[Address, str], float]] = defaultdict(lambda: defaultdict(float))
    for listener, of_listener in chain.from_iterable(part.choices for part in parts):
        for choice in of_listener:
            choices[listener][choice.address, choice.why] += choice.probability / len(parts)
    return ServicePortDetails(
        parts[0].name,
        tuple(reduce(_merge_endpoints, same) for same in endpoints.values()),
        tuple(
            (listener, tuple(NextChoice(address, share, why) for (address, why), share in shares.items()))
            for listener, shares in choices.items()
        ),
        len(parts),
    )


def _merge_endpoints(one: EndpointDetails, other: EndpointDetails) -> EndpointDetails:
    latest = max(one, other, key=lambda each: each.failed_at)
    return EndpointDetails(
        one.address,
        one.open + other.open,
        one.opened + other.opened,
        one.failures + other.failures,
        one.pins + other.pins,
        max(one.ejected_until, other.ejected_until),
        latest.last_failure,
        latest.failed_at,
        min(one.share, other.share),
    )
