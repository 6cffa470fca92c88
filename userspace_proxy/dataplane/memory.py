"""The state that the pickers of one service port share: client pins, and endpoints that are not like the others.

These are ejected, in slow start or suspected (`suspects.py`).

A service port may have several listeners, one for each set of endpoints. A client that uses the cluster IP and the
node port is still one client, and an endpoint that refuses one listener's dial also refuses another's.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from userspace_proxy.dataplane.suspects import Suspects
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Address
from userspace_proxy.model.names import ServicePortName

if TYPE_CHECKING:
    from userspace_proxy.dataplane.picker import Picker

EJECT_S = 1.0
EJECT_MAX_S = 60.0
# A trial without a result (the connection attempt was cut) ends after this time.
TRIAL_S = 4.0
# An endpoint is silent after this number of dials in a row that other endpoints overtook.
OVERTAKEN_MAX = 3
# The share of its usual connections that an endpoint gets at the beginning of its slow start.
SLOW_START_SHARE = 0.1
# Bounds for the memory that clients with failing dials can use.
REFUSED_CLIENTS_MAX = 1_024
REFUSALS_OF_A_CLIENT_MAX = 256
# Bound for pins: a client can choose its IPv6 address freely.
PINS_MAX = 65_536


class Pin(NamedTuple):
    """The endpoint of a pinned client, and its expiry in monotonic seconds (equal in every process of this host)."""

    address: Address
    expires_at: float


@dataclass(slots=True)
class Ejection:
    """The ejection of one endpoint. Its *trial* is the one connection that may test whether the endpoint works."""

    failures: int
    until: float
    trial_until: float = 0.0

    @property
    def due_at(self) -> float:
        """The time of the next trial."""
        return max(self.until, self.trial_until)


class PickerMemory(NamedTuple):
    """Pins and ejections, for pickers in another process.

    ``ejected``: (address, failures, until) of every ejection. ``pins``: (client IP, pin), all or the new ones.
    """

    pins: list[tuple[str, Pin]]
    ejected: list[tuple[Address, int, float]]


class _Empty(dict[Any, Any]):
    """The value of each dict of a `Memory` until its first entry (``self.pins = self.pins or {}``).

    Few service ports have failures or pins, and seven empty dicts for each would take 448 bytes.
    """

    __slots__ = ()

    def __setitem__(self, key: object, value: object) -> None:
        raise TypeError("no entry: all service ports share this dict")


_EMPTY = _Empty()


def _empty() -> dict[Any, Any]:
    return _EMPTY


# By service port.
Memories = list[tuple[ServicePortName, PickerMemory]]


@dataclass(slots=True, eq=False)
class Memory:
    """The state that the pickers of one service port share.

    ``has_learnt``: pins or ejections may have changed since the last `take_news`.
    """

    now: Callable[[], float]
    affinity_timeout_s: int | None = None
    slow_start_s: float = 0.0
    pins: dict[str, Pin] = field(default_factory=_empty)  # least recently used first
    ejected: dict[Address, Ejection] = field(default_factory=_empty)
    # Ejections for one client alone, by client; the client whose dial failed longest ago comes first.
    ejected_for: dict[str, dict[Address, Ejection]] = field(default_factory=_empty)
    suspects: Suspects = field(default_factory=Suspects)
    last_failures: dict[Address, tuple[float, str]] = field(default_factory=_empty)  # wall-clock second and reason
    starting: dict[Address, float] = field(default_factory=_empty)  # since when in slow start; oldest first
    has_learnt: bool = True
    _new_pins: dict[str, Pin] | None = None  # since the last `take_news`; None for all pins
    _reported_ejected: Sequence[tuple[Address, int, float]] = ()
    _overtaken: dict[Address, int] = field(default_factory=_empty)
    _counters: dict[Address, EndpointCounters] = field(default_factory=_empty)
    _pickers: tuple[Picker, ...] = ()

    # ---- pickers

    def register(self, picker: Picker) -> None:
        """Register *picker*, which has no endpoints yet."""
        self._pickers += (picker,)

    def note_endpoints(self, before: Collection[Address], addresses: Collection[Address]) -> None:
        """Note that a picker has new *addresses*. *before*: those of all pickers, empty for its first ones.

        The state of addresses that no picker has any more is dropped. New addresses begin with a slow start. The first
        ones of a picker, and the first ones of all, get their whole share at once.
        """
        self._forget_gone()
        if before and self.slow_start_s and (new := [a for a in addresses if a not in before]):
            self.starting = self.starting or {}
            self.starting.update(dict.fromkeys(new, self.now()))  # at the same time, so that they are one group

    def unregister(self, picker: Picker) -> bool:
        """Unregister *picker*. Return whether it was the last one."""
        self._pickers = tuple(other for other in self._pickers if other is not picker)
        self._forget_gone()
        return not self._pickers

    def addresses(self) -> Collection[Address]:
        """Return the addresses of all pickers, without duplicates."""
        of_pickers = [picker.endpoints for picker in self._pickers if picker.endpoints]
        return of_pickers[0] if len(of_pickers) == 1 else set().union(*of_pickers)

    def _forget_gone(self) -> None:
        present = self.addresses()
        states: list[dict[Address, Any]]
        states = [self.ejected, self.starting, self.suspects, self._overtaken, self.last_failures]
        for of_addresses in filter(None, states):
            for address in [address for address in of_addresses if address not in present]:
                del of_addresses[address]
                self.has_learnt = True
        for address in [a for a, counters in self._counters.items() if a not in present and not counters.open]:
            del self._counters[address]

    # ---- counters

    def counters_of(self, address: Address) -> EndpointCounters:
        """Return the shared counters of the endpoint at *address*."""
        counters = self._counters.get(address)
        if counters is None:
            self._counters = self._counters or {}
            counters = self._counters[address] = EndpointCounters()
        return counters

    def counters(self) -> list[tuple[Address, EndpointCounters]]:
        """Return the counters of each endpoint. A removed endpoint is included until its last connection ends."""
        self._forget_gone()
        for address in self.addresses():
            self.counters_of(address)
        return list(self._counters.items())

    # ---- pins

    def set_affinity(self, timeout_s: int | None) -> None:
        """Set the timeout of client-IP affinity in seconds, for all pins, or None to disable it and drop all pins."""
        before, self.affinity_timeout_s = self.affinity_timeout_s, timeout_s
        if timeout_s is None:
            self.pins.clear()
        elif before is not None and before != timeout_s and self.pins:
            later_s = timeout_s - before
            self.pins = {ip: Pin(pin.address, pin.expires_at + later_s) for ip, pin in self.pins.items()}
            self._new_pins, self.has_learnt = None, True

    def pin(self, client_ip: str, pin: Pin) -> None:
        """Add *pin* as the most recently used one. The caller has removed the pin that *client_ip* had before."""
        self.pins = self.pins or {}
        self.pins[client_ip] = pin
        self.has_learnt = True
        if self._new_pins is not None:
            self._new_pins = self._new_pins or {}
            self._new_pins[client_ip] = pin
            if len(self._new_pins) > PINS_MAX:
                self._new_pins = None  # the next news have all pins

    def forget_old_pins(self, now: float) -> None:
        while self.pins:
            client_ip, oldest = next(iter(self.pins.items()))
            if oldest.expires_at > now and len(self.pins) <= PINS_MAX:
                return
            del self.pins[client_ip]

    # ---- ejections

    def is_open(self, address: Address, now: float) -> bool:
        """Return whether *address* may be chosen. After the ejection time, the first caller gets the trial."""
        ejection = self.ejected.get(address)
        if ejection is None:
            return True
        if now < ejection.due_at:
            return False
        ejection.trial_until = now + TRIAL_S
        return True

    def eject(self, address: Address) -> bool:
        """Eject *address*, for twice as long as the last time. Return whether this starts a new ejection.

        Failures during an ejection do not count: those connections began before it.
        """
        now = self.now()
        ejection = self._own_ejected().setdefault(address, Ejection(0, now))
        if not _extend(ejection, now):
            return False
        self._notify(address)
        return True

    def _own_ejected(self) -> dict[Address, Ejection]:
        self.ejected = self.ejected or {}
        return self.ejected

    def end_ejection(self, address: Address) -> bool:
        """End the ejection of *address*. Return whether it was ejected."""
        if self._overtaken:
            self._overtaken.pop(address, None)
        if self.ejected.pop(address, None) is None:
            return False
        if self.slow_start_s:
            self.starting.pop(address, None)
            self.starting = self.starting or {}
            self.starting[address] = self.now()
        self._notify(address)
        return True

    def note_overtaken(self, address: Address) -> bool:
        """Count a dial to *address* that another one overtook. Return whether the endpoint counts as silent now."""
        if address in self.ejected:
            return True  # that was its trial
        count = self._overtaken.get(address, 0) + 1
        if count < OVERTAKEN_MAX:
            self._overtaken = self._overtaken or {}
            self._overtaken[address] = count
            return False
        self._overtaken.pop(address, None)
        return True

    def _notify(self, address: Address) -> None:
        self.has_learnt = True
        for picker in self._pickers:
            picker.on_ejection(address)

    # ---- slow start

    def set_slow_start(self, slow_start_s: float) -> None:
        """Set how long the share of a new or recovered endpoint grows; 0 disables slow start."""
        self.slow_start_s = slow_start_s
        self.end_slow_starts(self.now())

    def end_slow_starts(self, now: float) -> None:
        """Forget the slow starts that are over."""
        while self.starting:
            address, since = next(iter(self.starting.items()))
            if now - since < self.slow_start_s:
                return
            del self.starting[address]

    def share_of(self, since: float, now: float) -> float:
        """Return the share (0 to 1) of its usual connections for an endpoint whose slow start began at *since*."""
        return min(1.0, max(SLOW_START_SHARE, (now - since) / self.slow_start_s)) if self.slow_start_s else 1.0

    # ---- failures of one client

    def eject_for(self, client_ip: str, address: Address) -> bool:
        """Eject *address* for *client_ip* alone, after its dial failed. Return whether this is a new ejection.

        The endpoint's firewall may refuse only this client.
        """
        of_client = self.ejected_for.pop(client_ip, {})
        self.ejected_for = self.ejected_for or {}
        self.ejected_for[client_ip] = of_client
        now = self.now()
        ejection = of_client.pop(address, None) or Ejection(0, now)
        is_new = _extend(ejection, now)
        of_client[address] = ejection
        if len(of_client) > REFUSALS_OF_A_CLIENT_MAX:
            del of_client[next(iter(of_client))]
        if len(self.ejected_for) > REFUSED_CLIENTS_MAX:
            del self.ejected_for[next(iter(self.ejected_for))]
        return is_new

    def end_ejection_for(self, client_ip: str, address: Address) -> None:
        """End the ejection of *address* for *client_ip*, whose dial has succeeded."""
        of_client = self.ejected_for.get(client_ip)
        if of_client is not None and of_client.pop(address, None) is not None and not of_client:
            del self.ejected_for[client_ip]

    def note_failure(self, address: Address, why: str) -> None:
        """Note that a dial to *address* has failed now, for the reason *why*."""
        self.last_failures = self.last_failures or {}
        self.last_failures[address] = time.time(), why

    # ---- exchange with other processes

    def all(self) -> PickerMemory:
        """Return all pins and ejections."""
        return PickerMemory(list(self.pins.items()), self._ejections())

    def _ejections(self) -> list[tuple[Address, int, float]]:
        return [(address, held.failures, held.until) for address, held in self.ejected.items()]

    def take_news(self) -> PickerMemory | None:
        """Return the pins and ejections that are new since the last call, or None if there are none."""
        self.has_learnt = False
        ejected = self._ejections()
        pins: Iterable[tuple[str, Pin]] = (self.pins if self._new_pins is None else self._new_pins).items()
        news = PickerMemory(list(pins), ejected)
        self._new_pins = _EMPTY
        if not news.pins and ejected == list(self._reported_ejected):
            return None
        self._reported_ejected = ejected
        return news

    def pinned_since(self, at: float) -> PickerMemory:
        """Return the pins that were set or used at *at* or later."""
        expires_from = at + (self.affinity_timeout_s or 0)
        last_first = itertools.takewhile(lambda held: held[1].expires_at >= expires_from, reversed(self.pins.items()))
        return PickerMemory(list(last_first)[::-1], [])

    def remember(self, memory: PickerMemory) -> None:
        """Add the pins and ejections of another process's pickers of the same service port. The later pin counts."""
        if self.affinity_timeout_s is not None:
            for client_ip, pin in memory.pins:
                known = self.pins.get(client_ip)
                if known is None or known.expires_at < pin.expires_at:
                    self.pins.pop(client_ip, None)
                    self.pin(client_ip, pin)
        present = self.addresses()
        for address, failures, until in memory.ejected:
            if address in present:
                self._own_ejected().setdefault(address, Ejection(failures, until))
                self._notify(address)


def _extend(ejection: Ejection, now: float) -> bool:
    """Start *ejection* again, for twice as long, if its time is over. Return whether it was over."""
    if ejection.failures and now < ejection.until:
        return False
    ejection.failures += 1
    ejection.until = now + min(EJECT_S * 2.0 ** (ejection.failures - 1), EJECT_MAX_S)
    ejection.trial_until = 0.0
    return True
