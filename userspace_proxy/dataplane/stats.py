"""Add up the counters of several listeners or workers. Pure."""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TypeVar

from userspace_proxy.model.counters import Counters, EndpointCounters, PlaneStats, ServiceStats
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName

# About the same in every worker, so the maximum is taken; all other counters are added up.
_ALIKE = {"endpoints", "ejected", "starting"}

Counted = TypeVar("Counted", Counters, EndpointCounters, PlaneStats)


def add_up(parts: Iterable[ServiceStats], totals: PlaneStats, hidden_endpoints: int) -> PlaneStats:
    """Return *totals* with the counters of service ports and endpoints in *parts* added up."""
    services: defaultdict[ServicePortName, list[Counters]] = defaultdict(list)
    endpoints: defaultdict[ServicePortName, dict[Address, list[EndpointCounters]]] = defaultdict(dict)
    for name, counters, of_endpoints in parts:
        services[name].append(counters)
        for address, of_one in of_endpoints:
            endpoints[name].setdefault(address, []).append(of_one)
    return replace(
        totals,
        services={name: sum_of(*alike) for name, alike in services.items()},
        endpoints={name: {at: sum_of(*alike) for at, alike in its.items()} for name, its in endpoints.items()},
        hidden_endpoints=hidden_endpoints,
    )


def sum_of(first: Counted, *others: Counted) -> Counted:
    """Return the sum of all given counters. Fields that are mappings are not summed: those of *first* are kept."""
    if not others:
        return first
    return replace(
        first,
        **{
            field.name: (max if field.name in _ALIKE else sum)(getattr(one, field.name) for one in (first, *others))
            for field in fields(first)
            if isinstance(getattr(first, field.name), int)
        },
    )
