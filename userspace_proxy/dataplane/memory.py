"""What the pickers of one service port know together: where clients are pinned, and which endpoints are ejected.

A service port may have several listeners, one for each set of endpoints; a client that comes by a cluster IP and by
a node port is one client all the same, and a backend that refuses one listener's dial refuses the other's.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from userspace_proxy.interfaces import EndpointCounters
from userspace_proxy.model.endpoint import Address

EJECT_S = 1.0
EJECT_MAX_S = 60.0
# A trial that nobody reports on (the connection attempt was cut) is over after so long.
TRIAL_S = 4.0
# An endpoint that lets so many dials in a row be overtaken by others, and answers none, is silent.
OVERTAKEN_MAX = 3
# What clients whose own dials fail can make us remember.
REFUSED_CLIENTS_MAX = 1_024
REFUSALS_OF_A_CLIENT_MAX = 256
# A client can choose its IPv6 address freely, so what it can make us remember has a bound.
PINS_MAX = 65_536


class Pin(NamedTuple):
    """Where a client stays, and until when (monotonic seconds, the same in every process of this host)."""

    address: Address
    expires_at: float


@dataclass(slots=True)
class Ejection:
    """What is held against one endpoint. Its *trial* is the one connection that may see whether it is back."""

    failures: int
    until: float
    trial_until: float = 0.0


class Chooser(Protocol):
    """A picker, as its memory knows it."""

    def on_ejection(self, address: Address) -> None:
        """*address* was ejected, for longer than before or anew, or is ejected no more."""
        ...


class PickerMemory(NamedTuple):
    """What pickers know beside their endpoints, for those that take their place.

    Ejections are (address, failures, until), all of them; pins are (client IP, pin), those that are new.
    """

    pins: list[tuple[str, Pin]]
    ejected: list[tuple[Address, int, float]]


class Memory:
    """Pins and ejections of one service port."""

    def __init__(self, now: Callable[[], float], affinity_timeout_s: int | None = None) -> None:
        self.now = now
        self.affinity_timeout_s = affinity_timeout_s
        self.ejected: dict[Address, Ejection] = {}
        self._pins: dict[str, Pin] = {}  # least recently used first
        self._new_pins: dict[str, Pin] | None = None  # kept once somebody asks for news
        self._told_ejected: list[tuple[Address, int, float]] = []
        self._counters: dict[Address, EndpointCounters] = {}
        self._chosen_from: dict[Chooser, Collection[Address]] = {}
        self._overtaken: dict[Address, int] = {}
        # By client, the one whose dial failed longest ago first.
        self.refused: OrderedDict[str, dict[Address, Ejection]] = OrderedDict()

    # ---- who shares it

    def share(self, picker: Chooser, addresses: Collection[Address]) -> None:
        """From now on *picker* chooses from *addresses*; what no picker chooses from any more starts afresh."""
        self._chosen_from[picker] = addresses
        self._forget_gone()

    def leave(self, picker: Chooser) -> bool:
        """*picker* chooses no more; return whether it was the last one."""
        self._chosen_from.pop(picker, None)
        self._forget_gone()
        return not self._chosen_from

    def addresses(self) -> Collection[Address]:
        """Return all that any picker chooses from, each once."""
        known = list(self._chosen_from.values())
        return known[0] if len(known) == 1 else set().union(*known)

    def _forget_gone(self) -> None:
        known = self.addresses()
        for address in [address for address in self.ejected if address not in known]:
            del self.ejected[address]
        for address in [address for address in self._overtaken if address not in known]:
            del self._overtaken[address]
        for address in [a for a, counters in self._counters.items() if a not in known and not counters.open]:
            del self._counters[address]

    # ---- what is counted

    def counters_of(self, address: Address) -> EndpointCounters:
        """Return where everybody counts what the endpoint at *address* gets."""
        counters = self._counters.get(address)
        if counters is None:
            counters = self._counters[address] = EndpointCounters()
        return counters

    def counters(self) -> list[tuple[Address, EndpointCounters]]:
        """Return what each endpoint has had; one that is gone is told of until its last connection has ended."""
        self._forget_gone()
        return list(self._counters.items())

    # ---- pins

    @property
    def pins(self) -> Mapping[str, Pin]:
        return self._pins

    def set_affinity(self, timeout_s: int | None) -> None:
        """Switch client-IP affinity on (seconds), off (None), or to another timeout; pins end with it."""
        if timeout_s is None:
            self._pins.clear()
        self.affinity_timeout_s = timeout_s

    def take_pin(self, client_ip: str) -> Pin | None:
        """Return the pin of *client_ip*, which is no more: who picks pins anew."""
        return self._pins.pop(client_ip, None)

    def pin(self, client_ip: str, pin: Pin) -> None:
        self._pins[client_ip] = pin
        if self._new_pins is not None:
            self._new_pins[client_ip] = pin

    def forget_old_pins(self, now: float) -> None:
        while self._pins:
            client_ip, oldest = next(iter(self._pins.items()))
            if oldest.expires_at > now and len(self._pins) <= PINS_MAX:
                return
            del self._pins[client_ip]

    # ---- ejections

    def is_open(self, address: Address, now: float) -> bool:
        """Whether *address* may be chosen; the first to ask after its time is up has the trial."""
        ejection = self.ejected.get(address)
        if ejection is None:
            return True
        if now < ejection.until or now < ejection.trial_until:
            return False
        ejection.trial_until = now + TRIAL_S
        return True

    def eject(self, address: Address) -> bool:
        """Eject *address*, or for twice as long as the last time; return whether that makes a difference.

        One failure counts once, however many connections met it: those that failed while it was out say nothing new.
        """
        now = self.now()
        ejection = self.ejected.setdefault(address, Ejection(0, now))
        if not _extend(ejection, now):
            return False
        self._tell(address)
        return True

    def forgive(self, address: Address) -> bool:
        """Hold nothing against *address* any more; return whether it was ejected."""
        if self._overtaken:
            self._overtaken.pop(address, None)
        if self.ejected.pop(address, None) is None:
            return False
        self._tell(address)
        return True

    def is_silent(self, address: Address) -> bool:
        """Count a dial to *address* that another one has overtaken; return whether it is one too many."""
        if address in self.ejected:
            return True  # that was its trial
        count = self._overtaken.get(address, 0) + 1
        if count < OVERTAKEN_MAX:
            self._overtaken[address] = count
            return False
        self._overtaken.pop(address, None)
        return True

    def _tell(self, address: Address) -> None:
        for picker in self._chosen_from:
            picker.on_ejection(address)

    # ---- failures of one client

    def refuse(self, client_ip: str, address: Address) -> bool:
        """Eject *address* for *client_ip* alone, whose dial failed; return whether that makes a difference.

        A firewall of the endpoint may be against this client.
        """
        of_client = self.refused.setdefault(client_ip, {})
        self.refused.move_to_end(client_ip)
        now = self.now()
        ejection = of_client.pop(address, None) or Ejection(0, now)
        is_new = _extend(ejection, now)
        of_client[address] = ejection
        if len(of_client) > REFUSALS_OF_A_CLIENT_MAX:
            del of_client[next(iter(of_client))]
        if len(self.refused) > REFUSED_CLIENTS_MAX:
            self.refused.popitem(last=False)
        return is_new

    def welcome(self, client_ip: str, address: Address) -> None:
        """A dial to *address* in the name of *client_ip* succeeded."""
        of_client = self.refused.get(client_ip)
        if of_client is not None and of_client.pop(address, None) is not None and not of_client:
            del self.refused[client_ip]

    # ---- what another process should know

    def all(self) -> PickerMemory:
        """Return all that was learnt and still counts."""
        return PickerMemory(list(self._pins.items()), self._ejections())

    def _ejections(self) -> list[tuple[Address, int, float]]:
        return [(address, held.failures, held.until) for address, held in self.ejected.items()]

    def take_news(self) -> PickerMemory | None:
        """Return what was learnt since the last call; None where there is nothing."""
        ejected = self._ejections()
        pins: Iterable[tuple[str, Pin]] = (self._pins if self._new_pins is None else self._new_pins).items()
        news = PickerMemory(list(pins), ejected)
        self._new_pins = {}
        if not news.pins and ejected == self._told_ejected:
            return None
        self._told_ejected = ejected
        return news

    def remember(self, memory: PickerMemory) -> None:
        """Know what another process's pickers of the same service port knew."""
        if self.affinity_timeout_s is not None:
            self._pins = {**dict(memory.pins), **self._pins}
        known = self.addresses()
        for address, failures, until in memory.ejected:
            if address in known:
                self.ejected.setdefault(address, Ejection(failures, until))
                self._tell(address)


def _extend(ejection: Ejection, now: float) -> bool:
    """Let *ejection*, whose time is up, begin anew for twice as long; return whether it was up."""
    if ejection.failures and now < ejection.until:
        return False
    ejection.failures += 1
    ejection.until = now + min(EJECT_S * 2 ** (ejection.failures - 1), EJECT_MAX_S)
    ejection.trial_until = 0.0
    return True
