"""The messages between the control process and a worker: small and immutable, encoded as msgpack.

Requests are answered in order, so an answer needs no number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import msgspec

from userspace_proxy.dataplane.begin import ChildSettings
from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.memory import Memories, PickerMemory
from userspace_proxy.model.counters import PlaneStats, ServiceStats
from userspace_proxy.model.details import Details, DetailsRequest
from userspace_proxy.model.listeners import Backends, ListenerSpec
from userspace_proxy.model.names import ListenerName, ServicePortName


class WorkerSettings(ChildSettings, frozen=True):
    """The settings of a worker at its start."""

    limits: Limits
    # The index of this worker, and the number of workers.
    worker: int = 0
    workers: int = 1
    # After the orphan timeout.
    drain_timeout_s: float = 5.0
    splice: str = "auto"
    access_log: str = ""


# ---- control -> worker


class Open(msgspec.Struct, frozen=True, tag=True):
    """Serve these listeners. A descriptor comes with each of the first *new* specs; the others are reconfigured.

    A replacement for a worker also gets that worker's *backends* and *memory*, before it accepts the first client.
    Listeners of one service port share its memory.
    *waits*: UDP listeners, and those with client-IP affinity, are not read before `Begin`.
    """

    specs: list[ListenerSpec]
    new: int
    backends: list[tuple[ListenerName, Backends]] = []
    memory: Memories = []
    waits: bool = False


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Begin to read from waiting listeners: the predecessor has stopped.

    Its local ports are known now, and *memory* has the pins that it set since it sent its listeners.
    """

    memory: Memories = []


class Update(msgspec.Struct, frozen=True, tag=True):
    backends: list[tuple[ListenerName, Backends]]


class Retire(msgspec.Struct, frozen=True, tag=True):
    names: list[ListenerName]


class GetStats(msgspec.Struct, frozen=True, tag=True):
    """Request for counters. *endpoints*: include those of each endpoint."""

    endpoints: bool = False


class GetDetails(msgspec.Struct, frozen=True, tag=True):
    request: DetailsRequest


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Reset all connections at once, before other queued requests (a drain, for example). Not answered."""


class KeepOn(msgspec.Struct, frozen=True, tag=True):
    """Keep serving if the control process dies, until a successor calls. The socket bound to the name comes with it."""


class MakeWay(msgspec.Struct, frozen=True, tag=True):
    """Stop accepting if *handed_over*: other workers accept at the same sockets. Answer with the pins set *since*."""

    since: float
    handed_over: bool


class Stop(msgspec.Struct, frozen=True, tag=True):
    """Drain and exit. *handed_over*: other workers accept at the same sockets, so only open connections are drained."""

    drain_timeout_s: float
    handed_over: bool = False


Request = Open | Begin | Update | Retire | GetStats | GetDetails | Cut | KeepOn | MakeWay | Stop

# ---- worker -> control


class Part(msgspec.Struct, frozen=True, tag=True):
    """A part of an answer; `Done` comes last. Parts are small, so that no packet waits for all of them."""

    services: list[ServiceStats] = []
    details: list[Details] = []


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer to every request, or its end.

    *refused*: listeners that could not be served, with reasons. *totals*: the counters of the data plane as a whole,
    for `GetStats`. *memory*: pins, for `MakeWay`. *services* and *details* are sent before, as `Part`.
    """

    refused: list[tuple[ListenerName, str]] = []
    totals: PlaneStats | None = None
    services: list[ServiceStats] = []
    details: list[Details] = []
    memory: Memories = []


class News(msgspec.Struct, frozen=True, tag=True):
    """Sent without a request: pins and ejections that pickers have learnt in the last second."""

    memory: Memories


Answer = Done | Part | News

requests = msgspec.msgpack.Decoder(Request)
answers = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.encode

# Size limit for a message about several items: packets wait while it is decoded.
FRAME_BYTES = 256 << 10
# Listeners in a message that opens them: packets wait at most a few milliseconds while a worker applies it.
OPENED_A_FRAME = 16

Item = TypeVar("Item")
Message = TypeVar("Message", bound=msgspec.Struct)


def fitting(items: Sequence[Item], most: int, make: Callable[[list[Item]], Message]) -> Iterator[Message]:
    """Yield messages that *make* makes of parts of *items*, each with at most *most* items and FRAME_BYTES.

    A message about one item may be longer.
    """
    for start in range(0, len(items), most):
        part = list(items[start : start + most])
        message = make(part)
        size = len(encode(message)) if len(part) > 1 else 0
        if size > FRAME_BYTES:
            yield from fitting(part, max(1, len(part) * FRAME_BYTES // size), make)
        else:
            yield message


def openings(
    specs: Sequence[ListenerSpec],
    backends: Mapping[ListenerName, Backends],
    memory_of: Callable[[ServicePortName], PickerMemory],
    *,
    waits: bool = False,
) -> Iterator[Open]:
    """Yield messages that tell another process all it needs to serve *specs*. Their descriptors go with them."""

    def opening(part: list[ListenerSpec]) -> Open:
        names = [spec.name for spec in part]
        memories = [(name, memory_of(name)) for name in dict.fromkeys(name.service_port for name in names)]
        return Open(part, len(part), [(name, backends[name]) for name in names if name in backends], memories, waits)

    return fitting(specs, OPENED_A_FRAME, opening)
