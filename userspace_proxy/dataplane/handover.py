"""Hand over the listeners, and what pickers have learnt, from one process to its successor.

The serving processes of a network namespace are members there (rendezvous.py): the control process or, if that has
died, each of its workers (orphans). A successor calls them, gets every listener, serves, and reports that. Only then
does the predecessor stop accepting, so that some process accepts at every moment.

    successor                         predecessor
       Call, to all members    ->
                               <-     connects; each proves its right to the other
                               <-     Present
       TakeOver                ->
                               <-     Inherit, a frame for some listeners, with their descriptors ...
                               <-     HealthChecks, likewise, if requested ...
                               <-     ClusterDns, if requested
                               <-     Lock, with the descriptor of the name
       (serves)  Taken         ->
                               <-     Released, with the pins set since Inherit, and drains

Until `Taken` the predecessor serves as before, in case the successor fails.

The successor reads UDP listeners, and listeners with client-IP affinity, only after `Released`. The predecessor then
begins no more flows and sets no more pins, so the local ports that rest, and all pins, are known. Until then datagrams
and connections wait in the sockets.
"""

import asyncio
import contextlib
import itertools
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import DESCRIPTORS_A_FRAME, LOST, Channel, close_descriptors
from userspace_proxy.dataplane.memory import Memories
from userspace_proxy.dataplane.rendezvous import Call, answer, heard
from userspace_proxy.errors import SyncError
from userspace_proxy.interfaces import DataPlane
from userspace_proxy.model.listeners import ListenerSpec

# Version of these messages and of rendezvous.py, and the oldest version understood, for upgrade and roll-back. Unknown
# fields are ignored, and a new field has a default. A larger change raises OLDEST; a handover between such versions is
# refused with a message, in both directions. tests/dataplane/test_handover_versions.py has the other side as it was.
VERSION = OLDEST = 3
_ANSWER_TIMEOUT_S = 15.0
# Each silent caller costs a descriptor; the oldest of more than these is cut.
_SILENT_MAX = 8


class Present(msgspec.Struct, frozen=True, tag=True):
    """The serving process. ``worker`` of ``workers``, for an orphan. ``sources``: where its state comes from.

    ``oldest``: the oldest version that it understands. ``workers`` is 0 if the kernel serves and there are no
    listeners.
    """

    version: int
    pid: int
    sources: list[str] = []
    orphan: bool = False
    worker: int = 0
    workers: int = 1
    oldest: int = OLDEST


class TakeOver(msgspec.Struct, frozen=True, tag=True):
    """Request to take over. *workers*: the successor's number; sockets of further workers are closed once empty.

    *health_checks*: send health-check listeners, too; the clients of an older successor, which ignores them, would
    hang. *cluster_dns*: likewise.
    """

    version: int
    pid: int
    workers: int = 1
    health_checks: bool = False
    cluster_dns: bool = False
    oldest: int = OLDEST


class End(msgspec.Struct, frozen=True, tag=True):
    """Request to an orphan to stop now, because no successor will come."""


class Taken(msgspec.Struct, frozen=True, tag=True):
    pass


class Refused(msgspec.Struct, frozen=True, tag=True):
    reason: str


class Inherit(msgspec.Struct, frozen=True, tag=True):
    """Listeners of one worker, with their descriptors."""

    worker: int
    listeners: wire.Open


class HealthChecks(msgspec.Struct, frozen=True, tag=True):
    """Listeners of health-check node ports. The sockets themselves tell their ports."""


class ClusterDns(msgspec.Struct, frozen=True, tag=True):
    """The sockets of cluster DNS, and the channel to the process that reads from them."""


class Lock(msgspec.Struct, frozen=True, tag=True):
    """The last part of what the successor gets: the descriptor of the socket bound to the name."""


class Released(msgspec.Struct, frozen=True, tag=True):
    """The predecessor has stopped accepting, and has freed the admin addresses and the state folder.

    *memory*: the pins that its pickers have set or used since `Inherit`.
    """

    memory: Memories = []


