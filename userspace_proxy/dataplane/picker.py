"""Which endpoint takes the next connection: round robin, client-IP affinity, and passing over what fails.

Pure: no socket, no clock of its own. The API says which endpoints are ready; what our own dials say
comes in through `report_failure` and `report_success`, and ejects an endpoint for a while.

The rotation is exact: n picks over n endpoints are one each, in order, and an endpoint that comes or
goes moves nobody else's turn. Each family has its own, and a client meets endpoints of its own family.

Sets of endpoints are integers, a bit for each. So a choice among thousands, of which thousands are ejected, is a few
operations on a thousand bytes.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from userspace_proxy.dataplane.memory import TRIAL_S, Memory, Pin
from userspace_proxy.interfaces import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint

# From the third endpoint on, an attempt leaps over this part of the rotation: adjacent endpoints may fail together.
_LEAP = 0.382
_ADJACENT_MAX = 2


class Pick(NamedTuple):
    """An endpoint, why it was chosen, in one or two words for the access log, and where to count what it gets."""

    endpoint: Endpoint
    why: str
    counters: EndpointCounters


class _Rotation:
    """The endpoints of one family, and whose turn it is."""

    __slots__ = ("_due", "_index", "_memory", "_next", "_open", "_turns", "endpoints")

    def __init__(self, memory: Memory) -> None:
        self.endpoints: list[Endpoint] = []
        self._turns: list[Pick] = []  # of the endpoints, in the same order: made once, not for every connection
        self._next = 0
        self._memory = memory
        # Made once it is wanted: where each address is, which endpoints are not ejected, and when which has its trial.
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
        """Return where each address is."""
        index = self._index
        if index is None:
            index = self._index = {endpoint.address: at for at, endpoint in enumerate(self.endpoints)}
            self._open = (1 << len(index)) - 1
            self._due = []
            for address in self._memory.ejected:
                self.on_ejection(address)
        return index

    def on_ejection(self, address: Address) -> None:
        """Take note of how *address* fares now."""
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
        """Return whether any endpoint but this one is not ejected."""
        at = self.index().get(address)
        return bool(self._open if at is None else self._open & ~(1 << at))

    def take(self, client_ip: str, tried: Collection[Address], *, doubtful: bool = True) -> Pick | None:
        """Return whose turn it is, and turn on."""
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
        """Return the ejected endpoint whose time has been up for longest, unless it is one of *refused*."""
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
    """Return the first of *endpoints*, which are not none, from *at* on, round and round."""
    later = endpoints >> at
    if later:
        return at + (later & -later).bit_length() - 1
    return (endpoints & -endpoints).bit_length() - 1


class Picker:
    """The endpoints of one listener; who is pinned and who is ejected is in *memory*, for all of its service port."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._endpoints: dict[Address, Endpoint] = {}
        self._rotations = _Rotation(memory), _Rotation(memory)  # IPv4, IPv6
        memory.share(self, self._endpoints)

    # ---- what the cluster says

    @property
    def endpoints(self) -> Mapping[Address, Endpoint]:
        return self._endpoints

    def set_endpoints(self, usable: Sequence[Endpoint]) -> None:
        """Replace the endpoints. Those that stay keep their place in the rotation; new ones join at its end."""
        self._endpoints = {endpoint.address: endpoint for endpoint in usable}
        for is_ipv6, rotation in enumerate(self._rotations):
            rotation.replace({a: endpoint for a, endpoint in self._endpoints.items() if (":" in a[0]) == is_ipv6})
        self._memory.share(self, self._endpoints)

    # ---- choosing

    def pick(self, client_ip: str, tried: Collection[Address] = ()) -> Pick | None:
        """Return the endpoint for a new connection of *client_ip*, or None when there is none left to try.

        *tried* are the addresses that already failed this very connection: they are never chosen again,
        while an ejected one may be, if nothing else is left - better a doubtful endpoint than none.
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
        """Return another endpoint for a connection whose first one has not answered; its client's pin stays.

        *doubtful*: an ejected one, if there is no other.
        """
        return self._rotations[":" in client_ip].take(client_ip, tried, doubtful=doubtful)

    def pin(self, client_ip: str, endpoint: Endpoint) -> None:
        """Let *client_ip* come to *endpoint* from now on, where clients are pinned."""
        memory = self._memory
        if memory.affinity_timeout_s is not None:
            now = memory.now()
            memory.take_pin(client_ip)
            memory.pin(client_ip, Pin(endpoint.address, now + memory.affinity_timeout_s))
            memory.forget_old_pins(now)

    def _is_refused(self, client_ip: str, address: Address) -> bool:
        refused = self._memory.refused.get(client_ip)
        return refused is not None and address in refused and self._memory.now() < refused[address].until

    # ---- what our own dials say

    def on_ejection(self, address: Address) -> None:
        self._rotations[":" in address[0]].on_ejection(address)

    def report_failure(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Hold a failed dial against *endpoint*; return whether it is ejected by this.

        The time doubles with each failure, from EJECT_S to EJECT_MAX_S. *as_client*: whose address it saw, if not this
        node's; then the failure counts for this client alone.
        """
        address = endpoint.address
        if address not in self._endpoints:
            return False
        memory = self._memory
        if as_client:
            return memory.refuse(as_client, address)
        if address not in memory.ejected and not self._rotations[":" in endpoint.ip].has_another(address):
            return False  # never the last one: with nothing left to choose, ejecting helps nobody
        return memory.eject(address)

    def report_overtaken(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Another endpoint has answered before *endpoint*; return whether it is ejected, as this goes on and on."""
        return self._memory.is_silent(endpoint.address) and self.report_failure(endpoint, as_client)

    def report_success(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """*endpoint* took a connection: all is forgiven. Return whether it was ejected until now."""
        if as_client:
            self._memory.welcome(as_client, endpoint.address)
        return self._memory.forgive(endpoint.address)
