"""Active health checks: what a probe sends and expects, and the health of an endpoint. Pure."""

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class ProbeKind(StrEnum):
    """What makes a probe succeed.

    TCP: the endpoint accepts a connection. HTTP: it answers a GET with a wanted status. UDP: it answers a datagram.
    """

    TCP = "tcp"
    HTTP = "http"
    UDP = "udp"


@dataclass(frozen=True, slots=True)
class ProbeSpec:
    """The health check of a Service. The defaults of ``interval_s``, ``rise`` and ``fall`` are HAProxy's.

    ``port``: 0 for each endpoint's own. ``path``, ``statuses`` (first and last): for HTTP. ``send``, ``expect``: for
    UDP; the answer must contain ``expect``. ``rise``, ``fall``: successes or failures in a row that change the verdict.
    ``panic``: if every endpoint is unhealthy, use all of them.
    """

    kind: ProbeKind
    port: int = 0
    path: str = "/"
    statuses: tuple[int, int] = (200, 399)
    send: bytes = b""
    expect: bytes = b""
    interval_s: float = 2.0
    timeout_s: float = 1.0
    rise: int = 2
    fall: int = 3
    panic: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.path}" if self.kind is ProbeKind.HTTP else str(self.kind)


class EndpointCondition(StrEnum):
    """The verdict of probes on an endpoint."""

    HEALTHY = "healthy"
    UNHEALTHY = "unhealthy"


class EndpointHealth(NamedTuple):
    """The condition of one endpoint, the wall-clock second since which it has it, and why.

    The second is 0 and the reason is "" if the condition has not changed since the start.
    """

    condition: EndpointCondition
    since: float = 0.0
    reason: str = ""


HEALTHY = EndpointHealth(EndpointCondition.HEALTHY)
