"""Choose the endpoint for the next connection: round robin, client-IP affinity, outlier ejection.

Pure: no socket and no clock of its own. The API tells which endpoints are ready. `report_failure` and
`report_success` bring in the results of our dials; failures eject an endpoint for a while.

The rotation is exact: n picks over n endpoints give each endpoint one, in order. An endpoint that is added or removed
does not change the order of the others. Each family has its own rotation, and a client gets endpoints of its family.

Sets of endpoints are integers with one bit for each endpoint. A choice among thousands of endpoints, with thousands
ejected, is therefore a few operations on a thousand bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from userspace_proxy.dataplane.memory import TRIAL_S, Memory, Pin
from userspace_proxy.interfaces import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint

# From the third endpoint on, a connection's next attempt skips this part of the rotation, because adjacent endpoints
# may fail together.
_LEAP = 0.382
_ADJACENT_MAX = 2


class Pick(NamedTuple):
    """A chosen endpoint, the reason in one or two words for the access log, and the endpoint's counters."""

    endpoint: Endpoint
    why: str
    counters: EndpointCounters


class _Rotation:
    """The endpoints of one family, and the position in their round robin."""

    __slots__ = ("_due", "_index", "_memory", "_next", "_open", "_turns", "endpoints")

    def __init__(self, memory: Memory) -> None:
        self.endpoints: list[Endpoint] = []
        self._turns: list[Pick] = []  # for each endpoint; made once, not for every connection
        self._next = 0
        self._memory = memory
        # Made on first use: the index of each address, the bits of endpoints not ejected, and a heap of the times at
        # which ejected ones are due for a trial.
        self._index: dict[Address, int] | None = None
        self._open = 0
        self._due: list[tuple[float, Address]] = []

    def replace(self, wanted: dict[Address, Endpoint]) -> None:
        counters = {address: self._memory.counters_of(address) for address in wanted}
        kept: list[Endpoint] = []
        turn = 0
        for index, endpoint in enumerate(self.endpoints):
            if (stays := wanted.pop(endpoint.address, None)) is not None:
                kept.append(stays)
                if index < self._next:
                    turn += 1
        self.endpoints = kept + list(wanted.values())
        self._turns = [Pick(e, "round robin", counters[e.address]) for e in self.endpoints]
        self._next = turn if turn < len(self.endpoints) else 0
        self._index = None

    def index(self) -> dict[Address, int]:
        """Return the index of each address."""
        index = self._index
        if index is None:
            index = self._index = {endpoint.address: at for at, endpoint in enumerate(self.endpoints)}
            self._open = (1 << len(index)) - 1
            self._due = []
            for address in self._memory.ejected:
                self.on_ejection(address)
        return index

    def on_ejection(self, address: Address) -> None:
        """Update the bits for *address*, whose ejection has begun, changed or ended."""
        at = None if self._index is None else self._index.get(address)
        if at is None:
            return
        ejection = self._memory.ejected.get(address)
        if ejection is None:
            self._open |= 1 << at
        else:
            self._open &= ~(1 << at)
            heapq.heappush(self._due, (ejection.until, address))

    def has_another(self, address: Address) -> bool:
        """Return whether another endpoint than *address* is not ejected."""
        at = self.index().get(address)
        return bool(self._open if at is None else self._open & ~(1 << at))

    def take(self, client_ip: str, tried: Collection[Address], *, doubtful: bool = True) -> Pick | None:
        """Return the next endpoint in the rotation and advance it."""
        memory, count = self._memory, len(self._turns)
        if not memory.ejected and not tried and not memory.refused:
            if not count:
                return None
            index = self._next
            self._next = index + 1 if index + 1 < count else 0
            return self._turns[index]
        if not count:
            return None
        now = memory.now()
        refused = memory.refused.get(client_ip)
        index_of = self.index()
        if not tried and memory.ejected:
            trial = self._trial(now, refused or ())
            if trial is not None:
                return self._choose(index_of[trial], "trial")
        untried = self._without((1 << count) - 1, tried)
        candidates = untried & self._open
        if refused:
            candidates = self._without(candidates, [a for a, ejection in refused.items() if now < ejection.until])
        if candidates:
            leap = 0 if len(tried) < _ADJACENT_MAX else int(count * _LEAP)
            index = _following(candidates, (self._next + leap) % count)
            return self._choose(index, "failover" if tried else "round robin")
        return self._choose(_following(untried, self._next), "last resort") if untried and doubtful else None

    def _choose(self, index: int, why: str) -> Pick:
        self._next = (index + 1) % len(self._turns)
        turn = self._turns[index]
        return turn if why == turn.why else Pick(turn.endpoint, why, turn.counters)

    def _without(self, endpoints: int, addresses: Collection[Address]) -> int:
        index_of = self.index()
        for address in addresses:
            if (at := index_of.get(address)) is not None:
                endpoints &= ~(1 << at)
        return endpoints

    def _trial(self, now: float, refused: Collection[Address]) -> Address | None:
        """Return the ejected endpoint that has been due longest for a trial, or None; never one of *refused*."""
        due, ejected = self._due, self._memory.ejected
        while due and due[0][0] <= now:
            until, address = due[0]
            ejection = ejected.get(address)
            if ejection is None or until not in (ejection.until, ejection.trial_until):
                heapq.heappop(due)  # of an earlier ejection
            elif now < ejection.trial_until:
                heapq.heapreplace(due, (ejection.trial_until, address))
            elif address in refused:
                return None
            else:
                ejection.trial_until = now + TRIAL_S
                heapq.heapreplace(due, (ejection.trial_until, address))
                return address
        return None


