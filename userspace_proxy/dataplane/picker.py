"""Which endpoint takes the next connection: round robin, client-IP affinity, and passing over what fails.

Pure: no socket, no clock of its own. The API says which endpoints are ready; what our own dials say
comes in through `report_failure` and `report_success`, and ejects an endpoint for a while.

The rotation is exact: n picks over n endpoints are one each, in order, and an endpoint that comes or
goes moves nobody else's turn. Each family has its own, and a client meets endpoints of its own family.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from userspace_proxy.dataplane.memory import Ejection, Memory, Pin
from userspace_proxy.interfaces import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint

EJECT_S = 1.0
EJECT_MAX_S = 60.0


class Pick(NamedTuple):
    """An endpoint, why it was chosen, in one or two words for the access log, and where to count what it gets."""

    endpoint: Endpoint
    why: str
    counters: EndpointCounters


class _Rotation:
    """The endpoints of one family, and whose turn it is."""

    __slots__ = ("_ejected", "_memory", "_next", "_turns", "endpoints")

    def __init__(self, memory: Memory) -> None:
        self.endpoints: list[Endpoint] = []
        self._turns: list[Pick] = []  # of the endpoints, in the same order: made once, not for every connection
        self._next = 0
        self._memory = memory
        self._ejected = memory.ejected

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

    def take(self, tried: Collection[Address]) -> Pick | None:
        """Return whose turn it is, and turn on."""
        count = len(self._turns)
        if not self._ejected and not tried:
            if not count:
                return None
            index = self._next
            self._next = index + 1 if index + 1 < count else 0
            return self._turns[index]
        now = self._memory.now()
        doubtful = None
        for step in range(count):
            index = (self._next + step) % count
            address = self.endpoints[index].address
            if address in tried:
                continue
            if self._memory.is_open(address, now):
                self._next = (index + 1) % count
                return Pick(self.endpoints[index], self._why(address, tried), self._turns[index].counters)
            if doubtful is None:
                doubtful = index
        if doubtful is None:
            return None
        self._next = (doubtful + 1) % count
        return Pick(self.endpoints[doubtful], "last resort", self._turns[doubtful].counters)

    def _why(self, address: Address, tried: Collection[Address]) -> str:
        if address in self._ejected:
            return "trial"
        return "failover" if tried else "round robin"


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
        rotation = self._rotations[":" in client_ip]
        memory = self._memory
        timeout_s = memory.affinity_timeout_s
        if timeout_s is None:
            return rotation.take(tried)
        now = memory.now()
        pin = memory.take_pin(client_ip)
        if pin is not None and pin.expires_at > now and pin.address not in tried:
            pinned = self._endpoints.get(pin.address)
            if pinned is not None and memory.is_open(pin.address, now):
                memory.pin(client_ip, Pin(pin.address, now + timeout_s))
                return Pick(pinned, "affinity", memory.counters_of(pin.address))
        choice = rotation.take(tried)
        if choice is not None:
            memory.pin(client_ip, Pin(choice.endpoint.address, now + timeout_s))
            memory.forget_old_pins(now)
        return choice

    # ---- what our own dials say

    def report_failure(self, endpoint: Endpoint) -> bool:
        """Hold a failed dial against *endpoint*; return whether it is ejected by this.

        The time doubles with each failure, from EJECT_S to EJECT_MAX_S. One failure counts once, however
        many connections met it: those that failed while it was already out say nothing new.
        """
        address = endpoint.address
        if address not in self._endpoints:
            return False
        ejected, now = self._memory.ejected, self._memory.now()
        ejection = ejected.get(address)
        if ejection is None:
            others = (e.address for e in self._rotations[":" in endpoint.ip].endpoints if e.address != address)
            if all(other in ejected for other in others):
                return False  # never the last one: with nothing left to choose, ejecting helps nobody
            ejected[address] = Ejection(failures=1, until=now + EJECT_S)
            return True
        if now < ejection.until:
            return False
        ejection.failures += 1
        ejection.until = now + min(EJECT_S * 2 ** (ejection.failures - 1), EJECT_MAX_S)
        ejection.trial_until = 0.0
        return True

    def report_success(self, endpoint: Endpoint) -> bool:
        """*endpoint* took a connection: all is forgiven. Return whether it was ejected until now."""
        return self._memory.ejected.pop(endpoint.address, None) is not None
