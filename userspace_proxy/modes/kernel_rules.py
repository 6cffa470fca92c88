"""The interface between kernel modes and their rules: the desired translations, and the Protocol of their loader."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from userspace_proxy.interfaces import LoadedRules
from userspace_proxy.model.endpoint import Endpoint, Family
from userspace_proxy.model.loads import Loads
from userspace_proxy.model.names import ServicePortName
from userspace_proxy.model.redirects import PodDetector
from userspace_proxy.model.routes import Route
from userspace_proxy.model.service import Portal, ServicePort
from userspace_proxy.model.topology import Node, Reach
from userspace_proxy.modes.rule_line import Rules

if TYPE_CHECKING:
    from prometheus_client.core import Metric


@dataclass(frozen=True, slots=True)
class Translation:
    """The kernel's treatment of packets to one service port, in a kernel mode.

    ``routes``: for each portal of the service port, by sender; ANYBODY's first. A listener in a route stands for the
    endpoints of its scope in ``reaches``. With ``transparent`` these see the client's address, else this node's.
    ``allowed``: the CIDRs that may dial these portals, if restricted. ``serving``: endpoints whose UDP flows may stay.
    """

    service_port: ServicePort
    routes: tuple[Route, ...]
    reaches: Mapping[Family, Reach]
    allowed: Mapping[Portal, tuple[str, ...]] = field(default_factory=dict)
    serving: tuple[Endpoint, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The facts about this node that the rules of a kernel mode need, independent of Services.

    ``node_ports_on`` as in Redirects. ``service_cidrs``: the known cluster IP ranges.
    """

    node: Node = field(default_factory=Node)
    pods: PodDetector | None = None
    node_ports_on: tuple[str, ...] = ()
    service_cidrs: tuple[str, ...] = ()


class RuleUpdate(NamedTuple):
    """The desired content of a kernel mode's tables.

    ``changed``: the added, changed and removed service ports since the last load that succeeded.
    """

    translations: Mapping[ServicePortName, Translation]
    changed: Collection[ServicePortName]
    facts: NodeFacts


class KernelRules(LoadedRules, Protocol):
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

    async def load(self, update: RuleUpdate) -> None:
        """Put *update* in force, all or nothing. The cost follows ``update.changed``.

        Raises:
            SyncError: the kernel refused *update*; the previous rules stay in force.
        """
        ...