def _following(endpoints: int, at: int) -> int:
    """Return the index of the first set bit of *endpoints* from *at* on, wrapping around. *endpoints* is not 0."""
    later = endpoints >> at
    if later:
        return at + (later & -later).bit_length() - 1
    return (endpoints & -endpoints).bit_length() - 1


class Picker:
    """Chooses among the endpoints of one listener. *memory* holds the service port's pins and ejections."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._endpoints: dict[Address, Endpoint] = {}
        self._rotations = _Rotation(memory), _Rotation(memory)  # IPv4, IPv6
        memory.share(self, self._endpoints)

    # ---- endpoints from the API

    @property
    def endpoints(self) -> Mapping[Address, Endpoint]:
        return self._endpoints

    def set_endpoints(self, usable: Sequence[Endpoint]) -> None:
        """Replace the endpoints. Endpoints that stay keep their place in the rotation; new ones join at its end."""
        self._endpoints = {endpoint.address: endpoint for endpoint in usable}
        for is_ipv6, rotation in enumerate(self._rotations):
            rotation.replace({a: endpoint for a, endpoint in self._endpoints.items() if (":" in a[0]) == is_ipv6})
        self._memory.share(self, self._endpoints)

    # ---- choosing

    def pick(self, client_ip: str, tried: Collection[Address] = ()) -> Pick | None:
        """Return the endpoint for a new connection of *client_ip*, or None if none is left to try.

        *tried*: addresses that already failed for this connection; they are never chosen again. An ejected endpoint is
        chosen if no other is left.
        """
        memory = self._memory
        timeout_s = memory.affinity_timeout_s
        if timeout_s is None:
            return self._rotations[":" in client_ip].take(client_ip, tried)
        now = memory.now()
        pin = memory.take_pin(client_ip)
        if pin is not None and pin.expires_at > now and pin.address not in tried:
            pinned = self._endpoints.get(pin.address)
            if pinned is not None and not self._is_refused(client_ip, pin.address) and memory.is_open(pin.address, now):
                memory.pin(client_ip, Pin(pin.address, now + timeout_s))
                return Pick(pinned, "affinity", memory.counters_of(pin.address))
        choice = self._rotations[":" in client_ip].take(client_ip, tried)
        if choice is not None:
            self.pin(client_ip, choice.endpoint)
        return choice

    def pick_another(self, client_ip: str, tried: Collection[Address], *, doubtful: bool) -> Pick | None:
        """Return another endpoint for a connection whose first one has not answered. The client's pin does not change.

        *doubtful*: choose an ejected endpoint if no other is left.
        """
        return self._rotations[":" in client_ip].take(client_ip, tried, doubtful=doubtful)

    def pin(self, client_ip: str, endpoint: Endpoint) -> None:
        """Pin *client_ip* to *endpoint*, if the service port has affinity."""
        memory = self._memory
        if memory.affinity_timeout_s is not None:
            now = memory.now()
            memory.take_pin(client_ip)
            memory.pin(client_ip, Pin(endpoint.address, now + memory.affinity_timeout_s))
            memory.forget_old_pins(now)

    def _is_refused(self, client_ip: str, address: Address) -> bool:
        refused = self._memory.refused.get(client_ip)
        return refused is not None and address in refused and self._memory.now() < refused[address].until

    # ---- results of dials

    def on_ejection(self, address: Address) -> None:
        self._rotations[":" in address[0]].on_ejection(address)

    def report_failure(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Count a failed dial to *endpoint*. Return whether this ejects it.

        The ejection time doubles with each failure, from EJECT_S to EJECT_MAX_S. *as_client*: the client's address if
        the endpoint sees it instead of this node's; the failure then counts for this client alone.
        """
        address = endpoint.address
        if address not in self._endpoints:
            return False
        memory = self._memory
        if as_client:
            return memory.refuse(as_client, address)
        if address not in memory.ejected and not self._rotations[":" in endpoint.ip].has_another(address):
            return False  # never eject the last one: no other is left to choose
        return memory.eject(address)

    def report_overtaken(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Note that another endpoint answered before *endpoint*. Return whether this ejects it, after several cases."""
        return self._memory.is_silent(endpoint.address) and self.report_failure(endpoint, as_client)

    def report_success(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Note that *endpoint* accepted a connection, which ends its ejection. Return whether it was ejected."""
        if as_client:
            self._memory.welcome(as_client, endpoint.address)
        return self._memory.forgive(endpoint.address)
