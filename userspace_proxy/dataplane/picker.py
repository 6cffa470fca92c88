"""Which endpoint takes the next connection: round robin, client-IP affinity, and passing over what fails.

Pure: no socket, no clock of its own. The API says which endpoints are ready; what our own dials say
comes in through `report_failure` and `report_success`, and ejects an endpoint for a while.

The rotation is exact: n picks over n endpoints are one each, in order, and an endpoint that comes or
goes moves nobody else's turn.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from userspace_proxy.interfaces import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint

EJECT_S = 1.0
EJECT_MAX_S = 60.0
# A trial that nobody reports on (the connection attempt was cut) is over after the longest dial there is.
TRIAL_S = 4.0
# A client can choose its IPv6 address freely, so what it can make us remember has a bound.
PINS_MAX = 65_536


class Pick(NamedTuple):
    """An endpoint, why it was chosen, in one or two words for the access log, and where to count what it gets."""

    endpoint: Endpoint
    why: str
    counters: EndpointCounters


@dataclass(slots=True)
class _Ejection:
    """What is held against one endpoint. Its *trial* is the one connection that may see whether it is back."""

    failures: int
    until: float
    trial_until: float = 0.0


class Pin(NamedTuple):
    """Where a client stays, and until when (monotonic seconds, the same in every process of this host)."""

    address: Address
    expires_at: float


class PickerMemory(NamedTuple):
    """What a picker knows beside its endpoints, for the one that takes its place.

    Ejections are (address, failures, until), all of them; pins are (client IP, pin), those that are new.
    """

    pins: list[tuple[str, Pin]]
    ejected: list[tuple[Address, int, float]]


class Picker:
    """The endpoints of one service port, whose turn it is, who is pinned, and who is ejected."""

    def __init__(self, now: Callable[[], float], affinity_timeout_s: int | None = None) -> None:
        self._now = now
        self._affinity_timeout_s = affinity_timeout_s
        self._endpoints: list[Endpoint] = []
        self._turns: list[Pick] = []  # of the endpoints, in the same order: made once, not for every connection
        self._leaving: dict[Address, EndpointCounters] = {}  # no endpoints any more, with connections still open
        self._next = 0
        self._pins: dict[str, Pin] = {}  # least recently used first
        self._ejected: dict[Address, _Ejection] = {}
        self._new_pins: dict[str, Pin] | None = None  # kept once somebody asks for news
        self._told_ejected: list[tuple[Address, int, float]] = []

    # ---- what the cluster says

    @property
    def endpoints(self) -> Sequence[Endpoint]:
        return self._endpoints

    @property
    def ejected(self) -> Collection[Address]:
        """The addresses that are passed over now, or on trial."""
        return self._ejected.keys()

    @property
    def pins(self) -> int:
        return len(self._pins)

    def set_endpoints(self, usable: Sequence[Endpoint]) -> None:
        """Replace the endpoints. Those that stay keep their place in the rotation; new ones join at its end."""
        wanted = {endpoint.address: endpoint for endpoint in usable}
        kept: list[Endpoint] = []
        turn = 0
        for index, endpoint in enumerate(self._endpoints):
            if (still := wanted.pop(endpoint.address, None)) is not None:
                kept.append(still)
                if index < self._next:
                    turn += 1
        self._endpoints = kept + list(wanted.values())
        counters = {pick.endpoint.address: pick.counters for pick in self._turns} | self._leaving
        self._turns = [
            Pick(endpoint, "round robin", counters.get(endpoint.address) or EndpointCounters())
            for endpoint in self._endpoints
        ]
        stays = {endpoint.address for endpoint in self._endpoints}
        self._leaving = {address: gone for address, gone in counters.items() if gone.open and address not in stays}
        self._next = turn if turn < len(self._endpoints) else 0
        for address in self._ejected.keys() - stays:
            del self._ejected[address]

    def set_affinity(self, timeout_s: int | None) -> None:
        """Switch client-IP affinity on (seconds), off (None), or to another timeout; pins end with it."""
        if timeout_s is None:
            self._pins.clear()
        self._affinity_timeout_s = timeout_s

    def counters(self) -> list[tuple[Address, EndpointCounters]]:
        """Return what each endpoint has had; one that is gone is told of until its last connection has ended."""
        self._leaving = {address: gone for address, gone in self._leaving.items() if gone.open}
        return [*((pick.endpoint.address, pick.counters) for pick in self._turns), *self._leaving.items()]

    # ---- choosing

    def pick(self, client_ip: str, tried: Collection[Address] = ()) -> Pick | None:
        """Return the endpoint for a new connection of *client_ip*, or None when there is none left to try.

        *tried* are the addresses that already failed this very connection: they are never chosen again,
        while an ejected one may be, if nothing else is left - better a doubtful endpoint than none.
        """
        if self._affinity_timeout_s is None:
            return self._by_turn(tried)
        now = self._now()
        pin = self._pins.pop(client_ip, None)
        if pin is not None and pin.expires_at > now and pin.address not in tried:
            pinned = next((turn for turn in self._turns if turn.endpoint.address == pin.address), None)
            if pinned is not None and self._is_open(pin.address, now):
                self._pin(client_ip, Pin(pin.address, now + self._affinity_timeout_s))
                return Pick(pinned.endpoint, "affinity", pinned.counters)
        choice = self._by_turn(tried)
        if choice is not None:
            self._pin(client_ip, Pin(choice.endpoint.address, now + self._affinity_timeout_s))
            self._forget_old_pins(now)
        return choice

    def _pin(self, client_ip: str, pin: Pin) -> None:
        self._pins[client_ip] = pin
        if self._new_pins is not None:
            self._new_pins[client_ip] = pin

    def _by_turn(self, tried: Collection[Address]) -> Pick | None:
        endpoints = self._endpoints
        count = len(endpoints)
        if not self._ejected and not tried:
            if not count:
                return None
            index = self._next
            self._next = index + 1 if index + 1 < count else 0
            return self._turns[index]
        now = self._now()
        doubtful = None
        for step in range(count):
            index = (self._next + step) % count
            address = endpoints[index].address
            if address in tried:
                continue
            if self._is_open(address, now):
                self._next = (index + 1) % count
                return Pick(endpoints[index], self._why(address, tried), self._turns[index].counters)
            if doubtful is None:
                doubtful = index
        if doubtful is None:
            return None
        self._next = (doubtful + 1) % count
        return Pick(endpoints[doubtful], "last resort", self._turns[doubtful].counters)

    def _is_open(self, address: Address, now: float) -> bool:
        """Whether *address* may be chosen; the first to ask after its time is up has the trial."""
        ejection = self._ejected.get(address)
        if ejection is None:
            return True
        if now < ejection.until or now < ejection.trial_until:
            return False
        ejection.trial_until = now + TRIAL_S
        return True

    def _why(self, address: Address, tried: Collection[Address]) -> str:
        if address in self._ejected:
            return "trial"
        return "failover" if tried else "round robin"

    def _forget_old_pins(self, now: float) -> None:
        while self._pins:
            client_ip, oldest = next(iter(self._pins.items()))
            if oldest.expires_at > now and len(self._pins) <= PINS_MAX:
                return
            del self._pins[client_ip]

    # ---- what our own dials say

    def report_failure(self, endpoint: Endpoint) -> bool:
        """Hold a failed dial against *endpoint*; return whether it is ejected by this.

        The time doubles with each failure, from EJECT_S to EJECT_MAX_S. One failure counts once, however
        many connections met it: those that failed while it was already out say nothing new.
        """
        address = endpoint.address
        if not any(e.address == address for e in self._endpoints):
            return False
        now = self._now()
        ejection = self._ejected.get(address)
        if ejection is None:
            if len(self._ejected) + 1 >= len(self._endpoints):
                return False  # never the last one: with nothing left to choose, ejecting helps nobody
            self._ejected[address] = _Ejection(failures=1, until=now + EJECT_S)
            return True
        if now < ejection.until:
            return False
        ejection.failures += 1
        ejection.until = now + min(EJECT_S * 2 ** (ejection.failures - 1), EJECT_MAX_S)
        ejection.trial_until = 0.0
        return True

    def report_success(self, endpoint: Endpoint) -> bool:
        """*endpoint* took a connection: all is forgiven. Return whether it was ejected until now."""
        return self._ejected.pop(endpoint.address, None) is not None

    # ---- what another process should know

    def memory(self) -> PickerMemory:
        """Return all that was learnt and still counts."""
        return PickerMemory(list(self._pins.items()), self._ejections())

    def _ejections(self) -> list[tuple[Address, int, float]]:
        return [(address, held.failures, held.until) for address, held in self._ejected.items()]

    def take_news(self) -> PickerMemory | None:
        """Return what was learnt since the last call; None where there is nothing."""
        ejected = self._ejections()
        pins = dict(self._pins) if self._new_pins is None else self._new_pins
        self._new_pins = {}
        if not pins and ejected == self._told_ejected:
            return None
        self._told_ejected = ejected
        return PickerMemory(list(pins.items()), ejected)

    def remember(self, memory: PickerMemory) -> None:
        """Know what another picker of the same service port knew."""
        if self._affinity_timeout_s is not None:
            self._pins = {**dict(memory.pins), **self._pins}
        known = {endpoint.address for endpoint in self._endpoints}
        for address, failures, until in memory.ejected:
            if address in known:
                self._ejected.setdefault(address, _Ejection(failures, until))
