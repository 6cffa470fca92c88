"""Exclusive values of Services: stated ones and allocated ones. Pure.

A Service keeps its value until it requests another one that is available.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from enum import Enum
from typing import NamedTuple

from userspace_proxy.control.pools import Pool, Value
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.names import NamespacedName
from userspace_proxy.model.service import Portal


class ValueKind(Enum):
    CLUSTER_IP = "cluster IP"
    NODE_PORT = "node port"
    LOAD_BALANCER_IP = "load balancer IP"


# For these kinds a stated value takes precedence over an allocated one: the Service it was allocated to gets another.
# An allocated cluster IP does not move, because clients cache it. Kubernetes does the same.
_STATED_WINS = {ValueKind.NODE_PORT, ValueKind.LOAD_BALANCER_IP}


class ValueRequest(NamedTuple):
    """A request of a Service for a value: the one it states, or any value of *pool*.

    ``key`` identifies the value across restarts and is unique to this Service. ``field`` is the field that states the
    value, or could. If an ``optional`` value is not available, the Service is served without it. ``fix``: what the
    user can change if the pool is used up.
    """

    kind: ValueKind
    key: str
    field: str
    stated: Value | None = None
    pool: Pool | None = None
    optional: bool = False
    fix: str = ""


class _Held(NamedTuple):
    key: str
    kind: ValueKind
    value: Value
    allocated: bool


# Service -> the values that it now states, each with its request.
_Moves = Mapping[NamespacedName, Sequence[tuple[Value, ValueRequest]]]


class ValueClaims:
    """Records which Service holds each value.

    ``changes`` counts values taken and released. ``evicted``: Services that lost an allocated value to a Service that
    states it.
    """

    def __init__(self, pools: Iterable[Pool]) -> None:
        self._pools = tuple(pools)
        self._holders: dict[Value, NamespacedName] = {}
        self._held: dict[NamespacedName, tuple[_Held, ...]] = {}  # in the order requested
        self.evicted: set[NamespacedName] = set()
        self.changes = 0

    def has_any(self, name: NamespacedName) -> bool:
        return name in self._held

    def held(self, name: NamespacedName, kind: ValueKind) -> dict[str, Value]:
        """Return key -> value of the *kind* that *name* holds, in the order requested."""
        return {held.key: held.value for held in self._held.get(name, ()) if held.kind is kind}

    def allocated(self, kind: ValueKind) -> dict[str, Value]:
        """Return key -> value for all allocated values of *kind*, to be saved for the next process."""
        return {
            held.key: held.value
            for holdings in self._held.values()
            for held in holdings
            if held.kind is kind and held.allocated
        }

    def assign(self, name: NamespacedName, requests: Sequence[ValueRequest]) -> list[ConfigError]:
        """Give *name* exactly the values in *requests*; return an error for each optional one that is not available.

        Raises:
            ConfigError: another Service holds a required value, or the pool is used up. Nothing was changed.
        """
        before = {held.key: held for held in self._held.get(name, ())}
        wanted = {request.key: request for request in requests}
        kept = [key for key, held in before.items() if _is_met(wanted.get(key), held)]
        if kept == list(before) == list(wanted):
            return []
        for request in requests:
            if (
                not request.optional
                and self._holders.get(request.stated or "") != name
                and (error := self._conflict(name, request))
            ):
                raise error
        self._drop(name, before.keys() - kept)
        try:
            problems = self._take_all(name, requests)
        except ConfigError:
            self.release(name)
            for held in before.values():
                self._take(name, held)
            raise
        # The order requested is kept, because it tells the primary IP family from the secondary.
        holdings = {held.key: held for held in self._held.pop(name, ())}
        if ordered := tuple(holdings[key] for key in wanted if key in holdings):
            self._held[name] = ordered
        return problems

    def _take_all(self, name: NamespacedName, requests: Sequence[ValueRequest]) -> list[ConfigError]:
        problems = []
        has = {held.key for held in self._held.get(name, ())}
        missing = [request for request in requests if request.key not in has]
        for request in sorted(missing, key=lambda request: request.stated is None):  # no pool may allocate a stated one
            try:
                value = self._value_for(name, request)
            except ConfigError as error:
                if not request.optional:
                    raise
                problems.append(error)
                continue
            if value is not None:
                self._take(name, _Held(request.key, request.kind, value, allocated=request.stated is None))
        return problems

    def _value_for(self, name: NamespacedName, request: ValueRequest) -> Value | None:
        """Return the value that *request* states or is allocated, or None if it needs none.

        Raises ConfigError if another holder keeps it, or the pool is used up.
        """
        if (error := self._conflict(name, request)) is not None:
            raise error
        if request.stated is not None or request.pool is None:
            return request.stated
        value = request.pool.allocate(request.key, self._holders)
        if not value:
            raise ConfigError(f"{request.pool} is used up", field=request.field, fix=request.fix)
        return value

    def _conflict(self, name: NamespacedName, request: ValueRequest) -> ConfigError | None:
        """Return an error if another holder keeps the value that *request* states, else None."""
        if request.stated is None or request.stated not in self._holders:
            return None
        holder, held = self._holding(request.stated)
        if holder != name and held.allocated and held.kind in _STATED_WINS:
            return None
        reason = f"{request.stated} is already the {held.kind.value} of {holder}"
        return ConfigError(reason, field=request.field, fix="choose another one, or none")

    def _holding(self, value: Value) -> tuple[NamespacedName, _Held]:
        holder = self._holders[value]
        return next((holder, held) for held in self._held[holder] if held.value == value)

    def apply_moves(self, requests: Mapping[NamespacedName, Sequence[ValueRequest]]) -> None:
        """Move Services to the values they now state, if every current holder gives its value up.

        All moves happen at once, so that one change can pass values on or swap them.
        """
        leaves = {name: gone for name, own in requests.items() if (gone := self._given_up(name, own))}
        moves = {name: _required(requests[name]) for name in leaves}
        while blocked := self._blocked(moves, leaves):
            for name in blocked:  # a blocked Service keeps its values, and may block others
                del moves[name]
        for name in moves:
            self._drop(name, leaves[name])
        for name, stated in moves.items():
            for value, request in stated:
                if self._holders.get(value) != name:
                    self._take(name, _Held(request.key, request.kind, value, allocated=False))

    def _given_up(self, name: NamespacedName, requests: Sequence[ValueRequest]) -> list[str]:
        """Return the keys of the values that *name* holds and no longer requests."""
        wanted = {request.key: request for request in requests}
        return [held.key for held in self._held.get(name, ()) if not _is_met(wanted.get(held.key), held)]

    def _blocked(self, moves: _Moves, leaves: Mapping[NamespacedName, Sequence[str]]) -> list[NamespacedName]:
        """Return the Services of *moves* that state a value which its holder keeps or an earlier Service claims."""
        left = {held.value for name in moves for held in self._held[name] if held.key in leaves[name]}
        claims: dict[Value, NamespacedName] = {}
        blocked = []
        for name, stated in sorted(moves.items()):
            for value, request in stated:
                own = self._holders.get(value) == name
                taken = not own and value not in left and self._conflict(name, request) is not None
                if taken or claims.setdefault(value, name) != name:
                    blocked.append(name)
                    break
        return blocked

    # ---- one value

    def _take(self, name: NamespacedName, held: _Held) -> None:
        if held.value in self._holders:  # a stated value takes precedence over an allocated one
            holder, its = self._holding(held.value)
            self._drop(holder, [its.key])
            self.evicted.add(holder)
        self._holders[held.value] = name
        self._held[name] = (*self._held.get(name, ()), held)
        self.changes += 1
        for pool in self._pools if held.allocated else ():
            pool.take(held.key, held.value)

    def _drop(self, name: NamespacedName, keys: Collection[str]) -> None:
        holdings = self._held.pop(name, ())
        for held in [held for held in holdings if held.key in keys]:
            del self._holders[held.value]
            self.changes += 1
            if held.allocated:
                for pool in self._pools:
                    pool.release(held.key, held.value)
        if kept := tuple(held for held in holdings if held.key not in keys):
            self._held[name] = kept

    def release(self, name: NamespacedName) -> None:
        """Release all values of *name*; allocated ones are reserved for it if it comes back."""
        self._drop(name, {held.key for held in self._held.get(name, ())})


def _required(requests: Sequence[ValueRequest]) -> list[tuple[Value, ValueRequest]]:
    """Return those of *requests* that state a value and are not optional, each with its value."""
    return [(own.stated, own) for own in requests if own.stated is not None and not own.optional]


def _is_met(request: ValueRequest | None, held: _Held) -> bool:
    if request is None:
        return False
    return held.allocated if request.stated is None else held.value == request.stated


class PortalClaims:
    """Decides which Service gets a portal that several Services state.

    Order of precedence:
    1. The Service that has the portal at its own cluster IP.
    2. The Service that held it before, if *remembered* is given.
    3. The oldest Service, then the first by name.

    ``evicted``: Services that gained or lost a portal because of another Service.
    """

    def __init__(self, remembered: Mapping[str, str] | None = None) -> None:
        self._remembered = None if remembered is None else dict(remembered)
        self._owners: dict[Portal, NamespacedName] = {}  # of cluster IPs
        self._claimants: dict[Portal, dict[NamespacedName, str]] = {}  # with their creation time
        self._own: dict[NamespacedName, tuple[Portal, ...]] = {}
        self._stated: dict[NamespacedName, tuple[Portal, ...]] = {}
        self._refused: dict[NamespacedName, frozenset[Portal]] = {}
        self._holders: dict[Portal, NamespacedName] = {}  # for portals with claimants
        self.evicted: set[NamespacedName] = set()
        self.changes = 0

    def claim(
        self,
        name: NamespacedName,
        own: Iterable[Portal],
        external: Iterable[Portal],
        created: str | None,
        refused: Iterable[Portal] = (),
    ) -> dict[Portal, NamespacedName]:
        """Set the portals that *name* states; return those of *external* that it does not get -> the Service that does.

        *refused*: those of *external* that no Service may have.
        """
        self._refused.pop(name, None)
        if lost := frozenset(refused):
            self._refused[name] = lost
        owned, stated = frozenset(own), frozenset(external) - lost
        before_owned, before_stated = frozenset(self._own.pop(name, ())), frozenset(self._stated.pop(name, ()))
        self._set_owned(name, before_owned, owned)
        for portal in before_stated - stated:
            self._claimants[portal].pop(name)
        for portal in stated:
            self._claimants.setdefault(portal, {})[name] = created or "~"  # sorts after every timestamp
        if owned:
            self._own[name] = tuple(owned)
        if stated:
            self._stated[name] = tuple(stated)
        touched = (before_owned ^ owned) | before_stated | stated
        for portal in touched & self._claimants.keys():
            self._settle(portal, name)
        self.evicted.discard(name)
        return {portal: holder for portal in stated if (holder := self._holders[portal]) != name}

    def _set_owned(self, name: NamespacedName, before: Iterable[Portal], owned: Set[Portal]) -> None:
        for portal in before:
            if portal not in owned and self._owners.get(portal) == name:
                del self._owners[portal]
        self._owners.update(dict.fromkeys(owned, name))

    def release(self, name: NamespacedName) -> None:
        self.claim(name, (), (), None)

    def lost(self, name: NamespacedName) -> frozenset[Portal]:
        """Return the portals that *name* states but does not get."""
        to_others = (portal for portal in self.stated(name) if self._holders[portal] != name)
        return self._refused.get(name, frozenset()).union(to_others)

    def stated(self, name: NamespacedName) -> tuple[Portal, ...]:
        """Return the external portals that *name* states and that were not refused."""
        return self._stated.get(name, ())

    def _settle(self, portal: Portal, name: NamespacedName) -> None:
        """Decide which Service gets *portal*, and mark others than *name* as evicted if their share changes."""
        before = self._holders.pop(portal, None)
        claimants = self._claimants[portal]
        if not claimants:
            del self._claimants[portal]
            self.changes += before is not None
            return
        holder = None if self._remembered is None else self._remembered.get(portal_key(portal))
        after = self._owners.get(portal) or min(claimants, key=lambda it: (str(it) != holder, claimants[it], it))
        self._holders[portal] = after
        if before != after:
            self.changes += 1
            self.evicted |= {it for it in (before, after) if it in claimants and it != name}

    def take_evicted(self) -> set[NamespacedName]:
        """Return the Services that must be assigned again, and remember the current holders of all portals."""
        if self._remembered is not None:
            self._remembered |= self.memory()
        evicted, self.evicted = self.evicted, set()
        return evicted

    def memory(self) -> dict[str, str]:
        """Return portal -> Service for all claimed portals, to be saved for the next process."""
        return {portal_key(portal): str(holder) for portal, holder in self._holders.items()}


def portal_key(portal: Portal) -> str:
    return f"{portal}/{portal.protocol}"
