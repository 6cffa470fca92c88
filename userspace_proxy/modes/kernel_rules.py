"""The interface between proxiers and the rules of their modes: the desired translations, and Protocols of loaders."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from userspace_proxy.interfaces import LoadedRules
from userspace_proxy.model.endpoint import Endpoint, Family
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import Capture, PodDetector
from userspace_proxy.model.routes import Route
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.topology import Node, Reach
from userspace_proxy.modes.rule_line import Rules

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class Translation:
    """The kernel's treatment of packets to one service port.

    ``routes``: for each portal of the service port, by sender; ANYBODY's first. ``allowed``: the CIDRs that may dial
    these portals, if restricted.

    In kernel modes a listener in a route stands for the endpoints of its scope in ``reaches``. With ``transparent``
    these see the client's address, else this node's. ``serving``: endpoints whose UDP flows may stay.

    In userspace mode ``ports`` has the local port for each of ``routes``, or `DROPPED`.
    """

    service_port: ServicePort
    routes: tuple[Route, ...]
    reaches: Mapping[Family, Reach]
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    serving: tuple[Endpoint, ...] = ()
    ports: tuple[int, ...] = ()


def portals_of(made: Translation | None) -> frozenset[Portal]:
    """Return the portals that packets of *made* are dialled at."""
    return frozenset(route.portal for route in made.routes) if made is not None else frozenset()


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The facts about this node that rules need, independent of Services.

    ``node_ports_on``: CIDRs of node addresses that serve node ports; all addresses of a family serve them if it has no
    CIDR here. Of kernel modes: ``service_cidrs``, the known cluster IP ranges. Of userspace mode: ``refuse_port``, a
    port without a listener, where the kernel refuses packets to portals without endpoints (with a reset for TCP, with
    port unreachable for UDP); ``transparent``: some listener uses its clients' addresses towards backends, so replies
    must be routed to this host.
    """

    node: Node = field(default_factory=Node)
    pods: PodDetector | None = None
    node_ports_on: tuple[str, ...] = ()
    service_cidrs: tuple[str, ...] = ()
    refuse_port: int = 0
    capture: Capture = Capture.REDIRECT
    transparent: bool = False


class RuleUpdate(NamedTuple):
    """The desired rules of a mode.

    ``changed``: the added, changed and removed service ports since the last load that succeeded.
    """

    translations: Mapping[ServicePortName, Translation]
    changed: Collection[ServicePortName]
    facts: NodeFacts


class LoadableRules(LoadedRules, Protocol):
    """Holds the rules of one mode, in one rule language."""

    async def load(self, update: RuleUpdate) -> None:
        """Put *update* in force, all or nothing. The cost follows ``update.changed``.

        Raises:
            SyncError: the kernel refused *update*; the previous rules stay in force (userspace mode by iptables: in
                each refused table and family).
        """
        ...


class KernelRules(LoadableRules, Protocol):
    """Holds the rules of one kernel mode. ``loads``: counters of rule loads by IP family, if the mode counts them."""

    @property
    def loads(self) -> Mapping[str, Loads]: ...

    def metrics(self) -> Iterable[Metric]:
        """Return the metrics of these tables that no other kernel mode has."""
        ...

    def rules(self, translations: Mapping[ServicePortName, Translation], facts: NodeFacts) -> Rules:
        """Return the rules that a first load would load, each line with its reason. Touches no kernel."""
        ...

    async def prepare(self) -> None:
        """Prepare for the first load. A running instance may still serve this node: leave its rules untouched.

        Raises:
            SyncError: this host does not support these rules, or another program owns them; nothing was changed.
        """
        ...