Message = Present | TakeOver | End | Taken | Refused | Inherit | HealthChecks | ClusterDns | Lock | Released
Received = TypeVar("Received")

_messages = msgspec.msgpack.Decoder(Message)


class Conversation:
    """Exchange of messages and descriptors with one peer."""

    def __init__(self, sock: socket.socket) -> None:
        self._received: asyncio.Queue[tuple[Message, list[int]] | None] = asyncio.Queue()
        self._channel = Channel(sock, self._on_frame, lambda: self._received.put_nowait(None))

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        try:
            message = _messages.decode(body)
        except msgspec.DecodeError:
            close_descriptors(descriptors)
            self._channel.break_off("it sent an unknown message")
            return
        if LOST in descriptors:
            close_descriptors(descriptors)
            self._channel.break_off("no descriptor is left here")
        else:
            self._received.put_nowait((message, descriptors))

    def send(self, message: Message, descriptors: Iterable[int] = ()) -> None:
        self._channel.send(wire.encode(message), list(descriptors))

    async def receive(self, timeout_s: float = _ANSWER_TIMEOUT_S) -> tuple[Message, list[int]]:
        """Return the next message.

        Raises:
            ConnectionError: the peer is gone.
            TimeoutError: no message came in time.
        """
        async with asyncio.timeout(timeout_s):
            received = await self._received.get()
        if received is None:
            self._received.put_nowait(None)
            raise ConnectionError(self._channel.broken or "the other process is gone")
        return received

    async def ended(self) -> None:
        """Wait until the peer is gone, at most as long as an answer may take."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                await self.receive()

    async def sent(self) -> None:
        """Wait until the kernel has accepted all messages."""
        await self._channel.sent()

    def close(self) -> None:
        self._channel.close()
        while not self._received.empty():
            if received := self._received.get_nowait():
                close_descriptors(received[1])


def understands(other: Present | TakeOver) -> bool:
    """Return whether this process and the *other* one understand each other's version."""
    return other.oldest <= VERSION and other.version >= OLDEST


class HandoverPlane(DataPlane, Protocol):
    """A data plane, and what a hand-over needs of it.

    Only listeners in worker processes can be handed over and outlive this process. The defaults are those of a plane
    that cannot.
    """

    @property
    def handover_obstacle(self) -> str:
        """Why this data plane cannot be handed over; "" if it can, and its workers can serve without this process.

        If there is an obstacle, `adopt` raises, `inheritance` yields nothing, and `keep_on` and `leave` do nothing.
        """

    def keep_on(self, name: socket.socket) -> Sequence[asyncio.Future[wire.Done]]:
        """Prepare the workers to serve without this process, until a successor finds them by *name*.

        Each returned future ends when its worker is ready to do so.
        """
        return ()

    async def adopt(self, inherited: Iterable[tuple[Inherit, list[socket.socket]]]) -> list[ListenerSpec]:
        """Take over the listeners of another process and serve them as it did; return them.

        Call it before anything else.

        Raises:
            OSError, SyncError: the listeners cannot be taken over.
        """
        raise SyncError(self.handover_obstacle)

    async def begin(self, memory: Memories) -> None:
        """Begin to read from adopted listeners that wait: the predecessor has stopped.

        *memory*: what `make_way` of the predecessor has returned.
        """

    def inheritance(self) -> Iterator[tuple[Inherit, list[int]]]:
        """Yield the state for a successor, in parts, with descriptors that this process keeps."""
        return iter(())

    async def make_way(self, successors: int, since: float) -> Memories:
        """Stop accepting at the sockets of the first *successors* workers; return the pins set *since* (monotonic)."""
        return []

    def leave(self) -> None:
        """Leave the workers to serve alone, if `keep_on` was called."""
        return

    async def close(self, drain_timeout_s: float, *, successors: int = 0) -> None:
        """Close as `DataPlane.close` does. *successors*: the number of workers that already accept at these sockets."""


