"""One proxy in a network namespace: an abstract unix socket is the lock.

Abstract names belong to the network namespace, exactly as rules do, and the kernel frees a name when the last
process that holds it ends: the control process, or workers that serve on without one.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from userspace_proxy.dataplane.handover import (
    VERSION,
    Conversation,
    End,
    HealthChecks,
    Inherit,
    Lock,
    Present,
    Released,
    Taken,
    TakeOver,
    expect,
    peer,
)
from userspace_proxy.errors import StartError

_NAME = "\0userspace-proxy"
# Who wants to take over, or to clean up, holds this name meanwhile: two could each get half of the orphans.
_TURN = "\0userspace-proxy-successor"
_TURN_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 5.0
# An orphan answers at once; one that does not has died since, and only the lock that it shared with others is left.
_ORPHAN_TIMEOUT_S = 2.0
_ASK_AGAIN_S = 0.05

Meeting = tuple[Present, Conversation]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Inheritance:
    """The lock; and what was got with it from who served before: listeners, in a conversation with each process.

    ``health_checks``: the listeners of health-check node ports, which a control process has.
    """

    turn: socket.socket
    lock: socket.socket
    listeners: list[tuple[Inherit, list[socket.socket]]] = field(default_factory=list)
    health_checks: list[socket.socket] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)

    async def taken(self) -> None:
        """Say that we serve now, and wait until the one before has made way."""
        for conversation in self.conversations:
            conversation.send(Taken())
        for conversation in self.conversations:
            try:
                expect(await conversation.receive(), Released)
            except (OSError, TimeoutError) as error:
                log.warning("the process before did not say that it has made way: %s", error or "no answer")
                await self._release_orphans()
            conversation.close()
        self.lock.listen(64)  # from now on the kernel tells our credentials to who connects
        self.turn.close()

    async def _release_orphans(self) -> None:
        """Have workers drain whose control process died while it made way: what they hold we have already."""
        while (meeting := await _next_orphan()) is not None:
            _, conversation = meeting
            try:
                listeners: list[tuple[Inherit, list[socket.socket]]] = []
                (await _collect(conversation, listeners, [], workers=len(self.conversations))).close()
                _close(listeners)
                conversation.send(Taken())
                expect(await conversation.receive(), Released)
            except (OSError, TimeoutError) as error:
                log.warning("a worker of the process before serves on: %s", error or "no answer")
            conversation.close()

    def give_back(self) -> None:
        """Let go of everything: the one before goes on."""
        for conversation in self.conversations:
            conversation.close()
        _close(self.listeners)
        for sock in self.health_checks:
            sock.close()
        self.lock.close()
        self.turn.close()


async def take_lock(sources: Sequence[str], policy: str, workers: int) -> Inheritance:
    """Return the lock; with it, where somebody serves already, that one's listeners for so many *workers*.

    Without workers of our own only a proxy without any is taken over from: one whose mode has the kernel serve.
    *policy*: "always" takes over; "auto" does so from orphans and from who serves the same *sources*; "never" refuses.

    Raises:
        StartError: somebody serves who must not be, or cannot be, taken over from.
    """
    turn = await _take_turn()
    try:
        return await _take_lock(turn, sources, policy, workers)
    except BaseException:
        turn.close()
        raise


async def _take_lock(turn: socket.socket, sources: Sequence[str], policy: str, workers: int) -> Inheritance:
    while True:
        try:
            lock = _bind(_NAME)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        else:
            turn.close()
            return Inheritance(turn, lock)
        if (meeting := await _who_serves()) is None:
            continue  # it has just ended
        present, conversation = meeting
        if why_not := _why_not(present, sources, policy, workers):
            conversation.close()
            raise StartError(f"{_another(present.pid)}; {why_not}")
        return await _take_over(turn, present, conversation, workers)


def _why_not(present: Present, sources: Sequence[str], policy: str, workers: int) -> str:
    if present.version != VERSION:
        return f"it hands over in version {present.version} and this one takes over in {VERSION}; stop it first"
    if policy == "never" or (present.workers and not workers):
        return "stop it first"
    if policy == "auto" and not present.orphan and present.sources != list(sources):
        served = ", ".join(present.sources) or "something else"
        return f"it serves {served}; stop it first, or give --take-over always"
    return ""


async def _take_over(turn: socket.socket, present: Present, conversation: Conversation, workers: int) -> Inheritance:
    """Collect all that is there: from the control process, or from every worker that has none."""
    try:
        listeners: list[tuple[Inherit, list[socket.socket]]] = []
        health_checks: list[socket.socket] = []
        lock = await _collect(conversation, listeners, health_checks, workers)
        inheritance = Inheritance(turn, lock, listeners, health_checks, [conversation])
        while present.orphan and len(inheritance.conversations) < present.workers:
            if (meeting := await _next_orphan()) is None:
                missing = present.workers - len(inheritance.conversations)
                log.warning("%d of %d workers of the proxy before are gone", missing, present.workers)
                break
            _, conversation = meeting
            inheritance.conversations.append(conversation)
            (await _collect(conversation, listeners, health_checks, workers)).close()
    except (OSError, TimeoutError) as error:
        # What was collected goes with this process; who gave it notices, and serves on.
        conversation.close()
        raise StartError(
            f"userspace-proxy{running_as(present)} does not hand over: {error or 'no answer'}; "
            "it serves on (`kill -9` ends a process that hangs, its workers serve on for the next `run`)"
        ) from None
    return inheritance


async def _collect(
    conversation: Conversation,
    listeners: list[tuple[Inherit, list[socket.socket]]],
    health_checks: list[socket.socket],
    workers: int,
) -> socket.socket:
    """Ask for everything: *listeners* and *health_checks* get more, and the lock is returned."""
    conversation.send(TakeOver(VERSION, os.getpid(), workers, health_checks=True))
    while True:
        received = await conversation.receive()
        message, descriptors = received
        if isinstance(message, Lock):
            return socket.socket(fileno=descriptors[0])
        if isinstance(message, HealthChecks):
            health_checks += [socket.socket(fileno=descriptor) for descriptor in descriptors]
            continue
        inherit = expect(received, Inherit)
        listeners.append((inherit, [socket.socket(fileno=descriptor) for descriptor in descriptors]))


def _close(listeners: Sequence[tuple[Inherit, list[socket.socket]]]) -> None:
    for _, sockets in listeners:
        for sock in sockets:
            sock.close()


async def end_orphans() -> Present | None:
    """End every worker that serves without a control process; return the control process, if one is there.

    Raises:
        StartError: somebody is there and does not answer.
    """
    turn = await _take_turn()
    try:
        meeting = await _who_serves()
        while meeting is not None:
            present, conversation = meeting
            if not present.orphan:
                conversation.close()
                return present
            conversation.send(End())
            await conversation.ended()
            conversation.close()
            meeting = await _next_orphan()
    finally:
        turn.close()
    return None


# ---- meeting who serves


async def _next_orphan() -> Meeting | None:
    try:
        return await _meet(_ORPHAN_TIMEOUT_S)
    except TimeoutError:
        return None


async def _who_serves() -> Meeting | None:
    """Return who serves in this network namespace, and a conversation with that process.

    Raises:
        StartError: somebody is there and does not answer, or is another user's.
    """
    try:
        return await _meet(_ANSWER_TIMEOUT_S)
    except TimeoutError as error:
        (pid,) = error.args
        raise StartError(f"{_another(pid)} and does not answer; stop it first") from None


async def _meet(timeout_s: float) -> Meeting | None:
    """Return who answers at the lock; None where nobody holds it.

    Raises:
        TimeoutError: somebody holds it and does not answer; with the process id, 0 where nobody knows.
        StartError: it is another user's.
    """
    give_up_at = time.monotonic() + timeout_s
    pid = 0
    while (left_s := give_up_at - time.monotonic()) > 0:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            sock.connect(_NAME)
        except ConnectionRefusedError:
            sock.close()
            return None
        except BlockingIOError:  # its queue is full
            sock.close()
            await asyncio.sleep(_ASK_AGAIN_S)
            continue
        pid, uid = peer(sock)
        if uid not in (0, os.geteuid()):
            sock.close()
            raise StartError(f"a process of another user holds the socket @{_NAME[1:]} (process {pid}); stop it first")
        conversation = Conversation(sock)
        try:
            return expect(await conversation.receive(left_s), Present), conversation
        except (OSError, TimeoutError):  # it ends just now, or is of a version that does not speak
            conversation.close()
            await asyncio.sleep(_ASK_AGAIN_S)
    raise TimeoutError(pid)


async def _take_turn() -> socket.socket:
    """Wait until nobody else takes over or cleans up here, and be who does, until the socket is closed."""
    give_up_at = time.monotonic() + _TURN_TIMEOUT_S
    while True:
        try:
            return _bind(_TURN)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        if time.monotonic() > give_up_at:
            raise StartError(
                f"another process has held the socket @{_TURN[1:]} for {_TURN_TIMEOUT_S:.0f} s, as who takes over or"
                f" cleans up does; `ss -xlp | grep {_TURN[1:]}` shows which one"
            )
        await asyncio.sleep(_ASK_AGAIN_S)


def _bind(name: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        sock.bind(name)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    return sock


def _another(pid: int) -> str:
    return f"another userspace-proxy runs in this network namespace{f' (process {pid})' if pid else ''}"


def running_as(present: Present) -> str:
    """Return `` (process 4711)`` where that can be told."""
    return f" (process {present.pid})" if present.pid else ""
