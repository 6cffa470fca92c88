"""What the control process and a worker say to each other: small immutable messages, as msgpack.

Requests are answered in order, so an answer needs no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import msgspec

from userspace_proxy.dataplane.connections import Limits
from userspace_proxy.dataplane.memory import PickerMemory
from userspace_proxy.interfaces import Backends, ListenerSpec, PlaneStats, ServiceStats
from userspace_proxy.model.names import ListenerName, ServicePortName


class WorkerSettings(msgspec.Struct, frozen=True):
    """What a worker is told when it is started."""

    limits: Limits
    # Which one of how many.
    worker: int = 0
    workers: int = 1
    # How long it serves on when the control process is gone, and what open connections get when that is over.
    orphan_timeout_s: float = 0.0
    drain_timeout_s: float = 5.0
    splice: str = "auto"
    loop: str = "uvloop"
    access_log: str = ""
    log_format: str = "text"
    verbose: bool = False


# ---- control -> worker


class Open(msgspec.Struct, frozen=True, tag=True):
    """Serve these. A descriptor comes with each of the first *new* of them; the others are configured anew.

    For the worker that takes another's place *backends* and *memory* are what that one knew: both are there before
    the first client is accepted. Listeners of one service port share its memory.
    *waits*: UDP listeners are not read before `Begin`.
    """

    specs: list[ListenerSpec]
    new: int
    backends: list[tuple[ListenerName, Backends]] = []
    memory: list[tuple[ServicePortName, PickerMemory]] = []
    waits: bool = False


class Begin(msgspec.Struct, frozen=True, tag=True):
    """Read from UDP listeners that wait: the process before does no more, and which local ports it used is known."""


class Update(msgspec.Struct, frozen=True, tag=True):
    backends: list[tuple[ListenerName, Backends]]


class Retire(msgspec.Struct, frozen=True, tag=True):
    names: list[ListenerName]


class TellStats(msgspec.Struct, frozen=True, tag=True):
    """Answered with `Stats`. *endpoints*: theirs too."""

    endpoints: bool = False


class Cut(msgspec.Struct, frozen=True, tag=True):
    """Done at once, before whatever else was asked (a drain, say), and not answered."""


class Ping(msgspec.Struct, frozen=True, tag=True):
    """Answered with `Pong` at once, before whatever else was asked: the event loop goes round."""


class KeepOn(msgspec.Struct, frozen=True, tag=True):
    """Serve on when the control process is gone; the next one will call. The socket that has the name comes with it."""


class Close(msgspec.Struct, frozen=True, tag=True):
    """Stop. *handed_over*: others accept at the same sockets already, so only open connections are left to do."""

    drain_timeout_s: float
    handed_over: bool = False


Request = Open | Begin | Update | Retire | TellStats | Cut | Ping | KeepOn | Close

# ---- worker -> control


class Done(msgspec.Struct, frozen=True, tag=True):
    """The answer to every request but `TellStats`; *refused* says which listeners could not be served, and why."""

    refused: list[tuple[ListenerName, str]] = []


class StatsPart(msgspec.Struct, frozen=True, tag=True):
    """No answer yet: some of what `Stats` is the end of."""

    services: list[ServiceStats]


class Stats(msgspec.Struct, frozen=True, tag=True):
    """*services* came before, in parts, so that no packet waits for all of them."""

    rest: PlaneStats
    services: list[ServiceStats] = []


class Pong(msgspec.Struct, frozen=True, tag=True):
    """No answer to a request in turn: it overtakes them."""


class News(msgspec.Struct, frozen=True, tag=True):
    """No answer: what the pickers of service ports have learnt in the last second."""

    memory: list[tuple[ServicePortName, PickerMemory]]


Answer = Done | StatsPart | Stats | Pong | News

requests = msgspec.msgpack.Decoder(Request)
answers = msgspec.msgpack.Decoder(Answer)
encode = msgspec.msgpack.encode

# What a message may have, unless it is about a single item: while it is taken in, packets wait.
FRAME_BYTES = 256 << 10

Item = TypeVar("Item")
Message = TypeVar("Message", bound=msgspec.Struct)


def fitting(items: Sequence[Item], most: int, make: Callable[[list[Item]], Message]) -> Iterator[Message]:
    """Yield what *make* makes of *items*, so many at once that a message has *most* of them and FRAME_BYTES at most."""
    for start in range(0, len(items), most):
        part = list(items[start : start + most])
        message = make(part)
        size = len(encode(message)) if len(part) > 1 else 0
        if size > FRAME_BYTES:
            yield from fitting(part, max(1, len(part) * FRAME_BYTES // size), make)
        else:
            yield message
