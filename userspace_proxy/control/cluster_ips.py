"""Cluster IPs: which Service has which, and new ones for Services that state none. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence

from userspace_proxy import api
from userspace_proxy.control.decode import given_cluster_ips
from userspace_proxy.errors import ConfigError
from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.names import NamespacedName

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# More than any cluster has; an IPv6 range holds more than can be walked.
_NUMBERS_MAX = 1 << 20


class _Range:
    """One range. Its first part is left for addresses that people choose, as in Kubernetes (KEP-3070)."""

    def __init__(self, network: Network, remembered: Mapping[str, str]) -> None:
        self.network = network
        size = network.num_addresses
        self._first = 0 if size <= 16 else min(max(16, size // 16), 256)
        last = size - (2 if size > 2 else 1)  # the last address would be a broadcast
        self._first = max(self._first, min(1, last))
        numbers = {key: number for key, ip in remembered.items() if (number := self._number(ip)) is not None}
        self.allocator = Allocator(min(last - self._first + 1, _NUMBERS_MAX), numbers)

    def _number(self, ip: str) -> int | None:
        address = ipaddress.ip_address(ip)
        if address.version != self.network.version or address not in self.network:
            return None
        return int(address) - int(self.network.network_address) - self._first

    def take(self, key: str, ip: str) -> None:
        number = self._number(ip)
        if number is not None and 0 <= number < self.allocator.size:
            self.allocator.take(key, number)

    def allocate(self, key: str) -> str | None:
        number = self.allocator.allocate(key)
        return None if number is None else str(self.network.network_address + self._first + number)


class ClusterIPs:
    """Knows who has which cluster IP."""

    def __init__(self, networks: Sequence[Network], remembered: Mapping[str, str]) -> None:
        self._ranges = [_Range(network, remembered) for network in networks]
        self._remembered = {key.rpartition("/")[0] for key in remembered}
        self._holders: dict[str, NamespacedName] = {}
        self._held: dict[NamespacedName, tuple[str, ...]] = {}
        self._allocated: dict[str, str] = {}
        self.changes = 0

    def memory(self) -> dict[str, str]:
        """Return key -> IP of what was allocated, for the next process."""
        return dict(self._allocated)

    def first(self, name: NamespacedName, service: api.Service) -> int:
        """Return when *name* is to be served among others: who had an address, who states one, who wants one."""
        if service.spec is None or given_cluster_ips(service):
            return 1
        return 0 if str(name) in self._remembered else 2

    def assign(self, name: NamespacedName, service: api.Service) -> tuple[str, ...]:
        """Return the cluster IPs of *name*: those it states, else allocated ones.

        Raises:
            ConfigError: one is another Service's, or the range is used up. What *name* had before stays its own.
        """
        given = given_cluster_ips(service)
        for field, ip in given:
            holder = self._holders.get(ip, name)
            if holder != name:
                raise ConfigError(
                    f"{ip} is already the cluster IP of {holder}", field=field, mend="choose another one, or none"
                )
        if not given:
            return self._allocate(name, service)
        ips = tuple(ip for _, ip in given)
        if ips != self._held.get(name):
            self.release(name)
            self._take_given(name, ips)
        return ips

    def make_way(self, services: Mapping[NamespacedName, api.Service]) -> None:
        """Let those of *services* that state other addresses than they have move, where nobody stays on the new ones.

        All at once, so that addresses can be passed on, or swapped, within one change.
        """
        moves = {}
        for name, service in services.items():
            if held := self._held.get(name):
                ips = tuple(ip for _, ip in given_cluster_ips(service))
                if ips != held and (ips or not self._is_allocated(name)):
                    moves[name] = ips
        while blocked := self._blocked(moves):
            for name in blocked:  # it stays where it is, and so may block others
                del moves[name]
        for name in moves:
            self.release(name)
        for name, ips in moves.items():
            self._take_given(name, ips)

    def _blocked(self, moves: Mapping[NamespacedName, tuple[str, ...]]) -> list[NamespacedName]:
        """Return those of *moves* that want what somebody stays on, or what one before them wants."""
        claims: dict[str, NamespacedName] = {}
        blocked = []
        for name, ips in sorted(moves.items()):
            free = all(ip not in self._holders or self._holders[ip] in moves for ip in ips)
            if not free or any(claims.setdefault(ip, name) != name for ip in ips):
                blocked.append(name)
        return blocked

    def _is_allocated(self, name: NamespacedName) -> bool:
        return any(_key(name, known) in self._allocated for known in self._ranges)

    def held(self, name: NamespacedName) -> tuple[str, ...]:
        """Return the cluster IPs that *name* has now."""
        return self._held.get(name, ())

    def _take_given(self, name: NamespacedName, ips: tuple[str, ...]) -> None:
        for index, ip in enumerate(ips):
            self._hold(name, ip)
            for known in self._ranges:
                known.take(f"{name}/given{index}", ip)
        self._held[name] = ips

    def _allocate(self, name: NamespacedName, service: api.Service) -> tuple[str, ...]:
        ips: dict[_Range, str] = {}
        for known in self._wanted_ranges(service):
            ip = known.allocate(_key(name, known))  # what it has, if it has one
            if ip is None:
                for taken in ips:
                    if _key(name, taken) not in self._allocated:
                        taken.allocator.release(_key(name, taken))
                raise ConfigError(
                    f"{known.network} is used up", field="spec.clusterIP", mend="widen --service-cluster-ip-range"
                )
            ips[known] = ip
        if tuple(ips.values()) != self._held.get(name):
            self.release(name)
            for known, ip in ips.items():
                known.take(_key(name, known), ip)
                self._allocated[_key(name, known)] = ip
                self._hold(name, ip)
            self._held[name] = tuple(ips.values())
        return self._held[name]

    def _wanted_ranges(self, service: api.Service) -> list[_Range]:
        assert service.spec is not None
        families = service.spec.ip_families or []
        policy = service.spec.ip_family_policy or ("RequireDualStack" if len(families) > 1 else "SingleStack")
        by_family = {f"IPv{known.network.version}": known for known in self._ranges}
        if families and families[0] not in by_family:
            raise ConfigError(
                f"no cluster IP range is {families[0]}",
                field="spec.ipFamilies[0]",
                mend="add one to --service-cluster-ip-range, or choose another family",
            )
        wanted = [by_family[f] for f in families if f in by_family] or self._ranges[:1]
        if policy in ("PreferDualStack", "RequireDualStack"):
            wanted += [known for known in self._ranges if known not in wanted]
        return wanted if policy != "SingleStack" else wanted[:1]

    def _hold(self, name: NamespacedName, ip: str) -> None:
        self._holders[ip] = name
        self.changes += 1

    def release(self, name: NamespacedName) -> None:
        """Free what *name* holds; an allocated address is remembered, should the Service come back."""
        for index, ip in enumerate(self._held.pop(name, ())):
            del self._holders[ip]
            self.changes += 1
            for known in self._ranges:
                known.allocator.release(f"{name}/given{index}")
        for known in self._ranges:
            known.allocator.release(_key(name, known))
            self._allocated.pop(_key(name, known), None)


def _key(name: NamespacedName, known: _Range) -> str:
    return f"{name}/IPv{known.network.version}"
