"""How what serves goes from one process to the next: its listeners, and what its pickers have learnt.

The processes that serve in a network namespace are members there (rendezvous.py): the control process, or, when that
has died, each of its workers (orphans). A successor calls them. It is given every listener, serves, says so, and only
then the one before stops accepting; so at no moment does nobody accept.

    successor                         who serves
       Call, to all members    ->
                               <-     connects; each shows the other that it may
                               <-     Present
       TakeOver                ->
                               <-     Inherit, a frame for some listeners, with their descriptors ...
                               <-     HealthChecks, the same, where they were asked for ...
                               <-     Lock, with the descriptor of the name
       (serves)  Taken         ->
                               <-     Released, and drains

Until `Taken` the one before goes on as if nobody had asked, should the successor fail.

UDP listeners are read by the successor from `Released` on: which local ports rest is known only when the process before
begins no more flows. Datagrams wait in the socket meanwhile.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import msgspec

from userspace_proxy.dataplane import wire
from userspace_proxy.dataplane.channel import DESCRIPTORS_A_FRAME, LOST, Channel, close_descriptors
from userspace_proxy.dataplane.rendezvous import Call, answer, heard
from userspace_proxy.interfaces import DataPlane, ListenerSpec

# Of these messages and of rendezvous.py, and the oldest that is understood: upgrade and roll-back. Fields that are not
# known are ignored, and a field that is new has a default. A version that changes more than that says so by OLDEST;
# then it is refused in words, in both directions.
# tests/dataplane/test_handover_versions.py has the other side as it was.
VERSION = OLDEST = 3
_ANSWER_TIMEOUT_S = 15.0
# Who connects and asks nothing costs a descriptor each; the first of more makes way.
_SILENT_MAX = 8


class Present(msgspec.Struct, frozen=True, tag=True):
    """Who serves. ``worker`` of ``workers`` for an orphan; ``sources``: what is served, to tell the same again.

    ``oldest``: the oldest version that it understands. No ``workers``: the kernel serves, there are no listeners.
    """

    version: int
    pid: int
    sources: list[str] = []
    orphan: bool = False
    worker: int = 0
    workers: int = 1
    oldest: int = OLDEST


class TakeOver(msgspec.Struct, frozen=True, tag=True):
    """*workers*: how many will accept; sockets of workers beyond that number are closed, once they are empty.

    *health_checks*: whether those are taken, too; who does not know of them would let them hang.
    """

    version: int
    pid: int
    workers: int = 1
    health_checks: bool = False
    oldest: int = OLDEST


class End(msgspec.Struct, frozen=True, tag=True):
    """To an orphan: end now, nobody comes any more."""


class Taken(msgspec.Struct, frozen=True, tag=True):
    pass


class Refused(msgspec.Struct, frozen=True, tag=True):
    reason: str


class Inherit(msgspec.Struct, frozen=True, tag=True):
    """Listeners of one worker, with their descriptors."""

    worker: int
    listeners: wire.Open


class HealthChecks(msgspec.Struct, frozen=True, tag=True):
    """Listeners of health-check node ports; the sockets say themselves which."""


class Lock(msgspec.Struct, frozen=True, tag=True):
    """That was all; the descriptor of the socket that has the name comes with it."""


class Released(msgspec.Struct, frozen=True, tag=True):
    """Admin addresses and the state folder are free."""


Message = Present | TakeOver | End | Taken | Refused | Inherit | HealthChecks | Lock | Released
Received = TypeVar("Received")

_messages = msgspec.msgpack.Decoder(Message)


class Conversation:
    """Messages with descriptors, one after the other, with one peer."""

    def __init__(self, sock: socket.socket) -> None:
        self._received: asyncio.Queue[tuple[Message, list[int]] | None] = asyncio.Queue()
        self._channel = Channel(sock, self._on_frame, lambda: self._received.put_nowait(None))

    def _on_frame(self, body: bytes, descriptors: list[int]) -> None:
        try:
            message = _messages.decode(body)
        except msgspec.DecodeError:
            close_descriptors(descriptors)
            self._channel.break_off("it says what is not understood")
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
            TimeoutError: it says nothing.
        """
        async with asyncio.timeout(timeout_s):
            received = await self._received.get()
        if received is None:
            self._received.put_nowait(None)
            raise ConnectionError(self._channel.broken or "the other process is gone")
        return received

    async def ended(self) -> None:
        """Wait until the peer is gone, for as long as an answer may take."""
        with contextlib.suppress(ConnectionError, TimeoutError):
            while True:
                await self.receive()

    async def sent(self) -> None:
        """Wait until the kernel has all that was sent."""
        await self._channel.sent()

    def close(self) -> None:
        self._channel.close()
        while not self._received.empty():
            if received := self._received.get_nowait():
                for descriptor in received[1]:
                    os.close(descriptor)


def understands(other: Present | TakeOver) -> bool:
    """Return whether the *other* process speaks a version that this one understands, and the other way round."""
    return other.oldest <= VERSION and other.version >= OLDEST


