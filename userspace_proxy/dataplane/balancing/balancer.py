"""The interface of balancing algorithms.

An endpoint is an index. A set of endpoints is an integer with one bit for each, so that a choice among thousands is a
few operations on a thousand bytes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from random import random
from typing import NamedTuple, Protocol

from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Address


class Member(NamedTuple):
    """One endpoint that takes new connections. ``weight`` is at least 1."""

    address: Address
    weight: int
    counters: EndpointCounters


class Candidates(NamedTuple):
    """The endpoints that one connection may be given.

    ``bits``: their indexes; never 0. ``slow_starts``: for sets of endpoints in slow start, the share (0 to 1) of their
    usual connections that they get now. ``failed``: how many endpoints this connection has tried already.
    """

    bits: int
    slow_starts: Sequence[tuple[float, int]] = ()
    failed: int = 0

    def admitted(self, draw: float | None = None) -> int:
        """Return the bits without those in slow start whose share is at most *draw* (0 to 1); all if none is left.

        *draw* is random if it is None.
        """
        if not self.slow_starts:
            return self.bits
        draw = random() if draw is None else draw  # noqa: S311 - no secret
        bits = self.bits
        for share, starting in self.slow_starts:
            if share <= draw:
                bits &= ~starting
        return bits or self.bits


class Balancer(Protocol):
    """A balancing algorithm over the endpoints of one IP family."""

    @property
    def why(self) -> str:
        """The name of the algorithm, which the access log shows as the reason for a choice."""

    def replace(self, members: Sequence[Member]) -> None:
        """Replace the endpoints. Those that stay keep their order; new ones come last."""

    def pick(self, client_ip: str) -> int:
        """Return the index of the endpoint for a new connection. There is at least one, and any may be chosen."""

    def pick_among(self, client_ip: str, candidates: Candidates) -> int:
        """Return the index of the endpoint for a new connection, one of *candidates*."""

    def odds(self, client_ip: str, candidates: Candidates) -> Mapping[int, float]:
        """Return the probability of each index that `pick_among` may return now. Nothing changes."""


def indexes(bits: int) -> Iterator[int]:
    """Yield the indexes of the set bits, lowest first."""
    return (index for index, bit in enumerate(reversed(f"{bits:b}")) if bit == "1")


def odds_by_draw(candidates: Candidates, choose: Callable[[int], Mapping[int, float]]) -> dict[int, float]:
    """Return the probability of each index for an algorithm that admits endpoints in slow start by a random draw.

    *choose* returns the probabilities among the admitted bits.
    """
    odds: dict[int, float] = {}
    edges = sorted({0.0, 1.0, *(min(share, 1.0) for share, _ in candidates.slow_starts)})
    for low, high in pairwise(edges):
        for index, probability in choose(candidates.admitted(low)).items():
            odds[index] = odds.get(index, 0.0) + (high - low) * probability
    return odds


def first_from(bits: int, start: int) -> int:
    """Return the index of the first set bit from *start* on, wrapping around. *bits* is not 0."""
    later = bits >> start
    if later:
        return start + (later & -later).bit_length() - 1
    return (bits & -bits).bit_length() - 1
