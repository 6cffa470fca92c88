"""Where each client of a service port is led: to a listener, or to a refusal (kube-proxy's policies, as one table).

What a client dials and where it comes from decide; nobody's bytes are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import ListenerName, Scope
from userspace_proxy.model.service import Portal, ServicePort, SourceIP, external_portals, internal_portals
from userspace_proxy.model.topology import Reach


class Sender(Enum):
    """Where a packet comes from. A route for POD or NODE goes before the one for ANYBODY.

    POD: what the pod detector takes for a pod of this node; NODE: a process of the node itself.
    """

    ANYBODY = "anybody"
    POD = "pod"
    NODE = "node"


class Refusal(Enum):
    """REJECT: the kernel says no, as nobody is there. DROP: silence, as somebody is there, but not on this node."""

    REJECT = "reject"
    DROP = "drop"


class Route(NamedTuple):
    """What becomes of packets from *sender* to *portal*."""

    portal: Portal
    sender: Sender
    to: ListenerName | Refusal


def routes(service_port: ServicePort, family: Family, reach: Reach, *, detects_pods: bool) -> Iterator[Route]:
    """Yield the routes of *service_port* in *family*, whose endpoints are *reach*.

    With the policy Local a client from outside meets the endpoints of this node alone, as it dialled this node for
    the sake of its own address; pods and the node itself meet all (the short circuit of KEP-1669).

    *detects_pods*: pods can be told from others. Only then are others' addresses replaced at cluster IPs, and pods
    short-circuited. The client's address is kept where the endpoint's answer comes back by way of this node.
    """

    def led(scope: Scope, *, keeps_source: bool) -> ListenerName | Refusal:
        if reach.cluster if scope is Scope.CLUSTER else reach.local:
            transparent = keeps_source and service_port.source_ip is SourceIP.TRANSPARENT
            return ListenerName(service_port.name, scope, transparent)
        return Refusal.DROP if reach.has_any else Refusal.REJECT

    internal = Scope.LOCAL if service_port.internal_local else Scope.CLUSTER
    replaced = led(internal, keeps_source=False)
    kept = led(internal, keeps_source=True)
    for portal in internal_portals(service_port):
        if portal.family != family:
            continue
        yield Route(portal, Sender.ANYBODY, replaced if detects_pods else kept)
        if kept != replaced:
            yield Route(portal, Sender.POD, kept) if detects_pods else Route(portal, Sender.NODE, replaced)
    external = Scope.LOCAL if service_port.external_local else Scope.CLUSTER
    for portal in external_portals(service_port):
        if portal.family != family:
            continue
        yield Route(portal, Sender.ANYBODY, led(external, keeps_source=service_port.external_local))
        if service_port.external_local:
            if detects_pods:
                yield Route(portal, Sender.POD, led(Scope.CLUSTER, keeps_source=True))
            yield Route(portal, Sender.NODE, led(Scope.CLUSTER, keeps_source=False))
