"""Maglev's table (Eisenbud et al., NSDI 2016): which endpoint each slot leads to. Pure.

An endpoint that is added or removed changes few slots of the others.
"""

import functools
import hashlib
import struct
from collections.abc import Mapping, Sequence
from itertools import cycle

from userspace_proxy.model.endpoint import Address


def slot_table(endpoints: Sequence[Address], slots: int, weights: Mapping[str, int] | None = None) -> list[Address]:
    """Return the endpoint of each of *slots*, a power of two.

    The endpoints take one slot each in turn, in an order of their own, so that all get nearly the same number.
    *weights*: the number of slots that an IP takes in one turn; 1 if it is not listed. An endpoint with weight 0 gets
    no slots, unless every weight is 0. If the weights add up to more than *slots*, they are scaled down, to 1 at least.
    """
    if weights:
        endpoints = _by_weight(endpoints, slots, weights) or endpoints
    orders = [_order(endpoint, slots) for endpoint in endpoints]
    table: list[Address | None] = [None] * slots
    left = slots
    for index in cycle(range(len(endpoints))):
        at, step = orders[index]
        while table[at] is not None:
            at = (at + step) % slots
        table[at] = endpoints[index]
        orders[index] = (at, step)
        left -= 1
        if not left:
            break
    return table  # type: ignore[return-value]  # every slot is taken


def _by_weight(endpoints: Sequence[Address], slots: int, weights: Mapping[str, int]) -> list[Address]:
    """Return one turn: each of *endpoints* as often as its weight says, but *slots* in all if each has one."""
    asks = [weights.get(ip, 1) for ip, _ in endpoints]
    if (total := sum(asks)) > slots:
        asks = [ask and max(1, ask * slots // total) for ask in asks]
    asking = [(endpoint, ask) for endpoint, ask in zip(endpoints, asks, strict=True) if ask]
    turn: list[Address] = []
    while asking:  # interleaved, because the slots may end before the last endpoint has its own
        turn += (endpoint for endpoint, _ in asking)
        asking = [(endpoint, ask - 1) for endpoint, ask in asking if ask > 1]
    return turn


@functools.lru_cache(100_000)
def _order(endpoint: Address, slots: int) -> tuple[int, int]:
    """Return the first slot that *endpoint* takes, and the step to the next one: odd, so that it reaches all slots."""
    first, step = struct.unpack("<II", hashlib.blake2b(repr(endpoint).encode(), digest_size=8).digest())
    return first % slots, step % slots | 1
