"""Choose the endpoint for the next connection: affinity, trials of ejected endpoints, then a balancing algorithm.

Pure: no socket and no clock of its own. The API tells which endpoints are ready. `report_failure` and
`report_success` bring in the results of our dials; failures eject an endpoint for a while.

Each family has its own endpoints and its own balancer, and a client gets endpoints of its family.
"""

import heapq
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from userspace_proxy.dataplane.balancing import ALGORITHMS, Balancer, Candidates, Member
from userspace_proxy.dataplane.memory import TRIAL_S, Memory, Pin
from userspace_proxy.model.counters import EndpointCounters
from userspace_proxy.model.endpoint import Address, Endpoint
from userspace_proxy.model.service import Balance, Weights


class Pick(NamedTuple):
    """A chosen endpoint, the reason in one or two words for the access log, and the endpoint's counters."""

    endpoint: Endpoint
    why: str
    counters: EndpointCounters


class _Family:
    """The endpoints of one IP family that take new connections, by index, and the balancer that chooses among them."""

    __slots__ = ("_balancer", "_due", "_due_at", "_index", "_memory", "_open", "_picks", "_slow_starts")

    def __init__(self, memory: Memory, balance: Balance = Balance.ROUND_ROBIN) -> None:
        self._memory = memory
        self._balancer = ALGORITHMS[balance]()
        self._picks: list[Pick] = []  # for each endpoint; made once, not for every connection
        # Made on first use, by `index`: the index of each address, the bits of endpoints not ejected, a heap of the
        # times at which ejected ones are due for a trial, and the bits of endpoints in slow start by its beginning.
        self._index: dict[Address, int] | None = None
        self._open: int
        self._due: list[tuple[float, Address]]
        self._due_at: dict[Address, float]  # the entry of an endpoint that counts; others are of earlier ejections
        self._slow_starts: dict[float, int]

    def replace(
        self, wanted: Mapping[Address, Endpoint], weights: Mapping[str, int], balancer: Balancer | None = None
    ) -> None:
        """Replace the endpoints, and the balancer if one is given. Endpoints that stay keep their order.

        An endpoint with weight 0 takes no new connections, unless every weight is 0.
        """
        self._balancer = balancer or self._balancer
        if not wanted and not self._picks:
            return
        counters = {address: self._memory.counters_of(address) for address in wanted}
        taking = {address: endpoint for address, endpoint in wanted.items() if weights.get(endpoint.ip, 1)}
        if not taking:
            taking, weights = dict(wanted), {}
        before = (pick.endpoint.address for pick in self._picks)
        order = dict.fromkeys((*(address for address in before if address in taking), *taking))
        self._picks = [Pick(taking[address], self._balancer.why, counters[address]) for address in order]
        self._balancer.replace([Member(a, weights.get(a[0], 1), counters[a]) for a in order])
        self._index = None

    def index(self) -> dict[Address, int]:
        """Return the index of each address."""
        index = self._index
        if index is None:
            index = self._index = {pick.endpoint.address: at for at, pick in enumerate(self._picks)}
            self._open = (1 << len(index)) - 1
            self._due = []
            self._due_at = {}
            self._slow_starts = {}
            for address in (*self._memory.ejected, *self._memory.starting):
                self.on_ejection(address)
        return index

    def on_ejection(self, address: Address) -> None:
        """Note that the ejection of *address* has begun, changed or ended, which may begin its slow start."""
        at = None if self._index is None else self._index.get(address)
        if at is None:
            return
        ejection = self._memory.ejected.get(address)
        if ejection is not None:
            self._open &= ~(1 << at)
            self._due_at[address] = ejection.until
            heapq.heappush(self._due, (ejection.until, address))
            return
        self._open |= 1 << at
        if (since := self._memory.starting.get(address)) is not None:
            self._slow_starts[since] = self._slow_starts.get(since, 0) | 1 << at

    def has_another(self, address: Address) -> bool:
        """Return whether another endpoint than *address* is not ejected."""
        at = self.index().get(address)
        return bool(self._open if at is None else self._open & ~(1 << at))

    def take(self, client_ip: str, tried: Collection[Address], *, doubtful: bool = True) -> Pick | None:
        """Return the endpoint for a new connection of *client_ip* without affinity, or None if none is left to try.

        *tried*: as in `Picker.pick`. *doubtful*: return an ejected endpoint if no other is left.
        """
        memory = self._memory
        if not memory.ejected and not tried and not memory.ejected_for and not memory.starting:
            return self._picks[self._balancer.pick(client_ip)] if self._picks else None
        if not self._picks:
            return None
        now = memory.now()
        self.index()
        if not tried and memory.ejected and (trial := self._trial(client_ip, now)) is not None:
            return trial
        bits, failed, why = self._without_failures(client_ip, tried, now), len(tried), "failover" if tried else ""
        if not bits and doubtful:
            bits, failed, why = self._without((1 << len(self._picks)) - 1, tried), 0, "last resort"
        if not bits:
            return None
        slow_starts = self._shares(now) if memory.starting else ()
        pick = self._picks[self._balancer.pick_among(client_ip, Candidates(bits, slow_starts, failed))]
        return pick._replace(why=why) if why else pick

    def preview(self, client_ip: str) -> list[tuple[Pick, float]]:
        """Return what `take` may return for *client_ip* now, each with its probability. Nothing changes."""
        if not self._picks:
            return []
        memory, index_of = self._memory, self.index()
        now = memory.now()
        due = [(e.due_at, a) for a, e in memory.ejected.items() if a in index_of]
        due = [(at, address) for at, address in due if at <= now]
        if due and (trial := min(due)[1]) not in memory.ejected_for.get(client_ip, ()):
            return [(self._picks[index_of[trial]]._replace(why="trial"), 1.0)]
        bits = self._without_failures(client_ip, (), now)
        slow_starts = [(memory.share_of(since, now), starting) for since, starting in self._slow_starts.items()]
        odds = self._balancer.odds(client_ip, Candidates(bits or (1 << len(self._picks)) - 1, slow_starts))
        picks = ((self._picks[index], probability) for index, probability in odds.items())
        return [(pick if bits else pick._replace(why="last resort"), probability) for pick, probability in picks]

    def _shares(self, now: float) -> list[tuple[float, int]]:
        """Return the current share of the endpoints in slow start. Forget those that have their whole share."""
        self._memory.end_slow_starts(now)
        shares = {since: self._memory.share_of(since, now) for since in self._slow_starts}
        self._slow_starts = {since: bits for since, bits in self._slow_starts.items() if shares[since] < 1}
        return [(shares[since], bits) for since, bits in self._slow_starts.items()]

    def _without_failures(self, client_ip: str, tried: Collection[Address], now: float) -> int:
        """Return the endpoints that are neither in *tried* nor ejected, for all clients or for *client_ip* alone."""
        refused = self._memory.ejected_for.get(client_ip, {})
        bits = self._without(self._open, tried) if tried else self._open
        return self._without(bits, [a for a, e in refused.items() if now < e.until]) if refused else bits

    def _without(self, endpoints: int, addresses: Collection[Address]) -> int:
        index_of = self.index()
        for address in addresses:
            if (at := index_of.get(address)) is not None:
                endpoints &= ~(1 << at)
        return endpoints

    def _trial(self, client_ip: str, now: float) -> Pick | None:
        """Return the ejected endpoint that has been due longest for a trial, or None if *client_ip* may not try it."""
        due = self._due
        while due and due[0][0] <= now:
            at, address = due[0]
            ejection = self._memory.ejected.get(address)
            if ejection is None or self._due_at[address] != at:
                heapq.heappop(due)  # of an earlier ejection
                continue
            due_at = max(ejection.until, ejection.trial_until)
            if at < due_at:  # another listener, or a pinned client, has had a trial
                self._postpone(address, due_at)
                continue
            if address in self._memory.ejected_for.get(client_ip, ()):
                return None
            ejection.trial_until = now + TRIAL_S
            self._postpone(address, ejection.trial_until)
            its_turn = self._balancer.pick_among(client_ip, Candidates(1 << self.index()[address]))
            return self._picks[its_turn]._replace(why="trial")
        return None

    def _postpone(self, address: Address, at: float) -> None:
        """Make the endpoint that is due first, at *address*, due at another time."""
        self._due_at[address] = at
        heapq.heapreplace(self._due, (at, address))


