"""Weighted round robin: each endpoint has as many turns in a cycle as its weight, spread over the cycle.

The cycle is computed when endpoints change, so a choice costs the same with and without weights.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import chain
from math import gcd

from userspace_proxy.dataplane.balancing.balancer import Candidates, Member, first_from, odds_by_draw
from userspace_proxy.model.endpoint import Address

# From the third endpoint on, a connection's next attempt skips this part of the cycle, because adjacent endpoints may
# fail together.
_LEAP = 0.382
_ADJACENT_MAX = 2
# Weights that add up to more are scaled down.
_TURNS_MAX = 4_096


class RoundRobin:
    """In any cycle, wherever it begins, an endpoint gets exactly as many turns as its weight."""

    __slots__ = ("_addresses", "_has_weights", "_next", "_turns")

    why = "round robin"

    def __init__(self) -> None:
        self._addresses: list[Address] = []
        self._turns: list[int] = []  # indexes of endpoints
        self._next = 0
        self._has_weights = False

    def replace(self, members: Sequence[Member]) -> None:
        """Replace the endpoints. The next turn stays, or moves to the first endpoint after it that stays."""
        turns = cycle([member.weight for member in members])
        index_of = {member.address: index for index, member in enumerate(members)}
        following = chain(range(self._next, len(self._turns)), range(self._next))
        at = next((at for at in following if self._addresses[self._turns[at]] in index_of), None)
        self._next = 0
        if at is not None:
            index = index_of[self._addresses[self._turns[at]]]
            turn = self._turns[:at].count(self._turns[at])  # the endpoint's first turn in the cycle, or a later one
            places = [place for place, of in enumerate(turns) if of == index]
            self._next = places[turn % len(places)]
        self._addresses = [member.address for member in members]
        self._turns = turns
        self._has_weights = len(turns) != len(members)

    def pick(self, client_ip: str) -> int:
        turns, at = self._turns, self._next
        self._next = at + 1 if at + 1 < len(turns) else 0
        return turns[at]

    def pick_among(self, client_ip: str, candidates: Candidates) -> int:
        turns, count = self._turns, len(self._turns)
        leap = 0 if candidates.failed < _ADJACENT_MAX else int(count * _LEAP)
        start = (self._next + leap) % count
        bits = candidates.admitted()
        if self._has_weights:
            at = next(at for at in chain(range(start, count), range(start)) if bits >> turns[at] & 1)
        else:
            at = first_from(bits, start)
        self._next = (at + 1) % count
        return turns[at]

    def odds(self, client_ip: str, candidates: Candidates) -> Mapping[int, float]:
        def choose(bits: int) -> dict[int, float]:
            return {copy(self).pick_among(client_ip, Candidates(bits, failed=candidates.failed)): 1.0}

        return odds_by_draw(candidates, choose)


def cycle(weights: Sequence[int]) -> list[int]:
    """Return the turns of a whole cycle, as indexes into *weights*.

    Turn *k* of an endpoint is due at ``(k + offset) / weight`` of the cycle. Endpoints with equal weights have
    different offsets, so their turns do not fall together.
    """
    if len(set(weights)) <= 1:
        return list(range(len(weights)))
    divisor = gcd(*weights)
    weights = [weight // divisor for weight in weights]
    if (total := sum(weights)) > max(_TURNS_MAX, len(weights)):
        weights = [max(1, weight * _TURNS_MAX // total) for weight in weights]
    alike = Counter(weights)
    before: Counter[int] = Counter()
    due: list[tuple[float, int]] = []
    for index, weight in enumerate(weights):
        offset = (before[weight] + 0.5) / alike[weight]
        before[weight] += 1
        due += (((turn + offset) / weight, index) for turn in range(weight))
    return [index for _, index in sorted(due)]
