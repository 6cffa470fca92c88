"""One consistent picture of what the cluster wants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import Node


@dataclass(frozen=True, slots=True)
class ProxyState:
    """Every service port with its endpoints, and the node they are seen from, at one moment.

    ``service_cidrs``: where the cluster's API says that cluster IPs are from; empty where it does not say so.
    Both mappings are read-only and have the same keys. A value that did not change is the *same object*
    in the next state, so ``is not`` finds what changed and a sync costs what changed.
    """

    service_ports: Mapping[ServicePortName, ServicePort] = field(default_factory=lambda: MappingProxyType({}))
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]] = field(default_factory=lambda: MappingProxyType({}))
    node: Node = field(default_factory=Node)
    service_cidrs: tuple[str, ...] = ()
