"""Names: of objects, of service ports, and of the listeners that serve them.

A service port is known by its service, its port's *name* and its protocol - not by its number: one
number may serve TCP and UDP, and a renumbered port is still the same port.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple


class L4Protocol(StrEnum):
    """The transport protocols that can be proxied (SCTP cannot: it is refused where it is decoded)."""

    TCP = "TCP"
    UDP = "UDP"

    # Enum's own is written in Python, and every look-up of a service port's name asks for it.
    __hash__ = str.__hash__


class NamespacedName(NamedTuple):
    """An object's name in its namespace, shown as ``namespace/name``."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


class ObjectReference(NamedTuple):
    """An object that something is said about; ``uid`` where it is known."""

    kind: str
    name: NamespacedName
    uid: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.name if self.name.namespace else self.name.name}"


class ServicePortName(NamedTuple):
    """One port of one Service, shown as kube-proxy does: ``namespace/name:port_name``."""

    service: NamespacedName
    port_name: str
    protocol: L4Protocol

    def __str__(self) -> str:
        return f"{self.service}:{self.port_name}" if self.port_name else str(self.service)


class Scope(StrEnum):
    """Which endpoints of a service port are meant: those of the cluster, or those of this node (policy Local)."""

    CLUSTER = "cluster"
    LOCAL = "local"


class ListenerName(NamedTuple):
    """What serves one set of a service port's endpoints: a proxy port of its own, as UDP cannot tell what was dialled.

    ``transparent``: the endpoints see the client's own address; else this node's.
    """

    service_port: ServicePortName
    scope: Scope = Scope.CLUSTER
    transparent: bool = False

    @property
    def protocol(self) -> L4Protocol:
        return self.service_port.protocol

    @property
    def key(self) -> str:
        """A text that is unique to this listener: ``namespace/name:port_name[@local][@transparent]/PROTOCOL``."""
        scope = "" if self.scope is Scope.CLUSTER else f"@{self.scope}"
        transparent = "@transparent" if self.transparent else ""
        service, port_name, protocol = self.service_port
        return f"{service}:{port_name}{scope}{transparent}/{protocol}"

    def __str__(self) -> str:
        scope = "" if self.scope is Scope.CLUSTER else f" ({self.scope} endpoints)"
        return f"{self.service_port}{scope}{' (transparent)' if self.transparent else ''}"
