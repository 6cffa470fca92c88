"""Names of objects, of service ports, and of their listeners.

A service port is identified by its Service, its port's *name* and its protocol. The port number is not part of it:
one number may serve TCP and UDP, and a port keeps its identity when its number changes.
"""

from enum import StrEnum
from typing import NamedTuple


class L4Protocol(StrEnum):
    """The supported transport protocols. Decoding rejects SCTP."""

    TCP = "TCP"
    UDP = "UDP"

    # Enum.__hash__ is written in Python and slow; every look-up by a service port's name calls it.
    __hash__ = str.__hash__


class NamespacedName(NamedTuple):
    """An object's name in its namespace, shown as ``namespace/name``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ObjectReference(NamedTuple):
    """The object that an Event or log line is about; ``uid`` is "" if unknown."""

    kind: str
    name: NamespacedName
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name if self.name.namespace else self.name.name}"


class ServicePortName(NamedTuple):
    """One port of one Service, shown as in kube-proxy: ``namespace/name:port_name``."""

    service: NamespacedName
    port_name: str
    protocol: L4Protocol

    def __str__(self) -> str:
        return f"{self.service}:{self.port_name}" if self.port_name else str(self.service)


class Scope(StrEnum):
    """Which endpoints of a service port are used: all in the cluster, or those on this node (policy Local)."""

    CLUSTER = "cluster"
    LOCAL = "local"


class ListenerName(NamedTuple):
    """Names the listener for one set of a service port's endpoints.

    Each listener has its own proxy port, because a UDP socket does not learn the address that the client dialled.
    ``transparent``: endpoints see the client's address instead of this node's.
    """

    service_port: ServicePortName
    scope: Scope = Scope.CLUSTER
    transparent: bool = False

    @property
    def protocol(self) -> L4Protocol:
        return self.service_port.protocol

    @property
    def key(self) -> str:
        """A unique text for this listener: ``namespace/name:port_name[@local][@transparent]/PROTOCOL``."""
        scope = "" if self.scope is Scope.CLUSTER else f"@{self.scope}"
        transparent = "@transparent" if self.transparent else ""
        service, port_name, protocol = self.service_port
        return f"{service}:{port_name}{scope}{transparent}/{protocol}"

    def __str__(self) -> str:
        scope = "" if self.scope is Scope.CLUSTER else f" ({self.scope} endpoints)"
        return f"{self.service_port}{scope}{' (transparent)' if self.transparent else ''}"
