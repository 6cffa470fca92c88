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
        if given:
            ips = tuple(ip for _, ip in given)
            if ips != self._held.get(name):
                self.release(name)
                for index, ip in enumerate(ips):
                    self._hold(name, ip)
                    for known in self._ranges:
                        known.take(f"{name}/given{index}", ip)
                self._held[name] = ips
            return ips
        return self._allocate(name, service)

    def _allocate(self, name: NamespacedName, service: api.Service) -> tuple[str, ...]:
        held = self._held.get(name)
        ranges = self._wanted_ranges(service)
        if held and len(held) == len(ranges) and all(self._allocated.get(_key(name, r)) in held for r in ranges):
            return held
        self.release(name)
        ips = []
        for known in ranges:
            ip = known.allocate(_key(name, known))
            if ip is None:
                raise ConfigError(
                    f"{known.network} is used up", field="spec.clusterIP", mend="widen --service-cluster-ip-range"
                )
            ips.append(ip)
            self._allocated[_key(name, known)] = ip
            self._hold(name, ip)
        self._held[name] = tuple(ips)
        return self._held[name]

    def _wanted_ranges(self, service: api.Service) -> list[_Range]:
        assert service.spec is not None
        families = service.spec.ip_families or []
        policy = service.spec.ip_family_policy or "SingleStack"
        by_family = {f"IPv{known.network.version}": known for known in self._ranges}
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