@dataclass(eq=False)
class Incumbent:
    """Answers the calls of successors for the serving process, which *member* represents."""

    _member: socket.socket
    _present: Present
    _on_take_over: Callable[[TakeOver, Conversation], Awaitable[None]]
    _on_end: Callable[[], Awaitable[None]] | None = None
    _conversations: dict[asyncio.Task[None], str] = field(default_factory=dict)  # with the name of the caller
    _heard: asyncio.Task[None] | None = None  # whose request is being served
    _closed: bool = False

    def __post_init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._member.fileno(), self._hear)

    def _hear(self) -> None:
        for call in heard(self._member):
            if call.name in self._conversations.values():
                continue
            silent = [task for task in self._conversations if task is not self._heard]
            if len(silent) >= _SILENT_MAX:
                silent[0].cancel()
            task = asyncio.create_task(self._converse(call), name="answer a call")
            self._conversations[task] = call.name
            task.add_done_callback(lambda done: self._conversations.pop(done, None))

    async def _converse(self, call: Call) -> None:
        try:
            conversation = Conversation(await answer(call))
        except (OSError, TimeoutError):  # the caller is gone, or another process has its name
            return
        try:
            conversation.send(self._present)
            asked, descriptors = await conversation.receive(timeout_s=60)
            close_descriptors(descriptors)  # none are expected
            await self._serve(asked, conversation)
            await conversation.sent()
        except (OSError, TimeoutError):  # the successor is gone, or is another program
            pass
        finally:
            if self._heard is asyncio.current_task():
                self._heard = None
            conversation.close()

    async def _serve(self, asked: Message, conversation: Conversation) -> None:
        if self._heard is not None:
            conversation.send(Refused("another process is taking over now"))
        elif isinstance(asked, TakeOver) and not understands(asked):
            conversation.send(Refused(f"it hands over in version {VERSION} and was asked in {asked.version}"))
        else:
            self._heard = asyncio.current_task()
            if isinstance(asked, TakeOver):
                await self._on_take_over(asked, conversation)
            elif isinstance(asked, End) and self._on_end is not None:
                await self._on_end()

    def close(self) -> None:
        """Stop answering calls and leave the group. A request that is being served continues."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._member.fileno())
        self._member.close()
        for task in self._conversations:
            if task is not self._heard:
                task.cancel()

    def give_up(self) -> None:
        """Cancel the request that is being answered, and continue to serve."""
        if self._heard is not None:
            self._heard.cancel()


async def hand_over(
    conversation: Conversation,
    listeners: Iterable[tuple[Inherit, list[int]]],
    name: socket.socket,
    health_checks: Sequence[socket.socket] = (),
    cluster_dns: Sequence[socket.socket] = (),
) -> None:
    """Send *listeners*, *health_checks*, *cluster_dns* and *name* to the successor and wait until it serves.

    Raises:
        OSError, TimeoutError: the hand-over failed; this process still owns everything.
    """
    checks = [sock.fileno() for sock in health_checks]
    parts: list[tuple[Message, list[int]]] = [
        (HealthChecks(), checks[at : at + DESCRIPTORS_A_FRAME]) for at in range(0, len(checks), DESCRIPTORS_A_FRAME)
    ]
    if cluster_dns:
        parts.append((ClusterDns(), [sock.fileno() for sock in cluster_dns]))
    for message, descriptors in itertools.chain[tuple[Message, list[int]]](listeners, parts):
        conversation.send(message, descriptors)
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await conversation.sent()  # lets packets through, and bounds the descriptors in flight
    conversation.send(Lock(), [name.fileno()])
    answer, _ = await conversation.receive(timeout_s=60)
    if not isinstance(answer, Taken):
        raise ConnectionError(f"the successor said {type(answer).__name__}")


def expect(received: tuple[Message, list[int]], kind: type[Received]) -> Received:
    """Return the message of *received* if it is a *kind*; otherwise raise ConnectionError."""
    message, descriptors = received
    if isinstance(message, kind):
        return message
    close_descriptors(descriptors)
    raise ConnectionError(message.reason if isinstance(message, Refused) else f"it said {type(message).__name__}")