class HandoverPlane(DataPlane, Protocol):
    """A data plane, and what a hand-over needs of it.

    Only listeners in worker processes can be handed over and outlive this process. The in-process plane answers that
    it cannot.
    """

    @property
    def handover_obstacle(self) -> str:
        """Why its listeners cannot be handed over; "" if they can, and the workers can serve on without this process.

        If they cannot: `adopt` raises, `inheritance` yields nothing, and `keep_on` and `leave` do nothing.
        """
        ...

    def keep_on(self, name: socket.socket) -> Sequence[asyncio.Future[wire.Answer]]:
        """From now on workers serve on, should this process die, and are found by a successor; they have the *name*.

        Each has done so when it answers.
        """
        ...

    async def adopt(self, inherited: Iterable[tuple[Inherit, list[socket.socket]]]) -> list[ListenerSpec]:
        """Serve at the listeners of another process, as it did; return them. Before anything else.

        Raises:
            OSError, SyncError: that cannot be.
        """
        ...

    def begin(self) -> None:
        """Read from adopted UDP listeners. After the predecessor has yielded."""
        ...

    def inheritance(self) -> Iterator[tuple[Inherit, list[int]]]:
        """Yield all that a successor needs, in parts, with descriptors that stay ours."""
        ...

    def leave(self) -> None:
        """End, and let the workers serve on alone, if they were told to `keep_on`."""
        ...

    async def close(self, drain_timeout_s: float, *, successors: int = 0) -> None:
        """As `DataPlane.close`. So many *successors* accept already, each at the sockets of one worker."""
        ...


class Incumbent:
    """Answers the calls of successors, for the process that serves here now, which is *member*."""

    def __init__(
        self,
        member: socket.socket,
        present: Present,
        on_take_over: Callable[[TakeOver, Conversation], Awaitable[None]],
        on_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._member = member
        self._present = present
        self._on_take_over = on_take_over
        self._on_end = on_end
        self._loop = asyncio.get_running_loop()
        self._conversations: dict[asyncio.Task[None], str] = {}  # with the name of the caller
        self._heard: asyncio.Task[None] | None = None  # whose wish is being done
        self._closed = False
        self._loop.add_reader(member.fileno(), self._hear)

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
        except (OSError, TimeoutError):  # the caller has gone, or it is not the caller any more
            return
        try:
            conversation.send(self._present)
            asked, descriptors = await conversation.receive(timeout_s=60)
            for descriptor in descriptors:  # nobody has asked for any
                os.close(descriptor)
            if self._heard is not None:
                conversation.send(Refused("another process takes it over just now"))
            elif isinstance(asked, TakeOver) and not understands(asked):
                conversation.send(Refused(f"it hands over in version {VERSION} and was asked in {asked.version}"))
            else:
                self._heard = asyncio.current_task()
                if isinstance(asked, TakeOver):
                    await self._on_take_over(asked, conversation)
                elif isinstance(asked, End) and self._on_end is not None:
                    await self._on_end()
            await conversation.sent()
        except (OSError, TimeoutError):  # the successor has gone, or is not of our kind
            pass
        finally:
            if self._heard is asyncio.current_task():
                self._heard = None
            conversation.close()

    def close(self) -> None:
        """Answer no more, but to whom is being served; and be no member any more."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._member.fileno())
        self._member.close()
        for task in self._conversations:
            if task is not self._heard:
                task.cancel()

    def give_up(self) -> None:
        """Serve on without whoever is being served just now."""
        if self._heard is not None:
            self._heard.cancel()


async def hand_over(
    conversation: Conversation,
    listeners: Iterable[tuple[Inherit, list[int]]],
    name: socket.socket,
    health_checks: Sequence[socket.socket] = (),
) -> None:
    """Give *listeners*, *health_checks* and *name* to the successor and wait until it serves.

    Raises:
        OSError, TimeoutError: it failed; everything is ours still.
    """
    checks = [sock.fileno() for sock in health_checks]
    parts = [
        (HealthChecks(), checks[at : at + DESCRIPTORS_A_FRAME]) for at in range(0, len(checks), DESCRIPTORS_A_FRAME)
    ]
    for message, descriptors in itertools.chain[tuple[Message, list[int]]](listeners, parts):
        conversation.send(message, descriptors)
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            await conversation.sent()  # packets first; and descriptors under way are bounded
    conversation.send(Lock(), [name.fileno()])
    answer, _ = await conversation.receive(timeout_s=60)
    if not isinstance(answer, Taken):
        raise ConnectionError(f"the successor said {type(answer).__name__}")


def expect(received: tuple[Message, list[int]], kind: type[Received]) -> Received:
    """Return the message of *received*, which has to be a *kind*; raises ConnectionError where it is not."""
    message, descriptors = received
    if isinstance(message, kind):
        return message
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    raise ConnectionError(message.reason if isinstance(message, Refused) else f"it said {type(message).__name__}")
