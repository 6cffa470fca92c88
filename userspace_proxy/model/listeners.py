"""Listeners of a data plane, and the endpoints behind each."""

from dataclasses import dataclass
from typing import NamedTuple

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import ListenerName, Scope
from userspace_proxy.model.service import ServicePort


class Backends(NamedTuple):
    """The endpoints of one listener: ``usable`` for new traffic, ``serving`` for UDP flows that may stay.

    Contains both IP families. A client only gets endpoints of its own family.
    """

    usable: tuple[Endpoint, ...]
    serving: tuple[Endpoint, ...]


@dataclass(frozen=True, slots=True)
class ListenerSpec:
    """A service port, the local port that accepts its traffic, and the scope of its endpoints.

    ``at``: the address of a listener that clients dial themselves, and whose endpoints may have the other family. ""
    if clients come by a portal.
    """

    service_port: ServicePort
    proxy_port: int
    scope: Scope = Scope.CLUSTER
    transparent: bool = False
    at: str = ""

    @property
    def name(self) -> ListenerName:
        return ListenerName(self.service_port.name, self.scope, self.transparent)


# Prefix of the reason if a listener cannot be opened on any port now, but may be later.
NO_ROOM = "no room"
