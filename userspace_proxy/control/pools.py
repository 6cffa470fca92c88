"""Pools of addresses and node ports, allocated to Services that state none. Pure."""

import ipaddress
import socket
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from typing import NamedTuple

from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.endpoint import Family, family_of

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# kube-apiserver's default.
NODE_PORTS = range(30_000, 32_768)
# The first 86 are allocated to no Service: they are left for numbers that users choose, as in Kubernetes (KEP-3668).
_CHOSEN_NODE_PORTS = 86
# Larger than any cluster needs; an IPv6 range is too large to walk.
_NUMBERS_MAX = 1 << 20


def address_of(ip: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """Return the address *ip*, canonical text, three times as fast as `ipaddress.ip_address`."""
    return ipaddress.ip_address(socket.inet_pton(socket.AF_INET6 if ":" in ip else socket.AF_INET, ip))


class NodePort(NamedTuple):
    """A port of this node. TCP and UDP numbers are independent (behaviours P2)."""

    protocol: str
    number: int

    def __str__(self) -> str:
        return str(self.number)


# An exclusive value: only one Service can hold it.
Value = str | NodePort


class Pool(ABC):
    """Allocates values, each to one key."""

    def __init__(self, size: int, remembered: Mapping[str, Value]) -> None:
        numbers = {key: number for key, value in remembered.items() if (number := self._number_of(value)) is not None}
        self._allocator = Allocator(min(size, _NUMBERS_MAX), numbers)

    @abstractmethod
    def _number_of(self, value: Value) -> int | None:
        """Return the index of *value* in the pool, or None if it is of another kind."""

    @abstractmethod
    def _value_of(self, number: int) -> Value: ...

    def take(self, key: str, value: Value) -> None:
        """Allocate *value* to *key*, if the pool contains it."""
        number = self._number_of(value)
        if number is not None and 0 <= number < self._allocator.size:
            self._allocator.take(key, number)

    def allocate(self, key: str, stated: Container[Value]) -> Value | None:
        """Allocate a value to *key* that is not *stated* by a Service, and return it; None if all are taken."""
        for number in self._allocator.candidates(key):
            if (value := self._value_of(number)) not in stated:
                self._allocator.take(key, number)
                return value
        return None

    def release(self, key: str, value: Value) -> None:
        """Release *value*, if *key* holds it. The value stays reserved in case *key* asks for it again."""
        number = self._number_of(value)
        if number is not None and self._allocator.holder(number) == key:
            self._allocator.release(key)


class AddressRange(Pool):
    """One address range. Its first part is left for addresses that users choose, as in Kubernetes (KEP-3070)."""

    def __init__(self, network: Network, remembered: Mapping[str, Value]) -> None:
        self.network = network
        self.family: Family = family_of(str(network))
        size = network.num_addresses
        chosen = 0 if size <= 16 else min(max(16, size // 16), 256)
        last = size - (2 if size > 2 else 1)  # the last address would be a broadcast
        self._first = max(chosen, min(1, last))
        super().__init__(last - self._first + 1, remembered)

    def __contains__(self, ip: str) -> bool:
        return family_of(ip) == self.family and address_of(ip) in self.network

    def __str__(self) -> str:
        return str(self.network)

    def _number_of(self, value: Value) -> int | None:
        if isinstance(value, NodePort) or value not in self:
            return None
        return int(address_of(value)) - int(self.network.network_address) - self._first

    def _value_of(self, number: int) -> str:
        return str(self.network.network_address + self._first + number)


class NodePortRange(Pool):
    """The node ports that can be allocated for one protocol, TCP or UDP."""

    def __init__(self, protocol: str, remembered: Mapping[str, Value]) -> None:
        self.protocol = protocol
        self._first = NODE_PORTS.start + _CHOSEN_NODE_PORTS
        super().__init__(NODE_PORTS.stop - self._first, remembered)

    def __str__(self) -> str:
        return f"{NODE_PORTS.start}-{NODE_PORTS.stop - 1}"

    def _number_of(self, value: Value) -> int | None:
        if not isinstance(value, NodePort) or value.protocol != self.protocol:
            return None
        return value.number - self._first

    def _value_of(self, number: int) -> NodePort:
        return NodePort(self.protocol, self._first + number)
