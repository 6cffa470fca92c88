"""Names: of objects, and of service ports.

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

    @property
    def key(self) -> str:
        """A text that is unique to this service port: ``namespace/name:port_name/PROTOCOL``."""
        return f"{self.service}:{self.port_name}/{self.protocol}"
