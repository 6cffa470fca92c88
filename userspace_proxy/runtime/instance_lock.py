"""One instance of the proxy in a network namespace: its lock is membership in a group (dataplane/rendezvous.py).

The control process is a member in the role SERVES, and so are workers that serve without a control process (orphans).
Only a process with CAP_NET_ADMIN can be one. A process that starts first becomes the only member in the role
TAKES_TURN, so two processes that start at once never both find the lock free.

The abstract name @userspace-proxy is no lock, as any local user can bind it. It is bound if it is free, because earlier
versions use it as the lock, and `ss -xlp` shows it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from userspace_proxy.dataplane.handover import (
    VERSION,
    ClusterDns,
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
    understands,
)
from userspace_proxy.dataplane.memory import Memories
from userspace_proxy.dataplane.rendezvous import Caller, Role, join, members, port_of, process_of
from userspace_proxy.errors import StartError
from userspace_proxy.runtime.hung_workers import end_hung_worker

_NAME = "\0userspace-proxy"
_TURN_TIMEOUT_S = 30.0
_ANSWER_TIMEOUT_S = 5.0
# An orphan answers at once; one that does not hangs, or has just ended.
_ORPHAN_TIMEOUT_S = 2.0
_ASK_AGAIN_S = 0.05
_CALL_AGAIN_S = 0.3

Meeting = tuple[Present, Conversation]

log = logging.getLogger(__name__)


@dataclass(slots=True)
class InstanceLock:
    """The lock of this network namespace, and the sockets that the predecessor handed over with it.

    ``turn``, ``member``: the netlink sockets of this process in the roles TAKES_TURN and SERVES.
    ``name``: the socket for the abstract name; it stays unbound if another process has the name.
    ``health_checks``, ``cluster_dns``: the sockets of health-check node ports and of cluster DNS.
    ``conversations``: one with each process of the predecessor.
    """

    turn: socket.socket
    member: socket.socket
    name: socket.socket
    listeners: list[tuple[Inherit, list[socket.socket]]] = field(default_factory=list)
    health_checks: list[socket.socket] = field(default_factory=list)
    cluster_dns: list[socket.socket] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)

    async def taken(self) -> Memories:
        """Report to the predecessor that this process serves now, and wait until it has yielded.

        Return the pins that it has set meanwhile.
        """
        learnt: Memories = []
        for conversation in self.conversations:
            conversation.send(Taken())
        for conversation in self.conversations:
            try:
                learnt += expect(await conversation.receive(), Released).memory
            except (OSError, TimeoutError) as error:
                log.warning("the process before did not say that it has made way: %s", error or "no answer")
                learnt += await self._release_orphans()
            conversation.close()
        _hold_name(self.name)
        self.turn.close()
        return learnt

    async def _release_orphans(self) -> Memories:
        """Let workers drain whose control process died while it yielded: this process has their listeners already.

        Return their pins.
        """
        learnt: Memories = []
        with contextlib.suppress(TimeoutError):
            for present, conversation in await _call_members(self.turn, _ORPHAN_TIMEOUT_S, but=self.member):
                try:
                    duplicates = InstanceLock(self.turn, self.member, self.name)
                    (await _collect(conversation, len(self.conversations), duplicates)).close()
                    _close(duplicates.listeners)
                    conversation.send(Taken())
                    for inherit, _ in duplicates.listeners:
                        learnt += inherit.listeners.memory
                    learnt += expect(await conversation.receive(), Released).memory
                except (OSError, TimeoutError) as error:
                    log.warning(
                        "a worker%s of the process before serves on: %s", running_as(present), error or "no answer"
                    )
                conversation.close()
        return learnt

    def give_back(self) -> None:
        """Give up the lock and all inherited sockets; the predecessor continues to serve."""
        for conversation in self.conversations:
            conversation.close()
        _close(self.listeners)
        for sock in (*self.health_checks, *self.cluster_dns):
            sock.close()
        self.close()

    def close(self) -> None:
        """Release the lock."""
        for sock in (self.name, self.member, self.turn):
            sock.close()


async def take_lock(sources: Sequence[str], policy: str, workers: int) -> InstanceLock:
    """Return the lock. If another instance serves, take over its listeners, for *workers* workers.

    Without workers, only an instance without workers can be taken over: one in a mode in which the kernel serves.
    *policy*: "always" takes over; "auto" only from orphans and from an instance that serves the same *sources*;
    "never" refuses.

    Raises:
        StartError: another instance serves, and *policy* or a difference of the two forbids to take it over.
    """
    turn = await _take_turn()
    try:
        if not (meetings := await _find_running(turn)):
            with contextlib.ExitStack() as on_error:
                member = on_error.enter_context(join(Role.SERVES))
                name = on_error.enter_context(_unnamed())
                _hold_name(name)
                on_error.pop_all()
            turn.close()
            return InstanceLock(turn, member, name)
        present, _ = meetings[0]
        if not (obstacle := _take_over_obstacle(present, sources, policy, workers)):
            return await _take_over(turn, meetings, workers)
        _end_conversations(meetings)
    except BaseException:
        turn.close()
        raise
    turn.close()
    raise StartError(f"{_running_text(present.pid)}; {obstacle}")


async def check_take_over(sources: Sequence[str], policy: str, workers: int) -> None:
    """Check that the lock can be taken once the workers that serve here have become orphans.

    Raises:
        StartError: the lock cannot be taken; the message says why, and what to do.
    """
    with await _take_turn() as turn:
        meetings = await _find_running(turn)
        _end_conversations(meetings)
        for present, _ in meetings:
            if present.workers and (
                obstacle := _take_over_obstacle(msgspec.structs.replace(present, orphan=True), sources, policy, workers)
            ):
                raise StartError(obstacle)


def _take_over_obstacle(present: Present, sources: Sequence[str], policy: str, workers: int) -> str:
    if not understands(present):
        return f"it hands over in version {present.version} and this one takes over in {VERSION}; stop it first"
    if policy == "never" or (present.workers and not workers):
        return "stop it first"
    if policy == "auto" and not present.orphan and present.sources != list(sources):
        served = ", ".join(present.sources) or "something else"
        return f"it serves {served}; stop it first, or give --take-over always"
    return ""


async def _take_over(turn: socket.socket, meetings: Sequence[Meeting], workers: int) -> InstanceLock:
    """Collect all listeners: from the control process, or from every worker if there is none."""
    present, _ = meetings[0]
    if not present.orphan:
        _end_conversations(meetings[1:])
        meetings = meetings[:1]
    elif (missing := present.workers - len(meetings)) > 0:
        log.warning("%d of %d workers of the proxy before are gone", missing, present.workers)
    lock = InstanceLock(turn, join(Role.SERVES), _unnamed(), conversations=[each for _, each in meetings])
    try:
        names = [await _collect(each, workers, lock) for each in lock.conversations]
    except (OSError, TimeoutError) as error:
        lock.give_back()  # the senders notice, and serve on
        raise StartError(
            f"userspace-proxy{running_as(present)} does not hand over: {error or 'no answer'}; "
            "it serves on (`kill -9` ends a process that hangs, its workers serve on for the next `run`)"
        ) from None
    for name in (lock.name, *names[1:]):  # duplicates
        name.close()
    lock.name = names[0]
    return lock


async def _collect(conversation: Conversation, workers: int, found: InstanceLock) -> socket.socket:
    """Request everything, and add it to *found*; return the socket with the name."""
    conversation.send(TakeOver(VERSION, os.getpid(), workers, health_checks=True, cluster_dns=True))
    while True:
        received = await conversation.receive()
        message, descriptors = received
        if not isinstance(message, Lock | HealthChecks | ClusterDns):
            message = expect(received, Inherit)
        sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
        match message:
            case Lock():
                return sockets[0] if sockets else _unnamed()
            case HealthChecks():
                found.health_checks += sockets
            case ClusterDns():
                found.cluster_dns += sockets
            case Inherit():
                found.listeners.append((message, sockets))


def _close(listeners: Sequence[tuple[Inherit, list[socket.socket]]]) -> None:
    for _, sockets in listeners:
        for sock in sockets:
            sock.close()


async def end_orphans() -> Present | None:
    """End every worker that serves without a control process; return the control process, or None.

    Raises:
        StartError: a running process does not answer.
    """
    with await _take_turn() as turn:
        while meetings := await _find_running(turn):
            if not meetings[0][0].orphan:
                _end_conversations(meetings)
                return meetings[0][0]
            for _, conversation in meetings:
                conversation.send(End())
                await conversation.ended()
                conversation.close()
    return None


# ---- finding the instance that serves


async def _find_running(turn: socket.socket) -> list[Meeting]:
    """Return the instance that serves in this network namespace: its control process, or all orphans.

    Orphans that hang are ended.

    Raises:
        StartError: a process serves and does not answer.
    """
    met: list[Meeting] = []
    with contextlib.suppress(TimeoutError):
        met = await _call_members(turn, _ANSWER_TIMEOUT_S if members(Role.SERVES) else _ORPHAN_TIMEOUT_S)
        if not met or not met[0][0].orphan or len(met) >= len(members(Role.SERVES_ON)):
            return met
    _end_conversations(met)
    met_as = {present.pid for present, _ in met}
    try:
        if members(Role.SERVES):
            raise TimeoutError  # noqa: TRY301 - a control process that hangs is named
        silent = [inode for inode in members(Role.SERVES_ON).values() if process_of(inode) not in met_as]
        await asyncio.gather(*map(end_hung_worker, silent))
        return await _call_members(turn, _ANSWER_TIMEOUT_S)
    except TimeoutError:
        raise StartError(f"{_running_text(_first_process(_serving()))} and does not answer; stop it first") from None


async def _call_members(turn: socket.socket, timeout_s: float, but: socket.socket | None = None) -> list[Meeting]:
    """Return the members that answer a call, a control process first; none if only *but*, this process, is a member.

    Raises:
        TimeoutError: there are members, and none answers.
    """
    ours = {port_of(but)} if but is not None else set()
    give_up_at = time.monotonic() + timeout_s
    met: list[Meeting] = []
    with contextlib.closing(Caller(turn)) as caller:
        while expected := _serving().keys() - ours:
            if met and (not met[0][0].orphan or len(met) >= min(len(expected), met[0][0].workers)):
                break
            if (left_s := give_up_at - time.monotonic()) <= 0:
                if not met:
                    raise TimeoutError
                break
            with contextlib.suppress(OSError, TimeoutError):
                caller.call()
                async with asyncio.timeout(min(_CALL_AGAIN_S, left_s)):
                    conversation = Conversation(await caller.admitted.get())
                met.append(await _introduced(conversation, left_s))
                met.sort(key=lambda meeting: meeting[0].orphan)
    return met


async def _introduced(conversation: Conversation, timeout_s: float) -> Meeting:
    try:
        return expect(await conversation.receive(timeout_s), Present), conversation
    except BaseException:
        conversation.close()
        raise


def _end_conversations(meetings: Sequence[Meeting]) -> None:
    for _, conversation in meetings:
        conversation.close()


async def _take_turn() -> socket.socket:
    """Wait until no other process takes over or cleans up here.

    Return a socket that keeps other processes from doing so.
    """
    give_up_at = time.monotonic() + _TURN_TIMEOUT_S
    try:
        turn = join(Role.TAKES_TURN)
    except PermissionError:
        raise StartError("CAP_NET_ADMIN is needed in the user namespace that owns this network namespace") from None
    try:
        while others := {port: inode for port, inode in members(Role.TAKES_TURN).items() if port != port_of(turn)}:
            if time.monotonic() > give_up_at:
                break
            if yields := min(others) < port_of(turn):
                turn.close()
            await asyncio.sleep(_ASK_AGAIN_S)
            if yields:
                turn = join(Role.TAKES_TURN)
        else:
            return turn
    except BaseException:
        turn.close()
        raise
    turn.close()
    pid = _first_process(others)
    raise StartError(
        f"another process{f' ({pid})' if pid else ''} has been taking over or cleaning up here"
        f" for {_TURN_TIMEOUT_S:.0f} s; stop it first"
    )


def _serving() -> dict[int, int]:
    return members(Role.SERVES, Role.SERVES_ON)


def _first_process(found: Mapping[int, int]) -> int:
    """Return the process of the first member: the control process, if there is one; 0 if it is unknown."""
    return process_of(found[min(found)]) if found else 0


def _unnamed() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def _hold_name(sock: socket.socket) -> None:
    """Bind *sock* to the name, if it is free, and listen, so that the kernel names this process as its holder.

    No client is accepted, so clients that connect cost nothing.
    """
    try:
        if not sock.getsockname():
            sock.bind(_NAME)
        sock.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            log.warning(
                "%s holds the socket @%s without a proof that it may, and is ignored;"
                " stop it first if it is userspace-proxy in an older version",
                _holder(),
                _NAME[1:],
            )


def _holder() -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
        try:
            sock.connect(_NAME)
        except OSError:  # it does not listen, or its queue is full
            return "a process"
        pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
    return f"process {pid} of user {uid}" if pid else f"a process of user {uid}"


def _running_text(pid: int) -> str:
    return f"another userspace-proxy runs in this network namespace{f' (process {pid})' if pid else ''}"


def running_as(present: Present) -> str:
    """Return `` (process 4711)``, or "" if the process is unknown."""
    return f" (process {present.pid})" if present.pid else ""
