"""Random: each endpoint with a probability in proportion to its weight."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from random import choices

from userspace_proxy.dataplane.balancing.balancer import Candidates, Member, indexes, odds_by_draw


class RandomChoice:
    """Chooses at random. It has no state, so several workers, and several nodes, balance as one does."""

    why = "random"

    def __init__(self) -> None:
        self._weights: list[int] = []
        self._cumulative: list[int] = []
        self._all = range(0)

    def replace(self, members: Sequence[Member]) -> None:
        self._weights = [member.weight for member in members]
        self._cumulative = list(accumulate(self._weights))
        self._all = range(len(members))

    def pick(self, client_ip: str) -> int:
        return choices(self._all, cum_weights=self._cumulative)[0]  # noqa: S311 - no secret

    def pick_among(self, client_ip: str, candidates: Candidates) -> int:
        left = list(indexes(candidates.admitted()))
        return choices(left, [self._weights[index] for index in left])[0]  # noqa: S311 - no secret

    def odds(self, client_ip: str, candidates: Candidates) -> Mapping[int, float]:
        def choose(bits: int) -> dict[int, float]:
            total = sum(self._weights[index] for index in indexes(bits))
            return {index: self._weights[index] / total for index in indexes(bits)}

        return odds_by_draw(candidates, choose)
