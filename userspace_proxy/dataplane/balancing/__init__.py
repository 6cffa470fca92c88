"""Balancing algorithms: which endpoint a new connection gets if nothing else decides. One class each.

To add one: a module with a class for the Protocol `Balancer`, a word in `model.service.Balance`, and a line here. The
properties in `tests/dataplane/balancing` then hold for it, too.
"""

from collections.abc import Callable, Mapping

from userspace_proxy.dataplane.balancing.balancer import Balancer, Candidates, Member
from userspace_proxy.dataplane.balancing.least_connections import LeastConnections
from userspace_proxy.dataplane.balancing.random_choice import RandomChoice
from userspace_proxy.dataplane.balancing.round_robin import RoundRobin
from userspace_proxy.dataplane.balancing.source_hash import SourceHash
from userspace_proxy.model.service import Balance

ALGORITHMS: Mapping[Balance, Callable[[], Balancer]] = {
    Balance.ROUND_ROBIN: RoundRobin,
    Balance.LEAST_CONNECTIONS: LeastConnections,
    Balance.RANDOM: RandomChoice,
    Balance.SOURCE_HASH: SourceHash,
}

__all__ = ["ALGORITHMS", "Balancer", "Candidates", "Member"]
