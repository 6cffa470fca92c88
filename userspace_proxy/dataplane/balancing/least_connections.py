"""Least connections: the endpoint with the fewest open connections for its weight.

Connections that are being dialled count. Of several endpoints with equally few, round robin chooses.
"""

from collections.abc import Mapping, Sequence
from random import sample

from userspace_proxy.dataplane.balancing.balancer import Candidates, Member, indexes
from userspace_proxy.dataplane.balancing.round_robin import RoundRobin
from userspace_proxy.model.counters import EndpointCounters

# Of more endpoints, this number is drawn at random for each connection, and the least loaded of them is chosen.
_COMPARED_MAX = 32


class LeastConnections:
    """Counts the connections of this process: each of several workers balances its own."""

    why = "least connections"

    def __init__(self) -> None:
        self._weights: list[int] = []
        self._counters: list[EndpointCounters] = []
        self._all = range(0)
        self._of_equals = RoundRobin()

    def replace(self, members: Sequence[Member]) -> None:
        self._weights = [member.weight for member in members]
        self._counters = [member.counters for member in members]
        self._all = range(len(members))
        self._of_equals.replace(members)

    def pick(self, client_ip: str) -> int:
        return self._pick_of(self._all, client_ip, Candidates(0))

    def pick_among(self, client_ip: str, candidates: Candidates) -> int:
        return self._pick_of(list(indexes(candidates.bits)), client_ip, candidates)

    def odds(self, client_ip: str, candidates: Candidates) -> Mapping[int, float]:
        allowed = list(indexes(candidates.bits))
        equals = self._least_loaded(allowed, candidates)
        if len(allowed) <= _COMPARED_MAX and len(equals) > 1:
            bits = sum(1 << index for index in equals)
            return self._of_equals.odds(client_ip, candidates._replace(bits=bits))
        return dict.fromkeys(equals, 1 / len(equals))  # of more, those that are compared are drawn at random

    def _pick_of(self, allowed: Sequence[int], client_ip: str, candidates: Candidates) -> int:
        compared = allowed if len(allowed) <= _COMPARED_MAX else sample(allowed, _COMPARED_MAX)
        equals = self._least_loaded(compared, candidates)
        if len(equals) == 1:
            return equals[0]
        return self._of_equals.pick_among(client_ip, candidates._replace(bits=sum(1 << index for index in equals)))

    def _least_loaded(self, compared: Sequence[int], candidates: Candidates) -> list[int]:
        counters, weights = self._counters, self._weights
        loads = [((its := counters[i]).open + its.dialling) / weights[i] for i in compared]
        for share, starting in candidates.slow_starts:
            loads = [load / share if starting >> i & 1 else load for i, load in zip(compared, loads, strict=True)]
        least = min(loads)
        return [index for index, load in zip(compared, loads, strict=True) if load == least]
