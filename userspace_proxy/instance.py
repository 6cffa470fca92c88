"""One proxy in a network namespace: an abstract unix socket is the lock.

Abstract names belong to the network namespace, exactly as rules do, and the kernel frees the name when the last
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
    Inherit,
    Lock,
    Message,
    Present,
    Released,
    Taken,
    TakeOver,
    expect,
    peer,
)
from userspace_proxy.errors import StartError

_NAME = "\0userspace-proxy"
_ANSWER_TIMEOUT_S = 5.0
_ASK_AGAIN_S = 0.05
_TAKE_OVER_MEND = "stop it first, or give --take-over always"

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Inheritance:
    """What was got from who served before: the lock, and its listeners."""

    lock: socket.socket
    listeners: list[tuple[Inherit, list[socket.socket]]] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    pids: list[int] = field(default_factory=list)

    async def taken(self) -> None:
        """Say that we serve now, and wait until the one before has made way."""
        for conversation in self.conversations:
            conversation.send(Taken())
        for conversation in self.conversations:
            try:
                expect(await conversation.receive(), Released)
            except (OSError, TimeoutError) as error:
                log.warning("the process before did not say that it has made way: %s", error)
            conversation.close()
        self.lock.listen(64)  # from now on the kernel tells our credentials to who connects

    def give_back(self) -> None:
        """Let go of everything: the one before goes on."""
        for conversation in self.conversations:
            conversation.close()
        for _, sockets in self.listeners:
            for sock in sockets:
                sock.close()
        self.lock.close()


async def take_lock(sources: Sequence[str], policy: str, workers: int) -> Inheritance:
    """Return the lock; with it, where somebody serves already, that one's listeners for so many *workers*.

    *policy*: "always" takes over; "auto" does so from orphans and from who serves the same *sources*; "never" refuses.

    Raises:
        StartError: somebody serves who must not be, or cannot be, taken over from.
    """
    while True:
        try:
            return Inheritance(_new_lock())
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
        found = await _who_serves()
        if found is None:
            continue  # it has just ended
        present, conversation = found
        if why_not := _why_not(present, sources, policy, workers):
            conversation.close()
            raise StartError(f"another userspace-proxy runs in this network namespace{running_as(present)}; {why_not}")
        return await _take_over(present, conversation, workers)


def _why_not(present: Present, sources: Sequence[str], policy: str, workers: int) -> str:
    if present.version != VERSION:
        return f"it hands over in version {present.version} and this one takes over in {VERSION}; stop it first"
    if policy == "never" or not workers:
        return "stop it first"
    if policy == "auto" and not present.orphan and present.sources != list(sources):
        return f"it serves {', '.join(present.sources) or 'something else'}; {_TAKE_OVER_MEND}"
    return ""


async def _take_over(present: Present, conversation: Conversation, workers: int) -> Inheritance:
    """Collect all that is there: from the control process, or from every worker that has none."""
    inheritance: Inheritance | None = None
    listeners: list[tuple[Inherit, list[socket.socket]]] = []
    conversations = [conversation]
    pids = [present.pid]
    try:
        found_workers = {present.worker}
        while True:
            lock = await _collect(conversation, listeners, workers)
            if inheritance is None:
                inheritance = Inheritance(lock, listeners, conversations, pids)
            else:
                lock.close()
            if not present.orphan or len(found_workers) >= present.workers:
                return inheritance
            found = await _who_serves()
            if found is None:
                return inheritance
            another, conversation = found
            conversations.append(conversation)
            pids.append(another.pid)
            found_workers.add(another.worker)
    except (OSError, TimeoutError) as error:
        if inheritance is not None:
            inheritance.give_back()
        conversation.close()
        raise StartError(
            f"userspace-proxy{running_as(present)} does not hand over: {error or 'no answer'}; "
            "it serves on (`kill -9` ends a process that hangs, its workers serve on for the next `run`)"
        ) from None


async def _collect(
    conversation: Conversation, listeners: list[tuple[Inherit, list[socket.socket]]], workers: int
) -> socket.socket:
    conversation.send(TakeOver(VERSION, os.getpid(), workers))
    while True:
        received: tuple[Message, list[int]] = await conversation.receive()
        message, descriptors = received
        if isinstance(message, Lock):
            return socket.socket(fileno=descriptors[0])
        inherit = expect(received, Inherit)
        listeners.append((inherit, [socket.socket(fileno=descriptor) for descriptor in descriptors]))


async def end_orphans() -> Present | None:
    """End every worker that serves without a control process; return the control process, if one is there.

    Raises:
        StartError: somebody is there and does not answer.
    """
    while (found := await _who_serves()) is not None:
        present, conversation = found
        try:
            if not present.orphan:
                return present
            conversation.send(End())
            await conversation.ended()
        finally:
            conversation.close()
    return None


async def _who_serves() -> tuple[Present, Conversation] | None:
    """Return who serves in this network namespace, and a conversation with that process.

    Raises:
        StartError: somebody is there and does not answer, or is another user's.
    """
    give_up_at = time.monotonic() + _ANSWER_TIMEOUT_S
    pid = 0
    while time.monotonic() < give_up_at:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.setblocking(False)
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
            return expect(await conversation.receive(_ANSWER_TIMEOUT_S), Present), conversation
        except (OSError, TimeoutError):  # it ends just now, or is of a version that does not speak
            conversation.close()
            await asyncio.sleep(_ASK_AGAIN_S)
    raise StartError(
        f"another userspace-proxy runs in this network namespace{f' (process {pid})' if pid else ''}"
        " and does not answer; stop it first"
    )


def _new_lock() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(_NAME)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def running_as(present: Present) -> str:
    """Return `` (process 4711)`` where that can be told."""
    return f" (process {present.pid})" if present.pid else ""