# The family of all pickers that never had an endpoint of it.
_NO_ENDPOINTS = _Family(Memory(lambda: 0.0))


class Picker:
    """Chooses among the endpoints of one listener. *memory* holds the service port's pins and ejections.

    *mixes_families*: clients get endpoints of both families, in one rotation.
    """

    def __init__(self, memory: Memory, *, mixes_families: bool = False) -> None:
        self._memory = memory
        self._mixes_families = mixes_families
        self.endpoints: dict[Address, Endpoint] = {}
        self._is_new = True  # no endpoints have been given yet
        # IPv4, IPv6. Empty until the first connection: most service ports of a large cluster have none on this node.
        self._families = [_NO_ENDPOINTS] * 2
        self._is_in_use = False
        self._balancing: tuple[Balance, Weights] = Balance.ROUND_ROBIN, ()
        memory.register(self)

    # ---- endpoints from the API

    def set_endpoints(self, usable: Sequence[Endpoint]) -> None:
        """Replace the endpoints. Those that stay keep their order; new ones come last."""
        before = () if self._is_new else self._memory.addresses()
        self.endpoints, self._is_new = {endpoint.address: endpoint for endpoint in usable}, False
        self._memory.note_endpoints(before, self.endpoints)
        self._replace(*self._balancing)

    def balance(self, balance: Balance | None, weights: Weights) -> None:
        """Choose by another algorithm, or by other weights, from the next connection on. Pins stay."""
        if (wanted := (balance or Balance.ROUND_ROBIN, weights)) != self._balancing:
            self._replace(*wanted)

    def _replace(self, balance: Balance, weights: Weights) -> None:
        before, self._balancing = self._balancing[0], (balance, weights)
        if not self._is_in_use:
            return
        for is_ipv6, family in enumerate(self._families):
            given = self.endpoints.items()
            of_family = {a: e for a, e in given if self._mixes_families or (":" in a[0]) == is_ipv6}
            if family is not _NO_ENDPOINTS:
                family.replace(of_family, dict(weights), None if balance is before else ALGORITHMS[balance]())
            elif of_family:
                self._families[is_ipv6] = _Family(self._memory, balance)
                self._families[is_ipv6].replace(of_family, dict(weights))

    def _family(self, ip: str) -> _Family:
        """Return the family of a client or an endpoint with the address *ip*."""
        if not self._is_in_use:
            self._use()
        return self._families[":" in ip]

    def _use(self) -> None:
        """Prepare for the first connection."""
        self._is_in_use = True
        if self._mixes_families:
            self._families = [_Family(self._memory, self._balancing[0])] * 2
        self._replace(*self._balancing)

    # ---- choosing

    def pick(self, client_ip: str, tried: Collection[Address] = ()) -> Pick | None:
        """Return the endpoint for a new connection of *client_ip*, or None if none is left to try.

        *tried*: addresses that already failed for this connection; they are never chosen again. An ejected endpoint is
        chosen if no other is left.
        """
        memory = self._memory
        timeout_s = memory.affinity_timeout_s
        if not self._is_in_use:
            self._use()
        if timeout_s is None:
            return self._families[":" in client_ip].take(client_ip, tried)
        now = memory.now()
        pin = memory.pins.pop(client_ip, None)
        if pin is not None and pin.expires_at > now and pin.address not in tried:
            pinned = self.endpoints.get(pin.address)
            if pinned is not None and not self._is_refused(client_ip, pin.address) and memory.is_open(pin.address, now):
                memory.pin(client_ip, Pin(pin.address, now + timeout_s))
                return Pick(pinned, "affinity", memory.counters_of(pin.address))
        choice = self._families[":" in client_ip].take(client_ip, tried)
        if choice is not None:
            self.pin(client_ip, choice.endpoint)
        return choice

    def pick_another(self, client_ip: str, tried: Collection[Address], *, doubtful: bool) -> Pick | None:
        """Return another endpoint for a connection whose first one has not answered. The client's pin does not change.

        *doubtful*: choose an ejected endpoint if no other is left.
        """
        return self._family(client_ip).take(client_ip, tried, doubtful=doubtful)

    def pin(self, client_ip: str, endpoint: Endpoint) -> None:
        """Pin *client_ip* to *endpoint*, if the service port has affinity."""
        memory = self._memory
        if memory.affinity_timeout_s is not None:
            now = memory.now()
            memory.pins.pop(client_ip, None)
            memory.pin(client_ip, Pin(endpoint.address, now + memory.affinity_timeout_s))
            memory.forget_old_pins(now)

    def _is_refused(self, client_ip: str, address: Address) -> bool:
        refused = self._memory.ejected_for.get(client_ip)
        return refused is not None and address in refused and self._memory.now() < refused[address].until

    # ---- results of dials

    def on_ejection(self, address: Address) -> None:
        """Note that the ejection of *address* has begun, changed or ended."""
        self._families[":" in address[0]].on_ejection(address)

    def preview(self, client_ip: str) -> list[tuple[Pick, float]]:
        """Return what `pick` may return for *client_ip* now, each with its probability. Nothing changes."""
        memory, now = self._memory, self._memory.now()
        pin = memory.pins.get(client_ip) if memory.affinity_timeout_s is not None else None
        if pin is not None and pin.expires_at > now and (pinned := self.endpoints.get(pin.address)) is not None:
            ejection = memory.ejected.get(pin.address)
            if (ejection is None or now >= ejection.due_at) and not self._is_refused(client_ip, pin.address):
                return [(Pick(pinned, "affinity", memory.counters_of(pin.address)), 1.0)]
        return self._family(client_ip).preview(client_ip)

    def report_failure(self, endpoint: Endpoint, as_client: str = "", why: str = "") -> bool:
        """Count a failed dial to *endpoint*, for the reason *why*. Return whether this ejects it.

        The ejection time doubles with each failure, from EJECT_S to EJECT_MAX_S. *as_client*: the client's address if
        the endpoint sees it instead of this node's; the failure then counts for this client alone.
        """
        address = endpoint.address
        if address not in self.endpoints:
            return False
        memory = self._memory
        memory.note_failure(address, why)
        if as_client:
            return memory.eject_for(as_client, address)
        if address not in memory.ejected and not self._family(endpoint.ip).has_another(address):
            return False  # never eject the last one: no other is left to choose
        return memory.eject(address)

    def report_overtaken(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Note that another endpoint answered before *endpoint*. Return whether this ejects it, after several cases."""
        why = "slower to answer than others"
        return self._memory.note_overtaken(endpoint.address) and self.report_failure(endpoint, as_client, why)

    def report_success(self, endpoint: Endpoint, as_client: str = "") -> bool:
        """Note that *endpoint* accepted a connection, which ends its ejection. Return whether it was ejected."""
        if as_client:
            self._memory.end_ejection_for(as_client, endpoint.address)
        return self._memory.end_ejection(endpoint.address)
