"""Desired state: one consistent snapshot of all service ports and endpoints."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from userspace_proxy.model.dns_names import ServiceNames
from userspace_proxy.model.endpoint import Endpoint
from userspace_proxy.model.names import NamespacedName, ServicePortName
from userspace_proxy.model.service import ServicePort
from userspace_proxy.model.topology import Node


@dataclass(frozen=True, slots=True)
class ProxyState:
    """All service ports with their endpoints, and the node that the proxy runs on, at one moment.

    ``service_cidrs``: the cluster IP ranges that the API states; empty if it states none.
    ``names``: what cluster DNS publishes for each Service; empty without cluster DNS.
    The mappings are read-only, and the first two have the same keys. An unchanged value is the *same object* in the
    next state, and so is ``service_ports`` if all of its values are. ``is not`` therefore finds the changes, and the
    cost of a sync follows the number of changes.
    """

    service_ports: Mapping[ServicePortName, ServicePort] = field(default_factory=lambda: MappingProxyType({}))
    endpoints: Mapping[ServicePortName, tuple[Endpoint, ...]] = field(default_factory=lambda: MappingProxyType({}))
    node: Node = field(default_factory=Node)
    service_cidrs: tuple[str, ...] = ()
    names: Mapping[NamespacedName, ServiceNames] = field(default_factory=lambda: MappingProxyType({}))
