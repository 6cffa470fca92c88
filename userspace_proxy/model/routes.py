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
    """Yield the routes of *service_port* in *family*, whose endpoints are *reach*; ANYBODY's is the first of a portal.

    With the policy Local a client from outside meets the endpoints of this node alone, as it dialled this node for
    the sake of its own address; pods and the node itself meet all (the short circuit of KEP-1669).

    *detects_pods*: pods can be told from others. Only then are others' addresses replaced at cluster IPs, and pods
    short-circuited. The client's address is kept where the endpoint's answer comes back by way of this node.
    """
    for_anybody: dict[Portal, ListenerName | Refusal] = {}
    for portal, sender, listener in _leads(service_port, family, detects_pods=detects_pods):
        to: ListenerName | Refusal = listener
        if not (reach.cluster if listener.scope is Scope.CLUSTER else reach.local):
            to = Refusal.DROP if reach.has_any else Refusal.REJECT
        if sender is Sender.ANYBODY:
            for_anybody[portal] = to
        elif for_anybody[portal] == to:
            continue
        yield Route(portal, sender, to)


def listeners(service_port: ServicePort, *, detects_pods: bool) -> tuple[ListenerName, ...]:
    """Return every listener to which some client of *service_port* is led, or would be if there were endpoints."""
    leads = (lead for f in service_port.families for lead in _leads(service_port, f, detects_pods=detects_pods))
    return tuple(dict.fromkeys(listener for _, _, listener in leads))


def _leads(
    service_port: ServicePort, family: Family, *, detects_pods: bool
) -> Iterator[tuple[Portal, Sender, ListenerName]]:
    replaced = ListenerName(service_port.name)
    kept = replaced._replace(transparent=service_port.source_ip is SourceIP.TRANSPARENT)
    internal = Scope.LOCAL if service_port.internal_local else Scope.CLUSTER
    for portal in internal_portals(service_port):
        if portal.family != family:
            continue
        yield portal, Sender.ANYBODY, (replaced if detects_pods else kept)._replace(scope=internal)
        if detects_pods:
            yield portal, Sender.POD, kept._replace(scope=internal)
        else:
            yield portal, Sender.NODE, replaced._replace(scope=internal)
    for portal in external_portals(service_port):
        if portal.family != family:
            continue
        if not service_port.external_local:
            yield portal, Sender.ANYBODY, replaced
            continue
        yield portal, Sender.ANYBODY, kept._replace(scope=Scope.LOCAL)
        if detects_pods:
            yield portal, Sender.POD, kept
        yield portal, Sender.NODE, replaced
