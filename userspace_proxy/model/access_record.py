"""One line of the access log, as a value."""

from dataclasses import dataclass

from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.service import Portal


@dataclass(frozen=True, slots=True)
class AccessRecord:
    """One ended connection or flow. ``why``: the reason for the choice of endpoint. ``how``: how it ended."""

    service_port: ServicePortName
    client: Address
    portal: Portal | None
    endpoint: Endpoint | None
    why: str
    bytes_to_backend: int
    bytes_to_client: int
    duration_s: float
    how: str

    @property
    def protocol(self) -> L4Protocol:
        return self.service_port.protocol


# How a connection ended if the backend reset it while the client was open and no byte had come from the backend.
UNANSWERED = "reset by backend before it sent a byte"
