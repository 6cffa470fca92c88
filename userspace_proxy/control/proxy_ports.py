"""The numbers for proxy ports: which listener has which, the same after every restart. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.names import L4Protocol, ListenerName

_REFUSING = "nobody listens"
# Where other parts of Kubernetes listen: kubelet, kube-proxy, controller manager and scheduler; containerd's streams.
KUBERNETES_PORTS = frozenset((*range(10_248, 10_260), 10_010))


class ProxyPorts:
    """The numbers for proxy ports: an allocator for each protocol over one range, without those that are *reserved*."""

    def __init__(
        self, first: int, last: int, remembered: Mapping[str, int], reserved: Collection[int] = KUBERNETES_PORTS
    ) -> None:
        self._first = first
        self._reserved = reserved
        self._last = last
        numbers = {key: port - first for key, port in remembered.items()}
        self._allocators = {
            protocol: Allocator(last - first + 1, {k: n for k, n in numbers.items() if k.endswith(protocol)})
            for protocol in L4Protocol
        }

    @property
    def changes(self) -> int:
        return sum(allocator.changes for allocator in self._allocators.values())

    def memory(self) -> dict[str, int]:
        """Return key -> port, for the next process."""
        held = {}
        for allocator in self._allocators.values():
            held.update({key: number + self._first for key, number in allocator.memory().items()})
        return held

    def next_for(self, name: ListenerName, refused: set[int]) -> int | None:
        """Take the next port to try for *name*, but none of *refused*; None when there is none left."""
        return self._take(self._allocators[name.protocol], name.key, refused)

    def next_refusing(self, refused: set[int]) -> int | None:
        """Take a port for both protocols, at which nobody shall listen."""
        tcp, udp = self._allocators[L4Protocol.TCP], self._allocators[L4Protocol.UDP]
        port = self._take(tcp, f"{_REFUSING}/TCP", refused)
        if port is not None and not udp.take(f"{_REFUSING}/UDP", port - self._first):
            return self.next_refusing(refused | {port})
        return port

    def _take(self, allocator: Allocator, key: str, refused: set[int]) -> int | None:
        for number in allocator.candidates(key):
            port = number + self._first
            if port not in refused and port not in self._reserved:
                allocator.take(key, number)
                return port
        return None

    def hold(self, name: ListenerName, port: int) -> None:
        """Know that *name* has *port*, wherever it got it."""
        if self._first <= port <= self._last:
            self._allocators[name.protocol].take(name.key, port - self._first)

    def release(self, name: ListenerName) -> None:
        self._allocators[name.protocol].release(name.key)
