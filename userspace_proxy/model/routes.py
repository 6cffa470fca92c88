"""Map each kind of client of a service port to a listener or a refusal: kube-proxy's traffic policies, as one table.

The decision depends only on the dialled portal and the sender, never on the content of a packet.
"""

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from userspace_proxy.model.endpoint import Family
from userspace_proxy.model.names import ListenerName, Scope
from userspace_proxy.model.service import Portal, ServicePort, SourceIP, external_portals, internal_portals
from userspace_proxy.model.topology import Reach


class Sender(Enum):
    """Where a packet comes from. A route for POD or NODE takes precedence over the route for ANYBODY.

    POD: the pod detector matches it as a pod of this node. NODE: a process on the node itself.
    """

    ANYBODY = "anybody"
    POD = "pod"
    NODE = "node"


class Refusal(Enum):
    """How a packet is refused.

    REJECT: with an error, because there are no endpoints. DROP: silently, because all endpoints are on other nodes.
    """

    REJECT = "reject"
    DROP = "drop"


class Route(NamedTuple):
    """What happens to packets from *sender* to *portal*."""

    portal: Portal
    sender: Sender
    to: ListenerName | Refusal


def routes(service_port: ServicePort, family: Family, reach: Reach, *, detects_pods: bool) -> Iterator[Route]:
    """Yield the routes of *service_port* in *family* with the endpoints *reach*; ANYBODY's is the first of each portal.

    With policy Local, an external client reaches only endpoints on this node, which see its address. Pods and the node
    itself reach all endpoints (the short circuit of KEP-1669).

    Clients of a service port without any endpoint go to its listener if they may wait there.

    *detects_pods*: a pod detector is configured. Only then are the addresses of clients other than pods replaced at
    cluster IPs, and pods short-circuited. The client's address is kept if replies pass through this node.
    """
    for_anybody: dict[Portal, ListenerName | Refusal] = {}
    for portal, sender, listener in _targets(service_port, family, detects_pods=detects_pods):
        to = _destination(service_port, listener, reach)
        if sender is Sender.ANYBODY:
            for_anybody[portal] = to
        elif for_anybody[portal] == to:
            continue
        yield Route(portal, sender, to)


def _destination(service_port: ServicePort, listener: ListenerName, reach: Reach) -> ListenerName | Refusal:
    """Return *listener*, or how its clients are refused because it has no endpoints."""
    if reach.cluster if listener.scope is Scope.CLUSTER else reach.local:
        return listener
    if reach.has_any:
        return Refusal.DROP
    return listener if service_port.connections.wait_s else Refusal.REJECT


def listeners(service_port: ServicePort, *, detects_pods: bool) -> tuple[ListenerName, ...]:
    """Return every listener that clients of *service_port* may be routed to, whether or not it has endpoints."""
    targets = (each for f in service_port.families for each in _targets(service_port, f, detects_pods=detects_pods))
    return tuple(dict.fromkeys(listener for _, _, listener in targets))


def _targets(
    service_port: ServicePort, family: Family, *, detects_pods: bool
) -> Iterator[tuple[Portal, Sender, ListenerName]]:
    """Yield the listener for each portal and sender, before endpoints are considered."""
    name, is_transparent = service_port.name, service_port.source_ip is SourceIP.TRANSPARENT
    replaced_inside = replaced = ListenerName(name)
    kept_inside = kept = ListenerName(name, transparent=True) if is_transparent else replaced
    if service_port.internal_local:
        replaced_inside, kept_inside = ListenerName(name, Scope.LOCAL), ListenerName(name, Scope.LOCAL, is_transparent)
    internal = [(Sender.ANYBODY, kept_inside), (Sender.NODE, replaced_inside)]
    if detects_pods:
        internal = [(Sender.ANYBODY, replaced_inside), (Sender.POD, kept_inside)]
    external = [(Sender.ANYBODY, replaced)]
    if service_port.external_local:
        pods = [(Sender.POD, kept)] if detects_pods else []
        external = [(Sender.ANYBODY, ListenerName(name, Scope.LOCAL, is_transparent)), *pods, (Sender.NODE, replaced)]
    for portals, targets in ((internal_portals, internal), (external_portals, external)):
        for portal in (each for each in portals(service_port) if each.family == family):
            yield from ((portal, sender, listener) for sender, listener in targets)
