"""Add up the counters of several listeners or workers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from typing import TypeVar

from userspace_proxy.model.counters import Counters, EndpointCounters, PlaneStats, ServiceStats
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName

# About the same in every worker, so the maximum is taken; all other counters are added up.
_ALIKE = {"endpoints", "ejected", "starting"}

Counted = TypeVar("Counted", Counters, EndpointCounters, PlaneStats)


def add_up(told: Iterable[ServiceStats], totals: PlaneStats, hidden_endpoints: int) -> PlaneStats:
    """Return *totals* with the counters of service ports and endpoints in *told* added up."""
    services: dict[ServicePortName, Counters] = {}
    endpoints: dict[ServicePortName, dict[Address, EndpointCounters]] = {}
    for name, counters, of_endpoints in told:
        known = services.get(name)
        services[name] = counters if known is None else sum_of(known, counters)
        if of_endpoints:
            so_far = endpoints.setdefault(name, {})
            for address, of_one in of_endpoints:
                so_far[address] = sum_of(so_far[address], of_one) if address in so_far else of_one
    return replace(totals, services=services, endpoints=endpoints, hidden_endpoints=hidden_endpoints)


def sum_of(first: Counted, *others: Counted) -> Counted:
    """Return the sum of all given counters. Mappings are those of *first*."""
    return replace(
        first,
        **{
            field.name: (max if field.name in _ALIKE else sum)(getattr(one, field.name) for one in (first, *others))
            for field in fields(first)
            if isinstance(getattr(first, field.name), int)
        },
    )
