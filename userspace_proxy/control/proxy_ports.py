"""Allocates proxy ports: each listener gets the same port after every restart. Pure."""

from collections.abc import Collection, Mapping

from userspace_proxy.model.allocation import Allocator
from userspace_proxy.model.names import L4Protocol, ListenerName

_REFUSING = "nobody listens"
# Ports of other Kubernetes components: kubelet, kube-proxy, controller manager and scheduler; containerd's streaming
# port.
KUBERNETES_PORTS = frozenset((*range(10_248, 10_260), 10_010))


class ProxyPorts:
    """Allocates proxy ports from one range for each protocol, except *reserved* ones."""

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
        """Return key -> port, to be saved for the next process."""
        held = {}
        for allocator in self._allocators.values():
            held.update({key: number + self._first for key, number in allocator.memory().items()})
        return held

    def next_for(self, name: ListenerName, refused: set[int]) -> int | None:
        """Allocate the next port to try for *name* that is not in *refused*; return None if there is none left."""
        return self._take(self._allocators[name.protocol], name.key, refused)

    def next_refusing(self, refused: set[int]) -> int | None:
        """Allocate a port for both protocols that has no listener, so that connections to it are refused."""
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
        """Record that *name* uses *port*, which it may have from a predecessor."""
        if self._first <= port <= self._last:
            self._allocators[name.protocol].take(name.key, port - self._first)

    def release(self, name: ListenerName) -> None:
        self._allocators[name.protocol].release(name.key)
