"""The objects that all listeners of a data plane share."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from userspace_proxy.dataplane.connections import Connections, Limits
from userspace_proxy.dataplane.conntrack_lookup import KernelTables
from userspace_proxy.dataplane.datagrams import DatagramPoller
from userspace_proxy.dataplane.dial import Deadlines
from userspace_proxy.dataplane.lifetimes import Lifetimes, PolicyLoop
from userspace_proxy.dataplane.memory import Memory
from userspace_proxy.dataplane.poller import Poller
from userspace_proxy.interfaces import Splicer
from userspace_proxy.model.access_record import AccessRecord
from userspace_proxy.model.counters import Counters

# Called with the access record of each ended connection or flow.
Record = Callable[[AccessRecord], None]


@dataclass(frozen=True, slots=True)
class PlaneContext:
    """The data plane's pollers, splice engine, open connections, limits and clock."""

    poller: Poller
    datagrams: DatagramPoller
    loop: asyncio.AbstractEventLoop
    splicer: Splicer
    connections: Connections
    limits: Limits
    now: Callable[[], float]
    access_log: Record | None
    tables: KernelTables
    deadlines: tuple[Deadlines, ...]
    policy_loop: PolicyLoop


@dataclass(slots=True)
class Shared:
    """The state that the listeners of one service port share. ``lifetimes``: None without `ConnectionPolicy`."""

    memory: Memory
    counters: Counters = field(default_factory=Counters)
    lifetimes: Lifetimes | None = None

    def count(self) -> Counters:
        """Return the counters, with the present numbers of pins, endpoints and waiting connections."""
        counters, memory = self.counters, self.memory
        memory.end_slow_starts(memory.now())
        counters.pins, counters.endpoints = len(memory.pins), len(memory.addresses())
        counters.ejected, counters.starting = len(memory.ejected), len(memory.starting)
        counters.waiting = len(self.lifetimes.waiting) if self.lifetimes is not None else 0
        return counters
