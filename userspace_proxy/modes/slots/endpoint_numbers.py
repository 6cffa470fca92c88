"""The numbers of endpoint sets, and of endpoints in sets with affinity. Pure."""

from collections.abc import Collection, Sequence

from userspace_proxy.errors import SyncError
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import FAMILIES, Address, Endpoint, Family
from userspace_proxy.model.names import ListenerName, Scope, ServicePortName
from userspace_proxy.modes.kernel_rules import Translation
from userspace_proxy.modes.slots.packet_number import ENDPOINT, OURS

_SETS_MAX = 0x1_FFFF


class EndpointNumbers:
    """Allocates numbers. They depend on names where possible, so that a restart changes few of them."""

    def __init__(self) -> None:
        self._sets = Allocator(_SETS_MAX)
        self._endpoints: dict[tuple[str, Family], Allocator] = {}

    def of_set(self, name: ServicePortName, scope: Scope) -> int:
        number = self._sets.allocate(ListenerName(name, scope).key)
        if number is None:
            raise SyncError(f"more than {_SETS_MAX} endpoint sets")
        return OURS | (number + 1) << 12

    def of_endpoints(
        self, name: ServicePortName, scope: Scope, family: Family, endpoints: Sequence[Address]
    ) -> dict[Address, int]:
        """Return the numbers of *endpoints*, of which there are at most `ENDPOINT` in one *family*.

        Numbers of other endpoints are released if there are not enough.
        """
        of_set, desired = self.of_set(name, scope), {endpoint: str(endpoint) for endpoint in endpoints}
        numbers = self._endpoints.setdefault((ListenerName(name, scope).key, family), Allocator(ENDPOINT))
        found = {}
        for endpoint, key in desired.items():
            if (number := numbers.allocate(key)) is None:
                for other in numbers.memory().keys() - desired.values():
                    numbers.release(other)
                number = numbers.allocate(key)
            assert number is not None, "more endpoints than numbers"
            found[endpoint] = of_set | number + 1
        return found

    def forget(self, before: Translation, after: Translation | None) -> None:
        """Release the numbers of *before* that *after* does not need."""
        for scope in Scope:
            key = ListenerName(before.service_port.name, scope).key
            desired = _addresses(after, scope)
            gone = _addresses(before, scope) - desired
            if not desired:
                self._sets.release(key)
            for family in FAMILIES:
                self._forget_endpoints((key, family), gone, keeps_some=bool(desired))

    def _forget_endpoints(self, key: tuple[str, Family], gone: Collection[Address], *, keeps_some: bool) -> None:
        if not keeps_some:
            self._endpoints.pop(key, None)
        elif (numbers := self._endpoints.get(key)) is not None:
            for endpoint in gone:
                numbers.release(str(endpoint))


def endpoints_of(translation: Translation, family: Family, scope: Scope) -> Collection[Endpoint]:
    """Return the endpoints of *translation* in one family and scope."""
    reach = translation.reaches[family]
    return reach.cluster if scope is Scope.CLUSTER else reach.local


def _addresses(translation: Translation | None, scope: Scope) -> set[Address]:
    if translation is None:
        return set()
    return {e.address for family in translation.reaches for e in endpoints_of(translation, family, scope)}
