"""What health-check node ports say: how many endpoints of a Service are on this node."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """The port at which load balancers ask for a Service, and what they are told."""

    port: int
    local_endpoints: int
